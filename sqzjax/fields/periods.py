# SPDX-License-Identifier: Apache-2.0
"""Periods of an archive, and the samples inside them. Nothing here imports jax.

A sample is a number of states that lie a fixed step apart, all of one period: it never reaches
over a gap in the archive or from training into held-out time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sqzjax.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Period:
    """From `start` up to, not including, `stop`; null is the archive's begin or end.

    Either is an ISO date as text (`"2017"`, `"2017-06-01T12"`), or a fraction of the archive's
    times, 0 to 1.
    """

    start: str | float | None = None
    stop: str | float | None = None

    def __post_init__(self) -> None:
        start, stop = _parse("start", self.start), _parse("stop", self.stop)
        alike = isinstance(self.start, str) == isinstance(self.stop, str)
        if start is not None and stop is not None and alike and start >= stop:
            raise ValueError(f"start={self.start!r} must come before stop={self.stop!r}")

    def bounds(self, times: np.ndarray) -> tuple[int, int]:
        """Return the first index of the period and the one after its last."""
        start = 0 if self.start is None else _index(self.start, times)
        return start, len(times) if self.stop is None else _index(self.stop, times)

    def __str__(self) -> str:
        return (
            f"{'' if self.start is None else self.start}..{'' if self.stop is None else self.stop}"
        )


def _parse(name: str, value: str | float | None) -> float | None:
    """Check a bound; return it as a number that can be compared with its like."""
    if isinstance(value, str):
        try:
            seconds = np.datetime64(value, "s").astype(np.int64)
        except ValueError:
            seconds = None
        # numpy also takes words for dates, such as "now", and an empty text for none.
        if seconds is None or not value[:4].isdecimal():
            raise ValueError(f"{name}={value!r} is no ISO date; write it like '2017-06-01'")
        return float(seconds)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(
            f"{name}={value!r} must be a fraction in [0, 1], or a date in quotes, like '2017'"
        )
    return value


def _index(value: str | float, times: np.ndarray) -> int:
    if isinstance(value, str):
        return int(np.searchsorted(times, np.datetime64(value, "ns")))
    return round(value * len(times))


def indices(times: np.ndarray, periods: Sequence[Period]) -> np.ndarray:
    """Return the indices of all times inside the periods, each once, ascending."""
    parts = [np.arange(*period.bounds(times)) for period in periods]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def samples(
    times: np.ndarray, periods: Sequence[Period], *, step_hours: int, length: int
) -> np.ndarray:
    """Return the time indices of every sample, int64 `[samples, length]`, by start.

    Every time is a start if the archive has all the states that follow it, `step_hours` apart, in
    the same period.
    """
    step = np.timedelta64(step_hours, "h")
    found = [np.zeros((0, length), np.int64)]
    for period in periods:
        begin, end = period.bounds(times)
        inside = times[begin:end]
        if not len(inside):
            continue
        wanted = inside[:, None] + np.arange(length) * step
        positions = np.searchsorted(inside, wanted)
        there = inside[np.minimum(positions, len(inside) - 1)] == wanted
        found.append(begin + positions[there.all(1)])
    return np.unique(np.concatenate(found), axis=0)


def check_apart(times: np.ndarray, **splits: Sequence[Period]) -> None:
    """Raise DataError if two of the named splits share a time."""
    covered = {name: indices(times, periods) for name, periods in splits.items()}
    for number, (name, mine) in enumerate(covered.items()):
        for other, theirs in list(covered.items())[:number]:
            common = np.intersect1d(mine, theirs)
            if common.size:
                raise DataError(
                    f"the splits {other} and {name} share {common.size} times from "
                    f"{times[common[0]]} on; make one end where the other starts"
                )
