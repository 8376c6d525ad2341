# SPDX-License-Identifier: Apache-2.0
"""What all forecasts of an evaluation share, and everything that can be refused beforehand."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval import forecast_climate
from eval.forecast_config import ForecastConfig
from eval.forecast_models import Emulator, Found
from eval.forecast_scores import in_band
from sqzjax.errors import ConfigError
from sqzjax.fields import Archive, Period, States, open_archive
from sqzjax.fields.periods import indices, samples
from sqzjax.fields.statistics import Statistics
from sqzjax.sphere.harmonics import AnalysisTables, Transform, max_degree
from sqzjax.typing import Array

MAX_SHOWN = 4


@dataclass(frozen=True)
class Task:
    """The archive, the starts and the units that all forecasts share; call `check` first."""

    config: ForecastConfig
    found: list[Found]

    def check(self) -> None:
        """Refuse what cannot be evaluated, before a state is read or a forecast made.

        ConfigError, DataError or CheckpointError. Reads the weights of all models.
        """
        archive = self.archive
        for found in self.found:
            found.check(archive)
        self._check_band()
        _ = self.shown, self.rows
        forecast_climate.choose(self.config.climatology, *self.training)
        _ = self.models

    @cached_property
    def data(self) -> Any:
        """The data of the first model's run, which the others must share."""
        first = self.found[0].data
        for other in self.found[1:]:
            for name in ("channels", "step_hours", "drop_south_pole", "missing"):
                if other.data[name] != first[name]:
                    raise ConfigError(
                        f"models {self.found[0].name!r} and {other.name!r} differ in data.{name}: "
                        f"{first[name]!r} and {other.data[name]!r}; evaluate them apart"
                    )
        return first

    @cached_property
    def archive(self) -> Archive:
        """The archive; none of its states are read yet."""
        data = self.data
        return open_archive(
            self.config.archive or data["path"],
            channels=data["channels"],
            drop_south_pole=data["drop_south_pole"],
            missing="keep" if self.filled else "error",
            storage_options=data["storage_options"],
        )

    @cached_property
    def statistics(self) -> Statistics:
        """The units of the evaluation: those of the first model."""
        return self.found[0].statistics.select(self.archive.channels)

    @cached_property
    def states(self) -> States:
        """States in these units."""
        limit = self.config.in_memory_bytes
        return States(self.archive, self.statistics, in_memory_bytes=limit)

    @property
    def filled(self) -> bool:
        """Whether models read the mean where the archive lacks values."""
        return self.data["missing"] == "fill"

    @property
    def spectral(self) -> bool:
        """Whether spectra mean anything: not of regions, nor of fields with holes."""
        return self.archive.grid.periodic and not self.filled

    def valid(self, times: np.ndarray) -> Array | None:
        """Tell where the archive has values, `[B, C, H, W]`; None where it lacks none."""
        return jnp.asarray(np.isfinite(self.archive.read(times))) if self.filled else None

    @cached_property
    def transform(self) -> tuple[Transform, AnalysisTables] | None:
        """The harmonics of the grid and their tables; None without spectra."""
        if not self.spectral:
            return None
        transform = Transform(self.archive.grid)
        return transform, jax.tree.map(jnp.asarray, transform.analysis_tables())

    def _check_band(self) -> None:
        band, degrees = self.config.small_scales, max_degree(self.archive.grid) + 1
        if self.spectral and not in_band(degrees, band).any():
            raise ConfigError(f"small_scales={band} holds no degree of 0..{degrees - 1}; widen it")

    @cached_property
    def shown(self) -> list[str]:
        """The channels that figures show."""
        channels = self.archive.channels
        if unknown := [name for name in self.config.channels if name not in channels]:
            raise ConfigError(f"channels={unknown} are not in the archive; it has {list(channels)}")
        return list(self.config.channels or channels[:MAX_SHOWN])

    @property
    def steps(self) -> int:
        """Steps of a forecast."""
        hours = self.data["step_hours"]
        if self.config.lead_hours % hours:
            raise ConfigError(
                f"lead_hours={self.config.lead_hours} must be a multiple of the models' step, "
                f"{hours} h"
            )
        return self.config.lead_hours // hours

    @property
    def context(self) -> int:
        """States before the first forecast one that some model reads."""
        return max(found.model.config.context for found in self.found)

    def _periods(self, split: str) -> list[Period]:
        return [Period(**period) for period in self.data[split]]

    @cached_property
    def rows(self) -> np.ndarray:
        """Time indices of the states before and in each forecast, `[starts, context + steps]`."""
        config, times = self.config, self.archive.times
        found = samples(
            times,
            self._periods(config.split),
            step_hours=self.data["step_hours"],
            length=self.context + self.steps,
        )
        if not len(found):
            raise ConfigError(
                f"split={config.split!r} has no forecast of {config.lead_hours} h; choose a "
                "shorter lead_hours or another split"
            )
        start = times[found[:, self.context - 1]]
        since = (start - start[0]) / np.timedelta64(1, "h")
        found = found[since % config.every_hours == 0]
        if config.starts and len(found) > config.starts:
            found = found[np.linspace(0, len(found) - 1, config.starts).round().astype(int)]
        return found

    @property
    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices and times of the training period."""
        train = indices(self.archive.times, self._periods("train"))
        return train, self.archive.times[train]

    @cached_property
    def models(self) -> list[Emulator]:
        """The emulators, read from disk."""
        return [Emulator.load(found, self.statistics, self.archive) for found in self.found]

    def climate(self) -> forecast_climate.Climate:
        """Fit the climatology, in one stream over the training period."""
        settings, archive = self.config.climatology, self.archive
        return forecast_climate.fit(
            settings, self.states.read, *self.training, state_bytes=archive.state_bytes
        )
