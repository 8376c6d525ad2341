# SPDX-License-Identifier: Apache-2.0
"""Profile a compiled program and say which of its operations the time goes to."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sqzjax.analysis import hlo
from sqzjax.analysis.timeline import Interval, breakdown

_LOG = logging.getLogger(__name__)

MARGIN_PERCENT = 15.0
"""A breakdown whose sum differs more from the time measured without the profiler is flagged."""
_TRACES = 3
_MIN_BUSY = 0.1


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Milliseconds of one step by part, from a trace of several steps.

    `parts` (see `sqzjax.analysis.timeline.PARTS`) and `idle_ms`, the time in which the profiled
    run had no operation running, sum to `total_ms`, its length. `error_percent` compares that with
    the step time measured without the profiler.
    """

    parts: dict[str, float]
    idle_ms: float
    total_ms: float
    error_percent: float

    @property
    def within_margin(self) -> bool:
        """Whether the sum agrees with the measured step time."""
        return abs(self.error_percent) <= MARGIN_PERCENT


def measure_breakdown(
    compiled: Any, run: Callable[[], float], *, steps: int, step_seconds: float
) -> Breakdown | None:
    """Profile `run`, which executes `compiled` for `steps` steps and returns the seconds it took.

    Of a few traces the one whose length agrees best with `step_seconds` counts. None where the
    profiler sees too little: no events, or a loop that XLA compiled into a single call.
    """
    scopes = hlo.parse(compiled.as_text()).op_names()
    best = None
    for _ in range(_TRACES):
        parts, seconds = _profile(run, scopes)
        total = 1e3 * seconds / steps
        shares = {name: time / 1e6 / steps for name, time in parts.items()}
        found = Breakdown(
            parts=shares,
            idle_ms=total - sum(shares.values()),
            total_ms=total,
            error_percent=100 * (total / (1e3 * step_seconds) - 1),
        )
        if best is None or abs(found.error_percent) < abs(best.error_percent):
            best = found
        if best.within_margin:
            break
    assert best is not None
    if sum(best.parts.values()) < _MIN_BUSY * best.total_ms:
        _LOG.warning("the profiler sees hardly any of the step's operations; no breakdown")
        return None
    return best


def _profile(run: Callable[[], float], scopes: dict[str, str]) -> tuple[dict[str, float], float]:
    """Return nanoseconds by part, and the seconds that the run took."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds = run()
        intervals = [one for one in read_intervals(Path(folder)) if one.name in scopes]
    return breakdown(intervals, scopes), seconds


def read_intervals(folder: Path) -> Iterator[Interval]:
    """Yield the executed HLO instructions of every trace in a folder.

    Where devices have planes of their own, what the host says of the same instructions is left out.
    """
    for path in folder.rglob("*.xplane.pb"):
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in devices or planes:
            for number, line in enumerate(plane.lines):
                thread = f"{plane.name}/{line.name}/{number}"
                for event in line.events:
                    if name := _instruction(event):
                        yield Interval(name, thread, event.start_ns, event.end_ns)


def _instruction(event: Any) -> str:
    with warnings.catch_warnings():
        # A type of the profiler's reader lacks the attribute __module__ (jax 0.12).
        warnings.simplefilter("ignore", DeprecationWarning)
        return next((str(value) for key, value in event.stats if key == "hlo_op"), "")
