# SPDX-License-Identifier: Apache-2.0
"""What a sweep leaves on disk: states and results of jobs, `results.json`, `status.md`.

Every file is replaced as a whole, so a reader or a restarted sweep never sees half of one. A job
is finished if and only if its folder has a `result.json`. Nothing here imports jax.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sqzjax import config as configs
from sqzjax.errors import ConfigError, DataError
from sqzjax.io import manifest
from train.sweep_config import SweepConfig, number_name
from train.sweep_plan import JOBS, Job, SweepPlan, align, loss_kind, rollout_of

STATE, RESULT = "state.json", "result.json"
_HELD_OUT = "eval/held_out/"
# Settings that change no number, and collections that may grow.
_FREE = ("executor", "retries", "epoch_size", "flops_per_second", "train.checkpoint", "train.log")
_GROWING = ("sizes", "budgets", "variants")

JobState = Literal["pending", "running", "done", "failed"]


@dataclass
class Record:
    """State of a job; `crashes` counts failures of this sweep process, `reason` says the last."""

    state: JobState = "pending"
    crashes: int = 0
    code: int | None = None
    reason: str = ""


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole, also against power loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is absent."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete it to have it made again") from None


def read_record(folder: Path) -> Record:
    """Return the state that a sweep, running or not, has noted for a job."""
    if (folder / RESULT).exists():
        return Record("done", code=0)
    noted = read_json(folder / STATE)
    return Record() if noted is None else Record(**noted)


def write_record(folder: Path, record: Record) -> None:
    """Note the state of a job."""
    write_json(folder / STATE, asdict(record))


def collect(job: Job, folder: Path, epoch_size: int | None) -> dict[str, Any] | None:
    """Return the result of a job that has trained and saved its last step; None if it has not.

    A held-out loss that is not finite is an error.
    """
    metrics = _last_metrics(folder / "metrics.jsonl", job.steps)
    saved = manifest.exists(folder / "checkpoints" / str(job.steps))
    if f"{_HELD_OUT}loss" not in metrics or not saved:
        return None
    loss = metrics[f"{_HELD_OUT}loss"]
    if loss is None:
        raise DataError(f"the held-out loss of step {job.steps} is not finite")
    data = job.steps * job.size.data
    estimate = None if epoch_size is None else data / epoch_size
    return {
        "name": job.name.partition("/")[2],
        "size": job.size.name,
        "params": job.size.params,
        "counted_params": job.size.counted_params,
        "budget": job.total_flops if job.budget is None else job.budget,
        "flops": job.total_flops,
        "data": data,
        "epochs": metrics.get("data/epochs", estimate),
        "steps": job.steps,
        "loss": loss,
        "loss_kind": loss_kind(job),
        "schedule": job.role,
        "variant": job.variant,
        "rollout": rollout_of(job.config),
        "metrics": {
            name.removeprefix(_HELD_OUT): value
            for name, value in sorted(metrics.items())
            if name.startswith(_HELD_OUT)
        },
        "workdir": f"{JOBS}/{job.name}",
        "trunk": None if job.needs is None else f"{JOBS}/{job.needs}",
    }


def _last_metrics(path: Path, step: int) -> dict[str, Any]:
    """Return everything logged at a step; the end of the file may have been cut off by a kill."""
    merged: dict[str, Any] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if values.get("step") == step:
                merged |= values
    return merged


def write_results(workdir: Path, plan: SweepPlan) -> None:
    """Write `results.json` from the finished jobs of a plan."""
    points = [
        point
        for job in plan.jobs.values()
        if (point := read_json(workdir / JOBS / job.name / RESULT)) is not None
    ]
    points.sort(key=lambda p: (p["size"], p["steps"], p["name"]))
    write_json(workdir / "results.json", {"version": 1, "unit": plan.unit, "points": points})


def status_table(workdir: Path, plan: SweepPlan, records: Mapping[str, Record]) -> str:
    """Return a Markdown table of all jobs, and how many are in each state."""
    rows = []
    for job in plan.jobs.values():
        record = records[job.name]
        done = record.state == "done"
        point = read_json(workdir / JOBS / job.name / RESULT) if done else None
        loss = "" if point is None else f"{point['loss']:.5f}"
        budget = "" if job.budget is None else number_name(job.budget)
        steps = f"{job.start:,} to {job.steps:,}"
        note = record.reason
        if job.needs is not None and records[job.needs].state == "failed":
            note = f"waits for {job.needs}, which failed"
        rows.append([job.name, job.role, budget, steps, record.state, loss, note])
    head = ["job", "role", "budget", "steps", "state", "held-out loss", "note"]
    rule = ["---"] * len(head)
    lines = align([head, rule, *rows], gap=" | ").splitlines()
    states = [record.state for record in records.values()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("done", "running", "pending", "failed"))
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{len(rows)} jobs: {counts}\n\n{table}\n"


def check_folder(config: SweepConfig, workdir: Path) -> None:
    """Refuse a folder of another sweep; sizes, budgets and variants may have been added."""
    stored = read_json(workdir / "sweep.json")
    if stored is not None:
        try:
            before = configs.load(SweepConfig, stored)  # fills in settings that are newer
        except ConfigError as error:
            raise ConfigError(
                [f"{workdir}/sweep.json: {text}" for text in error.problems]
            ) from None
        changed = _changes(_resolved(before), _resolved(config))
        if changed:
            raise ConfigError(
                [
                    f"the sweep in {workdir} was begun with other settings; choose another folder "
                    "or restore them (sizes, budgets and variants may be added)",
                    *changed,
                ]
            )
    write_json(workdir / "sweep.json", configs.to_dict(config))


def _resolved(config: SweepConfig) -> dict[str, Any]:
    return {**configs.to_dict(config), "train": configs.to_dict(config.base)}


def _changes(before: Any, now: Any, at: str = "") -> list[str]:
    """Return a line for every setting that differs and matters."""
    if at in _FREE or before == now:
        return []
    if at == "budgets":
        gone = [number_name(value) for value in before if value not in now]
        return [f"budgets: {', '.join(gone)} was removed"] if gone else []
    if at == "cosine" and before is None:
        return []
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [f"{at}: was {json.dumps(before)}, is {json.dumps(now)}"]
    grows = at in _GROWING
    return [
        line
        for key in before | now
        if not (grows and key not in before)
        for line in _changes(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    ]
