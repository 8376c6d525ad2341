# SPDX-License-Identifier: Apache-2.0
"""What an evaluation of weather emulators runs. Imports no jax."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EmulatorEntry:
    """The folder of a training run; its newest checkpoint unless `step` names another."""

    path: str
    name: str = ""
    step: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name the folder of a training run")
        if not self.name:
            object.__setattr__(self, "name", Path(self.path).name)
        if not self.name:
            raise ValueError(f"path={self.path!r} has no name of its own; set name")


@dataclass(frozen=True, kw_only=True)
class Climatology:
    """The mean of the training period, with so many waves of the year and of the day on it.

    Fitted by least squares to at most `states` states, drawn at random with a fixed seed. Anomalies
    are deviations from it: without waves of the year the seasonal cycle counts as skill.
    """

    annual: int = 0
    daily: int = 0
    states: int = 4000

    def __post_init__(self) -> None:
        for name, least in (("annual", 0), ("daily", 0), ("states", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {least}")


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """Forecasts of emulators scored against the archive they were trained on.

    Each model starts every `every_hours` of `split` (at most `starts` of these times, evenly
    spaced; 0: all) and runs to `lead_hours`, next to persistence and climatology. `archive` takes
    the place of the path that the first model's run names. Figures show `channels` (none: the first
    four), maps at `map_leads` and spectra at `spectrum_leads`, in hours; leads beyond `lead_hours`
    or between two steps of the models are left out. Small scales, whose power tells how sharp a
    forecast is, are the degrees between the fractions `small_scales` of the largest one; choose a
    band in which the truth has power, below what its own model damps. Points where the archive
    lacks values (`missing: fill` of the runs) count nothing, and spectra are left out then;
    baselines start from the mean there, as models do.
    """

    kind: Literal["forecast"] = "forecast"
    models: tuple[EmulatorEntry, ...]
    split: Literal["valid", "test"] = "test"
    archive: str = ""
    lead_hours: int = 240
    every_hours: int = 12
    starts: int = 0
    batch_size: int = 8
    climatology: Climatology = Climatology()
    channels: tuple[str, ...] = ()
    map_leads: tuple[int, ...] = (24, 120)
    spectrum_leads: tuple[int, ...] = (6, 24, 120, 240)
    small_scales: tuple[float, float] = (2 / 3, 1.0)
    in_memory_bytes: int = 2 << 30
    title: str = "Forecasts"
    workdir: str = "runs/forecast"

    def __post_init__(self) -> None:
        least = {"lead_hours": 1, "every_hours": 1, "starts": 0, "batch_size": 1}
        for name, bound in (least | {"in_memory_bytes": 0}).items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {bound}")
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"models={names} must be at least one, each with its own name")
        if taken := {"persistence", "climatology", "truth"} & set(names):
            raise ValueError(f"models are called {sorted(taken)}, the names of baselines")
        if not 0 <= self.small_scales[0] < self.small_scales[1] <= 1:
            raise ValueError(
                f"small_scales={self.small_scales} must be two ascending fractions in [0, 1]"
            )
        for name in ("map_leads", "spectrum_leads"):
            leads = getattr(self, name)
            if any(lead < 1 for lead in leads) or list(leads) != sorted(set(leads)):
                raise ValueError(f"{name}={leads} must be hours >= 1, ascending")
