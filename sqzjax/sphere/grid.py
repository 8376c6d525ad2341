# SPDX-License-Identifier: Apache-2.0
"""Latitude-longitude grids: where the rows and columns of a field lie. Nothing here imports jax."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Layout = Literal["equiangular", "no_south_pole", "cells", "gauss", "region"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows from north to south, columns eastward, both evenly spaced but for `gauss`.

    `equiangular` has both poles as rows, `no_south_pole` lacks the last of them (ERA5 without its
    721st row), `cells` has rows at the middle of equal cells, `gauss` at Gauss-Legendre nodes.
    `region` is a piece of the sphere, not periodic: it starts at `north`, `west` (degrees) and goes
    on in steps of `spacing`.
    """

    latitudes: int
    longitudes: int
    layout: Layout = "equiangular"
    north: float = 90.0
    west: float = 0.0
    spacing: float | None = None

    def __post_init__(self) -> None:
        for name in ("latitudes", "longitudes"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 2")
        if (self.spacing is not None) != (self.layout == "region"):
            raise ValueError(
                f"spacing={self.spacing} with layout={self.layout!r}: a region needs the degrees "
                "between its rows, other layouts follow from their size"
            )
        if self.layout == "region" and not -90 <= self.north - self._extent <= self.north <= 90:
            raise ValueError(
                f"{self.latitudes} rows of spacing={self.spacing} from north={self.north} leave "
                "the sphere; latitudes lie in [-90, 90]"
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
