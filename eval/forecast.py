# SPDX-License-Identifier: Apache-2.0
"""Score forecasts of emulators, persistence and climatology; `results.json` and `report.html`.

Starts are streamed in batches, leads one after another, so that memory holds one state of each
forecaster. Every figure of the report is in the record; the maps are in `maps.npz`.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval import forecast_climate, run
from eval.forecast_config import ForecastConfig
from eval.forecast_models import Emulator, Forecaster, Found, FromClimatology, Persistence, find
from eval.forecast_scores import Scores, score, sharpness, spectrum
from eval.provenance import provenance
from eval.tables import rounded
from sqzjax import config as configs
from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.fields import Period, States, open_archive
from sqzjax.fields.periods import indices, samples
from sqzjax.sphere.harmonics import Transform
from sqzjax.typing import Array

_LOG = logging.getLogger(__name__)
MAX_SHOWN = 4
MAP_COLUMNS = 360
"""Maps of finer grids are thinned to about so many columns."""


def run_forecast(config: ForecastConfig, workdir: Path) -> dict[str, Any]:
    """Run all forecasts, write all files and return the record."""
    from eval import forecast_report

    found = [find(entry) for entry in config.models]
    task = Task(config, found)
    workdir.mkdir(parents=True, exist_ok=True)
    record, maps = evaluate(task)
    run.save(rounded(record, 5), workdir)
    np.savez_compressed(workdir / "maps.npz", **maps)
    forecast_report.write(record, maps, workdir)
    return record


def problems(config: ForecastConfig) -> list[str]:
    """Return what is missing of each model, as far as nothing need be loaded to tell."""
    lines = []
    for entry in config.models:
        try:
            find(entry)
        except (CheckpointError, ConfigError, DataError) as error:
            lines.append(str(error))
    return lines


@dataclass(frozen=True)
class Task:
    """The archive, the starts and the units that all forecasts share."""

    config: ForecastConfig
    found: list[Found]

    @cached_property
    def data(self) -> Any:
        """The data of the first model's run, which the others must share."""
        first = self.found[0].data
        for other in self.found[1:]:
            for name in ("channels", "step_hours", "drop_south_pole"):
                if other.data[name] != first[name]:
                    raise ConfigError(
                        f"models {self.found[0].name!r} and {other.name!r} differ in data.{name}: "
                        f"{first[name]!r} and {other.data[name]!r}; evaluate them apart"
                    )
        return first

    @cached_property
    def states(self) -> States:
        """States in the units of the first model."""
        data = self.data
        archive = open_archive(
            self.config.archive or data["path"],
            channels=data["channels"],
            drop_south_pole=data["drop_south_pole"],
            missing="keep" if data["missing"] == "fill" else "error",
            storage_options=data["storage_options"],
        )
        for found in self.found:
            shape = found.model.config.grid, found.model.config.out_channels
            if shape != (archive.grid, len(archive.channels)):
                raise ConfigError(
                    f"model {found.name!r} forecasts {shape[1]} channels on {shape[0]}; the "
                    f"archive {archive.path} has {len(archive.channels)} on {archive.grid}"
                )
        statistics = self.found[0].statistics
        return States(archive, statistics, in_memory_bytes=self.config.in_memory_bytes)

    @cached_property
    def transform(self) -> tuple[Transform, tuple[Array, ...]]:
        """The spherical harmonics of the grid, and its tables."""
        transform = Transform(self.states.archive.grid)
        return transform, tuple(map(jnp.asarray, transform.analysis_tables()))

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

    def periods(self, split: str) -> list[Period]:
        """Return the periods of a split of the run's data."""
        return [Period(**period) for period in self.data[split]]

    @cached_property
    def rows(self) -> np.ndarray:
        """Time indices of the states before and in each forecast, `[starts, context + steps]`."""
        config, times = self.config, self.states.archive.times
        found = samples(
            times,
            self.periods(config.split),
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

    def forecasters(self) -> tuple[list[Forecaster], forecast_climate.Climate]:
        """Return the models, read from disk, and the baselines after them."""
        archive, statistics = self.states.archive, self.states.statistics
        train = indices(archive.times, self.periods("train"))
        climate = forecast_climate.fit(
            self.config.climatology,
            self.states.read,
            train,
            archive.times[train],
            archive.state_bytes,
        )
        models: list[Forecaster] = [
            Emulator.load(found, statistics, archive.constants(found.data["constants"]))
            for found in self.found
        ]
        return [*models, Persistence(), FromClimatology(climate)], climate


@dataclass
class Totals:
    """What is summed up over the starts."""

    scores: dict[str, Scores]
    spectra: dict[str, Scores]
    maps: dict[str, Any] = field(default_factory=dict)  # arrays C H W, by name and lead
    seconds: dict[str, float] = field(default_factory=dict)


def evaluate(task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record, and the maps by name (`truth_24`, `<model>_24`)."""
    config, archive = task.config, task.states.archive
    began = time.perf_counter()
    rows, steps = task.rows, task.steps
    forecasters, climate = task.forecasters()
    names = [forecaster.name for forecaster in forecasters]
    totals = Totals(
        scores={name: Scores(steps) for name in names},
        spectra={name: Scores(steps) for name in [*names, "truth"]},
        seconds=dict.fromkeys(names, 0.0),
    )
    for begin in range(0, len(rows), config.batch_size):
        part = rows[begin : begin + config.batch_size]
        # The last batch repeats its last start, which counts nothing, to keep its shape.
        filled = part[np.minimum(np.arange(config.batch_size), len(part) - 1)]
        weight = (np.arange(config.batch_size) < len(part)).astype(np.float32)
        _run_batch(task, forecasters, climate, filled, weight, totals)
        _LOG.info("%d of %d starts done", begin + len(part), len(rows))
    record: dict[str, Any] = {
        **provenance("forecast", packages=("xarray",)),
        "device": run.environment()["device"],
        "title": config.title,
        "config": configs.to_dict(config),
        "archive": archive.path,
        "grid": configs.to_dict(archive.grid),
        "channels": list(archive.channels),
        "shown": _shown(config, archive.channels),
        "leads": [task.data["step_hours"] * (step + 1) for step in range(steps)],
        "starts": len(rows),
        "period": [str(archive.times[rows[i, task.context - 1]])[:16] for i in (0, -1)],
        "forecasts": _forecasts(task, forecasters, totals),
        "spectra": _spectra(task, totals),
        "seconds": time.perf_counter() - began,
    }
    return record, totals.maps


def _run_batch(
    task: Task,
    forecasters: Sequence[Forecaster],
    climate: forecast_climate.Climate,
    rows: np.ndarray,
    weight: np.ndarray,
    totals: Totals,
) -> None:
    """Run and score the forecasts from some starts, `rows` `[B, context + steps]`."""
    context, grid = task.context, task.states.archive.grid
    window = jnp.asarray(np.stack([task.states.read(row) for row in rows[:, :context]]))
    running = [forecaster.start(window) for forecaster in forecasters]
    count = float(weight.sum())
    for step in range(task.steps):
        now = rows[:, context + step]
        when = task.states.archive.times[now]
        truth, mean = jnp.asarray(task.states.read(now)), climate(when)
        _add_spectrum(task, totals, "truth", step, truth, weight)
        _keep_map(task, totals, "truth", step, truth)
        for place, forecaster in enumerate(forecasters):
            began = time.perf_counter()
            running[place], fields = forecaster.advance(running[place], when)
            jax.block_until_ready(fields)
            totals.seconds[forecaster.name] += time.perf_counter() - began
            sums = score(fields, truth, mean, jnp.asarray(weight), grid)
            totals.scores[forecaster.name].add(step, sums, count)
            _add_spectrum(task, totals, forecaster.name, step, fields, weight)
            _keep_map(task, totals, forecaster.name, step, fields)


def _add_spectrum(
    task: Task, totals: Totals, name: str, step: int, fields: Array, weight: np.ndarray
) -> None:
    if not task.states.archive.grid.periodic:
        return
    power = spectrum(fields, jnp.asarray(weight), *task.transform)
    totals.spectra[name].add(step, {"power": power}, float(weight.sum()))


def _keep_map(task: Task, totals: Totals, name: str, step: int, fields: Array) -> None:
    """Keep the fields of the first start at the leads that maps are drawn of."""
    lead = task.data["step_hours"] * (step + 1)
    key = f"{name}_{lead}"
    if lead not in task.config.map_leads or key in totals.maps:
        return
    archive = task.states.archive
    shown = [archive.channels.index(c) for c in _shown(task.config, archive.channels)]
    every = max(1, archive.grid.longitudes // MAP_COLUMNS)
    physical = task.states.statistics.denormalise(np.asarray(fields[0]))
    totals.maps[key] = physical[shown, ::every, ::every]


def _shown(config: ForecastConfig, channels: Sequence[str]) -> list[str]:
    """Return the channels that figures show."""
    unknown = [name for name in config.channels if name not in channels]
    if unknown:
        raise ConfigError(f"channels={unknown} are not in the archive; it has {list(channels)}")
    return list(config.channels or channels[:MAX_SHOWN])


def _forecasts(
    task: Task, forecasters: Sequence[Forecaster], totals: Totals
) -> list[dict[str, Any]]:
    """Return the scores of each forecaster, in physical units but for the mean over channels."""
    std = task.states.statistics.std
    entries = []
    for place, forecaster in enumerate(forecasters):
        scores = totals.scores[forecaster.name]
        found = task.found[place] if place < len(task.found) else None
        entry: dict[str, Any] = {
            "name": forecaster.name,
            "kind": "emulator" if found else "baseline",
            "source": found.source if found else "",
            "parameters": found.model.config.num_params if found else 0,
            "seconds": totals.seconds[forecaster.name],
            "normalised_rmse": scores.rmse.mean(1).tolist(),
            "rmse": (scores.rmse * std).tolist(),
            "bias": (scores.mean("error") * std).tolist(),
            "correlation": scores.mean("correlation").tolist(),
            "sharpness": None,
        }
        if task.states.archive.grid.periodic:
            predicted, true = (
                totals.spectra[name].mean("power") for name in (forecaster.name, "truth")
            )
            entry["sharpness"] = sharpness(predicted, true, task.config.small_scales).tolist()
        entries.append(entry)
    return entries


def _spectra(task: Task, totals: Totals) -> dict[str, Any]:
    """Return mean power per order, S(l) / (2 l + 1), of the shown channels, physical units."""
    archive, hours = task.states.archive, task.data["step_hours"]
    if not archive.grid.periodic:
        return {"leads": []}
    leads = [
        lead
        for lead in task.config.spectrum_leads
        if lead % hours == 0 and lead <= task.config.lead_hours
    ]
    shown = [archive.channels.index(c) for c in _shown(task.config, archive.channels)]
    variance = task.states.statistics.std[shown, None] ** 2
    found: dict[str, Any] = {"leads": leads}
    for name, sums in totals.spectra.items():
        power = sums.mean("power")
        orders = 2 * np.arange(power.shape[-1]) + 1
        found[name] = [
            (power[lead // hours - 1, shown] * variance / orders).tolist() for lead in leads
        ]
    return found
