# SPDX-License-Identifier: Apache-2.0
"""Average step metrics over a logging window, exactly and resumably.

Means are quotients of sums: (sum, weight) pairs add up over steps and are divided once. The window
that is open when a checkpoint is written goes into its `meta`, so a resumed run logs the same
numbers as an undisturbed one.
"""

import math
from typing import Any

Pairs = dict[str, list[float]]


class Window:
    """Sums of the steps since the last line of metrics."""

    def __init__(self, pairs: Pairs | None = None):
        self._pairs: Pairs = {name: list(pair) for name, pair in (pairs or {}).items()}
        self._last: dict[str, float] = {}

    @property
    def state(self) -> Pairs:
        """The sums so far, as JSON values."""
        return {name: list(pair) for name, pair in self._pairs.items()}

    def add(self, metrics: dict[str, Any]) -> None:
        """Add the host metrics of one step; of a rejected one only the counters."""
        self._last = {name: float(metrics[name]) for name in ("learning_rate", "rejected")}
        if metrics["rejected_in_row"]:
            return
        pairs = {name: pair for name, pair in metrics.items() if isinstance(pair, tuple)}
        for name in ("loss", *(name for name in pairs if name != "loss")):
            self._add(name, float(pairs[name][0]), float(pairs[name][1]))
        self._add("grad_norm", float(metrics["grad_norm"]), 1.0)

    def close(self) -> dict[str, float]:
        """Return the metrics of the window by public name, and start the next."""
        values = {f"train/{name}": mean(*pair) for name, pair in self._pairs.items()}
        values["train/learning_rate"] = self._last.get("learning_rate", math.nan)
        values["train/rejected_steps"] = self._last.get("rejected", 0.0)
        self._pairs = {}
        return values

    def _add(self, name: str, total: float, weight: float) -> None:
        pair = self._pairs.setdefault(name, [0.0, 0.0])
        pair[0] += total
        pair[1] += weight


def mean(total: float, weight: float) -> float:
    """Return total / weight; NaN of nothing."""
    return total / weight if weight else math.nan
