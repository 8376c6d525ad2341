# SPDX-License-Identifier: Apache-2.0
"""Periods of an archive, and the samples inside them. Nothing here imports jax.

A sample is a number of states that lie a fixed step apart, all of one period: it never reaches
over a gap in the archive or from training into held-out time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sqzjax.errors import DataError

_DATE = re.compile(r"(\d{4})(-\d\d(-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d{1,9})?)?)?)?)?)?")
FIRST_YEAR, LAST_YEAR = 1678, 2261
"""The whole years that nanoseconds in 64 bits reach."""


@dataclass(frozen=True, kw_only=True)
class Period:
    """From `start` up to, not including, `stop`; null is the archive's begin or end.

    Either is an ISO date as text (`"2017"`, `"2017-06-01T12"`), or a fraction of the archive's
    times, 0 to 1.
    """

    start: str | float | None = None
    stop: str | float | None = None

    def __post_init__(self) -> None:
        start, stop = _check("start", self.start), _check("stop", self.stop)
        alike = isinstance(self.start, str) == isinstance(self.stop, str)
        if start is not None and stop is not None and alike and start >= stop:
            raise ValueError(f"start={self.start!r} must come before stop={self.stop!r}")

    def bounds(self, times: np.ndarray) -> tuple[int, int]:
        """Return the first index of the period in ascending times, and the one after its last.

        Equal where the archive has no time in it. Of dates it holds the times from `start` on and
        before `stop`; fractions are rounded to whole times. DataError if it ends before it begins,
        which for a date beside a fraction depends on the archive.
        """
        start = 0 if self.start is None else _index(self.start, times)
        stop = len(times) if self.stop is None else _index(self.stop, times)
        if start > stop:
            raise DataError(
                f"the period {self} ends before it begins in an archive of {len(times)} times from "
                f"{times[0]}; give both as dates, or both as fractions"
            )
        return start, stop

    def __str__(self) -> str:
        return (
            f"{'' if self.start is None else self.start}..{'' if self.stop is None else self.stop}"
        )


def parse_date(name: str, text: str) -> np.datetime64:
    """Return an ISO date, `2017` to `2017-06-01T12:30:00`, in nanoseconds; ValueError with `name`.

    Numpy alone also takes words such as "now" for dates, an empty text for none, and wraps around
    beyond the years that nanoseconds reach.
    """
    form = _DATE.fullmatch(text)
    if form and FIRST_YEAR <= int(form[1]) <= LAST_YEAR:
        try:
            return np.datetime64(text, "ns")
        except ValueError:  # such as a 13th month
            pass
    raise ValueError(
        f"{name}={text!r} is no ISO date of the years {FIRST_YEAR} to {LAST_YEAR}; write it like "
        "'2017-06-01' or '2017-06-01T12'"
    )


def _check(name: str, value: str | float | None) -> Any:
    """Check a bound; return it as something that can be compared with its like."""
    if isinstance(value, str):
        return parse_date(name, value)
    if value is not None and (isinstance(value, bool) or not 0 <= value <= 1):
        raise ValueError(
            f"{name}={value!r} must be a fraction in [0, 1], or a date in quotes, like '2017'"
        )
    return value


def _index(value: str | float, times: np.ndarray) -> int:
    if isinstance(value, str):
        return int(np.searchsorted(times, parse_date("date", value)))
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
