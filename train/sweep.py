# SPDX-License-Identifier: Apache-2.0
"""Run a scaling sweep: `python -m train CONFIG` with `kind: sweep` in the config.

The working directory gets `jobs/<size>/<job>/`, a training run each with its `job.log`; `data/`,
which they share; `status.md`, `results.json` (rewritten whenever a job ends), `sweep.json` and
`sweep.log`. The same command continues after any interruption: finished jobs are left alone, others
resume from their last checkpoint, and the numbers are those of an undisturbed sweep. A process of
an earlier sweep may still train a job, on any machine that sees the folder: the job waits for the
lock of its folder up to ten minutes and fails then; other jobs go on. Nothing here imports jax;
every job is a process of its own.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sqzjax import config as configs
from sqzjax.cli import EXIT_CONFIG, EXIT_FAILED, EXIT_NONFINITE, EXIT_OK
from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.io import atomic, manifest
from sqzjax.io.lock import WorkdirLock
from train.executors import EXIT_LOST, LOG, Executor, JobRun, make_executor
from train.logs import log_file
from train.preempt import EXIT_PREEMPTED, Preemption
from train.sweep_config import SweepConfig
from train.sweep_plan import JOBS, Job, SweepPlan, cost_table, make_plan
from train.sweep_records import (
    RESULT,
    Record,
    check_folder,
    collect,
    newest_step,
    read_json,
    read_record,
    status_table,
    write_config,
    write_json,
    write_record,
    write_results,
)

TRAINER = (sys.executable, "-m", "train")
STOP = "stop"
_POLL_SECONDS = 0.1
_ORPHAN_SECONDS = 600
_MOST_LOST = 10
"""Machines may be taken away, but a job that loses so many brings them down itself."""
_FINAL = (EXIT_CONFIG, EXIT_NONFINITE)
"""Trying again would give the same."""
_STOPPED = (EXIT_PREEMPTED, -signal.SIGTERM, 128 + signal.SIGTERM)
"""How a job ends that was asked to stop; before it can save, it dies of the signal."""

_log = logging.getLogger(__name__)


def run(
    config: SweepConfig,
    *,
    workdir: Path,
    resume: str = "auto",
    dry_run: bool = False,
    trainer: Sequence[str] = TRAINER,
) -> int:
    """Run and return the exit code: 0 all done, 1 some job failed, 75 preempted, all jobs saved.

    `dry_run` prints the resolved configuration and what each job costs, with its state if the
    folder exists. `trainer` is the command that trains a config.
    """
    if resume != "auto":
        raise ConfigError(
            f"--resume {resume}: a sweep always continues; use another --workdir to start anew"
        )
    workdir = Path(workdir).absolute()
    plan = make_plan(config, workdir)
    executor = make_executor(config.executor)
    if dry_run:
        check_folder(config, workdir)
        folders = {name: workdir / JOBS / name for name in plan.jobs}
        states = {k: read_record(folder).state for k, folder in folders.items() if folder.exists()}
        sys.stdout.write(f"{configs.dump(config)}\n{cost_table(config, plan, states)}\n")
        return EXIT_OK
    with WorkdirLock(workdir), log_file(workdir / "sweep.log"):
        check_folder(config, workdir)
        write_config(config, workdir)
        for text in plan.warnings(config.budgets):
            _log.warning(text)
        # Entered last: an executor may set signal handlers of its own.
        with executor as pool, Preemption() as preemption:
            sweep = Sweep(config, plan, workdir, pool, trainer)
            code = sweep.run(preemption)
        sys.stdout.write(sweep.status())
        return code


class Sweep:
    """The jobs of one plan and their states."""

    def __init__(
        self,
        config: SweepConfig,
        plan: SweepPlan,
        workdir: Path,
        executor: Executor,
        trainer: Sequence[str] = TRAINER,
    ):
        self.config, self.plan, self.workdir = config, plan, workdir
        self._executor, self._trainer = executor, trainer
        self._records = {name: Record() for name in plan.jobs}
        self._stopping = False
        self._held: dict[str, float] = {}  # since when somebody else holds a job's folder
        self._saved: dict[str, int] = {}  # the last step that a job had saved when it started

    def run(self, preemption: Preemption) -> int:
        """Run what is not finished; return the exit code."""
        (self.workdir / STOP).unlink(missing_ok=True)
        (self.workdir / "data").mkdir(exist_ok=True)
        for name in self.plan.jobs:
            self._find(name)
        self._show()
        while True:
            if preemption.requested and not self._stopping:
                self._stopping = True
                _log.warning("asked to stop: the running jobs save and end")
                self._executor.stop()
            waits = not self._stopping and self._start_ready()
            if not waits and not any(one.state == "running" for one in self._records.values()):
                break
            for name, code in self._executor.poll():
                self._end(name, code)
            # The event is set once and for all when stopping; only then must the wait be a sleep.
            time.sleep(_POLL_SECONDS) if self._stopping else preemption.wait(_POLL_SECONDS)
        return self._code()

    def status(self) -> str:
        """Return a table of all jobs."""
        return status_table(self.workdir, self.plan, self._records)

    def _code(self) -> int:
        states = {record.state for record in self._records.values()}
        if states == {"done"}:
            return EXIT_OK
        return EXIT_FAILED if "failed" in states else EXIT_PREEMPTED

    def _folder(self, name: str) -> Path:
        return self.workdir / JOBS / name

    def _find(self, name: str) -> None:
        """Learn the state of a job from its folder; one whose sweep was killed may have finished.

        Failed jobs get another chance: the user may have removed the cause.
        """
        folder = self._folder(name)
        if (result := read_json(folder / RESULT)) is not None:
            if result["steps"] != (steps := self.plan.jobs[name].steps):
                raise ConfigError(
                    f"{folder} has the result of {result['steps']} steps and the plan is {steps}: "
                    "another version of this program counted FLOPs otherwise; choose another folder"
                )
            self._records[name] = Record("done", code=EXIT_OK)
        elif folder.exists() and not self._take_result(name):
            write_record(folder, self._records[name])

    def _start_ready(self) -> bool:
        """Start what can start; return whether a job waits for room or for the lock of its folder.

        Without a job running there may be no room either: machines come and go.
        """
        for name, job in self.plan.jobs.items():
            waits_for = None if job.needs is None else self._records[job.needs].state
            if self._records[name].state != "pending" or waits_for not in (None, "done"):
                continue
            if not self._executor.free:
                return True
            if self._left_alone(name):
                self._start(job)
        return bool(self._held)

    def _left_alone(self, name: str) -> bool:
        """Return whether a job is to be started: nobody else holds its folder or has finished it.

        A process that a killed sweep or a lost machine left behind keeps the lock until it ends.
        """
        folder = self._folder(name)
        if not folder.exists():
            return True
        try:
            WorkdirLock(folder).acquire().release()
        except CheckpointError as error:
            if name not in self._held:
                _log.warning("%s waits: %s", name, error)
            since = self._held.setdefault(name, time.monotonic())
            if time.monotonic() - since > _ORPHAN_SECONDS:
                del self._held[name]
                self._set(name, replace(self._records[name], state="failed", reason=str(error)))
            return False
        self._held.pop(name, None)
        return not self._take_result(name)

    def _start(self, job: Job) -> None:
        folder = self._folder(job.name)
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "data"
        # Prepared once for all; its entries are named by their content, so a copy serves as well.
        if not data.is_symlink() and not data.exists():
            data.symlink_to(os.path.relpath(self.workdir / "data", folder))
        config = folder / "config.yaml"
        atomic.write_text(config, configs.dump(job.config))
        options = ["--workdir", str(folder), "--resume", "auto"]
        _log.info("starting %s: steps %d to %d", job.name, job.start, job.steps)
        self._saved[job.name] = newest_step(folder)
        self._set(job.name, replace(self._records[job.name], state="running", reason=""))
        self._executor.start(
            JobRun(
                name=job.name,
                folder=str(folder),
                command=[*self._trainer, str(config), *options],
                cwd=str(Path.cwd()),
                environment=dict(self.config.executor.environment),
                stop=str(self.workdir / STOP),
            )
        )

    def _end(self, name: str, code: int) -> None:
        """Note how a job ended, and whether it is to run again."""
        record, folder = replace(self._records[name], code=code), self._folder(name)
        if code == EXIT_OK:
            if not self._take_result(name):
                reason = "ended without a held-out loss and checkpoint; delete its folder"
                self._set(name, replace(record, state="failed", reason=reason))
        elif self._stopping and code in _STOPPED:
            self._set(name, replace(record, state="pending", reason="asked to stop"))
        elif code == EXIT_PREEMPTED and newest_step(folder) > self._saved[name]:
            self._set(name, replace(record, state="pending", reason="saved"))
        elif code == EXIT_LOST:
            record.lost += 1
            self._fail(name, record, "its worker or machine was lost", record.lost > _MOST_LOST)
        else:
            record.crashes += 1
            reason = f"exit {code}: {_last_line(folder / LOG)}"
            self._fail(name, record, reason, record.crashes > self.config.retries)

    def _fail(self, name: str, record: Record, reason: str, final: bool) -> None:
        """Note that a job failed; it is tried again unless that is of no use."""
        final = final or record.code in _FINAL
        if final and record.code == EXIT_FAILED:
            reason += self._damage(self.plan.jobs[name])
        _log.warning("%s failed%s: %s", name, "" if final else ", trying again", reason)
        self._set(name, replace(record, state="failed" if final else "pending", reason=reason))

    def _damage(self, job: Job) -> str:
        """Say so if what a job continues from is damaged: the job before it counts as done."""
        if job.needs is None:
            return ""
        source = self._folder(job.needs)
        if not manifest.verify(source / "checkpoints" / str(job.start)):
            return ""
        return f" (the checkpoint of {job.needs} is damaged; delete {source} to train it again)"

    def _take_result(self, name: str) -> bool:
        """Store the result of a job if it has one; return whether the job is settled."""
        folder = self._folder(name)
        try:
            result = collect(self.plan.jobs[name], folder, self.config.epoch_size)
        except DataError as error:
            self._set(name, Record("failed", 0, EXIT_OK, str(error)))
            return True
        if result is None:
            return False
        write_json(folder / RESULT, result)
        _log.info("%s: held-out loss %.6g at step %d", name, result["loss"], result["steps"])
        self._set(name, Record("done", code=EXIT_OK))
        return True

    def _set(self, name: str, record: Record) -> None:
        self._records[name] = record
        write_record(self._folder(name), record)
        self._show()

    def _show(self) -> None:
        atomic.write_text(self.workdir / "status.md", self.status())
        write_results(self.workdir, self.plan)


def _last_line(path: Path) -> str:
    """Return the last words of a job: what its log ends with."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return "no log"
    words = [line.strip() for line in lines if line.strip()]
    return words[-1][:200].replace("|", "/") if words else "no output"
