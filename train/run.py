# SPDX-License-Identifier: Apache-2.0
"""Run a training configuration in a working directory.

The directory holds `config.yaml` (resolved), `metrics.jsonl`, `train.log`, `checkpoints/`, the
token cache `data/`, `heldout.npz` and `baselines.json` for evaluation and, after `export: true`,
the model as a Hugging Face folder in `export/`.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from sqzjax import config as configs
from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.io.lock import WorkdirLock
from train.config import TrainConfig
from train.data import Dataset
from train.families import family_of
from train.guard import Guard
from train.heldout import write_held_out
from train.logs import log_file
from train.loop import Loop
from train.metrics import Window
from train.plan import Advice, Plan, lay_out, make_plan
from train.preempt import Preemption
from train.session import Session
from train.state import Frozen, TrainState
from train.trackers import closing, open_trackers, truncate

_log = logging.getLogger(__name__)


def run(config: TrainConfig, *, workdir: Path, resume: str = "auto", dry_run: bool = False) -> int:
    """Train and return the exit code: 0 done, 3 non-finite, 75 preempted and saved.

    `resume`: "auto" continues from the newest intact checkpoint if there is one, "never" starts
    anew, a number continues from that step. `dry_run` prints the resolved configuration and what
    the run needs, compiles nothing and writes nothing.
    """
    if dry_run:
        sys.stdout.write(f"{configs.dump(config)}\n{dry_plan(config).describe()}\n")
        return 0
    workdir = Path(workdir)
    dry_plan(config)  # what can be refused without the data is, before anything is written
    with WorkdirLock(workdir) as lock, log_file(workdir / "train.log"), Preemption() as preemption:
        with as_config_error():
            session = Session(config, workdir)
        _log.info("training in %s:\n%s", workdir, session.plan.describe())
        with jax.set_mesh(session.mesh), out_of_memory(session.plan):
            return _train(session, workdir, resume, lock, preemption)


def dry_plan(config: TrainConfig) -> Plan:
    """Return what a run needs, from shapes alone."""
    with as_config_error():
        model = family_of(config).define(config.resolve_model(), config.execution)
        return make_plan(config, model, lay_out(config, model))


def _train(
    session: Session, workdir: Path, resume: str, lock: WorkdirLock, preemption: Preemption
) -> int:
    config, settings = session.config, session.config.checkpoint
    checkpoints = Checkpointer(
        workdir / "checkpoints",
        keep=settings.keep,
        keep_every=settings.keep_every,
        keep_steps=settings.keep_steps,
        async_save=settings.async_save,
        on_error="warn",
        lock=lock,
    )
    with checkpoints:
        frozen = session.frozen_params()
        state, window = _start(session, checkpoints, resume)
        # Not before: what a command that is refused finds in the folder stays as it was.
        if isinstance(session.dataset, Dataset):
            write_held_out(session.dataset, workdir)
        _write_config(config, workdir / "config.yaml")
        step = int(state.step)
        truncate(workdir / "bad_batches.jsonl", step)
        bad = workdir / "bad_batches.jsonl"
        guard = Guard(bad, config.stability.max_bad_steps, config.batch_size)
        names = config.log.trackers
        with closing(open_trackers(names, workdir, step, configs.to_dict(config))) as trackers:
            loop = Loop(
                session,
                state,
                frozen,
                checkpoints=checkpoints,
                trackers=trackers,
                guard=guard,
                preemption=preemption,
                window=window,
            )
            code = loop.run()
        if code == 0 and config.export:
            export(session, loop.state, frozen, workdir / "export")
        return code


def _start(session: Session, checkpoints: Checkpointer, resume: str) -> tuple[TrainState, Window]:
    """Return the state to start from, and the metrics window that was open then."""
    step = int(resume) if resume.isdecimal() else None
    if step is None and (resume == "never" or checkpoints.latest_good() is None):
        if session.config.branch is not None:
            return session.branch_state(), Window()
        return session.initial_state(), Window()
    state, meta = session.restore(checkpoints, step)
    if meta["step"] > session.config.steps:
        raise ConfigError(
            f"the run is at step {meta['step']} already, past steps={session.config.steps}; raise "
            "steps, go back with --resume STEP, or choose another --workdir"
        )
    _log.info("resuming from step %d", meta["step"])
    return state, Window(meta["window"])


def export(session: Session, state: TrainState, frozen: Frozen, folder: Path) -> None:
    """Write the trained model in the layout that others read, a language model's tokenizer too."""
    params = session.export_params(state, frozen)
    session.family.export(folder, session.model, params, session.dataset)
    _log.info("exported to %s", folder)


@contextmanager
def as_config_error() -> Iterator[None]:
    """Turn a ValueError about settings into a `ConfigError`, which the command line prints."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError):
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def out_of_memory(plan: Advice) -> Iterator[None]:
    """Turn the device's out-of-memory error into a `ConfigError` that says what to lower."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise ConfigError(f"{plan.out_of_memory()} ({first})") from error


def _write_config(config: TrainConfig, path: Path) -> None:
    text = configs.dump(config)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        _log.warning("%s differs from this run's configuration and is replaced", path)
    path.write_text(text, encoding="utf-8")
