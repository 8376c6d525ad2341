# SPDX-License-Identifier: Apache-2.0
"""Compare autoregressive and diffusion decoding on paper, and write `results.json`, `report.html`.

Everything follows from shapes and data sheets (`sqzjax.analysis.regimes`, `crossover`), so no
weights are read and no device is used; seconds to run. With `measure`, steps of a small model are
timed here as well. Predictions are lower bounds: compare regimes with each other, not with a clock.
"""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.arm_vs_dlm_config import ArmVsDlmConfig
from eval.plan_config import architecture_of
from eval.provenance import provenance
from sqzjax import config as configs
from sqzjax.analysis import Hardware
from sqzjax.analysis.crossover import (
    Contest,
    Planned,
    generation,
    plan_batches,
    tokens_per_pass,
)
from sqzjax.analysis.regimes import DIFFUSION, REGIMES, Regime, memory_bytes, regime, ridge
from sqzjax.io import atomic
from sqzjax.io.lock import check_writable
from sqzjax.models.config import ModelConfig

_LOG = logging.getLogger(__name__)
_DIGITS = 4
PLAN_BATCHES = tuple(2**power for power in range(11))
# Columns of each table, and those that every device has a value of, in the order of `hardware`.
_STEPS = (
    "model regime context block batch fed tokens_per_pass gflop gbyte intensity",
    "ms ms_per_token tokens_per_second bound fits",
)
_CONTESTS = (
    "model regime context block tokens_per_pass",
    "break_even break_even_per_step crossing_batch",
)
_GENERATIONS = ("model regime prompt length passes intensity", "prefill_s seconds")
_PLANS = ("model context", "nearest reaching")
_LEFT_OUT = ("model block", "step_ms head_percent sampling_percent")


def run_arm_vs_dlm(config: ArmVsDlmConfig, workdir: Path) -> dict[str, Any]:
    """Compute every table, write both files and return the record."""
    from eval import arm_vs_dlm_report

    arm = architecture_of(config.autoregressive)
    models = {entry.name: architecture_of(entry) for entry in config.diffusion}
    check_writable(workdir)
    record: dict[str, Any] = {
        **provenance("arm_vs_dlm"),
        "config": configs.to_dict(config),
        "hardware": [
            asdict(device) | {"ridge": _short(ridge(device, config.step.precision))}
            for device in config.hardware
        ],
        "steps": _table(_STEPS, _steps(config, arm, models)),
        "contests": _table(_CONTESTS, _contests(config, arm, models)),
        "generations": _table(_GENERATIONS, _generations(config, arm, models)),
        "plans": _table(_PLANS, _plans(config, models)),
        "left_out": _table(_LEFT_OUT, _left_out(config, models)),
        "measured": None,
    }
    if config.measure:
        from eval import arm_vs_dlm_measure

        record["measured"] = arm_vs_dlm_measure.measure()
    # Written first and read back, so that the page shows what the file says.
    text = encode(record)
    atomic.write_text(workdir / "results.json", text)
    record = json.loads(text)
    atomic.write_text(workdir / "report.html", arm_vs_dlm_report.render(record))
    _LOG.info("wrote %s", workdir / "report.html")
    return record


def encode(record: dict[str, Any]) -> str:
    """Return JSON with one line per row of a table: small, and readable as a difference."""

    def entry(value: Any) -> str:
        if isinstance(value, dict) and "rows" in value:
            rows = ",\n  ".join(_line(row) for row in value["rows"])
            kept = _line({name: item for name, item in value.items() if name != "rows"})
            return f'{kept[:-1]},"rows":[\n  {rows}\n ]}}'
        return _line(value)

    entries = (f' "{name}": {entry(value)}' for name, value in record.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def expand(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a table of a record as one mapping per row and device."""
    table = record[name]
    return [
        {
            **dict(zip(table["columns"], row[:-1], strict=True)),
            "device": device["name"],
            **dict(zip(table["device_columns"], values, strict=True)),
        }
        for row in table["rows"]
        for device, values in zip(record["hardware"], row[-1], strict=True)
    ]


def _table(names: tuple[str, str], rows: Iterable[list[Any]]) -> dict[str, Any]:
    columns, device_columns = (text.split() for text in names)
    return {"columns": columns, "device_columns": device_columns, "rows": list(rows)}


def _line(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _blocks(config: ArmVsDlmConfig, name: Regime) -> tuple[int, ...]:
    """Tokens that a pass of this regime generates together."""
    if name in ("arm_prefill", "arm_decode"):
        return (1,)
    return (config.response,) if name == "full_dlm" else config.blocks


def _steps(
    config: ArmVsDlmConfig, arm: ModelConfig, models: dict[str, ModelConfig]
) -> Iterator[list[Any]]:
    """Yield one row per model, regime, context, block and batch."""
    for name in REGIMES:
        chosen = models if name in DIFFUSION else {config.autoregressive.name: arm}
        axes = (chosen.items(), config.contexts, _blocks(config, name), config.batches)
        for (model, shape), context, new, batch in itertools.product(*axes):
            costs = [
                regime(
                    shape,
                    name,
                    context=context,
                    new=new,
                    batch=batch,
                    hardware=device,
                    options=config.step,
                )
                for device in config.hardware
            ]
            prefill = name == "arm_prefill"
            tokens = context if prefill else tokens_per_pass(name, new, config.tokens_per_step)
            held = memory_bytes(shape, config.step.precision, costs[0], context)
            on = [
                [
                    _short(1e3 * cost.seconds),
                    _short(1e3 * cost.seconds / tokens),
                    _short(cost.tokens_per_second(tokens)),
                    cost.bound,
                    _fits(device, held),
                ]
                for device, cost in zip(config.hardware, costs, strict=True)
            ]
            cost = costs[0]
            sizes = (cost.flops / 1e9, cost.bytes / 1e9, cost.intensity)
            row = [model, name, context, new, batch, cost.fed, _short(tokens)]
            yield [*row, *map(_short, sizes), on]


def _fits(device: Hardware, held: float) -> bool:
    return not device.memory_bytes or held <= device.memory_bytes


def _contests(
    config: ArmVsDlmConfig, arm: ModelConfig, models: dict[str, ModelConfig]
) -> Iterator[list[Any]]:
    """Yield break-even and crossing batch of each diffusion regime against the other model."""
    for (model, shape), name, context in itertools.product(
        models.items(), DIFFUSION, config.contexts
    ):
        for new in _blocks(config, name):
            on = []
            for device in config.hardware:
                contest = Contest(
                    arm=arm,
                    dlm=shape,
                    name=name,
                    context=context,
                    new=new,
                    hardware=device,
                    options=config.step,
                )
                least = contest.tokens_per_step(config.batches[0])
                crossing = contest.crossing_batch(config.tokens_per_step, config.largest_batch)
                ratios = [_short(contest.ratio(batch)) for batch in config.batches]
                on.append([ratios, None if least is None else _short(least), crossing])
            tokens = _short(tokens_per_pass(name, new, config.tokens_per_step))
            yield [model, name, context, new, tokens, on]


def _generations(
    config: ArmVsDlmConfig, arm: ModelConfig, models: dict[str, ModelConfig]
) -> Iterator[list[Any]]:
    """Yield the time of whole generations of one sequence."""
    pairs: list[tuple[str, ModelConfig, Regime]] = []
    pairs.append((config.autoregressive.name, arm, "arm_decode"))
    pairs.extend((model, shape, name) for model, shape in models.items() for name in DIFFUSION)
    for (model, shape, name), prompt, length in itertools.product(
        pairs, config.prompts, config.lengths
    ):
        made = [
            generation(
                shape,
                name,
                prompt=prompt,
                length=length,
                block=config.generation_block,
                tokens_per_step=config.tokens_per_step,
                hardware=device,
                options=config.step,
            )
            for device in config.hardware
        ]
        on = [[_short(one.prefill_seconds), _short(one.seconds)] for one in made]
        yield [model, name, prompt, length, made[0].passes, _short(made[0].intensity), on]


def _plans(config: ArmVsDlmConfig, models: dict[str, ModelConfig]) -> Iterator[list[Any]]:
    """Yield which block size and batch bring a cached block step near the ridge."""
    for (model, shape), context in itertools.product(models.items(), config.contexts):
        made = [
            plan_batches(
                shape,
                device,
                context=context,
                blocks=config.blocks,
                batches=PLAN_BATCHES,
                options=config.step,
            )
            for device in config.hardware
        ]
        on = [[_pair(one.nearest), [_pair(pair) for pair in one.reaching.values()]] for one in made]
        yield [model, context, on]


def _pair(pair: Planned | None) -> dict[str, Any] | None:
    if pair is None:
        return None
    numbers = {"intensity": _short(pair.intensity), "ms": _short(1e3 * pair.seconds)}
    return {"block": pair.block, "batch": pair.batch} | numbers


def _left_out(config: ArmVsDlmConfig, models: dict[str, ModelConfig]) -> Iterator[list[Any]]:
    """Yield what head and sampling take of a cached step at the first context and batch 1."""
    for (model, shape), block in itertools.product(models.items(), config.blocks):
        on = []
        for device in config.hardware:
            cost = regime(
                shape,
                "block_cached",
                context=config.contexts[0],
                new=block,
                hardware=device,
                options=config.step,
            )
            seconds = {row.operator.name: row.seconds for row in cost.roofline.rows}
            parts = [seconds.get(name, 0.0) for name in ("lm_head", "sampling")]
            shares = [_short(100 * part / cost.seconds) for part in parts]
            on.append([_short(1e3 * cost.seconds), *shares])
        yield [model, block, on]
