# SPDX-License-Identifier: Apache-2.0
"""Real spherical-harmonic transform at the true latitudes of a grid, and spectra.

FFT over longitudes, then one matrix product per order with tables of Legendre functions, whose size
`sqzjax.sphere.harmonics` tells. Under `jit` they become constants of the program, or arguments
where `tables` is given, which large ones should be.

Coefficients are complex64 `[..., l, m]` for m >= 0, zero where m > l, of orthonormal harmonics with
the Condon-Shortley phase: the power spectrum of a field sums to its square integrated over the unit
sphere (4 pi times its mean square).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.sphere.grid import Grid
from sqzjax.sphere.harmonics import BLOCK, Transform
from sqzjax.typing import Array, Float, Shaped

Tables = Sequence[Any]
"""Arrays `[m, l, H]` of `Transform.analysis_tables()` or `synthesis_tables()`."""


def forward(
    field: Float[Array, "*batch H W"], transform: Transform, tables: Tables | None = None
) -> Shaped[Array, "*batch l m"]:
    """Return the coefficients of a real field."""
    _check(field.shape[-2:], transform)
    tables = transform.analysis_tables() if tables is None else tables
    degree = transform.degree
    waves = jnp.fft.rfft(field.astype(jnp.float32), norm="forward")[..., : degree + 1]
    # Longitudes are counted from the first column here, from Greenwich in the coefficients.
    waves = waves * jnp.conj(_phases(transform.grid, degree))
    parts = jnp.stack([waves.real, waves.imag])  # real products: the tables are real
    blocks = []
    for first, table in zip(range(0, degree + 1, BLOCK), tables):
        rows = parts[..., first : first + BLOCK]
        block = jnp.einsum(
            "...km,mlk->...lm", rows, table, precision="highest", preferred_element_type=jnp.float32
        )
        above = [(0, 0)] * (block.ndim - 2) + [(first, 0), (0, 0)]
        blocks.append(jnp.pad(block, above))
    real, imaginary = jnp.concatenate(blocks, axis=-1)
    return jax.lax.complex(real, imaginary)


def inverse(
    coefficients: Shaped[Array, "*batch l m"], transform: Transform, tables: Tables | None = None
) -> Float[Array, "*batch H W"]:
    """Return the real field of coefficients; imaginary parts at m = 0 do not matter."""
    degree = transform.degree
    if coefficients.shape[-2:] != (degree + 1, degree + 1):
        raise ValueError(
            f"coefficients of shape {coefficients.shape} must end in {(degree + 1, degree + 1)}, "
            "the degrees and orders of the transform"
        )
    tables = transform.synthesis_tables() if tables is None else tables
    parts = jnp.stack([coefficients.real, coefficients.imag])
    blocks = []
    for first, table in zip(range(0, degree + 1, BLOCK), tables):
        block = jnp.einsum(
            "...lm,mlk->...km",
            parts[..., first:, first : first + BLOCK],
            table,
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        blocks.append(block)
    real, imaginary = jnp.concatenate(blocks, axis=-1)
    waves = jax.lax.complex(real, imaginary) * _phases(transform.grid, degree)
    return jnp.fft.irfft(waves, n=transform.grid.longitudes, norm="forward")


def power_spectrum(coefficients: Shaped[Array, "*batch l m"]) -> Float[Array, "*batch l"]:
    """Return the power of each degree: |x_l0|^2 + 2 sum_{m>0} |x_lm|^2."""
    return cross_spectrum(coefficients, coefficients)


def cross_spectrum(
    first: Shaped[Array, "*batch l m"], second: Shaped[Array, "*batch l m"]
) -> Float[Array, "*batch l"]:
    """Return Re(x_l0 y_l0* + 2 sum_{m>0} x_lm y_lm*) of each degree."""
    products = first.real * second.real + first.imag * second.imag
    return 2.0 * products.sum(-1) - products[..., 0]


def _phases(grid: Grid, degree: int) -> np.ndarray:
    angle = np.radians(grid.longitude()[0]) * np.arange(degree + 1)
    return np.exp(1j * angle).astype(np.complex64)


def _check(shape: tuple[int, ...], transform: Transform) -> None:
    if shape != transform.grid.shape:
        raise ValueError(f"a field of {shape} points is not on the grid {transform.grid.shape}")
