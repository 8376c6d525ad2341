# SPDX-License-Identifier: Apache-2.0
"""Scores of forecasts, summed over starts as they come: errors, anomaly correlation, spectra.

Rows of the grid are weighted by cos(latitude). Over the starts, squared errors are averaged before
the root is taken, and anomaly correlations as they are (the rules of WeatherBench 2, arXiv
2308.15560). Sums over the sphere are float32, sums over starts float64.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.sphere.grid import Grid
from sqzjax.sphere.harmonics import AnalysisTables, Transform
from sqzjax.sphere.transform import forward, power_spectrum
from sqzjax.typing import Array, Bool, Float

Sums = dict[str, Array]


@partial(jax.jit, static_argnames=("grid",))
def score(
    prediction: Float[Array, "B C H W"],
    truth: Float[Array, "B C H W"],
    climate: Float[Array, "B C H W"],
    weight: Float[Array, "B"],
    grid: Grid,
    valid: Bool[Array, "B C H W"] | None = None,
) -> Sums:
    """Return sums over samples of square error, error and anomaly correlation, each `[C]`.

    Error is forecast minus truth; fields and sums are in normalised units. `climate` is the mean
    state at the valid time, from which anomalies deviate. Only points that are `valid` count;
    "count" is the weight of the samples that have any.
    """
    areas = jnp.asarray(grid.area_weights(), jnp.float32)[:, None] / np.prod(grid.shape)
    valid = jnp.ones(truth.shape, bool) if valid is None else valid
    share = (valid * areas).sum((-2, -1))  # B C

    def mean(fields: Array) -> Array:
        whole = jnp.where(share > 0, share, 1.0)
        return (jnp.where(valid, fields, 0.0) * areas).sum((-2, -1)) / whole

    error, ahead, there = prediction - truth, prediction - climate, truth - climate
    product = mean(ahead * there)
    size = jnp.sqrt(mean(jnp.square(ahead)) * mean(jnp.square(there)))
    # A forecast of the climate itself has no anomaly and says nothing: correlation 0. One that
    # has diverged has none at all.
    correlation = jnp.where(size == 0, 0.0, product / jnp.where(jnp.isinf(size), jnp.nan, size))
    each = {"square": mean(jnp.square(error)), "error": mean(error), "correlation": correlation}
    counts = weight[:, None] * (share > 0)
    return {name: (counts * values).sum(0) for name, values in each.items()} | {
        "count": counts.sum(0)
    }


@partial(jax.jit, static_argnames=("transform",))
def spectrum(
    fields: Float[Array, "B C H W"],
    weight: Float[Array, "B"],
    transform: Transform,
    tables: AnalysisTables,
) -> Array:
    """Return the sum over samples of the power at each degree, `[C, l]`, in normalised units."""
    return jnp.einsum("b,bcl->cl", weight, power_spectrum(forward(fields, transform, tables)))


class Scores:
    """Sums of one forecaster, by lead."""

    def __init__(self, leads: int):
        self._sums: list[dict[str, np.ndarray]] = [{} for _ in range(leads)]

    def add(self, lead: int, sums: Mapping[str, Any]) -> None:
        """Add sums over some starts at a lead; "count" is how many they are."""
        kept = self._sums[lead]
        for name, values in sums.items():
            kept[name] = kept.get(name, 0.0) + np.asarray(values, np.float64)

    def mean(self, name: str) -> np.ndarray:
        """Return the mean over starts, `[leads, ...]`; NaN where nothing counts."""
        with np.errstate(invalid="ignore"):
            return np.stack([sums[name] / sums["count"] for sums in self._sums])

    @property
    def rmse(self) -> np.ndarray:
        """Root of the mean square error, `[leads, C]`."""
        return np.sqrt(self.mean("square"))


def band_power(spectra: np.ndarray, band: tuple[float, float]) -> np.ndarray:
    """Return the power of the degrees in a band, `[...]` from `[..., l]`.

    The band is above and up to fractions of the largest degree.
    """
    return spectra[..., in_band(spectra.shape[-1], band)].sum(-1)


def in_band(degrees: int, band: tuple[float, float]) -> np.ndarray:
    """Tell which of the degrees 0, 1, ... lie in a band, `[degrees]`."""
    share = np.arange(degrees) / max(1, degrees - 1)
    return (share > band[0]) & (share <= band[1])


def sharpness(
    predicted: np.ndarray, true: np.ndarray, band: tuple[float, float] = (2 / 3, 1.0)
) -> np.ndarray:
    """Return small-scale power of forecasts over the truth's, geometric mean over channels.

    `[leads]` from two spectra `[leads, C, l]`: 1 is as sharp as the truth, less is blurred, more is
    noise. Channels without small scales in truth do not count; NaN where none counts.
    """
    ours, theirs = band_power(predicted, band), band_power(true, band)
    counts = theirs > 0
    tiny = np.finfo(np.float64).tiny
    ratio = np.log(np.maximum(ours, tiny) / np.where(counts, theirs, 1.0))
    mean = np.where(counts, ratio, 0.0).sum(-1) / np.maximum(counts.sum(-1), 1)
    return np.where(counts.any(-1), np.exp(mean), np.nan)
