# SPDX-License-Identifier: Apache-2.0
"""Capacity planning without hardware: compile real model sizes for a TPU slice and read the result.

`run_plan` compiles every program in a child process (`eval.plan_compile`), relates it to the
chip's peak figures and writes `plan.json` and `plan.md`. Bytes are XLA's own memory analysis of one
device; operations and memory traffic come from `sqzjax.analysis`, communication from the compiled
program. The predicted time is the slowest of the three, a bound that no schedule can beat. Needs
the TPU compiler (package libtpu, extra `aot-tpu`); a minute for 8B parameters on 64 chips.
"""

import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.plan_config import DecodeProgram, PlanConfig, TrainProgram, architecture_of
from eval.plan_report import markdown
from eval.provenance import provenance
from eval.speed_config import SpeedModel
from sqzjax import config as configs
from sqzjax.analysis import Hardware, Precision, Workload, operators
from sqzjax.analysis.topology import check_compiler, compile_environment, compile_in_child
from sqzjax.errors import ConfigError
from sqzjax.io import atomic
from sqzjax.io.lock import check_writable
from sqzjax.models.config import ModelConfig

__all__ = ["roofline_of", "run_plan"]

_LOG = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[1]
_BITS = {"float32": 32, "bfloat16": 16}


def run_plan(config: PlanConfig, workdir: Path) -> dict[str, Any]:
    """Compile every program of `config`; write and return the record."""
    check_compiler("kind: plan")
    check_writable(workdir)
    record: dict[str, Any] = {
        **provenance("plan", packages=("libtpu",)),
        "config": configs.to_dict(config),
        "hardware": asdict(config.hardware),
        "programs": [],
    }
    for number, entry in enumerate(config.models):
        for phase in ("train", "decode"):
            if getattr(config, phase) is not None:
                row = _plan(config, number, entry, phase)
                record["programs"].append(row)
                _LOG.info("%s %s: %s in %.0f s", entry.name, phase, row["status"], row["seconds"])
    atomic.write_text(workdir / "plan.json", json.dumps(record, indent=2) + "\n")
    atomic.write_text(workdir / "plan.md", markdown(record))
    _LOG.info("wrote %s", workdir / "plan.md")
    return record


def _plan(config: PlanConfig, number: int, entry: SpeedModel, phase: str) -> dict[str, Any]:
    """Compile one program and complete its row."""
    began = time.perf_counter()
    result = _compile({"config": configs.to_dict(config), "model": number, "phase": phase}, config)
    row = {"model": entry.name, "phase": phase, "error": "", **result}
    row["seconds"] = time.perf_counter() - began
    if row["status"] == "bad config":
        raise ConfigError(f"{phase} of {entry.name}: {row['error']}")
    if row["status"] == "ok":
        memory = row["memory"]
        row["needed"] = memory["peak"] + memory["code"]
        row["fits"] = row["needed"] <= config.hardware.memory_bytes
        row["arguments"] = sum(row["bytes"].values())
        row["arguments_percent"] = 100 * (row["arguments"] / memory["arguments"] - 1)
        row["roofline"] = roofline_of(config, entry, phase, row)
    elif row["status"] == "too large":
        row["fits"] = False
    return row


def _compile(request: dict[str, Any], config: PlanConfig) -> dict[str, Any]:
    """Compile in a child process; a crash or a timeout is a result."""
    environment = compile_environment(os.environ, _ROOT)
    return compile_in_child("eval.plan_compile", request, environment, config.timeout_s)


def roofline_of(
    config: PlanConfig, entry: SpeedModel, phase: str, row: dict[str, Any]
) -> dict[str, Any]:
    """Return the least times of one device (seconds), what bounds the step, and tokens/s.

    A collective's bytes leave over both directions of every torus axis that its group spans.
    `overlapped` is the largest of the three times, `serial` their sum. Tokens count every one that
    a step computes; a diffusion model keeps some of a block at a time, speculation what is right.
    """
    hardware = config.hardware
    model = architecture_of(entry)
    if phase == "train":
        assert config.train is not None
        flops, model_flops, traffic = _train_costs(model, config.train, row)
        tokens = config.train.batch_size * config.train.seq_len
    else:
        assert config.decode is not None
        flops, traffic = _decode_costs(model, config.decode, row)
        model_flops = flops
        tokens = config.decode.batch_size * config.decode.queries
    times = {
        "compute": flops / hardware.peak_flops,
        "memory": traffic / hardware.bandwidth,
        "link": link_seconds(row["collectives"], hardware),
    }
    bound = max(times, key=lambda name: times[name])
    return {
        **times,
        "flops": flops,
        "model_flops": model_flops,
        "traffic": traffic,
        "sent": sum(step["count"] * step["sent_bytes"] for step in row["collectives"]),
        "bound": bound,
        "overlapped": times[bound],
        "serial": sum(times.values()),
        "tokens_per_second": tokens / times[bound],
    }


def link_seconds(steps: list[dict[str, Any]], hardware: Hardware) -> float:
    """Return the least time that all collectives take on the torus's links."""
    rate = 2 * hardware.link_bandwidth
    return sum(step["count"] * step["sent_bytes"] / (rate * step["axes"]) for step in steps)


def _train_costs(
    model: ModelConfig, settings: TrainProgram, row: dict[str, Any]
) -> tuple[float, float, float]:
    """Operations with and without recomputation, and memory traffic, of one device.

    Every operator runs once forward and costs twice that backward; `remat` repeats all of them
    ("full") or attention alone ("dots"). The optimizer reads and writes the whole state once.
    """
    mesh, bits = row["mesh"], _BITS[settings.dtype]
    work = Workload(
        phase="prefill",
        batch=settings.batch_size // (mesh["data"] * mesh["fsdp"]),
        context=settings.seq_len,
        logit_rows=settings.seq_len,
        causal=model.mask == "causal",
        store_kv=False,
        tensor_parallel=mesh["tensor"],
    )
    forward = operators(model, Precision.uniform(bits), work)
    repeated = {
        "none": [],
        "dots": [op for op in forward if op.name == "attention"],
        "full": [op for op in forward if op.name != "lm_head"],
    }[settings.remat]
    flops = sum(op.flops * op.count for op in forward)
    traffic = sum(op.bytes * op.count for op in forward)
    state = row["memory"]["arguments"] + row["memory"]["outputs"]
    return (
        3 * flops + sum(op.flops * op.count for op in repeated),
        3 * flops,
        3 * traffic + sum(op.bytes * op.count for op in repeated) + state,
    )


def _decode_costs(
    model: ModelConfig, settings: DecodeProgram, row: dict[str, Any]
) -> tuple[float, float]:
    """Operations and memory traffic of one device with a full cache."""
    mesh = row["mesh"]
    rows = settings.batch_size // (mesh["data"] * mesh["fsdp"])
    work = Workload(
        phase="decode",
        batch=rows,
        context=settings.context,
        query_tokens=settings.queries,
        tensor_parallel=mesh["tensor"],
    )
    ops = operators(model, Precision.uniform(_BITS[settings.dtype]), work)
    return sum(op.flops * op.count for op in ops), sum(op.bytes * op.count for op in ops)
