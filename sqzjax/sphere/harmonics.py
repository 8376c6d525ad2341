# SPDX-License-Identifier: Apache-2.0
"""Which spherical harmonics a grid determines, and the tables that take fields to them and back.

Tables are made in float64 and stored in float32, in blocks of orders without the degrees that none
of them has: about 2 D^2 H bytes for degree D and H rows, once for each direction (0.1 GB at degree
255 and 0.8 GB at full degree for 720 rows). Imports no jax.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from sqzjax.sphere.grid import Grid
from sqzjax.sphere.legendre import analysis_matrices, legendre, quadrature

BLOCK = 64
"""Orders of one table; degrees below its first order are left out."""


class AnalysisTables(NamedTuple):
    """What takes rows to coefficients: float32 `[m, l, H]` by blocks of orders."""

    blocks: tuple


class SynthesisTables(NamedTuple):
    """What takes coefficients to rows: float32 `[m, l, H]` by blocks of orders."""

    blocks: tuple


@dataclass(frozen=True)
class Transform:
    """Which harmonics of which grid: degrees 0 to `truncation`, or all that the grid determines.

    These are H - 1 on Gauss nodes and cells, H - 2 with a row at a pole, and below half the number
    of columns: for them a round trip gives back every coefficient. Hashable, static under `jit`.
    """

    grid: Grid
    truncation: int | None = None

    def __post_init__(self) -> None:
        quadrature(self.grid)  # refuses a piece of the sphere
        most = max_degree(self.grid)
        if self.truncation is not None and not 0 <= self.truncation <= most:
            rows, columns = self.grid.shape
            raise ValueError(
                f"truncation={self.truncation} must lie in [0, {most}], the degrees that "
                f"{rows} x {columns} points ({self.grid.layout}) determine; or null for all"
            )

    @property
    def degree(self) -> int:
        """The largest degree l, and the largest order m."""
        return max_degree(self.grid) if self.truncation is None else self.truncation

    @property
    def table_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """The shapes of the tables' blocks, the same in both directions; they are not computed."""
        rows, degrees = self.grid.latitudes, self.degree + 1
        return tuple((len(orders), degrees - orders[0], rows) for orders in _blocks(self.degree))

    def analysis_tables(self) -> AnalysisTables:
        """Return what `forward` multiplies by.

        Kept for the next call. Takes a minute for 720 rows at full degree.
        """
        return _analysis_tables(self.grid, self.degree)

    def synthesis_tables(self) -> SynthesisTables:
        """Return what `inverse` multiplies by; kept for the next call."""
        return _synthesis_tables(self.grid, self.degree)


def max_degree(grid: Grid) -> int:
    """Return the largest degree that the points of a grid determine."""
    lost = 2 if grid.layout in ("equiangular", "no_south_pole") else 1
    return max(0, min(grid.latitudes - lost, (grid.longitudes - 1) // 2))


def _blocks(degree: int) -> list[range]:
    return [range(m, min(m + BLOCK, degree + 1)) for m in range(0, degree + 1, BLOCK)]


@cache
def _synthesis_tables(grid: Grid, degree: int) -> SynthesisTables:
    return SynthesisTables(
        tuple(
            legendre(grid.latitude(), degree, orders)[:, orders[0] :].astype(np.float32)
            for orders in _blocks(degree)
        )
    )


@cache
def _analysis_tables(grid: Grid, degree: int) -> AnalysisTables:
    tables = []
    for orders in _blocks(degree):
        table = legendre(grid.latitude(), degree, orders)
        inverse = analysis_matrices(grid, table, orders)
        tables.append(inverse[:, orders[0] :].astype(np.float32))
    return AnalysisTables(tuple(tables))
