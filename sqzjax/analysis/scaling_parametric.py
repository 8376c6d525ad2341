# SPDX-License-Identifier: Apache-2.0
"""`L = E + A / N^alpha + B / D^beta` fitted to all runs: approach 3 of arXiv 2203.15556.

The objective is the *sum* of Huber terms of the log residuals. With their mean, usual optimisers
find the gradient small enough next to their start (arXiv 2404.10102), so every fit here reports the
gradient it ended with. Pick it where runs do not line up in budgets, or to extrapolate both in
size and data; it needs the losses of one schedule and one kind. 4,500 starts take a few seconds.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize as scipy_minimize

from sqzjax.analysis.batched_bfgs import minimise
from sqzjax.analysis.scaling_laws import Numbers, Rows, Vector, check_positive

DELTA = 1e-3
"""Log residuals beyond this count linearly."""
CONVERGED = 1e-6
"""Largest gradient of a converged fit, as a share of the largest one residuals could add up to."""

Thetas = Float[np.ndarray, "R 5"]
"""Rows of (a, b, e, alpha, beta) with A = e^a, B = e^b, E = e^e."""

# Typical size, data and lowest loss of the runs that the grid of starts was made for. Other runs
# are measured in these units first, so that the fit does not depend on the user's.
_TYPICAL_SIZE, _TYPICAL_DATA, _TYPICAL_LOSS = 8.5e8, 1.7e10, 2.08
_GRID = (
    (0, 5, 10, 15, 20, 25),
    (0, 5, 10, 15, 20, 25),
    (-1, -0.5, 0, 0.5, 1),
    (0, 0.5, 1, 1.5, 2),
    (0, 0.5, 1, 1.5, 2),
)
_FIRST_ITERATIONS, _KEPT, _ITERATIONS = 20, 200, 400
_CHUNK = 50_000  # residuals evaluated together: their arrays stay in cache, 2.5 times faster


class ParametricLaw(NamedTuple):
    """`E + A / N^alpha + B / D^beta`."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, size: Numbers, data: Numbers) -> Numbers:
        """Return the loss of a size after so much data, or of arrays of them."""
        return self.E + self.A / size**self.alpha + self.B / data**self.beta

    @property
    def size_exponent(self) -> float:
        """Exponent of the best size in compute, beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, compute: Numbers, flops_per_pair: float = 6.0) -> tuple[Numbers, Numbers]:
        """Return the best size and data where compute is `flops_per_pair` x size x data.

        ValueError unless both exponents are positive: there is no best size then.
        """
        if not (np.all(np.asarray(self.alpha) > 0) and np.all(np.asarray(self.beta) > 0)):
            raise ValueError(
                f"alpha={self.alpha} and beta={self.beta} must be > 0 for a best size; the runs do "
                "not settle them: add sizes or budgets"
            )
        total = self.alpha + self.beta
        share = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        pairs = compute / flops_per_pair
        return share * pairs ** (self.beta / total), pairs ** (self.alpha / total) / share


class ParametricFit(NamedTuple):
    """The best law found, and whether to believe it.

    `gradient` is the largest derivative of the objective in (a, b, e, alpha, beta) with sizes and
    data in units of their geometric means, as a share of the largest possible; `agreeing` of
    `starts` ended at the same objective to 1e-6.
    """

    law: ParametricLaw
    objective: float
    gradient: float
    converged: bool
    starts: int
    agreeing: int


class _Runs(NamedTuple):
    """Logarithms about their means, with what was taken away."""

    sizes: Vector
    data: Vector
    losses: Vector
    size_centre: float
    data_centre: float


def objective(
    thetas: Thetas,
    log_sizes: Vector,
    log_data: Vector,
    log_losses: Vector,
    counts: Rows | None = None,
    *,
    delta: float = DELTA,
) -> tuple[Float[np.ndarray, "R"], Thetas]:
    """Return the sum of Huber terms at each row and its gradient; `counts` weights the runs."""
    a, b, e, alpha, beta = (thetas[:, index, None] for index in range(5))
    parts = (a - alpha * log_sizes, b - beta * log_data, e + 0 * log_data)
    terms = np.stack(np.broadcast_arrays(*parts))
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    residuals = top + np.log(total) - log_losses
    clipped = np.clip(residuals, -delta, delta)
    huber = clipped * (residuals - clipped / 2)
    weighted = clipped / total if counts is None else clipped * counts / total
    value = huber.sum(1) if counts is None else (huber * counts).sum(1)
    size_part, data_part, floor_part = shares * weighted
    columns = [size_part.sum(1), data_part.sum(1), floor_part.sum(1)]
    columns += [-(size_part @ log_sizes), -(data_part @ log_data)]
    return value, np.stack(columns, 1)


def fit_parametric(
    sizes: Vector, data: Vector, losses: Vector, *, delta: float = DELTA
) -> ParametricFit:
    """Fit the law from 4,500 starts, then polish the best with BFGS until its gradient vanishes.

    All starts run some iterations; the best 200 run on. ValueError for fewer than 6 runs, as five
    constants would meet them exactly, and for columns that are not positive and finite.
    """
    check_positive(sizes=sizes, data=data, losses=losses)
    if len(losses) < 6:
        raise ValueError(
            f"{len(losses)} runs cannot settle the five constants of E + A/N^alpha + B/D^beta; "
            "run at least 6 different ones"
        )
    runs = _centred(sizes, data, losses)
    starts = _starts(runs)
    tolerance = CONVERGED * delta * len(losses) / 100
    first = _minima(starts, runs, None, delta, _FIRST_ITERATIONS, tolerance)
    kept = np.argsort(first.values)[:_KEPT]
    last = _minima(first.points[kept], runs, None, delta, _ITERATIONS, tolerance)
    theta = last.points[np.nanargmin(last.values)]
    theta, value, gradient = _polished(theta, runs, delta)
    agreeing = (last.values <= value * (1 + 1e-6)).sum()
    share = float(np.abs(gradient).max() / (delta * len(losses)))
    law = _laws(theta[None], runs)[0]
    return ParametricFit(
        law=ParametricLaw(*law.tolist()),
        objective=value,
        gradient=share,
        converged=share <= CONVERGED,
        starts=len(starts),
        agreeing=int(agreeing),
    )


def refit_resampled(
    fit: ParametricFit,
    sizes: Vector,
    data: Vector,
    losses: Vector,
    *,
    resamples: int = 4000,
    seed: int = 0,
    delta: float = DELTA,
) -> Thetas:
    """Draw the runs with replacement and fit again from `fit`; rows of (E, A, B, alpha, beta).

    A row that did not converge (a resample may not settle a constant) is NaN.
    """
    runs = _centred(sizes, data, losses)
    count = len(losses)
    generator = np.random.default_rng((seed, 3))
    counts = generator.multinomial(count, np.full(count, 1 / count), resamples).astype(float)
    start = np.tile(_theta(fit.law, runs), (resamples, 1))
    tolerance = CONVERGED * delta * count
    found = _minima(start, runs, counts, delta, _ITERATIONS, tolerance)
    # A residual at the kink of its Huber term can stop a row early: such a row is within a hair.
    good = np.abs(found.gradients).max(1) <= 100 * tolerance
    return np.where(good[:, None], _laws(found.points, runs), np.nan)


def optima_of(
    laws: Thetas, compute: float, flops_per_pair: float = 6.0
) -> tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"], Float[np.ndarray, "R"]]:
    """Return best size, best data and the loss there for rows of (E, A, B, alpha, beta).

    `compute` is in FLOPs, size and data in the units that the laws were fitted in. NaN for rows
    without a best size: those that are NaN, or have an exponent <= 0.
    """
    good = (laws[:, 3:] > 0).all(1)
    columns = ParametricLaw(*np.where(good[:, None], laws, 1.0).T)  # formulae hold for arrays too
    size, data = columns.optimum(compute, flops_per_pair)
    found = (size, data, columns(size, data))
    size, data, loss = (np.where(good, one, np.nan) for one in found)
    return size, data, loss


def _centred(sizes: Vector, data: Vector, losses: Vector) -> _Runs:
    logs = np.log(sizes), np.log(data)
    centres = [float(one.mean()) for one in logs]
    return _Runs(logs[0] - centres[0], logs[1] - centres[1], np.log(losses), *centres)


def _starts(runs: _Runs) -> Thetas:
    """Return the grid of starts about the means of these runs."""
    a, b, e, alpha, beta = np.array(list(itertools.product(*_GRID)), float).T
    unit = runs.losses.min() - np.log(_TYPICAL_LOSS)
    a = a - alpha * np.log(_TYPICAL_SIZE) + unit
    b = b - beta * np.log(_TYPICAL_DATA) + unit
    return np.stack([a, b, e + unit, alpha, beta], 1)


def _minima(starts, runs: _Runs, counts: Rows | None, delta: float, iterations: int, tolerance):
    """Minimise in pieces that fit into memory."""

    def evaluate(points: Thetas, rows: Int[np.ndarray, "R"]):
        parts = np.array_split(np.arange(len(rows)), len(rows) * len(runs.losses) // _CHUNK + 1)
        found = [
            objective(
                points[part],
                *runs[:3],
                None if counts is None else counts[rows[part]],
                delta=delta,
            )
            for part in parts
        ]
        values, gradients = zip(*found)
        return np.concatenate(values), np.concatenate(gradients)

    return minimise(evaluate, starts, iterations=iterations, tolerance=tolerance)


def _polished(theta, runs: _Runs, delta: float):
    """Return the end of scipy's BFGS from a point, or the point where that is no better."""

    def scaled(point):
        value, gradient = objective(point[None], *runs[:3], delta=delta)
        return value[0] / delta, gradient[0] / delta

    with np.errstate(all="ignore"):
        found = scipy_minimize(
            scaled, theta, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000}
        )
    candidates = np.stack([theta, found.x])
    values, gradients = objective(candidates, *runs[:3], delta=delta)
    best = int(np.nanargmin(values))
    return candidates[best], float(values[best]), gradients[best]


def _laws(thetas: Thetas, runs: _Runs) -> Thetas:
    """Return (E, A, B, alpha, beta) in the user's units."""
    a, b, e, alpha, beta = thetas.T
    with np.errstate(over="ignore"):
        A, B = np.exp(a + alpha * runs.size_centre), np.exp(b + beta * runs.data_centre)
    return np.stack([np.exp(e), A, B, alpha, beta], 1)


def _theta(law: ParametricLaw, runs: _Runs) -> Float[np.ndarray, "5"]:
    a = np.log(law.A) - law.alpha * runs.size_centre
    b = np.log(law.B) - law.beta * runs.data_centre
    return np.array([a, b, np.log(law.E), law.alpha, law.beta])
