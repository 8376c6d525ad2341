# SPDX-License-Identifier: Apache-2.0
"""Uncertainty of IsoFLOP laws: optima of thousands of resampled sweeps, all fitted together.

`resampled_optima` draws runs again, or their residuals; `akima_optima` draws the noise of a loss
again and interpolates instead of fitting a parabola (arXiv 2406.19146). Residuals are the default:
a budget has 4 to 8 runs, and drawing among so few runs leaves many sweeps without a minimum.
Memory is `resamples x runs` floats per budget.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.interpolate import Akima1DInterpolator

from sqzjax.analysis.scaling_laws import (
    IsoFlop,
    Optimum,
    Vector,
    Vertices,
    interpolate,
    power_laws,
    vertices,
)

Scheme = Literal["residuals", "runs"]
_FINEST = 1024


class OptimaSamples(NamedTuple):
    """Optima of resampled sweeps, NaN where a resample has no minimum at that budget."""

    budgets: Float[np.ndarray, "K"]
    size: Float[np.ndarray, "R K"]
    loss: Float[np.ndarray, "R K"]
    data: Float[np.ndarray, "R K"]

    def refused(self) -> Float[np.ndarray, "K"]:
        """Return the share of resamples without a minimum, for each budget."""
        return np.isnan(self.size).mean(0)


def resampled_optima(
    fit: IsoFlop,
    budgets: Vector,
    sizes: Vector,
    losses: Vector,
    data: Vector | None = None,
    *,
    scheme: Scheme = "residuals",
    resamples: int = 4000,
    seed: int = 0,
    log_loss: bool = False,
) -> OptimaSamples:
    """Fit the accepted budgets of `fit` again and again.

    `runs` draws the runs of each budget with replacement. `residuals` keeps every run and draws
    relative residuals of all parabolas, made larger by what the parabola absorbed (leverage) and
    scaled by a draw of their deviation given its degrees of freedom.
    """
    generator = np.random.default_rng(seed)
    pool = _pooled(fit, budgets, sizes, losses, log_loss) if scheme == "residuals" else None
    # The deviation of so few residuals is itself uncertain; without this, intervals are too short.
    freedom = max(sum(optimum.points - 3 for optimum in fit.optima), 1)
    spread = np.sqrt(freedom / generator.chisquare(freedom, (resamples, 1)))
    columns = []
    for optimum in fit.optima:
        own = budgets == optimum.budget
        drawn, counts = np.broadcast_to(losses[own], (resamples, own.sum())), None
        if pool is None:
            share = np.full(own.sum(), 1 / own.sum())
            counts = generator.multinomial(own.sum(), share, resamples).astype(float)
        else:
            fitted = _fitted(optimum, sizes[own], log_loss)
            drawn = fitted * np.exp(spread * generator.choice(pool, (resamples, own.sum())))
        found = vertices(sizes[own], drawn, counts, log_loss=log_loss)
        columns.append(_column(found, sizes[own], None if data is None else data[own]))
    return _samples(fit, columns)


def residual_deviation(
    fit: IsoFlop, budgets: Vector, sizes: Vector, losses: Vector, *, log_loss: bool = False
) -> float:
    """Return the relative deviation of a loss from its parabola: an estimate of the noise."""
    pool = _pooled(fit, budgets, sizes, losses, log_loss)
    return float(np.sqrt((pool**2).mean()))


def _pooled(
    fit: IsoFlop, budgets: Vector, sizes: Vector, losses: Vector, log_loss: bool
) -> Float[np.ndarray, "m"]:
    """Relative residuals of all budgets, each divided by what its leverage leaves of it."""
    pool = []
    for optimum in fit.optima:
        own = budgets == optimum.budget
        logs = np.log(sizes[own])
        logs = (logs - logs.mean()) / np.ptp(logs)
        basis = np.linalg.qr(np.stack([logs**2, logs, np.ones_like(logs)], 1))[0]
        left = 1 - (basis**2).sum(1)
        residuals = np.log(losses[own] / _fitted(optimum, sizes[own], log_loss))
        # Three runs are met exactly and tell nothing about the noise.
        pool += [one / np.sqrt(rest) for one, rest in zip(residuals, left) if rest > 1e-6]
    if not pool:
        raise ValueError(
            "every budget has 3 runs, which a parabola meets exactly: there are no residuals to "
            "draw; give a noise, or run a fourth size"
        )
    return np.array(pool) - np.mean(pool)


def _fitted(optimum: Optimum, sizes: Vector, log_loss: bool) -> Vector:
    values = np.polyval(optimum.coefficients, np.log(sizes))
    return np.exp(values) if log_loss else values


def _column(found: Vertices, sizes: Vector, data: Vector | None) -> list[Float[np.ndarray, "R"]]:
    """Return size, loss and data with NaN where refused."""
    seen = (
        np.full_like(found.size, np.nan) if data is None else interpolate(found.size, sizes, data)
    )
    return [
        np.where(found.reason == 0, values, np.nan) for values in (found.size, found.loss, seen)
    ]


def _samples(fit: IsoFlop, columns: list[list[Float[np.ndarray, "R"]]]) -> OptimaSamples:
    budgets = np.array([optimum.budget for optimum in fit.optima])
    size, loss, data = (np.stack(parts, 1) for parts in zip(*columns))
    return OptimaSamples(budgets, size, loss, data)


def akima_optima(
    fit: IsoFlop,
    budgets: Vector,
    sizes: Vector,
    losses: Vector,
    data: Vector | None = None,
    *,
    noise: float,
    resamples: int = 1000,
    seed: int = 0,
) -> OptimaSamples:
    """Redraw each loss with a relative noise and take the minimum of Akima's interpolant.

    The interpolant is of ln L over ln N; a minimum at either end is dropped. Runs of one size and
    budget are averaged.
    """
    if noise < 0:
        raise ValueError(f"noise={noise} must be >= 0, the relative deviation of a loss")
    generator = np.random.default_rng(seed)
    columns = []
    for optimum in fit.optima:
        own = budgets == optimum.budget
        logs, group = np.unique(np.log(sizes[own]), return_inverse=True)
        drawn = np.log(losses[own]) + noise * generator.standard_normal((resamples, own.sum()))
        values = np.stack([drawn[:, group == one].mean(1) for one in range(len(logs))])
        fine = np.linspace(logs[0], logs[-1], _FINEST)
        curves = Akima1DInterpolator(logs, values)(fine)
        place = curves.argmin(0)
        reason = np.where((place == 0) | (place == _FINEST - 1), 2, 0)
        found = Vertices(
            np.exp(fine[place]), np.exp(curves.min(0)), np.empty((resamples, 0)), reason
        )
        columns.append(_column(found, sizes[own], None if data is None else data[own]))
    return _samples(fit, columns)


def with_known_optima(
    samples: OptimaSamples,
    known: Sequence[tuple[float, float, float]],
    *,
    deviation: float = 0.0,
    seed: int = 0,
) -> OptimaSamples:
    """Add optima (budget, size, loss) known from elsewhere, redrawn with a relative deviation."""
    generator = np.random.default_rng((seed, 1))
    rows = len(samples.size)
    budgets, size, loss = (np.array(values) for values in zip(*known))
    sizes, losses = (
        values * np.exp(deviation * generator.standard_normal((rows, len(known))))
        for values in (size, loss)
    )
    return OptimaSamples(
        np.concatenate([budgets, samples.budgets]),
        np.concatenate([sizes, samples.size], 1),
        np.concatenate([losses, samples.loss], 1),
        np.concatenate([np.full_like(sizes, np.nan), samples.data], 1),
    )


def law_samples(samples: OptimaSamples) -> dict[str, Float[np.ndarray, "R 2"]]:
    """Return coefficient and exponent of size, loss and data against compute, a row a resample."""
    named = {"size": samples.size, "loss": samples.loss, "data": samples.data}
    return {name: power_laws(samples.budgets, values) for name, values in named.items()}


def interval(
    values: Float[np.ndarray, "R ..."], confidence: float = 0.95
) -> Float[np.ndarray, "2 ..."]:
    """Return the percentile interval of the resamples that gave a value; NaN if none did."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    tail = 50 * (1 - confidence)
    if np.isnan(values).all():
        return np.full((2, *values.shape[1:]), np.nan)
    return np.nanpercentile(values, [tail, 100 - tail], axis=0)
