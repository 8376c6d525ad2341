# SPDX-License-Identifier: Apache-2.0
"""Forecast evaluation: scores against plain loops in float64, baselines, runs from disk, page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import forecast, forecast_climate, forecast_report
from eval.forecast_config import Climatology, EmulatorEntry, ForecastConfig
from eval.forecast_scores import Scores, band_power, score, sharpness
from eval.tables import rounded
from sqzjax import config as configs
from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.fields.statistics import Statistics
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.models.config import Execution
from sqzjax.models.swin import SwinEmulator
from sqzjax.models.swin_config import SwinConfig
from sqzjax.sphere import Grid, Transform, forward, power_spectrum
from tests.tolerances import FLOAT64_REL, FORECAST_REL

xarray = pytest.importorskip("xarray")
pytest.importorskip("zarr")
GRID = Grid(latitudes=8, longitudes=16, layout="gauss")
STEPS, LEADS = 60, 4
CHANNELS = ("temperature_500", "temperature_850", "surface_pressure")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Fifteen days of waves that drift eastward by one column a step, with noise."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3, 8, 16)).cumsum(-1)
    fields = np.stack([np.roll(base, step, axis=-1) for step in range(STEPS)], axis=1)
    fields += 0.1 * rng.normal(size=fields.shape)
    fields = fields * np.array([5.0, 8.0, 900.0])[:, None, None, None]
    fields += np.array([250.0, 280.0, 1e5])[:, None, None, None]
    time = np.datetime64("2001-01-01", "ns") + np.arange(STEPS) * np.timedelta64(6, "h")
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
            "latitude": GRID.latitude(),
            "longitude": GRID.longitude(),
        },
    )
    path = tmp_path_factory.mktemp("archive") / "waves.zarr"
    dataset.to_zarr(path, zarr_format=2, consolidated=True)
    return path


def write_run(
    folder: Path, archive: Path, *, context: int = 1, seed: int = 0, shift: float = 0.0, **data: Any
) -> Path:
    """Write what a training run leaves behind: a checkpoint and its statistics."""
    config = SwinConfig(
        grid=GRID,
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
    meta = {
        "config": {
            "model": {"kind": "swin"},
            "data": told,
            "execution": configs.to_dict(execution),
            "ema": None,
        },
        "model": configs.to_dict(config),
    }
    with Checkpointer(folder / "checkpoints", async_save=False) as checkpoints:
        checkpoints.save(7, {"params": params}, meta)
    own = np.array([5.0, 8.0, 900.0]) * (1 + shift)
    Statistics(
        channels=CHANNELS,
        mean=np.array([250.0, 280.0, 1e5]) + shift * own,
        std=own,
        step_std=own,
        step_hours=6,
        states=36,
        source="",
    ).save(folder / "data" / "statistics.json")
    return folder


@pytest.fixture(scope="module")
def runs(archive, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "plain": write_run(folder / "plain", archive),
        "context": write_run(folder / "context", archive, context=2, seed=1),
        "units": write_run(folder / "units", archive, shift=0.5),
    }


def make_config(*runs: Path, **changes: Any) -> ForecastConfig:
    defaults = {"lead_hours": 6 * LEADS, "every_hours": 6, "batch_size": 4}
    entries = tuple(EmulatorEntry(path=str(run)) for run in runs)
    return ForecastConfig(models=entries, **(defaults | changes))


def evaluate(config: ForecastConfig) -> dict[str, Any]:
    found = [forecast.find(entry) for entry in config.models]
    return forecast.evaluate(forecast.Task(config, found))[0]


@pytest.fixture(scope="module")
def record(runs, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("record")
    shown = {"channels": CHANNELS[1:], "map_leads": (24,), "spectrum_leads": (6, 24, 240)}
    config = make_config(runs["plain"], runs["context"], **shown)
    return forecast.run_forecast(config, folder) | {"folder": folder}


def physical(archive: Path) -> np.ndarray:
    """The archive as float64 `[time, channel, H, W]`, read by xarray alone."""
    with xarray.open_zarr(archive) as data:
        levels = data["temperature"].transpose("time", "level", "latitude", "longitude").values
        pressure = data["surface_pressure"].values[:, None]
    return np.concatenate([levels, pressure], axis=1).astype(np.float64)


def by_name(record, name):
    return next(entry for entry in record["forecasts"] if entry["name"] == name)


def loop_scores(predicted: np.ndarray, truth: np.ndarray, climate: np.ndarray) -> dict[str, Any]:
    """RMSE, bias and anomaly correlation of `[start, C, H, W]`, point by point."""
    area = np.cos(np.radians(GRID.latitude()))
    area = np.repeat(area[:, None], 16, axis=1) / (16 * area.sum())
    scores: dict[str, list[float]] = {"rmse": [], "bias": [], "correlation": []}
    for channel in range(truth.shape[1]):
        squares, errors, correlations = [], [], []
        for start in range(len(truth)):
            p, t, c = (a[start, channel] for a in (predicted, truth, climate))
            squares.append((area * (p - t) ** 2).sum())
            errors.append((area * (p - t)).sum())
            norm = np.sqrt((area * (p - c) ** 2).sum() * (area * (t - c) ** 2).sum())
            correlations.append((area * (p - c) * (t - c)).sum() / norm if norm else 0.0)
        scores["rmse"].append(np.sqrt(np.mean(squares)))
        scores["bias"].append(np.mean(errors))
        scores["correlation"].append(np.mean(correlations))
    return scores


def test_persistence_and_climatology_are_scored_as_plain_loops_do(archive, record):
    states = physical(archive)
    mean = states[:36].mean(0)
    # Two states of context; test starts at 48, so starts are 49 ... 55 of 60.
    starts = np.arange(49, 60 - LEADS)
    assert record["starts"] == len(starts)
    assert record["period"] == ["2001-01-13T06:00", "2001-01-14T18:00"]
    for lead in range(1, LEADS + 1):
        truth, climate = states[starts + lead], np.repeat(mean[None], len(starts), axis=0)
        for name, predicted in (("persistence", states[starts]), ("climatology", climate)):
            wanted, entry = loop_scores(predicted, truth, climate), by_name(record, name)
            for score_name, values in wanted.items():
                scale = np.array([5.0, 8.0, 900.0]) if score_name != "correlation" else 1.0
                found, wanted_values = (
                    np.array(v) / scale for v in (entry[score_name][lead - 1], values)
                )
                np.testing.assert_allclose(found, wanted_values, atol=10 * FORECAST_REL)
            normalised = np.mean(np.array(wanted["rmse"]) / [5.0, 8.0, 900.0])
            np.testing.assert_allclose(
                entry["normalised_rmse"][lead - 1], normalised, rtol=10 * FORECAST_REL
            )


@pytest.mark.parametrize("name", ["plain", "context"])
def test_emulators_run_on_their_own_states(archive, runs, record, name):
    found = forecast.find(EmulatorEntry(path=str(runs[name])))
    context = found.model.config.context
    states = physical(archive)
    normal = (states - np.array([250.0, 280.0, 1e5])[:, None, None]) / np.array([5.0, 8.0, 900.0])[
        :, None, None
    ]
    constants = np.cos(np.radians(GRID.latitude()))[:, None] * np.ones((1, 1, 8, 16))
    starts = np.arange(49, 60 - LEADS)
    window = [normal[starts - back] for back in range(context - 1, -1, -1)]
    params, step = found.params(), jax.jit(found.model.forward)
    for lead in range(1, LEADS + 1):
        inputs = [
            np.concatenate([s, np.repeat(constants, len(starts), 0)], axis=1)
            for s in window[-context:]
        ]
        window.append(np.asarray(step(params, jnp.asarray(np.stack(inputs, 1), jnp.float32))))
        wanted = loop_scores(window[-1], normal[starts + lead], normal[starts + lead] * 0)
        rmse = np.array(by_name(record, name)["rmse"][lead - 1]) / [5.0, 8.0, 900.0]
        np.testing.assert_allclose(rmse, wanted["rmse"], rtol=10 * FORECAST_REL)


def test_spectra_and_sharpness_are_those_of_the_fields(archive, record):
    states = physical(archive)
    assert record["spectra"]["leads"] == [6, 24]
    scale = np.array([250.0, 280.0, 1e5]), np.array([5.0, 8.0, 900.0])
    normal = (states - scale[0][:, None, None]) / scale[1][:, None, None]
    truth = jnp.asarray(normal[np.arange(49, 56) + 4], jnp.float32)
    power = np.asarray(power_spectrum(forward(truth, Transform(GRID))), np.float64).mean(0)
    wanted = (power * scale[1][:, None] ** 2 / (2 * np.arange(8) + 1))[1:]
    found = np.array(record["spectra"]["truth"][1])
    np.testing.assert_allclose(found, wanted, rtol=100 * FORECAST_REL)
    # Persistence is as sharp as the truth but for noise; the mean of drifting waves is not.
    assert 0.8 < by_name(record, "persistence")["sharpness"][0] < 1.25
    assert by_name(record, "climatology")["sharpness"][0] < 0.7
    assert band_power(np.arange(8.0), (2 / 3, 1.0)) == 5 + 6 + 7
    assert band_power(np.arange(8.0), (0.0, 0.5)) == 1 + 2 + 3
    true = np.ones((1, 2, 9))
    np.testing.assert_allclose(sharpness(true * [[4.0], [0.25]], true), 1.0, rtol=FLOAT64_REL)
    np.testing.assert_allclose(sharpness(true * [[0.5], [0.5]], true), 0.5, rtol=FLOAT64_REL)


def test_models_with_other_units_are_compared_in_common_ones(archive, runs):
    """The same weights read other numbers and mean other values by their output."""
    config = make_config(runs["plain"], runs["units"], lead_hours=6)
    record = evaluate(config)
    found = forecast.find(EmulatorEntry(path=str(runs["units"])))
    own = found.statistics
    states, starts = physical(archive), np.arange(48, 59)
    inputs = (states[starts] - own.mean[:, None, None]) / own.std[:, None, None]
    constants = np.broadcast_to(np.cos(np.radians(GRID.latitude()))[:, None], (11, 1, 8, 16))
    inputs = jnp.asarray(np.concatenate([inputs, constants], axis=1)[:, None], jnp.float32)
    output = np.asarray(found.model.forward(found.params(), inputs), np.float64)
    output = output * own.std[:, None, None] + own.mean[:, None, None]
    wanted = loop_scores(output, states[starts + 1], states[starts + 1] * 0)["rmse"]
    np.testing.assert_allclose(by_name(record, "units")["rmse"][0], wanted, rtol=1e2 * FORECAST_REL)


def test_padding_of_the_last_batch_changes_nothing(runs, record):
    config = make_config(runs["plain"], runs["context"], batch_size=7)
    whole = evaluate(config)
    for entry in record["forecasts"]:
        again = by_name(whole, entry["name"])["normalised_rmse"]
        np.testing.assert_allclose(entry["normalised_rmse"], again, rtol=FORECAST_REL)


def test_files_hold_record_maps_and_page(archive, record):
    folder = record["folder"]
    stored = json.loads((folder / "results.json").read_text())
    assert stored["forecasts"] == rounded(record["forecasts"], 5)
    with np.load(folder / "maps.npz") as maps:
        assert set(maps) == {
            f"{name}_24" for name in ("truth", "plain", "context", "persistence", "climatology")
        }
        np.testing.assert_allclose(maps["truth_24"], physical(archive)[53, 1:], rtol=FORECAST_REL)
    page = (folder / "report.html").read_text()
    for text in (
        "Findings",
        "Anomaly correlation",
        "Spectra",
        "Sharpness",
        "Maps",
        "plain - truth",
    ):
        assert text in page or "matplotlib is not installed" in page
    table = (folder / "table.md").read_text()
    assert "| persistence |" in table and "climatology" in table
    assert forecast_report.markdown(stored) + "\n" == table


def test_findings_say_how_far_baselines_are_beaten():
    leads = [6, 12, 24]
    entries = [
        {"name": "m", "kind": "emulator", "normalised_rmse": [0.1, 0.3, 0.9], "sharpness": None},
        {"name": "persistence", "kind": "baseline", "normalised_rmse": [0.2, 0.4, 0.6]},
        {"name": "climatology", "kind": "baseline", "normalised_rmse": [1.0, 1.0, 1.0]},
    ]
    said = forecast_report.findings({"leads": leads, "forecasts": entries})
    assert said == ["m beats persistence to 12 h and beats climatology at every lead to 24 h."]


def test_a_climate_of_waves_is_recovered():
    when = np.datetime64("2001-01-01", "ns") + np.arange(1600) * np.timedelta64(6, "h")
    config = Climatology(annual=1, daily=1, states=900)
    waves = forecast_climate.basis(config, when)
    truth = np.random.default_rng(0).normal(size=(5, 2, 3, 4))
    states = np.tensordot(waves, truth, axes=1)
    climate = forecast_climate.fit(
        config, lambda rows: states[rows], np.arange(1600), when, state_bytes=1 << 20
    )
    np.testing.assert_allclose(climate(when[:7]), states[:7], atol=FORECAST_REL)
    with pytest.raises(DataError, match=r"lower climatology\.annual"):
        forecast_climate.fit(config, lambda rows: states[rows], np.arange(80), when[:80], 1)


def test_scores_of_equal_fields_and_of_none():
    fields = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8, 16)), jnp.float32)
    sums = score(fields, fields, jnp.zeros_like(fields), jnp.array([1.0, 0.0]), GRID)
    np.testing.assert_allclose(sums["correlation"], 1.0, rtol=FORECAST_REL)
    assert not sums["square"].any() and not sums["error"].any()
    scores = Scores(1)
    for _ in range(3):
        scores.add(0, {"square": np.array([4.0, 9.0])}, 1.0)
    np.testing.assert_allclose(scores.rmse, [[2.0, 3.0]], rtol=FLOAT64_REL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lead_hours": 7}, "multiple of the models' step"),
        ({"lead_hours": 600}, "shorter lead_hours"),
        ({"channels": ("humidity",)}, "not in the archive"),
    ],
)
def test_what_the_archive_cannot_give_is_refused(runs, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        forecast.run_forecast(make_config(runs["plain"], **changes), tmp_path)


def test_runs_that_do_not_fit_are_refused(runs, archive, tmp_path):
    other = write_run(tmp_path / "other", archive, step_hours=12)
    with pytest.raises(ConfigError, match=r"differ in data\.step_hours"):
        forecast.run_forecast(make_config(runs["plain"], other), tmp_path)
    entry = EmulatorEntry(path=str(runs["plain"]), step=3)
    with pytest.raises(CheckpointError, match=r"no step 3; it has \[7\]"):
        forecast.find(entry)
    missing = replace(make_config(runs["plain"]), models=(EmulatorEntry(path="nowhere"),))
    assert "no complete step" in forecast.problems(missing)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "at least one"),
        ({"models": [{"path": "a"}, {"path": "b/a"}]}, "each with its own name"),
        ({"models": [{"path": "runs/truth"}]}, "names of baselines"),
        ({"models": [{"path": ""}]}, "path is empty"),
        ({"models": [{"path": "a"}], "map_leads": [24, 6]}, "ascending"),
        ({"models": [{"path": "a"}], "small_scales": [0.5, 0.5]}, "two ascending fractions"),
        ({"models": [{"path": "a"}], "batch_size": 0}, "batch_size=0 must be >= 1"),
        ({"models": [{"path": "a"}], "climatology": {"states": 0}}, "states=0 must be >= 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(ForecastConfig, {"kind": "forecast", **settings})
