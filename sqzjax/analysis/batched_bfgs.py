# SPDX-License-Identifier: Apache-2.0
"""Minimise one smooth function from thousands of starts, or thousands of functions, at once.

BFGS with a backtracking line search, one row per problem, in float64 numpy. Pick it where a problem
has a handful of unknowns and scipy would spend its time in Python; an iteration evaluates the
rows that are still running, once. A minimum is local: that of the basin a row started in.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Points = Float[np.ndarray, "R P"]
Function = Callable[
    [Points, Int[np.ndarray, "R"]], tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R P"]]
]
"""Values and gradients at points of the problems with these numbers."""

_SUFFICIENT = 1e-4
_SHORTEST = 1e-10


class Minima(NamedTuple):
    """Where each row ended, its value and gradient there."""

    points: Points
    values: Float[np.ndarray, "R"]
    gradients: Float[np.ndarray, "R P"]


def minimise(function: Function, starts: Points, *, iterations: int, tolerance: float) -> Minima:
    """Run every row until its largest gradient is at most `tolerance`, or it cannot improve.

    `tolerance` is absolute, in units of value per unknown, so scale the function first. Steps to
    values that are not finite are refused; a row that starts at one ends there, NaN and all. Look
    at the gradients: nothing is raised where `iterations` did not suffice.
    """
    count, unknowns = starts.shape
    best = Minima(starts.copy(), *function(starts, np.arange(count)))
    inverse = np.tile(np.eye(unknowns), (count, 1, 1))
    fresh = np.ones(count, bool)  # no curvature is known yet
    step = _first_step(best.gradients)
    running = np.abs(best.gradients).max(1) > tolerance
    for _ in range(iterations):
        rows = np.flatnonzero(running)
        if not len(rows):
            break
        gradients = best.gradients[rows]
        direction = -np.einsum("rij,rj->ri", inverse[rows], gradients)
        slope = (direction * gradients).sum(1)
        move = step[rows, None] * direction
        values, trial_gradients = function(best.points[rows] + move, rows)
        good = values <= best.values[rows] + _SUFFICIENT * step[rows] * slope
        good &= np.isfinite(values) & (slope < 0)
        _learn(inverse, fresh, rows[good], move[good], (trial_gradients - gradients)[good])
        best.points[rows[good]] += move[good]
        best.values[rows[good]] = values[good]
        best.gradients[rows[good]] = trial_gradients[good]
        step[rows] = np.where(good, 1.0, step[rows] / 3)
        stuck = rows[(step[rows] < _SHORTEST) | (slope >= 0)]
        running[rows] = np.abs(best.gradients[rows]).max(1) > tolerance
        # One more try along the gradient before a row is given up.
        running[stuck] &= ~fresh[stuck]
        inverse[stuck], fresh[stuck] = np.eye(unknowns), True
        step[stuck] = _first_step(best.gradients[stuck])
    return best


def _first_step(gradients: Points) -> Float[np.ndarray, "R"]:
    """Return steps that move no unknown by more than 0.1."""
    return 0.1 / np.maximum(np.abs(gradients).max(1), 1e-300)


def _learn(
    inverse: np.ndarray, fresh: np.ndarray, rows: np.ndarray, move: Points, change: Points
) -> None:
    """Update the inverse Hessians of some rows in place, where the curvature is positive."""
    curvature = (move * change).sum(1)
    size = np.linalg.norm(move, axis=1) * np.linalg.norm(change, axis=1)
    scale = curvature / np.maximum((change**2).sum(1), 1e-300)
    # Below the second bound, where changes are next to nothing, quotients overflow.
    use = (curvature > 1e-10 * size) & (curvature > 1e-200) & (scale > 0)
    rows, move, change, curvature, scale = (
        one[use] for one in (rows, move, change, curvature, scale)
    )
    first = fresh[rows]
    inverse[rows[first]] = np.eye(move.shape[1]) * scale[first, None, None]
    fresh[rows] = False
    outer = np.eye(move.shape[1]) - move[:, :, None] * (change / curvature[:, None])[:, None, :]
    kept = outer @ inverse[rows] @ outer.transpose(0, 2, 1)
    inverse[rows] = kept + move[:, :, None] * (move / curvature[:, None])[:, None, :]
