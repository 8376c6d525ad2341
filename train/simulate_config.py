# SPDX-License-Identifier: Apache-2.0
"""The schema of simulated weather. Nothing here imports jax."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sqzjax.fields.periods import LAST_YEAR, parse_date
from sqzjax.sphere.grid import Grid
from sqzjax.sphere.harmonics import max_degree

Variable = Literal["geopotential", "temperature", "u_component_of_wind", "v_component_of_wind"]


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """A dry atmosphere with mountains under Held-Suarez forcing (1994), by the package dinosaur.

    Primitive equations, spherical harmonics to degree `wavenumbers` and `layers` sigma layers,
    `time_step_minutes` at a time. `days` days after `spin_up_days` are kept, one state every
    `interval_hours`, on a Gaussian grid of `latitudes` x `longitudes`: `variables` at `levels`
    (hPa), and surface pressure. Land covers `land_fraction` of the sphere, up to
    `mountain_height` metres high. The smallest scale decays in `diffusion_hours`, others slower
    with the 8th power of theirs. `start` is the date of the first state. `chunk_states` are
    computed and saved at a time; a run that is stopped loses at most those.
    """

    kind: Literal["simulate"] = "simulate"
    latitudes: int = 32
    longitudes: int = 64
    wavenumbers: int = 31
    layers: int = 5
    levels: tuple[int, ...] = (250, 500, 850)
    variables: tuple[Variable, ...] = (
        "geopotential",
        "temperature",
        "u_component_of_wind",
        "v_component_of_wind",
    )
    days: int = 1460
    spin_up_days: int = 120
    interval_hours: int = 6
    time_step_minutes: float = 72.0
    diffusion_hours: float = 2.4
    land_fraction: float = 0.35
    mountain_height: float = 2500.0
    start: str = "2000-01-01"
    chunk_states: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"latitudes": 4, "longitudes": 8, "wavenumbers": 3, "layers": 2, "days": 1}
        least |= {"spin_up_days": 0, "interval_hours": 1, "chunk_states": 1, "seed": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {number}")
        most = max_degree(self.grid)
        if self.wavenumbers > most:
            raise ValueError(
                f"wavenumbers={self.wavenumbers} must be <= {most}, the highest degree that a grid "
                f"of latitudes={self.latitudes} x longitudes={self.longitudes} resolves"
            )
        self._check_times()
        if sorted(set(self.levels)) != list(self.levels) or not self.variables:
            raise ValueError(f"levels={list(self.levels)} must ascend, and variables name some")
        if len(set(self.variables)) < len(self.variables):
            raise ValueError(f"variables={list(self.variables)} must name each once")
        if not all(0 < level <= 1000 for level in self.levels) or not self.levels:
            raise ValueError(f"levels={list(self.levels)} must be pressures in (0, 1000] hPa")
        if not 0 < self.land_fraction < 1 or not 0 <= self.mountain_height <= 5000:
            raise ValueError(
                f"land_fraction={self.land_fraction} must lie in (0, 1), mountain_height="
                f"{self.mountain_height} in [0, 5000] m"
            )

    def _check_times(self) -> None:
        steps = self.interval_hours * 60 / max(self.time_step_minutes, 1e-9)
        if self.time_step_minutes <= 0 or abs(steps - round(steps)) > 1e-9:
            raise ValueError(
                f"time_step_minutes={self.time_step_minutes} must divide interval_hours="
                f"{self.interval_hours}, such as {self.interval_hours * 10}"
            )
        if 24 % self.interval_hours:
            raise ValueError(f"interval_hours={self.interval_hours} must divide 24")
        if not self.diffusion_hours > 0:
            raise ValueError(f"diffusion_hours={self.diffusion_hours} must be > 0")
        end = parse_date("start", self.start).astype("M8[D]") + np.timedelta64(self.days, "D")
        if end >= np.datetime64(f"{LAST_YEAR + 1}"):
            raise ValueError(
                f"days={self.days} after start={self.start!r} go on beyond the year {LAST_YEAR}; "
                "begin earlier"
            )

    @property
    def grid(self) -> Grid:
        """Where the rows and columns of the archive lie."""
        return Grid(latitudes=self.latitudes, longitudes=self.longitudes, layout="gauss")

    @property
    def spin_up_states(self) -> int:
        """States that come before those that are kept."""
        return self.spin_up_days * 24 // self.interval_hours

    @property
    def num_states(self) -> int:
        """States that are kept."""
        return self.days * 24 // self.interval_hours

    @property
    def steps_per_state(self) -> int:
        """Time steps between two states."""
        return round(self.interval_hours * 60 / self.time_step_minutes)
