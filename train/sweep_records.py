# SPDX-License-Identifier: Apache-2.0
"""What a sweep leaves on disk: states and results of jobs, `results.json`, `status.md`.

Every file is replaced as a whole, so a reader or a restarted sweep never sees half of one. A job
is finished if and only if its folder has a `result.json`. Nothing here imports jax.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sqzjax import config as configs
from sqzjax.errors import ConfigError, DataError
from sqzjax.io import atomic, manifest
from train.cost import rollout_of
from train.sweep_config import SweepConfig, number_name
from train.sweep_plan import JOBS, Job, SweepPlan, align, loss_kind

STATE, RESULT, SWEEP = "state.json", "result.json", "sweep.json"
_HELD_OUT = "eval/held_out/"
_FREE = ("checkpoint", "log")
"""Settings of a run that change no number."""
_ABSENT = "nothing"

JobState = Literal["pending", "running", "done", "failed"]


@dataclass
class Record:
    """State of a job, its failures while this sweep process runs, and the last one's `reason`.

    `crashes` are its own failures, `lost` those of its machines.
    """

    state: JobState = "pending"
    crashes: int = 0
    code: int | None = None
    reason: str = ""
    lost: int = 0


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole."""
    atomic.write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


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
    if not isinstance(noted, dict):
        return Record()
    known = {one.name for one in fields(Record)}  # another version may have noted more
    return Record(**{name: value for name, value in noted.items() if name in known})


def write_record(folder: Path, record: Record) -> None:
    """Note the state of a job."""
    write_json(folder / STATE, asdict(record))


def newest_step(folder: Path) -> int:
    """Return the last step that a job has saved; 0 if none."""
    saved = (folder / "checkpoints").glob(f"[0-9]*/{manifest.NAME}")
    return max((int(path.parent.name) for path in saved if path.parent.name.isdecimal()), default=0)


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
        "body_params": job.size.body_params,
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
        epochs = "" if point is None or point["epochs"] is None else f"{point['epochs']:.2f}"
        budget = "" if job.budget is None else number_name(job.budget)
        steps = f"{job.start:,} to {job.steps:,}"
        note = record.reason
        if job.needs is not None and records[job.needs].state == "failed":
            note = f"waits for {job.needs}, which failed"
        rows.append([job.name, job.role, budget, steps, record.state, loss, epochs, note])
    head = ["job", "role", "budget", "steps", "state", "held-out loss", "epochs", "note"]
    rule = ["---"] * len(head)
    lines = align([head, rule, *rows], gap=" | ").splitlines()
    states = [record.state for record in records.values()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("done", "running", "pending", "failed"))
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{len(rows)} jobs: {counts}\n\n{table}\n"


def check_folder(config: SweepConfig, workdir: Path) -> None:
    """Refuse a folder of another sweep.

    Sizes, budgets and variants may have been added, and the range of steps widened.
    """
    path = workdir / SWEEP
    try:
        stored = read_json(path)
    except DataError:
        raise ConfigError(
            f"{path} is damaged: nothing else tells what the results beside it were made with; "
            "bring it back from a copy, or choose another folder"
        ) from None
    if stored is None:
        if next(workdir.glob(f"{JOBS}/*/*/{RESULT}"), None) is not None:
            raise ConfigError(
                f"{workdir} has results and no {SWEEP} that tells what they were made with; bring "
                "it back from a copy, or choose another folder"
            )
        return
    try:
        before = configs.load(SweepConfig, stored)  # fills in settings that are newer
        changed = _changes_of(before, config)
    except ConfigError as error:
        raise ConfigError([f"{path}: {text}" for text in error.problems]) from None
    if changed:
        raise ConfigError(
            [
                f"the sweep in {workdir} was begun with other settings; choose another folder "
                "or restore them (sizes, budgets and variants may be added)",
                *changed,
            ]
        )


def write_config(config: SweepConfig, workdir: Path) -> None:
    """Note what the sweep in a folder is, for `check_folder`."""
    write_json(workdir / SWEEP, configs.to_dict(config))


def _changes_of(before: SweepConfig, now: SweepConfig) -> list[str]:
    """Return a line for every setting that differs and matters, whichever way it is spelled."""
    problems = []
    gone = [number_name(value) for value in before.budgets if value not in now.budgets]
    if gone:
        problems.append(f"budgets: {', '.join(gone)} was removed")
    problems += _changes(before.cooldown, now.cooldown, "cooldown")
    if now.min_steps > before.min_steps or now.max_steps < before.max_steps:
        problems.append(
            f"min_steps..max_steps: was {before.min_steps}..{before.max_steps}, is "
            f"{now.min_steps}..{now.max_steps}; it may be widened only"
        )
    if before.cosine is not None:
        problems += _changes(_plain(before.cosine), _plain(now.cosine), "cosine")
    for kind in ("sizes", "variants"):
        missing = set(getattr(before, kind)) - set(getattr(now, kind))
        problems += [f"{kind}.{name} was removed" for name in sorted(missing)]
    return problems or _changed_runs(before, now)


def _changed_runs(before: SweepConfig, now: SweepConfig) -> list[str]:
    """Compare what the settings come to: the runs of every size and variant."""
    found: dict[str, list[str]] = {}
    for size in before.sizes:
        for line in _changes(_plain(before.size_config(size)), _plain(now.size_config(size))):
            found.setdefault(line, []).append(f"sizes.{size}")
    if found:
        return [f"{line} ({', '.join(where)})" for line, where in found.items()]
    for name, variant in before.variants.items():
        for part in ("sizes", "budgets"):
            was, is_now = (list(getattr(one.variants[name], part)) for one in (before, now))
            for line in _changes(was, is_now, part):
                found[line] = [f"variants.{name}"]
        for size in variant.sizes or before.sizes:
            was, is_now = (_plain(one.variant_config(size, name)) for one in (before, now))
            for line in _changes(was, is_now):
                found.setdefault(line, []).append(f"variants.{name} of {size}")
    return [f"{line} ({', '.join(where)})" for line, where in found.items()]


def _plain(settings: Any) -> Any:
    return None if settings is None else configs.to_dict(settings)


def _changes(before: Any, now: Any, at: str = "") -> list[str]:
    """Return a line for every setting that differs and matters."""
    if at in _FREE or before == now:
        return []
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [f"{at}: was {json.dumps(before)}, is {json.dumps(now)}"]
    return [
        line
        for key in before | now
        for line in _changes(
            before.get(key, _ABSENT), now.get(key, _ABSENT), f"{at}.{key}" if at else key
        )
    ]
