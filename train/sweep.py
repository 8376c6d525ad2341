# SPDX-License-Identifier: Apache-2.0
"""Run a scaling sweep: `python -m train CONFIG` with `kind: sweep` in the config.

The working directory gets `jobs/<size>/<job>/`, a training run each with its `job.log`; `data/`,
which they share; `status.md`, `results.json` (rewritten whenever a job ends), `sweep.json` and
`sweep.log`. The same command continues after any interruption: finished jobs are left alone, others
resume from their last checkpoint, and the numbers are those of an undisturbed sweep. Nothing here
imports jax; every job is a process of its own.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sqzjax import config as configs
from sqzjax.cli import EXIT_CONFIG, EXIT_FAILED, EXIT_NONFINITE, EXIT_OK
from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.io.lock import WorkdirLock
from train.executors import LOG, Executor, JobRun, make_executor, still_running
from train.logs import log_file
from train.preempt import EXIT_PREEMPTED, Preemption
from train.sweep_config import SweepConfig
from train.sweep_plan import JOBS, Job, SweepPlan, cost_table, make_plan
from train.sweep_records import (
    RESULT,
    Record,
    check_folder,
    collect,
    read_json,
    read_record,
    status_table,
    write_atomically,
    write_json,
    write_record,
    write_results,
)

TRAINER = (sys.executable, "-m", "train")
STOP = "stop"
_POLL_SECONDS = 0.1
_ORPHAN_SECONDS = 120
_FINAL = (EXIT_CONFIG, EXIT_NONFINITE)
"""Trying again would give the same."""

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
    if dry_run:
        folders = {name: workdir / JOBS / name for name in plan.jobs}
        states = {k: read_record(folder).state for k, folder in folders.items() if folder.exists()}
        sys.stdout.write(f"{configs.dump(config)}\n{cost_table(config, plan, states)}\n")
        return EXIT_OK
    executor = make_executor(config.executor)
    with WorkdirLock(workdir), log_file(workdir / "sweep.log"):
        check_folder(config, workdir)
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

    def run(self, preemption: Preemption) -> int:
        """Run what is not finished; return the exit code."""
        (self.workdir / STOP).unlink(missing_ok=True)
        (self.workdir / "data").mkdir(exist_ok=True)
        for name in self.plan.jobs:
            self._find(name)
        self._show()
        stopping = False
        while True:
            if preemption.requested and not stopping:
                stopping = True
                _log.warning("asked to stop: the running jobs save and end")
                self._executor.stop()
            if not stopping:
                self._start_ready()
            if not any(record.state == "running" for record in self._records.values()):
                break
            for name, code in self._executor.poll():
                self._end(name, code)
            # The event is set once and for all when stopping; only then must the wait be a sleep.
            time.sleep(_POLL_SECONDS) if stopping else preemption.wait(_POLL_SECONDS)
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
        if read_json(folder / RESULT) is not None:
            self._records[name] = Record("done", code=EXIT_OK)
        elif folder.exists():
            _wait_for_orphan(folder)
            if not self._take_result(name):
                write_record(folder, self._records[name])

    def _start_ready(self) -> None:
        for name, job in self.plan.jobs.items():
            if not self._executor.free:
                return
            waits_for = None if job.needs is None else self._records[job.needs].state
            if self._records[name].state == "pending" and waits_for in (None, "done"):
                self._start(job)

    def _start(self, job: Job) -> None:
        folder = self._folder(job.name)
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "data"
        if not data.is_symlink():  # prepared once for all; its entries are named by their content
            data.symlink_to(os.path.relpath(self.workdir / "data", folder))
        config = folder / "config.yaml"
        write_atomically(config, configs.dump(job.config))
        options = ["--workdir", str(folder), "--resume", "auto"]
        _log.info("starting %s: steps %d to %d", job.name, job.start, job.steps)
        self._set(job.name, Record("running", self._records[job.name].crashes))
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
        if code == EXIT_OK:
            if not self._take_result(name):
                record = Record("failed", 0, code, "ended without a held-out loss and checkpoint")
                self._set(name, record)
        elif code == EXIT_PREEMPTED:
            self._set(name, Record("pending", self._records[name].crashes, code, "saved"))
        else:
            crashes = self._records[name].crashes + 1
            final = code in _FINAL or crashes > self.config.retries
            reason = f"exit {code}: {_last_line(self._folder(name) / LOG)}"
            _log.warning("%s failed%s: %s", name, "" if final else ", trying again", reason)
            self._set(name, Record("failed" if final else "pending", crashes, code, reason))

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
        write_atomically(self.workdir / "status.md", self.status())
        write_results(self.workdir, self.plan)


def _wait_for_orphan(folder: Path) -> None:
    """Wait until a job that a killed sweep left behind has saved and ended."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while (pid := still_running(folder)) is not None:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"process {pid} of an earlier sweep still runs in {folder}; wait for it or stop it"
            )
        time.sleep(_POLL_SECONDS)


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
