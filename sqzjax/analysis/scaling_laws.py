# SPDX-License-Identifier: Apache-2.0
"""IsoFLOP parabolas and laws of compute: which size is best for a budget, and what loss it reaches.

Approach 2 of arXiv 2203.15556 as arXiv 2603.25687 uses it: for each budget C a parabola of the loss
in ln N, whose vertex is the best size; then least squares of the logarithms on ln C. A budget
whose minimum lies at an edge is refused with its reason. Everything is float64 numpy without jax;
`losses` and `counts` may carry a leading axis of resamples, which costs one small solve each.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Vector = Float[np.ndarray, "n"]
Rows = Float[np.ndarray, "R n"]
Numbers = float | int | Float[np.ndarray, "..."]

REASONS = (
    "accepted",
    "fewer than 3 sizes",
    "the lowest loss is that of the smallest or largest size: add sizes beyond it",
    "the parabola has no minimum",
    "the minimum of the parabola lies outside the sizes tried",
    "the parabola falls below zero: fit ln L (log_loss) or add sizes",
)
_START_FLOORS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


class Vertices(NamedTuple):
    """Minima of one budget, a row a resample; `reason` indexes `REASONS`, 0 where accepted.

    `coefficients` are of `a (ln N)^2 + b ln N + c`, of ln L where that was fitted.
    """

    size: Float[np.ndarray, "R"]
    loss: Float[np.ndarray, "R"]
    coefficients: Float[np.ndarray, "R 3"]
    reason: Int[np.ndarray, "R"]


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best size of a budget, its loss, and the data it sees (None where that is unknown)."""

    budget: float
    size: float
    loss: float
    data: float | None
    coefficients: tuple[float, float, float]
    points: int


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A budget that has no trustworthy minimum, and why."""

    budget: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class IsoFlop:
    """Minima of all budgets in ascending order."""

    optima: tuple[Optimum, ...]
    refusals: tuple[Refusal, ...]


class PowerLaw(NamedTuple):
    """`coefficient * C ** exponent`."""

    coefficient: float
    exponent: float

    def __call__(self, compute: Numbers) -> Numbers:
        """Return the value at a compute, or at each of an array."""
        return self.coefficient * compute**self.exponent


class SaturatingLaw(NamedTuple):
    """`floor + coefficient * (C / reference) ** -exponent`; a floor of 0 is the pure power law."""

    floor: float
    coefficient: float
    exponent: float
    reference: float

    def __call__(self, compute: Numbers) -> Numbers:
        """Return the value at a compute, or at each of an array."""
        return self.floor + self.coefficient * (compute / self.reference) ** -self.exponent


def isoflop(
    budgets: Vector,
    sizes: Vector,
    losses: Vector,
    data: Vector | None = None,
    *,
    log_loss: bool = False,
) -> IsoFlop:
    """Find the best size of every budget, or the reason why it has none.

    `log_loss` fits ln L in place of L; published constants are of L. `data` gives the data at the
    best size by interpolation between the runs of the budget. ValueError where fewer than two
    budgets are left, since there is no law to fit then, and for columns that are not positive.
    """
    check_positive(budgets=budgets, sizes=sizes, losses=losses, data=data)
    optima, refusals = [], []
    for budget in np.unique(budgets):
        own = budgets == budget
        found = vertices(sizes[own], losses[own][None], log_loss=log_loss)
        if found.reason[0]:
            refusals.append(Refusal(budget=float(budget), reason=REASONS[found.reason[0]]))
            continue
        seen = None if data is None else interpolate(found.size, sizes[own], data[own])[0]
        optima.append(
            Optimum(
                budget=float(budget),
                size=float(found.size[0]),
                loss=float(found.loss[0]),
                data=None if seen is None else float(seen),
                coefficients=tuple(found.coefficients[0].tolist()),
                points=int(own.sum()),
            )
        )
    if len(optima) < 2:
        reasons = "; ".join(f"{one.budget:.4g} FLOPs: {one.reason}" for one in refusals)
        raise ValueError(
            f"only {len(optima)} of {len(optima) + len(refusals)} budgets have a minimum and a law "
            f"needs two ({reasons}); run more sizes or budgets"
        )
    return IsoFlop(optima=tuple(optima), refusals=tuple(refusals))


def check_positive(**columns: Float[np.ndarray, "_"] | None) -> None:
    """Raise ValueError unless columns are positive, finite and of one length; None is absent."""
    given = {name: values for name, values in columns.items() if values is not None}
    if len({len(values) for values in given.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in given.items())
        raise ValueError(f"{counts} must be as many: one of each for every run")
    for name, values in given.items():
        bad = values[~(np.isfinite(values) & (values > 0))]
        if len(bad):
            raise ValueError(
                f"{name} must be positive and finite, found {bad[:3].tolist()}; leave such runs out"
            )


def vertices(
    sizes: Vector,
    losses: Rows,
    counts: Rows | None = None,
    *,
    log_loss: bool = False,
) -> Vertices:
    """Fit a parabola in ln N to each row of losses and find its minimum.

    `counts` says how often a row drew each run (0: left out), 1 by default. Runs that a row did not
    draw count neither as sizes nor as edges. Where the lowest loss is a tie, an edge refuses it.
    """
    logs = np.log(sizes)
    weights = np.ones_like(losses) if counts is None else counts
    present = weights > 0
    centre, scale = logs.mean(), max(float(np.ptp(logs)) / 2, 1e-30)
    values = np.log(losses) if log_loss else losses
    scaled, usable = _parabolas((logs - centre) / scale, values, weights)
    a, b, c = scaled.T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        place = -b / (2 * a)
        bottom = c - b**2 / (4 * a)
        size = np.exp(centre + scale * place)
        loss = np.exp(bottom) if log_loss else bottom
    low = np.where(present, logs, np.inf).min(1)
    high = np.where(present, logs, -np.inf).max(1)
    lowest = present & (losses == np.where(present, losses, np.inf).min(1, keepdims=True))
    at_edge = (lowest & ((logs == low[:, None]) | (logs == high[:, None]))).any(1)
    middle = centre + scale * place
    outside = (middle <= low) | (middle >= high)
    reason = np.select([~usable, at_edge, a <= 0, outside, loss <= 0], [1, 2, 3, 4, 5], 0)
    a, b, c = a / scale**2, b / scale, c
    coefficients = np.stack([a, b - 2 * a * centre, c - b * centre + a * centre**2], 1)
    return Vertices(size, loss, coefficients, reason)


def _parabolas(
    places: Vector, values: Rows, weights: Rows
) -> tuple[Float[np.ndarray, "R 3"], Bool[np.ndarray, "R"]]:
    """Solve the weighted normal equations; rows with fewer than 3 different places are unusable."""
    design = np.stack([places**2, places, np.ones_like(places)], 1)
    matrix = np.einsum("rn,ni,nj->rij", weights, design, design)
    right = np.einsum("rn,ni,rn->ri", weights, design, values)
    _, group = np.unique(places, return_inverse=True)
    member = np.arange(group.max() + 1)[:, None] == group
    usable = ((weights > 0) @ member.T.astype(float) > 0).sum(1) >= 3
    matrix[~usable] = np.eye(3)
    return np.linalg.solve(matrix, right[..., None])[..., 0], usable


def interpolate(
    at: Float[np.ndarray, "..."], sizes: Vector, data: Vector
) -> Float[np.ndarray, "..."]:
    """Return the data at sizes between those that were run, linear in the logarithms.

    Units are those of `sizes` and `data`. Beyond the sizes it is the data of the nearest one; of
    `at` that is not a positive number, that of the smallest.
    """
    logs, places = np.unique(np.log(sizes), return_index=True)
    safe = np.where(np.isfinite(at) & (at > 0), at, np.exp(logs[0]))
    return np.exp(np.interp(np.log(safe), logs, np.log(data[places])))


def fit_power_law(compute: Vector, values: Vector) -> PowerLaw:
    """Fit ln(values) by least squares on ln(compute), in FLOPs; the coefficient is at 1 FLOP.

    ValueError for fewer than two different computes, and for what is not positive and finite.
    """
    check_positive(compute=compute, values=values)
    if len(np.unique(compute)) < 2:
        raise ValueError(
            f"{len(values)} values at {len(np.unique(compute))} different computes make no law; "
            "run two budgets"
        )
    law = power_laws(compute, values[None])
    return PowerLaw(float(law[0, 0]), float(law[0, 1]))


def power_laws(compute: Vector, values: Rows) -> Float[np.ndarray, "R 2"]:
    """Return coefficient and exponent of each row; NaN values are left out of theirs.

    A row with fewer than two values is NaN.
    """
    known = np.isfinite(values)
    logs, targets = np.log(compute), np.log(np.where(known, values, 1.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        count = known.sum(1, keepdims=True)
        mean = (known * logs).sum(1, keepdims=True) / count
        level = (known * targets).sum(1, keepdims=True) / count
        offset = known * (logs - mean)
        slope = (offset * targets).sum(1) / (offset**2).sum(1)
        slope = np.where(count[:, 0] >= 2, slope, np.nan)
        return np.stack([np.exp(level[:, 0] - slope * mean[:, 0]), slope], 1)


def power_of_ten(compute: Vector) -> float:
    """Return the power of ten next to the geometric mean: a readable unit of compute."""
    return float(10.0 ** np.round(np.log10(compute).mean()))


def fit_saturating_law(
    compute: Vector, values: Vector, *, reference: float | None = None
) -> SaturatingLaw:
    """Fit `E + A (C / reference)^-g` with E, A >= 0 by least squares of the logarithms.

    `compute` and `reference` are FLOPs (by default `power_of_ten`), E and A are in units of the
    values. Needs three values; three are met exactly. Where the data do not level off E is 0.
    ValueError for fewer, and for what is not positive and finite.
    """
    check_positive(compute=compute, values=values)
    if len(values) < 3:
        raise ValueError(
            f"{len(values)} values cannot settle the three constants of E + A C^-g; run 3 budgets"
        )
    unit = reference or power_of_ten(compute)
    floor, coefficient, exponent = saturating_laws(compute, values[None], unit)[0]
    return SaturatingLaw(float(floor), float(coefficient), float(exponent), unit)


def saturating_laws(
    compute: Vector, values: Rows, reference: float, *, iterations: int = 60
) -> Float[np.ndarray, "R 3"]:
    """Return floor, coefficient and exponent of each row; NaN values are left out of theirs.

    `compute` and `reference` are FLOPs, floor and coefficient (at `reference`) in units of the
    values. Levenberg-Marquardt on all rows together, from the best of some floors; the pure
    power law wins where no positive floor is better. A row with fewer than three values is NaN.
    """
    known = np.isfinite(values)
    logs = np.log(compute / reference)
    safe = np.where(known, values, 1.0)
    lowest = np.where(known, values, np.inf).min(1)
    lowest = np.where(np.isfinite(lowest), lowest, 1.0)
    starts = [_start(compute / reference, values, lowest * share) for share in _START_FLOORS]
    errors = np.stack([_saturation(start, logs, safe, known)[0] for start in starts])
    point = np.stack(starts)[np.nanargmin(np.nan_to_num(errors, nan=np.inf), 0), range(len(values))]
    point = _descend(point, logs, safe, known, iterations)
    pure = starts[0]
    better = _saturation(pure, logs, safe, known)[0] <= _saturation(point, logs, safe, known)[0]
    point = np.where(better[:, None], pure, point)
    point = np.where(known.sum(1, keepdims=True) >= 3, point, np.nan)
    return np.stack([point[:, 0], np.exp(point[:, 1]), point[:, 2]], 1)


def _start(
    compute: Vector, values: Rows, floor: Float[np.ndarray, "R"]
) -> Float[np.ndarray, "R 3"]:
    """Return (E, ln A, g) of the power law that is left once a floor is taken away."""
    with np.errstate(invalid="ignore"):
        law = power_laws(compute, values - floor[:, None])
        return np.stack([floor, np.log(law[:, 0]), -law[:, 1]], 1)


def _saturation(
    point: Float[np.ndarray, "R 3"], logs: Vector, values: Rows, known: Bool[np.ndarray, "R n"]
) -> tuple[Float[np.ndarray, "R"], Rows, Float[np.ndarray, "R n 3"]]:
    """Return the sum of squares, the residuals of the logarithms, and their derivatives."""
    decay = np.exp(np.clip(point[:, 1:2] - point[:, 2:3] * logs, -700, 700))
    predicted = point[:, :1] + decay
    residuals = np.where(known, np.log(predicted) - np.log(values), 0.0)
    slopes = np.stack([np.ones_like(decay), decay, -decay * logs], -1) / predicted[..., None]
    return (residuals**2).sum(1), residuals, np.where(known[..., None], slopes, 0.0)


def _descend(
    point: Float[np.ndarray, "R 3"],
    logs: Vector,
    values: Rows,
    known: Bool[np.ndarray, "R n"],
    iterations: int,
) -> Float[np.ndarray, "R 3"]:
    """Take damped Gauss-Newton steps with the floor kept >= 0; noise may lift it above values."""
    point = np.nan_to_num(point)
    damping = np.full(len(point), 1e-3)
    error, residuals, slopes = _saturation(point, logs, values, known)
    for _ in range(iterations):
        matrix = np.einsum("rni,rnj->rij", slopes, slopes)
        diagonal = np.einsum("rii->ri", matrix)
        diagonal += damping[:, None] * diagonal + 1e-300
        gradient = np.einsum("rni,rn->ri", slopes, residuals)
        trial = point - (np.linalg.pinv(matrix, hermitian=True) @ gradient[..., None])[..., 0]
        trial[:, 0] = np.maximum(trial[:, 0], 0.0)
        found = _saturation(trial, logs, values, known)
        better = found[0] < error
        damping = np.where(better, damping / 4, damping * 4).clip(1e-12, 1e12)
        point = np.where(better[:, None], trial, point)
        error, residuals, slopes = (
            np.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
            for new, old in zip(found, (error, residuals, slopes))
        )
    return point
