# SPDX-License-Identifier: Apache-2.0
"""The training loop: dispatch steps, read metrics one step late, log, evaluate, save, stop.

The host never waits for the step it has just dispatched, except where a checkpoint or an
evaluation needs the numbers. Everything that decides what is computed is a function of the step,
so a run that is interrupted anywhere and resumed computes what an undisturbed one does.
"""

import logging
import time
from collections import deque
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from sqzjax import config as configs
from sqzjax.errors import CheckpointError
from sqzjax.io.checkpoint import Checkpointer
from train.guard import EXIT_NONFINITE, Guard, all_finite
from train.metrics import Window, mean
from train.preempt import EXIT_PREEMPTED, Preemption
from train.progress import Progress
from train.session import Session
from train.speed import Speed
from train.state import Frozen, TrainState, to_items
from train.trackers import Tracker

_log = logging.getLogger(__name__)


class Loop:
    """One run from `state.step` to `config.steps`; `run` returns the exit code."""

    def __init__(
        self,
        session: Session,
        state: TrainState,
        frozen: Frozen,
        *,
        checkpoints: Checkpointer,
        trackers: list[Tracker],
        guard: Guard,
        preemption: Preemption,
        window: Window,
    ):
        self.session, self.config = session, session.config
        self.state, self.frozen = state, frozen
        self._checkpoints, self._trackers = checkpoints, trackers
        self._guard, self._preemption, self._window = guard, preemption, window
        self._start = int(state.step)
        self._pending: deque[tuple[int, Any]] = deque()
        self._speed = Speed(session)
        self._saved_at = time.monotonic()
        guard.last_good = self._start

    def run(self) -> int:
        """Train, save the last state, and return 0; 3 if stopped by the guard, 75 if preempted."""
        program = self.session.compile()
        self._prepare_eval()
        self._speed.start()
        steps = self.config.steps
        with (
            Progress(self._start, steps) as self._progress,
            self.session.dataset.prefetch(self._start, steps) as batches,
        ):
            for done in range(self._start + 1, steps + 1):
                with self._speed.loading():
                    batch = self.session.put(next(batches)[1])
                self.state, metrics = program(self.state, self.frozen, batch)
                jax.tree.map(lambda leaf: leaf.copy_to_host_async(), metrics)
                self._pending.append((done, metrics))
                if (code := self._after(done)) is not None:
                    return code
        if not self._checkpoints.wait():
            raise self._not_saved("the last checkpoint could not be written")
        return 0

    def _after(self, step: int) -> int | None:
        """Do what is due after a step; return the exit code if the run ends early."""
        config, last = self.config, step == self.config.steps
        evaluate = bool(config.eval.interval) and (last or step % config.eval.interval == 0)
        stop = self._preemption.requested
        save = last or stop or self._save_due(step)
        self._checkpoints.poll()
        if self._collect(leave=0 if save or evaluate else 1):
            return self._stop_nonfinite()
        self._progress.advance(step)
        if evaluate:
            with self._speed.paused():
                self._evaluate(step)
        if save:
            with self._speed.paused():
                self._save(step, self.state)
        if stop and not last:
            return self._stop_preempted(step)
        return None

    # Metrics.

    def _collect(self, leave: int) -> bool:
        """Read the metrics of all but the newest `leave` steps; return whether the guard stops."""
        stop = False
        while len(self._pending) > leave and not stop:
            step, metrics = self._pending.popleft()
            host = jax.device_get(metrics)
            stop = self._guard.observe(step, host)
            self._window.add(host)
            self._speed.count()
            if step % self.config.log.interval == 0 or step == self.config.steps:
                self._log(step, self._window.close() | self._speed.close())
        return stop

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)
        self._progress.report(step, metrics)

    def _prepare_eval(self) -> None:
        """Compile the evaluation and read its batches, once."""
        self._eval_program, self._eval_batches = None, []
        if not self.config.eval.interval or self._start >= self.config.steps:
            return
        self._eval_program = self.session.compile_eval()
        wanted = range(self.config.eval.batches)
        batches = self.session.dataset.eval_batches(self.config.batch_size)
        self._eval_batches = [batch for _, batch in zip(wanted, batches)]

    def _evaluate(self, step: int) -> None:
        assert self._eval_program is not None
        average = self.state.average
        trained = self.state.trained if average is None else average
        sums: dict[str, list[float]] = {}
        for index, batch in enumerate(self._eval_batches):
            out = self._eval_program(
                trained, self.frozen, self.session.put(batch), np.asarray(index, np.int32)
            )
            pairs = jax.device_get({"loss": (out.sum, out.weight), **out.metrics})
            for name, (total, weight) in pairs.items():
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0] += float(total)
                pair[1] += float(weight)
        found = {f"eval/held_out/{name}": mean(*pair) for name, pair in sums.items()}
        found["data/epochs"] = max(self.session.dataset.epochs(step))
        self._log(step, found)

    # Saving and stopping.

    def _save_due(self, step: int) -> bool:
        settings = self.config.checkpoint
        waited = time.monotonic() - self._saved_at
        by_time = bool(settings.minutes) and waited >= 60 * settings.minutes
        by_interval = bool(settings.interval) and step % settings.interval == 0
        return by_time or by_interval or step in settings.keep_steps

    def _save(self, step: int, state: TrainState) -> None:
        self._saved_at = time.monotonic()
        family = self.session.family
        meta = {
            "config": configs.to_dict(self.config),
            "model": configs.to_dict(self.session.model.config),
            "frozen": self.session.frozen_marks,
            "step": step,
            f"{family.unit}_seen": step * family.units_per_step(self.config),
            "data": self.session.dataset.state(step),
            "window": self._window.state,
        }
        self._checkpoints.save(step, to_items(state, self.session.item), meta)

    def _not_saved(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{what}: {self._checkpoints.failure}; free the disk, then the same command continues "
            "from the newest step that was saved"
        )

    def _stop_preempted(self, step: int) -> int:
        if not self._checkpoints.wait():
            raise self._not_saved(f"asked to stop, but step {step} could not be saved")
        _log.warning("asked to stop: step %d is saved, the same command continues", step)
        return EXIT_PREEMPTED

    def _stop_nonfinite(self) -> int:
        """Keep the last good state: rejected steps have changed nothing but counters."""
        self._collect(leave=0)
        good = self._guard.last_good
        saved = self._checkpoints.wait() and self._checkpoints.last_saved
        if good > (saved or 0) and all_finite(self.state.trained):
            number = np.asarray(good, np.int32)
            zero = np.asarray(0, np.int32)
            self._save(good, replace(self.state, step=number, rejected_in_row=zero))
            self._checkpoints.wait()
        _log.error(
            "stopping: %d steps in a row gave no finite loss, gradient or update. The last good "
            "state is that of step %d; bad_batches.jsonl names the batches. Lower "
            "schedule.learning_rate or stability.clip_norm, or look at these batches",
            self.config.stability.max_bad_steps,
            good,
        )
        return EXIT_NONFINITE
