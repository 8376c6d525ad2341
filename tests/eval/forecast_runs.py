# SPDX-License-Identifier: Apache-2.0
"""Small archives, what training runs of emulators leave behind, and scores by plain loops."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from eval import forecast
from eval.forecast_config import EmulatorEntry, ForecastConfig
from eval.forecast_task import Task
from sqzjax import config as configs
from sqzjax.fields.statistics import Statistics
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.models.config import Execution
from sqzjax.models.swin import SwinEmulator
from sqzjax.models.swin_config import SwinConfig
from sqzjax.sphere import Grid

xarray = pytest.importorskip("xarray")
pytest.importorskip("zarr")

GRID = Grid(latitudes=8, longitudes=16, layout="gauss")
STEPS, LEADS = 60, 4
CHANNELS = ("temperature_500", "temperature_850", "surface_pressure")
MEAN, STD = np.array([250.0, 280.0, 1e5]), np.array([5.0, 8.0, 900.0])


def waves(grid: Grid = GRID) -> np.ndarray:
    """Waves that drift eastward by one column a step, with noise, `[C, time, H, W]`."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3, *grid.shape)).cumsum(-1)
    fields = np.stack([np.roll(base, step, axis=-1) for step in range(STEPS)], axis=1)
    return fields + 0.1 * rng.normal(size=fields.shape)


def write_archive(path: Path, normal: np.ndarray, grid: Grid = GRID, hours: int = 6) -> Path:
    """Write normalised fields `[C, time, H, W]` as an archive in physical units."""
    fields = normal * STD[:, None, None, None] + MEAN[:, None, None, None]
    time = np.datetime64("2001-01-01", "ns") + np.arange(STEPS) * np.timedelta64(hours, "h")
    dims = ("time", "level", "latitude", "longitude")
    levels = np.stack([fields[0], fields[1]], axis=1)
    dataset = xarray.Dataset(
        {
            "temperature": (dims, levels.astype(np.float32)),
            "surface_pressure": ((dims[0], *dims[2:]), fields[2].astype(np.float32)),
        },
        coords={
            "time": time,
            "level": [500, 850],
            "latitude": grid.latitude(),
            "longitude": grid.longitude(),
        },
    )
    dataset.to_zarr(path, zarr_format=2, consolidated=True)
    return path


def physical(archive: Path) -> np.ndarray:
    """The archive as float64 `[time, channel, H, W]`, read by xarray alone."""
    with xarray.open_zarr(archive) as data:
        levels = data["temperature"].transpose("time", "level", "latitude", "longitude").values
        pressure = data["surface_pressure"].values[:, None]
    return np.concatenate([levels, pressure], axis=1).astype(np.float64)


def write_run(
    folder: Path,
    archive: Path,
    *,
    grid: Grid = GRID,
    context: int = 1,
    seed: int = 0,
    shift: float = 0.0,
    scale: float = 1.0,
    average: Any = None,
    **data: Any,
) -> Path:
    """Write a checkpoint and its statistics; weights are multiplied by `scale`."""
    config = SwinConfig(
        grid=grid,
        in_channels=4,
        out_channels=3,
        embed_dim=16,
        depth=1,
        num_heads=2,
        patch_size=2,
        window=(2, 4),
        context=context,
    )
    execution = Execution(scan_layers=False)
    params = jax.jit(SwinEmulator(config, execution).init_params)(jax.random.key(seed))
    params = jax.tree.map(lambda leaf: scale * leaf, params)
    told = {
        "kind": "fields",
        "path": str(archive),
        "storage_options": {},
        "channels": list(CHANNELS),
        "constants": ["cos_latitude"],
        "step_hours": 6,
        "train": [{"stop": 0.6}],
        "valid": [{"start": 0.6, "stop": 0.8}],
        "test": [{"start": 0.8}],
        "drop_south_pole": False,
        "missing": "error",
        "statistics": None,
        **data,
    }
    run = {
        "model": {"kind": "swin"},
        "data": told,
        "execution": configs.to_dict(execution),
        "ema": None if average is None else 0.9,
    }
    items = {"params": params} | ({} if average is None else {"train": {"average": average}})
    with Checkpointer(folder / "checkpoints", async_save=False) as checkpoints:
        checkpoints.save(7, items, {"config": run, "model": configs.to_dict(config)})
    own = STD * (1 + shift)
    Statistics(
        channels=CHANNELS,
        mean=MEAN + shift * own,
        std=own,
        states=36,
        source="",
    ).save(folder / "data" / "statistics.json")
    return folder


def make_config(*runs: Path, **changes: Any) -> ForecastConfig:
    defaults: dict[str, Any] = {"lead_hours": 6 * LEADS, "every_hours": 6, "batch_size": 4}
    entries = tuple(EmulatorEntry(path=str(run)) for run in runs)
    return ForecastConfig(models=entries, **(defaults | changes))


def make_task(*runs: Path, **changes: Any) -> Task:
    """A task that has been checked."""
    config = make_config(*runs, **changes)
    task = Task(config, forecast.find_all(config.models))
    task.check()
    return task


def by_name(record: Any, name: str) -> Any:
    return next(entry for entry in record["forecasts"] if entry["name"] == name)


def loop_scores(
    predicted: np.ndarray,
    truth: np.ndarray,
    climate: np.ndarray,
    grid: Grid = GRID,
) -> dict[str, Any]:
    """RMSE, bias and anomaly correlation of `[start, C, H, W]`, point by point.

    Points where the truth is NaN do not count, nor starts that have no others.
    """
    cosine = np.repeat(np.cos(np.radians(grid.latitude()))[:, None], grid.longitudes, axis=1)
    scores: dict[str, list[float]] = {"rmse": [], "bias": [], "correlation": []}
    for channel in range(truth.shape[1]):
        squares, errors, correlations = [], [], []
        for start in range(len(truth)):
            known = np.isfinite(truth[start, channel])
            if not known.any():
                continue
            p, t, c = (a[start, channel][known] for a in (predicted, truth, climate))
            area = cosine[known] / cosine[known].sum()
            squares.append((area * (p - t) ** 2).sum())
            errors.append((area * (p - t)).sum())
            norm = np.sqrt((area * (p - c) ** 2).sum() * (area * (t - c) ** 2).sum())
            correlations.append((area * (p - c) * (t - c)).sum() / norm if norm else 0.0)
        scores["rmse"].append(np.sqrt(np.mean(squares)))
        scores["bias"].append(np.mean(errors))
        scores["correlation"].append(np.mean(correlations))
    return scores
