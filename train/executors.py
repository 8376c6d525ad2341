# SPDX-License-Identifier: Apache-2.0
"""Where the jobs of a sweep run: processes of this machine, or tasks of a Ray cluster.

Both start the same command in the same way, so both give the same numbers. A job is a plain dict
(`JobRun`); nothing else reaches another machine, and its folder must be visible there. Nothing here
imports jax.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict

from sqzjax.cli import EXIT_PREEMPTED
from sqzjax.errors import ConfigError
from train.sweep_config import LocalExecutor, RayExecutor

ROOT = Path(__file__).resolve().parents[1]
LOG = "job.log"
EXIT_LOST = -1
"""The machine or worker of a job went away."""

_POLL_SECONDS = 0.2

_log = logging.getLogger(__name__)


class JobRun(TypedDict):
    """All that a machine needs to run a job; `stop` is a file that asks every job to save."""

    name: str
    folder: str
    command: list[str]
    cwd: str
    environment: dict[str, str]
    stop: str


class Executor(Protocol):
    """Runs jobs side by side; a context manager that leaves no job behind."""

    @property
    def free(self) -> bool:
        """Whether another job may be started now."""
        ...

    def start(self, job: JobRun) -> None:
        """Start a job; returns at once."""
        ...

    def poll(self) -> list[tuple[str, int]]:
        """Return name and exit code of jobs that ended since the last call."""
        ...

    def stop(self) -> None:
        """Ask all jobs to save and end."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...


def make_executor(config: LocalExecutor | RayExecutor) -> Executor:
    """Return the executor of a configuration, not yet entered."""
    return Local(config) if isinstance(config, LocalExecutor) else Ray(config)


def launch(job: JobRun, cpus: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start the process of a job."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": _import_path(), **job["environment"]}
    bound = [str(os.getpid()), ",".join(map(str, cpus))]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "train.sweep_child", *bound, *job["command"]],
            cwd=job["cwd"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which asks the jobs to stop
        )


def _import_path() -> str:
    """Return a PYTHONPATH that has this checkout."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


class Local:
    """Processes of this machine."""

    def __init__(self, config: LocalExecutor):
        self._config = config
        self._running: dict[str, tuple[subprocess.Popen[bytes], tuple[int, ...]]] = {}
        self._idle = self._slots()

    def _slots(self) -> list[tuple[int, ...]]:
        """Return the cores of each job that may run at the same time; () is all of them."""
        workers, per_job = self._config.workers, self._config.cpus_per_job
        if per_job is None or not hasattr(os, "sched_getaffinity"):
            return [()] * workers
        cpus = sorted(os.sched_getaffinity(0))
        if workers * per_job > len(cpus):
            raise ConfigError(
                f"executor: workers={workers} x cpus_per_job={per_job} exceed the {len(cpus)} "
                "cores of this machine; lower one of them, or set cpus_per_job: null to share"
            )
        return [tuple(cpus[i * per_job : (i + 1) * per_job]) for i in range(workers)]

    @property
    def free(self) -> bool:
        """Whether another job may be started now."""
        return bool(self._idle)

    def start(self, job: JobRun) -> None:
        """Start a job; returns at once."""
        cpus = self._idle.pop(0)
        self._running[job["name"]] = (launch(job, cpus), cpus)

    def poll(self) -> list[tuple[str, int]]:
        """Return name and exit code of jobs that ended since the last call."""
        ended = [
            (name, code)
            for name, (process, _) in self._running.items()
            if (code := process.poll()) is not None
        ]
        for name, _ in ended:
            self._idle.append(self._running.pop(name)[1])
        return ended

    def stop(self) -> None:
        """Ask all jobs to save and end."""
        for process, _ in self._running.values():
            process.send_signal(signal.SIGTERM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._running:  # an error in the sweep itself
            self.stop()
            for process, _ in self._running.values():
                process.wait()


def run_job(job: JobRun) -> int:
    """Run a job to its end and return the exit code; the stop file asks it to save."""
    if "OMP_NUM_THREADS" not in job["environment"]:
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it, the local executor does not
    stop = Path(job["stop"])
    if stop.exists():
        return EXIT_PREEMPTED
    process, asked = launch(job), False
    while True:
        try:
            return process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if not asked and stop.exists():
                process.send_signal(signal.SIGTERM)
                asked = True


class Ray:
    """Tasks of a Ray cluster; Ray places and queues them."""

    def __init__(self, config: RayExecutor):
        self._config = config
        self._running: dict[Any, JobRun] = {}

    def __enter__(self) -> Self:
        try:
            import ray
            from ray.exceptions import RayError
        except ImportError:
            raise ConfigError("executor.kind='ray' needs the package ray; install it") from None
        self._ray, self._error = ray, RayError
        config = self._config
        cluster: dict[str, Any] = {"address": config.address}
        if config.address is None:
            cluster = {"num_cpus": config.num_cpus, "include_dashboard": False, "address": "local"}
        try:
            ray.init(
                **cluster,
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": {"PYTHONPATH": _import_path()}},
            )
        except ConnectionError as error:
            raise ConfigError(
                f"executor.address={config.address!r}: no Ray cluster answers "
                f"({_first_line(error)}); start one with `ray start --head`, or set address: null "
                "for one on this machine"
            ) from None
        if not self._slots():
            ray.shutdown()
            raise ConfigError(
                f"executor: no machine of the Ray cluster has cpus_per_job={config.cpus_per_job:g} "
                f"and gpus_per_job={config.gpus_per_job:g}; lower them or add such a machine"
            )
        # Retries are the sweep's: Ray's own would run a job that failed for good again.
        self._task = ray.remote(
            num_cpus=config.cpus_per_job, num_gpus=config.gpus_per_job, max_retries=0
        )(run_job)
        return self

    @property
    def free(self) -> bool:
        """Whether another job may be started now.

        No more than the machines hold: jobs that wait for others of this sweep stay pending.
        """
        return len(self._running) < self._slots()

    def _slots(self) -> int:
        """Return how many jobs the machines of the cluster hold side by side, as they are now."""
        config = self._config
        shares = {"CPU": config.cpus_per_job, "GPU": config.gpus_per_job}
        return sum(
            min(int(node["Resources"].get(k, 0) / share) for k, share in shares.items() if share)
            for node in self._ray.nodes()
            if node["Alive"]
        )

    def start(self, job: JobRun) -> None:
        """Hand a job to the cluster; returns at once."""
        self._running[self._task.options(name=job["name"]).remote(job)] = job

    def poll(self) -> list[tuple[str, int]]:
        """Return name and exit code of jobs that ended since the last call."""
        if not self._running:
            return []
        waiting = list(self._running)
        ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return [(self._running.pop(task)["name"], self._code(task)) for task in ready]

    def _code(self, task: Any) -> int:
        try:
            return self._ray.get(task)
        except self._error as error:
            _log.warning("a Ray worker was lost: %s", _first_line(error))
            return EXIT_LOST

    def stop(self) -> None:
        """Ask all jobs to save and end; they look for the file every moment."""
        for job in self._running.values():
            Path(job["stop"]).touch()

    def __exit__(self, *_: Any) -> None:
        if self._running:  # an error in the sweep itself
            self.stop()
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=60)
        self._ray.shutdown()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
