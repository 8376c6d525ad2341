# SPDX-License-Identifier: Apache-2.0
"""The lower envelope of loss curves: approach 1 of arXiv 2203.15556.

At many computes the curve with the lowest loss names the best size. Valid only for losses that
stand for finished training: curves whose learning-rate schedule ends where they are read, or, with
a constant rate, the losses of cooldowns branched from each size. Costs one interpolation a curve.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sqzjax.analysis.scaling_laws import PowerLaw, Vector, check_positive, fit_power_law


class Curve(NamedTuple):
    """Losses of one size after so much compute (FLOPs) and data (samples or tokens)."""

    size: float
    compute: Vector
    losses: Vector
    data: Vector | None = None


class Envelope(NamedTuple):
    """The best size at each compute where it lies between others, and its laws.

    `winners` are the different sizes that won somewhere; few of them make coarse steps.
    """

    compute: Float[np.ndarray, "C"]
    size: Float[np.ndarray, "C"]
    loss: Float[np.ndarray, "C"]
    size_law: PowerLaw
    loss_law: PowerLaw
    data_law: PowerLaw | None
    winners: tuple[float, ...]


def envelope(
    curves: Sequence[Curve], *, points: int = 1500, smooth: int = 1, interior: bool = True
) -> Envelope:
    """Take the lowest of the curves at `points` log-spaced computes and regress on ln C.

    `smooth` is the number of neighbouring losses averaged before (odd). With `interior` a compute
    whose winner is the smallest or largest size with a curve there is left out: the best size may
    lie beyond. Curves of fewer than two losses are ignored. ValueError if fewer than 3 sizes win
    anywhere, and for numbers that are not positive and finite.
    """
    for curve in curves:
        check_positive(compute=curve.compute, losses=curve.losses, data=curve.data)
    check_positive(sizes=np.array([curve.size for curve in curves], float))
    if smooth < 1 or smooth % 2 == 0:
        raise ValueError(f"smooth={smooth} must be an odd number of losses >= 1")
    usable = [_sorted(curve) for curve in curves if len(curve.compute) >= 2]
    found = len({curve.size for curve in usable})
    if found < (5 if interior else 3):
        raise ValueError(
            f"{found} sizes with at least two losses make no envelope; it needs "
            f"{'5, as the smallest and the largest never count' if interior else '3'}"
        )
    ends = [(curve.compute[0], curve.compute[-1]) for curve in usable]
    grid = np.geomspace(min(low for low, _ in ends), max(high for _, high in ends), points)
    losses = np.stack([_at(curve, grid, _smoothed(curve.losses, smooth)) for curve in usable])
    sizes = np.array([curve.size for curve in usable])
    there = np.isfinite(losses)
    winner = np.where(there, losses, np.inf).argmin(0)
    size = sizes[winner]
    keep = there.any(0)
    if interior:
        keep &= size > np.where(there, sizes[:, None], np.inf).min(0)
        keep &= size < np.where(there, sizes[:, None], -np.inf).max(0)
    won = tuple(np.unique(size[keep]).tolist())
    if len(won) < 3:
        raise ValueError(
            f"only {len(won)} sizes are best at a compute where smaller and larger ones were "
            "measured too; an envelope needs 3: add sizes or longer runs"
        )
    loss = losses[winner, np.arange(points)]
    data_law = None
    if all(curve.data is not None for curve in usable):
        data = np.stack([_at(curve, grid, curve.data) for curve in usable])  # type: ignore[arg-type]
        data_law = fit_power_law(grid[keep], data[winner, np.arange(points)][keep])
    return Envelope(
        compute=grid[keep],
        size=size[keep],
        loss=loss[keep],
        size_law=fit_power_law(grid[keep], size[keep]),
        loss_law=fit_power_law(grid[keep], loss[keep]),
        data_law=data_law,
        winners=won,
    )


def _sorted(curve: Curve) -> Curve:
    order = np.argsort(curve.compute)
    data = None if curve.data is None else curve.data[order]
    return Curve(curve.size, curve.compute[order], curve.losses[order], data)


def _at(curve: Curve, grid: Float[np.ndarray, "C"], values: Vector) -> Float[np.ndarray, "C"]:
    """Interpolate in the logarithms; NaN outside the curve."""
    logs = np.interp(np.log(grid), np.log(curve.compute), np.log(values))
    inside = (grid >= curve.compute[0]) & (grid <= curve.compute[-1])
    return np.where(inside, np.exp(logs), np.nan)


def _smoothed(values: Vector, width: int) -> Vector:
    """Average neighbours, fewer of them at the ends, as many on either side (odd widths)."""
    kernel = np.ones(min(width, len(values) - 1 + len(values) % 2))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
