# SPDX-License-Identifier: Apache-2.0
"""A sweep of trainings that last a second: `python -m tests.train.sweep_toy CONFIG --workdir DIR`.

Stands for `python -m train`: locks its folder, resumes, branches, honours SIGTERM, and leaves
metrics and checkpoints where the sweep looks for them. Its "parameter" is a chain of hashes over
everything that should decide it, so a lost, repeated or foreign step changes the loss. `TOY_FAULTS`
maps job names to the exit codes of their first starts; `TOY_SLEEP` is the duration of a step.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from sqzjax.io import manifest
from sqzjax.io.lock import WorkdirLock

TRAINER = (sys.executable, "-m", "tests.train.sweep_toy")
SAVE_EVERY = 5


TRAIN = {
    "model": {
        "kind": "custom",
        "config": {
            "vocab_size": 260,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_layers": 1,
            "num_heads": 2,
        },
    },
    "batch_size": 4,
    "seq_len": 32,
    "schedule": {"kind": "continual", "warmup_steps": 4},
    "eval": {"interval": 100, "batches": 1},
}


def toy_config(**changes: Any) -> Any:
    """Return a sweep of two sizes and two budgets with trunks of some tens of steps."""
    from train.sweep_config import SweepConfig

    settings: dict[str, Any] = {
        "train": TRAIN,
        "sizes": {"w16": {}, "w32": {"model": {"config": {"hidden_size": 32}}}},
        "budgets": (1.5e8, 3e8),
        "cooldown": 0.2,
        "min_steps": 5,
        "max_steps": 200,
        "retries": 1,
    }
    return SweepConfig(**{**settings, **changes})


def points(workdir: Path) -> list[dict[str, Any]]:
    """Return the points of a sweep's results."""
    return json.loads((workdir / "results.json").read_text())["points"]


def lines(workdir: Path, name: str) -> dict[str, int]:
    """Return how many lines each job has in a log such as `completed.log`."""
    found = (workdir / "jobs").glob(f"*/*/{name}")
    return {path.parent.name: len(path.read_text().splitlines()) for path in found}


class Trainer:
    """One run of the stand-in."""

    def __init__(self, config: dict[str, Any], workdir: Path):
        self.config, self.workdir = config, workdir
        self.checkpoints = workdir / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        self.stopping = False
        signal.signal(signal.SIGTERM, self._stop)
        essence = (config["model"], config["objective"], config["batch_size"], config["seed"])
        self.essence = json.dumps(essence, sort_keys=True)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def run(self) -> int:
        """Train; return the exit code."""
        self._append("starts.log", "started")
        self._fail_as_told()
        step, state = self._start()
        steps = self.config["steps"]
        while step < steps:
            time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
            state = hashlib.sha256(f"{state} {step} {self._rate(step)} {self.essence}".encode())
            state, step = state.hexdigest(), step + 1
            if step % SAVE_EVERY == 0 or self.stopping:
                self._save(step, state, final=False)
            if self.stopping and step < steps:
                return 75
        self._append("completed.log", "completed")
        loss = int(state[:8], 16) / 2**32
        metrics = {"step": steps, "eval/held_out/loss": loss, "data/epochs": steps / 10}
        self._append("metrics.jsonl", json.dumps(metrics))
        self._save(steps, state, final=True)
        return 0

    def _fail_as_told(self) -> None:
        faults = json.loads(os.environ.get("TOY_FAULTS", "{}")).get(self.workdir.name, [])
        starts = len((self.workdir / "starts.log").read_text().splitlines())
        if starts <= len(faults):
            print(f"fault number {starts}")
            sys.exit(faults[starts - 1])

    def _start(self) -> tuple[int, str]:
        if own := self._read(self.workdir):
            return own
        branch = self.config["branch"]
        if branch is None:
            return 0, ""
        found = self._read(Path(branch["run"]))
        if found is None or found[0] != branch["step"]:
            raise RuntimeError(f"the trunk is at {found}, not at {branch['step']}")
        return found

    def _rate(self, step: int) -> Any:
        """Return something that changes with the step exactly where a rate would."""
        schedule = dict(self.config["schedule"])
        length = int((schedule.pop("cooldown", 0) or 0) * self.config["steps"])
        cooling = step - (self.config["steps"] - length)
        return schedule["learning_rate"] if cooling < 0 else (cooling, length)

    def _read(self, folder: Path) -> tuple[int, str] | None:
        path = folder / "checkpoints" / "state.json"
        return tuple(json.loads(path.read_text())) if path.exists() else None

    def _save(self, step: int, state: str, final: bool) -> None:
        temporary = self.checkpoints / "state.tmp"
        temporary.write_text(json.dumps([step, state]))
        os.replace(temporary, self.checkpoints / "state.json")
        if final:
            (self.checkpoints / str(step)).mkdir(exist_ok=True)
            (self.checkpoints / str(step) / "state").write_text(state)
            manifest.write(self.checkpoints / str(step))

    def _append(self, name: str, line: str) -> None:
        with (self.workdir / name).open("a") as file:
            file.write(f"{line}\n")


if __name__ == "__main__":
    file, _, folder = sys.argv[1:4]
    with WorkdirLock(folder):
        sys.exit(Trainer(yaml.safe_load(Path(file).read_text()), Path(folder)).run())
