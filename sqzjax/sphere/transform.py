# SPDX-License-Identifier: Apache-2.0
"""Real spherical-harmonic transform at the true latitudes of a grid, and spectra.

FFT over longitudes, then one matrix product per order with tables of Legendre functions, whose size
`sqzjax.sphere.harmonics` tells. Under `jit` they become constants of the program, or arguments
where `tables` is given, which large ones should be.

Coefficients are complex64 `[..., l, m]` for m >= 0, zero where m > l, of orthonormal harmonics with
the Condon-Shortley phase: the power spectrum of a field sums to its square integrated over the unit
sphere (4 pi times its mean square).
"""

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.sphere.grid import Grid
from sqzjax.sphere.harmonics import BLOCK, AnalysisTables, SynthesisTables, Transform
from sqzjax.typing import Array, Float, Shaped

Tables = AnalysisTables | SynthesisTables


def forward(
    field: Float[Array, "*batch H W"], transform: Transform, tables: Tables | None = None
) -> Shaped[Array, "*batch l m"]:
    """Return the coefficients of a real field, complex64 by degree l and order m.

    `tables` are `transform.analysis_tables()`, on the host or as arrays of the program; without
    them they become constants of it. ValueError if they are others, or the field is on another
    grid.
    """
    if field.shape[-2:] != transform.grid.shape:
        raise ValueError(
            f"a field of {field.shape[-2:]} points is not on the grid {transform.grid.shape}"
        )
    tables = transform.analysis_tables() if tables is None else tables
    _check(tables, AnalysisTables, transform)
    degree = transform.degree
    waves = jnp.fft.rfft(field.astype(jnp.float32), norm="forward")[..., : degree + 1]
    # Longitudes are counted from the first column here, from Greenwich in the coefficients.
    waves = waves * jnp.conj(_phases(transform.grid, degree))
    parts = jnp.stack([waves.real, waves.imag])  # real products: the tables are real
    blocks = []
    for first, table in zip(range(0, degree + 1, BLOCK), tables.blocks, strict=True):
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
    """Return the real field of coefficients, float32; imaginary parts at m = 0 do not matter.

    `tables` are `transform.synthesis_tables()`, as for `forward`. ValueError if they are others, or
    the coefficients are of other degrees.
    """
    degree = transform.degree
    if coefficients.shape[-2:] != (degree + 1, degree + 1):
        raise ValueError(
            f"coefficients of shape {coefficients.shape} must end in {(degree + 1, degree + 1)}, "
            "the degrees and orders of the transform"
        )
    tables = transform.synthesis_tables() if tables is None else tables
    _check(tables, SynthesisTables, transform)
    parts = jnp.stack([coefficients.real, coefficients.imag])
    blocks = []
    for first, table in zip(range(0, degree + 1, BLOCK), tables.blocks, strict=True):
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


def _check(tables: Tables, wanted: type[Tables], transform: Transform) -> None:
    if not isinstance(tables, wanted):
        raise ValueError(f"tables are {type(tables).__name__}, and must be {wanted.__name__}")
    shapes = tuple(table.shape for table in tables.blocks)
    if shapes != transform.table_shapes:
        raise ValueError(
            f"tables of the shapes {shapes} are of another transform; this one's are "
            f"{transform.table_shapes}"
        )
