# SPDX-License-Identifier: Apache-2.0
"""Associated Legendre functions and latitude quadrature, in float64 numpy.

Functions of order m are computed upwards in degree with the factor cos(latitude)^m left out
(Holmes and Featherstone, J. Geodesy 76, 2002), which neither over- nor underflows up to degree
`MAX_DEGREE`; the plain recurrence loses high orders near the poles. Imports no jax.
"""

from collections.abc import Iterator

import numpy as np

from sqzjax.sphere.grid import Grid

MAX_DEGREE = 2000
_SCALE = 1e-280


def legendre(latitude: np.ndarray, degree: int, orders: range) -> np.ndarray:
    """Return orthonormal associated Legendre functions, float64 `[orders, degree + 1, H]`.

    `latitude` is in degrees. Entry (m, l) times exp(i m longitude) is the spherical harmonic Y_lm
    with the Condon-Shortley phase, whose square integrates to 1 over the unit sphere; it is zero
    where m > l.
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"degree={degree} must lie in [0, {MAX_DEGREE}]; lower it")
    m = np.array(orders, np.float64)
    table = np.zeros((len(m), degree + 1, len(latitude)))
    x, cosine = np.sin(np.radians(latitude)), np.cos(np.radians(latitude))
    for place, values in _recurrence(x, degree, orders):
        table[:, place] = values
    logarithm = np.log(cosine)  # finite: the cosine of the poles is 6e-17, not zero
    with np.errstate(under="ignore"):
        power = np.exp(m[:, None] * logarithm - np.log(_SCALE))
        return table * power[:, None, :]


def _recurrence(x: np.ndarray, degree: int, orders: range) -> Iterator[tuple[int, np.ndarray]]:
    """Yield degree l and the functions `[orders, H]` of it, over cos^m and times `_SCALE`."""
    m = np.array(orders, np.int64)
    odd = 2.0 * np.arange(1, max(degree, 1) + 1) + 1.0
    steps = np.sqrt(odd / (odd - 1.0))
    seeds = np.cumprod(np.concatenate([[np.sqrt(0.25 / np.pi)], steps])) * _SCALE
    before = np.zeros((len(m), len(x)))
    last = np.zeros_like(before)
    for l in range(degree + 1):  # noqa: E741
        square, order = float(l * l), np.minimum(m, max(l - 1, 0)).astype(np.float64)
        rise = np.sqrt((4.0 * square - 1.0) / (square - order**2)) if l else np.ones(len(m))
        fall = np.sqrt(
            np.maximum((l - 1.0) ** 2 - order**2, 0.0) / max(4.0 * (l - 1.0) ** 2 - 1, 1)
        )
        values = rise[:, None] * (x * last - fall[:, None] * before)
        values[m == l] = (-1.0) ** l * seeds[l]
        values[m > l] = 0.0
        before, last = last, values
        yield l, values


def quadrature(grid: Grid) -> np.ndarray:
    """Return weights of the rows whose sum over f(sin latitude) is its integral over [-1, 1].

    Float64 `[H]`, north first. Exact for polynomials of degree 2H - 1 on Gauss nodes, of degree
    H - 1 (one for each row) on the other layouts: Clenshaw-Curtis with both poles as rows, Fejer's
    first rule on cells. Without the south pole they follow from Clenshaw-Curtis weights and the
    value there of the polynomial through all rows.
    """
    rows = grid.latitudes
    match grid.layout:
        case "gauss":
            return np.polynomial.legendre.leggauss(rows)[1][::-1].copy()
        case "equiangular":
            return _clenshaw_curtis(rows)
        case "cells":
            angles = (np.arange(rows) + 0.5) * np.pi / rows
            return 2.0 / rows * _cosine_moments(angles, (rows - 1) // 2)
        case "no_south_pole":
            weights = _clenshaw_curtis(rows + 1)
            signs = 2.0 * (-1.0) ** np.arange(rows)
            signs[0] = 1.0
            return weights[:-1] - (-1.0) ** rows * weights[-1] * signs
        case _:
            raise ValueError(
                f"layout={grid.layout!r} covers a piece of the sphere, which has no spherical "
                "harmonics; use a loss and metrics without spectra there"
            )


def _clenshaw_curtis(rows: int) -> np.ndarray:
    last = rows - 1
    weights = 2.0 / last * _cosine_moments(np.arange(rows) * np.pi / last, last // 2, last % 2 == 0)
    weights[[0, -1]] /= 2.0
    return weights


def _cosine_moments(angles: np.ndarray, terms: int, halve_last: bool = False) -> np.ndarray:
    """Return 1 - 2 sum_{j=1..terms} cos(2 j angle) / (4 j^2 - 1), the last term halved or not."""
    j = np.arange(1, terms + 1)
    factors = 2.0 / (4.0 * j**2 - 1.0)
    if halve_last and terms:
        factors[-1] /= 2.0
    return 1.0 - np.cos(2.0 * np.outer(angles, j)) @ factors


def analysis_matrices(grid: Grid, table: np.ndarray, orders: range) -> np.ndarray:
    """Return what takes rows to coefficients, float64 `[orders, degree + 1, H]`.

    For each order the weighted least-squares inverse of the functions in `table`: quadrature where
    that is exact, and an exact inverse beyond, up to the degrees that the rows determine.
    """
    weights = quadrature(grid)
    exact = 2 * grid.latitudes - 1 if grid.layout == "gauss" else grid.latitudes - 1
    if 2 * (table.shape[1] - 1) <= exact:
        return 2.0 * np.pi * weights * table
    # Without the south pole the weight of the north pole may be zero, or rounded below it.
    root = np.sqrt(np.maximum(weights, 0.0))
    result = np.zeros_like(table)
    for place, order in enumerate(orders):
        functions = table[place, order:] * root
        result[place, order:] = np.linalg.solve(functions @ functions.T, functions * root)
    return result
