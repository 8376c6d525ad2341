# SPDX-License-Identifier: Apache-2.0
"""Scores of forecasts, summed over starts as they come: errors, anomaly correlation, spectra.

Rows are weighted by cos(latitude). Over the starts, squared errors are averaged before the root is
taken, and anomaly correlations as they are (the rules of WeatherBench 2, arXiv 2308.15560). Sums
over the sphere are float32, sums over starts float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.sphere.grid import Grid
from sqzjax.sphere.harmonics import Transform
from sqzjax.sphere.transform import forward, power_spectrum
from sqzjax.typing import Array, Float

Sums = dict[str, Array]


@partial(jax.jit, static_argnames=("grid",))
def score(
    prediction: Float[Array, "B C H W"],
    truth: Float[Array, "B C H W"],
    climate: Float[Array, "B C H W"],
    weight: Float[Array, "B"],
    grid: Grid,
) -> Sums:
    """Return sums over rows of square error, error and anomaly correlation, each `[C]`."""
    areas = jnp.asarray(grid.area_weights(), jnp.float32)[:, None] / np.prod(grid.shape)

    def mean(fields: Array) -> Array:
        return (fields * areas).sum((-2, -1))

    error, ahead, there = prediction - truth, prediction - climate, truth - climate
    product = mean(ahead * there)
    size = jnp.sqrt(mean(jnp.square(ahead)) * mean(jnp.square(there)))
    # A forecast of the climate itself has no anomaly and says nothing: correlation 0.
    correlation = jnp.where(size > 0, product / jnp.where(size > 0, size, 1.0), 0.0)
    each = {"square": mean(jnp.square(error)), "error": mean(error), "correlation": correlation}
    return {name: weight @ values for name, values in each.items()}


@partial(jax.jit, static_argnames=("transform",))
def spectrum(
    fields: Float[Array, "B C H W"],
    weight: Float[Array, "B"],
    transform: Transform,
    tables: tuple[Array, ...],
) -> Array:
    """Return the sum over rows of the power at each degree, `[C, l]`."""
    return jnp.einsum("b,bcl->cl", weight, power_spectrum(forward(fields, transform, tables)))


class Scores:
    """Sums of one forecaster, by lead."""

    def __init__(self, leads: int):
        self._sums: list[dict[str, np.ndarray]] = [{} for _ in range(leads)]
        self._count = np.zeros(leads)

    def add(self, lead: int, sums: Sums, count: float) -> None:
        """Add sums over `count` starts at a lead."""
        kept = self._sums[lead]
        for name, values in sums.items():
            kept[name] = kept.get(name, 0.0) + np.asarray(values, np.float64)
        self._count[lead] += count

    def mean(self, name: str) -> np.ndarray:
        """Return the mean over starts, `[leads, ...]`."""
        means = [sums[name] / count for sums, count in zip(self._sums, self._count)]
        return np.stack(means)

    @property
    def rmse(self) -> np.ndarray:
        """Root of the mean square error, `[leads, C]`."""
        return np.sqrt(self.mean("square"))


def band_power(spectra: np.ndarray, band: tuple[float, float]) -> np.ndarray:
    """Return the power of the degrees in a band, `[...]` from `[..., l]`.

    The band is above and up to fractions of the largest degree.
    """
    share = np.arange(spectra.shape[-1]) / max(1, spectra.shape[-1] - 1)
    return spectra[..., (share > band[0]) & (share <= band[1])].sum(-1)


def sharpness(
    predicted: np.ndarray, true: np.ndarray, band: tuple[float, float] = (2 / 3, 1.0)
) -> np.ndarray:
    """Return small-scale power of forecasts over the truth's, geometric mean over channels.

    `[leads]` from two spectra `[leads, C, l]`: 1 is as sharp as the truth, less is blurred, more is
    noise. Channels without small scales in truth do not count.
    """
    ours, theirs = band_power(predicted, band), band_power(true, band)
    counts = theirs > 0
    tiny = np.finfo(np.float64).tiny
    ratio = np.log(np.maximum(ours, tiny) / np.where(counts, theirs, 1.0)) * counts
    return np.exp(ratio.sum(-1) / np.maximum(counts.sum(-1), 1))
