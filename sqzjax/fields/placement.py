# SPDX-License-Identifier: Apache-2.0
"""Recognise the grid of an archive from its coordinates. Nothing here imports jax.

Archives count latitudes up or down and longitudes from -180 or from 0; the result says which of
their rows and columns to take, in which order, so that rows go south and columns eastward. Rows
that do not reach from pole to pole are a region, which is not periodic, also where its columns go
all the way round (60 S to 60 N): emulators see an edge there.
"""

import math
from typing import NamedTuple

import numpy as np

from sqzjax.errors import DataError
from sqzjax.sphere.grid import Grid

_LAYOUTS = ("equiangular", "no_south_pole", "cells", "gauss")
_SLACK = 0.01  # of a grid step: coordinates are stored in float32, Gaussian ones with few digits

_ROUNDING = 1e-3  # degrees that rounded steps may add up to


class Placement(NamedTuple):
    """A grid, and the archive's row and column numbers in its order."""

    grid: Grid
    rows: np.ndarray  # int64 H
    columns: np.ndarray  # int64 W


def recognise(
    latitude: np.ndarray, longitude: np.ndarray, *, drop_south_pole: bool = False
) -> Placement:
    """Return the grid of these coordinates (degrees); DataError if they form none."""
    latitude, longitude = (np.asarray(a, np.float64) for a in (latitude, longitude))
    if min(latitude.size, longitude.size) < 2 or latitude.ndim != 1 or longitude.ndim != 1:
        raise DataError(
            f"latitudes {latitude.shape} and longitudes {longitude.shape} must be two lists of at "
            "least 2 values; curvilinear and unstructured grids need regridding first"
        )
    rows = np.argsort(-latitude, kind="stable")
    if drop_south_pole:
        if not np.isclose(latitude[rows[-1]], -90.0):
            raise DataError(
                f"drop_south_pole=true, yet the last row lies at {latitude[rows[-1]]:g} degrees; "
                "remove the setting"
            )
        rows = rows[:-1]
    columns, west, step = _order_columns(longitude)
    north_south = latitude[rows]
    if abs(step * longitude.size - 360) < _SLACK * step:
        for layout in _LAYOUTS:
            grid = Grid(latitudes=rows.size, longitudes=columns.size, layout=layout, west=west)
            if _fits(grid, north_south):
                return Placement(grid, rows, columns)
    return Placement(_region(north_south, columns.size, west, step), rows, columns)


def _order_columns(longitude: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return the columns eastward from the widest gap, the first longitude and the step."""
    east = np.mod(longitude, 360.0)
    # A float just below 0 must not become the last column.
    east[np.isclose(east, 360.0, atol=1e-4)] = 0.0
    columns = np.argsort(east, kind="stable")
    gaps = np.diff(east[columns], append=east[columns[0]] + 360.0)
    if np.isclose(gaps, 0).any():
        raise DataError("longitudes repeat (0 and 360, or -180 and 180?); drop one of the two")
    step = float(np.median(gaps))
    if gaps.max() > 1.5 * step:  # a region, which may lie across 0 degrees
        first = int(gaps.argmax()) + 1
        columns = np.roll(columns, -first)
        gaps = np.delete(gaps, first - 1)
    if np.ptp(gaps) > _SLACK * step:
        raise DataError(f"longitudes are not evenly spaced: steps {gaps.min():g} to {gaps.max():g}")
    return columns, round(float(east[columns[0]]), 6), float(gaps.mean())


def _fits(grid: Grid, latitude: np.ndarray) -> bool:
    found = grid.latitude()
    return bool(np.abs(found - latitude).max() < _SLACK * np.abs(np.diff(found)).min())


def _region(latitude: np.ndarray, columns: int, west: float, step: float) -> Grid:
    spacing = float(np.mean(-np.diff(latitude)))
    problem = None
    if np.ptp(np.diff(latitude)) > _SLACK * spacing:
        problem = "latitudes are neither evenly spaced nor those of a known global grid"
    elif abs(spacing - step) > _SLACK * spacing:
        problem = f"rows are {spacing:g} degrees apart and columns {step:g}"
    if problem:
        raise DataError(
            f"{problem}; regrid to equal steps, or to one of the global grids {list(_LAYOUTS)}"
        )
    north, steps, spacing = round(float(latitude[0]), 6), latitude.size - 1, round(spacing, 6)
    if 0 < steps * spacing - (north + 90) < _ROUNDING:  # two thirds, rounded up
        spacing = math.floor((north + 90) / steps * 1e6) / 1e6
    return Grid(
        latitudes=latitude.size,
        longitudes=columns,
        layout="region",
        north=north,
        west=west,
        spacing=spacing,
    )
