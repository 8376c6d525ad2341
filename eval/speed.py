# SPDX-License-Identifier: Apache-2.0
"""Speed report: decoding and training speed, bytes, share of the roofline, and transformers.

`run_speed` measures every model at every batch size and writes `speed.json` (all figures, device,
versions, commit, date) and `speed.md` (its tables). The memory bandwidth and matrix peak behind the
roofline columns are measured in the same run where the device has no data-sheet record. Use a quiet
machine: threads that wait for each other (PyTorch's above all) slow down out of proportion when
another process takes a core, which would flatter the comparison.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax

from eval.machine import hardware_here, usable_cores
from eval.plan_config import architecture_of
from eval.provenance import provenance
from eval.speed_config import SpeedConfig, SpeedModel
from eval.speed_measure import (
    greedy,
    measure_decode,
    measure_emulator,
    measure_train_step,
    random_prompts,
)
from eval.speed_peer import Peer, compare
from eval.speed_steps import measure_steps
from eval.speed_trace import MARGIN_PERCENT
from eval.tables import table
from sqzjax.analysis import Hardware
from sqzjax.analysis.timeline import PARTS
from sqzjax.decode import Generator
from sqzjax.io import atomic, hf
from sqzjax.io.lock import check_writable
from sqzjax.models import SIZES, DecoderLM, Execution
from sqzjax.typing import Params

_LOG = logging.getLogger(__name__)
_BUSY = "Load average {:.1f} at the start: other processes were running, so quote no figure here."


def run_speed(config: SpeedConfig, workdir: Path) -> dict[str, Any]:
    """Measure everything `config` asks for; write and return the record."""
    for entry in config.models:
        _check_length(config, entry)
    check_writable(workdir)
    hardware = hardware_here(workdir, refresh=True)
    device = jax.devices()[0]
    record: dict[str, Any] = {
        **provenance("speed"),
        "device": {"platform": device.platform, "kind": device.device_kind},
        "config": dataclasses.asdict(config),
        "hardware": dataclasses.asdict(hardware),
        "decode": [],
        "steps": [],
        "training": [],
        "emulators": [],
        "transformers": [],
    }
    if _busy(record):
        _LOG.warning(_BUSY.format(record["load_average"]))
    for entry in config.models:
        model, params = load_model(entry, config.dtype, config.seed)
        _measure(config, entry, model, params, hardware, record)
        del model, params  # before the next model is made
    for entry in config.emulators:
        result = measure_emulator(
            entry, dtype=config.dtype, repeats=config.repeats, hardware=hardware, seed=config.seed
        )
        record["emulators"].append({"model": entry.name, **dataclasses.asdict(result)})
        _LOG.info("%s: %.1f ms a step", entry.name, result.step_ms)
    if config.transformers_python:
        # Only now: a second process slows the figures above, even while it waits.
        with Peer(config.transformers_python, config.threads or usable_cores()) as peer:
            for entry in config.models:
                model, params = load_model(entry, config.dtype, config.seed)
                folder = _folder(entry, model, params, workdir)
                _compare(config, entry, model, params, peer, folder, record)
            record["versions"]["transformers"] = peer.versions
    atomic.write_text(workdir / "speed.json", json.dumps(record, indent=2) + "\n")
    atomic.write_text(workdir / "speed.md", markdown(record))
    _LOG.info("wrote %s", workdir / "speed.md")
    return record


def load_model(entry: SpeedModel, dtype: str, seed: int) -> tuple[DecoderLM, Params]:
    """Load a checkpoint, or make random weights, with unrolled layers (which decode faster)."""
    execution = Execution(dtype=dtype, param_dtype=dtype, scan_layers=False)  # type: ignore[arg-type]
    if entry.path is not None:
        architecture, params = hf.load(entry.path, execution=execution, dtype=dtype)
        return DecoderLM(architecture, execution), params
    model = DecoderLM(entry.architecture or SIZES[entry.name], execution)
    return model, jax.jit(model.init_params)(jax.random.key(seed))


def _check_length(config: SpeedConfig, entry: SpeedModel) -> None:
    limit = architecture_of(entry).max_positions
    total = config.prompt_len + config.new_tokens
    if (config.generate or config.transformers_python) and total > limit:
        raise ValueError(
            f"prompt_len + new_tokens = {total} must be <= max_positions={limit} of model "
            f"{entry.name!r}; shorten either"
        )
    if config.contexts and max(config.contexts) + config.steps > limit:
        raise ValueError(
            f"contexts={config.contexts} and steps={config.steps} must end within "
            f"max_positions={limit} of model {entry.name!r}; shorten either"
        )


def _measure(
    config: SpeedConfig,
    entry: SpeedModel,
    model: DecoderLM,
    params: Params,
    hardware: Hardware,
    record: dict[str, Any],
) -> None:
    for batch in config.batches if config.generate else ():
        result = measure_decode(
            model,
            params,
            batch=batch,
            prompt_len=config.prompt_len,
            new_tokens=config.new_tokens,
            repeats=config.repeats,
            hardware=hardware,
            seed=config.seed,
        )
        record["decode"].append({"model": entry.name, **dataclasses.asdict(result)})
        _LOG.info("%s batch %d: %.1f tokens/s", entry.name, batch, result.tokens_per_second)
    _measure_steps(config, entry, model, params, hardware, record)
    if config.train_batch:
        result = measure_train_step(
            model,
            params,
            batch=config.train_batch,
            seq_len=config.train_seq_len,
            repeats=max(config.repeats, 5),
            hardware=hardware,
            seed=config.seed,
        )
        record["training"].append({"model": entry.name, **dataclasses.asdict(result)})


def _measure_steps(
    config: SpeedConfig,
    entry: SpeedModel,
    model: DecoderLM,
    params: Params,
    hardware: Hardware,
    record: dict[str, Any],
) -> None:
    """Time decode steps at every context; one that does not fit in memory is recorded as such."""
    for context in config.contexts:
        for batch in config.batches:
            row: dict[str, Any] = {"model": entry.name, "batch": batch, "context": context}
            try:
                result = measure_steps(
                    model,
                    params,
                    batch=batch,
                    context=context,
                    steps=config.steps,
                    repeats=config.repeats,
                    hardware=hardware,
                    breakdown=config.breakdown,
                    seed=config.seed,
                )
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                record["steps"].append(row | {"out_of_memory": True})
                _LOG.warning("%s batch %d context %d: no room", entry.name, batch, context)
                continue
            record["steps"].append(row | dataclasses.asdict(result) | {"out_of_memory": False})
            _LOG.info(
                "%s batch %d context %d: %.3f ms a step", entry.name, batch, context, result.step_ms
            )


def _compare(
    config: SpeedConfig,
    entry: SpeedModel,
    model: DecoderLM,
    params: Params,
    peer: Peer,
    folder: Path,
    record: dict[str, Any],
) -> None:
    generator, sampling = Generator(model, params), greedy(config.new_tokens)
    for batch in config.batches:
        prompts = random_prompts(model.config.vocab_size, batch, config.prompt_len, config.seed)
        rows = compare(
            lambda ids: generator.generate(ids, sampling).tokens,
            peer,
            folder,
            prompts,
            new_tokens=config.new_tokens,
            caches=config.transformers_caches,
            repeats=config.repeats,
        )
        for row in rows:
            record["transformers"].append({"model": entry.name, **dataclasses.asdict(row)})
            _LOG.info(
                "%s batch %d: %.2f times transformers (%s cache)",
                entry.name,
                batch,
                row.speedup,
                row.cache,
            )


def _folder(entry: SpeedModel, model: DecoderLM, params: Params, workdir: Path) -> Path:
    """Return the model's Hugging Face folder, exporting random weights for the other side."""
    if entry.path is not None:
        return Path(entry.path).resolve()
    folder = (workdir / "models" / entry.name).resolve()
    hf.save(folder, model.config, params, overwrite=True)
    return folder


def _busy(record: dict[str, Any]) -> bool:
    """Whether other processes kept a core occupied in the minute before the measurement."""
    return record["load_average"] > 1.0


def markdown(record: dict[str, Any]) -> str:
    """Render the tables of a record that `run_speed` returned or that was read from its JSON."""
    hardware, versions = record["hardware"], record["versions"]
    rates = f"{hardware['bandwidth'] / 1e9:.1f} GB/s, {hardware['peak_flops'] / 1e12:.3g} TFLOP/s"
    lines = [
        f"Device: {hardware['name']}; {rates} ({hardware['source']}).",
        f"jax {versions['jax']}, commit {record['commit']}, {record['created']}.",
        "",
    ]
    if _busy(record):
        lines += [f"**{_BUSY.format(record['load_average'])}**", ""]
    sections = (
        ("Greedy decoding", "decode", _DECODE_COLUMNS),
        ("Training step", "training", _TRAIN_COLUMNS),
        ("Training step of emulators", "emulators", _EMULATOR_COLUMNS),
        ("Against Hugging Face transformers, same run", "transformers", _PEER_COLUMNS),
    )
    for title, key, columns in sections:
        if record.get(key):
            lines += [f"### {title}", "", *table(record[key], columns), ""]
    lines += _step_tables(record.get("steps", []))
    return "\n".join(lines)


def _step_tables(rows: list[dict[str, Any]]) -> list[str]:
    measured = [row for row in rows if not row["out_of_memory"]]
    lines = []
    if measured:
        lines += ["### Decode steps at a given context", "", *table(measured, _STEP_COLUMNS), ""]
    if profiled := [_shares(row) for row in measured if row["breakdown"]]:
        lines += [
            "### Where a decode step's time goes, ms",
            "",
            *table(profiled, _PART_COLUMNS),
            "",
            "Parts and idle time (no operation running) add up to the step under the profiler; the "
            "last column is its difference from the step timed without, flagged beyond "
            f"{MARGIN_PERCENT:.0f} %.",
            "",
        ]
    for row in rows:
        if row["out_of_memory"]:
            place = f"{row['model']}, batch {row['batch']}, context {row['context']}"
            lines += [f"{place}: out of memory.", ""]
    return lines


def _shares(row: dict[str, Any]) -> dict[str, Any]:
    parts = row["breakdown"]
    flag = "" if abs(parts["error_percent"]) <= MARGIN_PERCENT else " (!)"
    return {
        **row,
        **parts["parts"],
        "idle": parts["idle_ms"],
        "total": parts["total_ms"],
        "error": f"{parts['error_percent']:+.1f} %{flag}",
    }


def comparison(record: dict[str, Any]) -> str:
    """Render the comparison with transformers alone, as the project's README shows it."""
    return "\n".join(table(record["transformers"], _PEER_COLUMNS))


def emulators(record: dict[str, Any]) -> str:
    """Render the training steps of emulators alone, as the project's README shows them."""
    return "\n".join(table(record["emulators"], _EMULATOR_COLUMNS))


# Heading, field, format.
_DECODE_COLUMNS = (
    ("model", "model", "{}"),
    ("batch", "batch", "{}"),
    ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("TTFT ms", "ttft_ms", "{:.2f}"),
    ("TPOT ms", "tpot_ms", "{:.3f}"),
    ("streamed step ms", "step_ms", "{:.3f}"),
    ("p90", "step_p90_ms", "{:.3f}"),
    ("cache bytes", "cache_bytes", "{:,}"),
    ("bytes a step", "step_bytes", "{:,}"),
    ("% of roofline", "roofline_percent", "{:.1f}"),
    ("bound", "bound", "{}"),
)
_STEP_COLUMNS = (
    ("model", "model", "{}"),
    ("context", "context", "{:,}"),
    ("batch", "batch", "{}"),
    ("step ms", "step_ms", "{:.3f}"),
    ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("cache bytes", "cache_bytes", "{:,}"),
    ("bytes a step", "step_bytes", "{:,}"),
    ("% of roofline", "roofline_percent", "{:.1f}"),
    ("bound", "bound", "{}"),
)
_PART_COLUMNS = (
    ("model", "model", "{}"),
    ("context", "context", "{:,}"),
    ("batch", "batch", "{}"),
    *((part, part, "{:.3f}") for part in PARTS),
    ("idle", "idle", "{:.3f}"),
    ("sum", "total", "{:.3f}"),
    ("against the timed step", "error", "{}"),
)
_TRAIN_COLUMNS = (
    ("model", "model", "{}"),
    ("batch", "batch", "{}"),
    ("sequence", "seq_len", "{}"),
    ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("step ms", "step_ms", "{:.1f}"),
    ("p90", "step_p90_ms", "{:.1f}"),
    ("MFU %", "mfu_percent", "{:.1f}"),
)
_EMULATOR_COLUMNS = (
    ("model", "model", "{}"),
    ("batch", "batch", "{}"),
    ("layers", "layers", "{}"),
    ("remat", "remat", "{}"),
    ("samples/s", "samples_per_second", "{:.1f}"),
    ("step ms", "step_ms", "{:.1f}"),
    ("MFU %", "mfu_percent", "{:.1f}"),
)
_PEER_COLUMNS = (
    ("model", "model", "{}"),
    ("batch", "batch", "{}"),
    ("transformers cache", "cache", "{}"),
    ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("transformers tokens/s", "transformers_tokens_per_second", "{:.1f}"),
    ("speed-up", "speedup", "{:.2f}"),
    ("same tokens", "same_tokens", "{:.3f}"),
)
