# SPDX-License-Identifier: Apache-2.0
"""Mean states by time of year and day, fitted to the training period in one stream over it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from eval.forecast_config import Climatology
from sqzjax.errors import DataError
from sqzjax.typing import Array

_YEAR, _DAY = 365.2425, 1.0
_CHUNK_BYTES = 1 << 27
_WORST_CONDITION = 1e4


@dataclass(frozen=True)
class Climate:
    """Waves of the year and the day, with a field of each as coefficient."""

    config: Climatology
    coefficients: Array = field(repr=False)  # waves C H W

    def __call__(self, when: np.ndarray) -> Array:
        """Return the mean state at each of these times, float32 `[B, C, H, W]`."""
        return _combine(jnp.asarray(basis(self.config, when), jnp.float32), self.coefficients)


@jax.jit
def _combine(waves: Array, coefficients: Array) -> Array:
    return jnp.einsum("bp,pchw->bchw", waves, coefficients, precision="highest")


def basis(config: Climatology, when: np.ndarray) -> np.ndarray:
    """Return 1 and the waves at these times (datetime64), float64 `[B, waves]`."""
    days = (when - np.datetime64("2000-01-01", "ns")) / np.timedelta64(1, "D")
    columns = [np.ones(len(days))]
    for count, period in ((config.annual, _YEAR), (config.daily, _DAY)):
        for number in range(1, count + 1):
            angle = 2.0 * np.pi * number * days / period
            columns += [np.cos(angle), np.sin(angle)]
    return np.stack(columns, axis=1)


def choose(
    config: Climatology, indices: np.ndarray, when: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to fit to, and the waves at their times; DataError if they are too few."""
    if not len(indices):
        raise DataError(
            "the archive has no state of the training period, which climatology is fitted to; "
            "give one that has some as archive"
        )
    if len(indices) > config.states:
        chosen = np.random.default_rng(0).choice(len(indices), config.states, replace=False)
        chosen.sort()
        indices, when = indices[chosen], when[chosen]
    waves = basis(config, when)
    if np.linalg.cond(waves.T @ waves) > _WORST_CONDITION:
        raise DataError(
            f"{len(indices)} states from {when.min()} to {when.max()} do not determine "
            f"{config.annual} waves of the year and {config.daily} of the day; lower "
            "climatology.annual or climatology.daily"
        )
    return indices, waves


def fit(
    config: Climatology,
    read: Callable[[np.ndarray], np.ndarray],
    indices: np.ndarray,
    when: np.ndarray,
    state_bytes: int,
) -> Climate:
    """Fit to the states that `read` returns for `indices`, times of the training period.

    `when` holds the time of each of them. DataError as `choose`.
    """
    indices, waves = choose(config, indices, when)
    inverse = np.linalg.solve(waves.T @ waves, waves.T)  # waves, states
    total: np.ndarray | None = None
    size = max(1, _CHUNK_BYTES // state_bytes)
    for begin in range(0, len(indices), size):
        part = slice(begin, begin + size)
        added = np.tensordot(inverse[:, part], read(indices[part]), axes=1)
        total = added if total is None else total + added
    return Climate(config, jnp.asarray(total, jnp.float32))
