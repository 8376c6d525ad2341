# SPDX-License-Identifier: Apache-2.0
"""Latitude-longitude grids: where the rows and columns of a field lie. Nothing here imports jax."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Layout = Literal["equiangular", "no_south_pole", "cells", "gauss", "region"]
_ROUNDING = 1e-6  # of spacings that were rounded


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows from north to south, columns eastward, both evenly spaced but for `gauss`.

    `equiangular` has both poles as rows, `no_south_pole` lacks the last of them (ERA5 without its
    721st row), `cells` has rows at the middle of equal cells, `gauss` at Gauss-Legendre nodes.
    `region` is a piece of the sphere, not periodic: it starts at `north`, `west` (degrees) and goes
    on in steps of `spacing`. `west` is kept in [0, 360).
    """

    latitudes: int
    longitudes: int
    layout: Layout = "equiangular"
    north: float = 90.0
    west: float = 0.0
    spacing: float | None = None

    def __post_init__(self) -> None:
        for name in ("latitudes", "longitudes"):
            size = getattr(self, name)
            if type(size) is not int or size < 2:
                raise ValueError(f"{name}={size!r} must be an integer >= 2")
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout={self.layout!r} must be one of {list(get_args(Layout))}")
        for name in ("north", "west", "spacing"):
            value = getattr(self, name)
            if value is not None or name != "spacing":
                _check_degrees(name, value)
        if (self.spacing is not None) != (self.layout == "region"):
            raise ValueError(
                f"spacing={self.spacing} with layout={self.layout!r}: a region needs the degrees "
                "between its rows, other layouts follow from their size"
            )
        if self.spacing is not None:
            self._check_region(self.spacing)
        # Twice: a tiny negative number comes out as 360 the first time.
        object.__setattr__(self, "west", float(self.west) % 360.0 % 360.0)

    def _check_region(self, spacing: float) -> None:
        if not spacing > 0:
            raise ValueError(f"spacing={spacing} must be > 0 degrees")
        if not -90 <= self.north - self._extent <= self.north <= 90:
            raise ValueError(
                f"{self.latitudes} rows of spacing={spacing} from north={self.north} leave "
                "the sphere; latitudes lie in [-90, 90]"
            )
        if spacing * self.longitudes > 360 * (1 + _ROUNDING):
            raise ValueError(
                f"{self.longitudes} columns of spacing={spacing} go round the globe more than "
                "once; use fewer"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.latitudes, self.longitudes

    @property
    def periodic(self) -> bool:
        """Whether the last column is the first one's neighbour."""
        return self.layout != "region"

    @property
    def _extent(self) -> float:
        return (self.latitudes - 1) * (self.spacing or 0.0)

    def latitude(self) -> np.ndarray:
        """Return the latitudes of the rows in degrees, float64 `[H]`, descending."""
        rows = self.latitudes
        if self.layout == "gauss":
            return np.degrees(np.arcsin(np.polynomial.legendre.leggauss(rows)[0]))[::-1].copy()
        start, step = {
            "equiangular": (90.0, 180.0 / (rows - 1)),
            "no_south_pole": (90.0, 180.0 / rows),
            "cells": (90.0 - 90.0 / rows, 180.0 / rows),
            "region": (self.north, self.spacing or 0.0),
        }[self.layout]
        return start - step * np.arange(rows)

    def longitude(self) -> np.ndarray:
        """Return the longitudes of the columns in degrees, float64 `[W]`, ascending."""
        step = self.spacing if self.spacing is not None else 360.0 / self.longitudes
        return self.west + step * np.arange(self.longitudes)

    def area_weights(self) -> np.ndarray:
        """Return cos(latitude) divided by its mean over the rows, float64 `[H]`."""
        cosine = np.cos(np.radians(self.latitude()))
        return cosine / cosine.mean()


def _check_degrees(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number of degrees")
