# SPDX-License-Identifier: Apache-2.0
"""Score forecasts of emulators, persistence and climatology; `results.json` and `report.html`.

Starts are streamed in batches, leads one after another, so that memory holds one state of each
forecaster. Every figure of the report is in the record; the maps are in `maps.npz`.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eval import forecast_climate, run
from eval.forecast_config import ForecastConfig
from eval.forecast_models import Forecaster, FromClimatology, Persistence, find_all
from eval.forecast_scores import Scores, score, sharpness, spectrum
from eval.forecast_task import Task
from eval.provenance import provenance
from eval.tables import rounded
from sqzjax import config as configs
from sqzjax.errors import ConfigError
from sqzjax.io import atomic
from sqzjax.io.lock import check_writable
from sqzjax.typing import Array

_LOG = logging.getLogger(__name__)
MAP_COLUMNS = 360
"""Maps of finer grids are thinned to about so many columns."""


def run_forecast(config: ForecastConfig, workdir: Path) -> dict[str, Any]:
    """Run all forecasts, write all files and return the record.

    ConfigError, DataError or CheckpointError, before `workdir` is made, for what cannot be
    evaluated. Errors and spectra of the record are in the archive's units.
    """
    from eval import forecast_report

    task = Task(config, find_all(config.models))
    task.check()
    check_writable(workdir)
    record, maps = evaluate(task)
    run.save(record, workdir)
    with atomic.replacing(workdir / "maps.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, **maps)
    forecast_report.write(record, maps, workdir)
    return record


def problems(config: ForecastConfig) -> list[str]:
    """Return what is missing of each model, as far as nothing need be loaded to tell."""
    try:
        find_all(config.models)
    except ConfigError as error:
        return list(error.problems)
    return []


@dataclass
class Totals:
    """What is summed up over the starts."""

    scores: dict[str, Scores]
    spectra: dict[str, Scores]
    maps: dict[str, Any] = field(default_factory=dict)  # arrays C H W, by name and lead


def evaluate(task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record, and the maps by name (`truth_24`, `<model>_24`).

    ConfigError, DataError or CheckpointError as `Task.check`. Numbers of the record that are not
    finite, of models that diverge, are None.
    """
    config, archive = task.config, task.archive
    began = time.perf_counter()
    rows, steps = task.rows, task.steps
    forecasters: list[Forecaster] = [*task.models, Persistence(), FromClimatology()]
    climate = task.climate()
    names = [forecaster.name for forecaster in forecasters]
    totals = Totals(
        scores={name: Scores(steps) for name in names},
        spectra={name: Scores(steps) for name in [*names, "truth"]},
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
        "shown": task.shown,
        "leads": [task.data["step_hours"] * (step + 1) for step in range(steps)],
        "starts": len(rows),
        "period": [str(archive.times[rows[i, task.context - 1]])[:16] for i in (0, -1)],
        "forecasts": _forecasts(task, forecasters, totals),
        "spectra": _spectra(task, totals),
        "seconds": time.perf_counter() - began,
    }
    return rounded(record), totals.maps


def _run_batch(
    task: Task,
    forecasters: Sequence[Forecaster],
    climate: forecast_climate.Climate,
    rows: np.ndarray,
    weight: np.ndarray,
    totals: Totals,
) -> None:
    """Run and score the forecasts from some starts, `rows` `[B, context + steps]`."""
    context, grid = task.context, task.archive.grid
    window = jnp.asarray(np.stack([task.states.read(row) for row in rows[:, :context]]))
    running = [forecaster.start(window) for forecaster in forecasters]
    for step in range(task.steps):
        now = rows[:, context + step]
        truth, mean = jnp.asarray(task.states.read(now)), climate(task.archive.times[now])
        valid = task.valid(now)
        _add_spectrum(task, totals, "truth", step, truth, weight)
        _keep_map(task, totals, "truth", step, truth if valid is None else _holed(truth, valid))
        for place, forecaster in enumerate(forecasters):
            running[place], fields = forecaster.advance(running[place], mean)
            sums = score(fields, truth, mean, jnp.asarray(weight), grid, valid)
            totals.scores[forecaster.name].add(step, sums)
            _add_spectrum(task, totals, forecaster.name, step, fields, weight)
            _keep_map(task, totals, forecaster.name, step, fields)


def _holed(fields: Array, valid: Array) -> Array:
    return jnp.where(valid, fields, jnp.nan)


def _add_spectrum(
    task: Task, totals: Totals, name: str, step: int, fields: Array, weight: np.ndarray
) -> None:
    if task.transform is None:
        return
    power = spectrum(fields, jnp.asarray(weight), *task.transform)
    totals.spectra[name].add(step, {"power": power, "count": weight.sum()})


def _keep_map(task: Task, totals: Totals, name: str, step: int, fields: Array) -> None:
    """Keep the fields of the first start at the leads that maps are drawn of."""
    lead = task.data["step_hours"] * (step + 1)
    key = f"{name}_{lead}"
    if lead not in task.config.map_leads or key in totals.maps:
        return
    archive = task.archive
    shown = [archive.channels.index(c) for c in task.shown]
    every = max(1, archive.grid.longitudes // MAP_COLUMNS)
    physical = task.statistics.denormalise(np.asarray(fields[0]))
    totals.maps[key] = physical[shown, ::every, ::every]


def _forecasts(
    task: Task, forecasters: Sequence[Forecaster], totals: Totals
) -> list[dict[str, Any]]:
    """Return the scores of each forecaster, in physical units but for the mean over channels."""
    std = task.statistics.std
    entries = []
    for place, forecaster in enumerate(forecasters):
        scores = totals.scores[forecaster.name]
        found = task.found[place] if place < len(task.found) else None
        entry: dict[str, Any] = {
            "name": forecaster.name,
            "kind": "emulator" if found else "baseline",
            "source": found.source if found else "",
            "parameters": found.model.config.num_params if found else 0,
            "normalised_rmse": scores.rmse.mean(1).tolist(),
            "rmse": (scores.rmse * std).tolist(),
            "bias": (scores.mean("error") * std).tolist(),
            "correlation": scores.mean("correlation").tolist(),
            "sharpness": None,
        }
        if task.spectral:
            predicted, true = (
                totals.spectra[name].mean("power") for name in (forecaster.name, "truth")
            )
            entry["sharpness"] = sharpness(predicted, true, task.config.small_scales).tolist()
        entries.append(entry)
    return entries


def _spectra(task: Task, totals: Totals) -> dict[str, Any]:
    """Return mean power per order, S(l) / (2 l + 1), of the shown channels, physical units."""
    archive, hours = task.archive, task.data["step_hours"]
    if not task.spectral:
        return {"leads": []}
    leads = [
        lead
        for lead in task.config.spectrum_leads
        if lead % hours == 0 and lead <= task.config.lead_hours
    ]
    shown = [archive.channels.index(c) for c in task.shown]
    variance = task.statistics.std[shown, None] ** 2
    found: dict[str, Any] = {"leads": leads}
    for name, sums in totals.spectra.items():
        power = sums.mean("power")
        orders = 2 * np.arange(power.shape[-1]) + 1
        found[name] = [
            (power[lead // hours - 1, shown] * variance / orders).tolist() for lead in leads
        ]
    return found
