# SPDX-License-Identifier: Apache-2.0
"""Forecast evaluation: which starts, other archives and grids, holes, divergence, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from eval import forecast, forecast_report
from eval.__main__ import run_forecast
from eval.forecast_config import Climatology, EmulatorEntry, ForecastConfig
from eval.forecast_models import find
from sqzjax import config as configs
from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.fields import Archive
from sqzjax.sphere import Grid
from tests.eval.forecast_runs import (
    CHANNELS,
    GRID,
    MEAN,
    STD,
    by_name,
    loop_scores,
    make_config,
    make_task,
    physical,
    waves,
    write_archive,
    write_run,
)
from tests.tolerances import FORECAST_REL


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Fifteen days of drifting waves."""
    return write_archive(tmp_path_factory.mktemp("archive") / "waves.zarr", waves())


@pytest.fixture(scope="module")
def plain(archive, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "plain", archive)


def persistence_errors(record, states, starts, grid=GRID, lead=1):
    """Return the scores of persistence as reported and by loops, in normalised units."""
    wanted = loop_scores(states[starts], states[starts + lead], states[starts] * 0, grid)["rmse"]
    return np.array(by_name(record, "persistence")["rmse"][lead - 1]) / STD, wanted / STD


def test_starts_are_those_asked_for(plain):
    """The archive has 60 states 6 h apart, the last 12 for tests, 12 before for validation."""

    def starts(**changes):
        return make_task(plain, **changes).rows[:, 0].tolist()

    assert starts() == list(range(48, 56))
    assert starts(every_hours=12) == [48, 50, 52, 54]
    assert starts(every_hours=9) == [48, 51, 54]
    assert starts(starts=3) == [48, 52, 55]
    assert starts(split="valid", every_hours=24) == [36, 40]


def test_another_archive_takes_the_place_of_the_one_that_is_named(archive, tmp_path):
    run = write_run(tmp_path / "run", tmp_path / "gone")
    with pytest.raises(DataError, match="does not exist"):
        make_task(run)
    assert make_task(run, archive=str(archive)).archive.path == str(archive)


def test_the_average_of_a_run_that_kept_one_is_evaluated(archive, plain, tmp_path):
    average = jax.tree.map(lambda leaf: leaf + 1, find(EmulatorEntry(path=str(plain))).params())
    found = find(EmulatorEntry(path=str(write_run(tmp_path / "run", archive, average=average))))
    jax.tree.map(np.testing.assert_array_equal, found.params(), average)
    wrong = write_run(tmp_path / "other", archive, average={"head": average["head"]})
    with pytest.raises(CheckpointError, match=r"does not fit its model: .*missing, expected"):
        make_task(wrong)


@pytest.mark.parametrize("kind", ["without the south pole", "region"])
def test_other_grids(tmp_path, kind):
    """A region has no spectra; a row at the south pole is left out of everything."""
    if kind == "region":
        stored = grid = Grid(latitudes=8, longitudes=16, layout="region", north=60.0, spacing=2.0)
    else:
        stored = Grid(latitudes=9, longitudes=16)
        grid = Grid(latitudes=8, longitudes=16, layout="no_south_pole")
    archive = write_archive(tmp_path / "a.zarr", waves(stored), stored)
    run = write_run(tmp_path / "run", archive, grid=grid, drop_south_pole=kind != "region")
    record, maps = forecast.evaluate(make_task(run, lead_hours=6, channels=CHANNELS[:1]))
    found, wanted = persistence_errors(
        record, physical(archive)[:, :, :8], np.arange(48, 59), grid=grid
    )
    np.testing.assert_allclose(found, wanted, rtol=10 * FORECAST_REL)
    whole = kind != "region"
    assert record["spectra"]["leads"] == ([6] if whole else [])
    assert (by_name(record, "run")["sharpness"] is None) != whole
    if not whole:
        assert "<h2>Spectra</h2>" not in forecast_report.render(record, maps)


def test_a_climatology_of_seasons_knows_the_season(tmp_path):
    """Weather that is nothing but a season, ten days a step: its climatology has no error."""
    when = 2 * np.pi * np.arange(60) * 10 / 365.2425
    season = np.random.default_rng(0).normal(size=(3, 1, 8, 16)) * np.cos(when)[:, None, None]
    archive = write_archive(tmp_path / "a.zarr", season, hours=240)
    run = write_run(tmp_path / "run", archive, step_hours=240)

    def error(annual):
        task = make_task(run, lead_hours=240, climatology=Climatology(annual=annual))
        return by_name(forecast.evaluate(task)[0], "climatology")["normalised_rmse"][0]

    assert error(1) < 10 * FORECAST_REL < 0.1 < error(0)


def test_points_without_values_do_not_count(tmp_path):
    fields = waves()
    fields[1, :, 2:5, :6] = np.nan  # always
    fields[2, 50] = np.nan  # once, everywhere
    archive = write_archive(tmp_path / "a.zarr", fields)
    run = write_run(tmp_path / "run", archive, missing="fill")
    record, maps = forecast.evaluate(make_task(run, lead_hours=6, map_leads=(6,)))
    states, starts = physical(archive), np.arange(48, 59)
    # A forecast from what is not there begins with the mean.
    filled = np.where(np.isnan(states), MEAN[:, None, None], states)
    climate = np.repeat(filled[:36].mean(0)[None], len(starts), axis=0)
    wanted = loop_scores(filled[starts], states[starts + 1], climate)
    found = by_name(record, "persistence")
    for name, values in wanted.items():
        scale = 1.0 if name == "correlation" else STD
        each = np.array(found[name][0]) / scale, np.array(values) / scale
        np.testing.assert_allclose(*each, atol=10 * FORECAST_REL)
    assert by_name(record, "run")["sharpness"] is None and not record["spectra"]["leads"]
    assert np.isnan(maps["truth_6"][1, 2:5, :6]).all()
    assert "<h2>Maps</h2>" in forecast_report.render(record, maps)


def test_a_model_that_diverges_is_reported(archive, plain, tmp_path):
    """Weights that grow the state until it is no number; the page and the file say so."""
    run = write_run(tmp_path / "wild", archive, scale=1e3)
    folder, few = tmp_path / "out", {"channels": CHANNELS[:1], "spectrum_leads": (24,)}
    record = forecast.run_forecast(make_config(plain, run, **few), folder)
    wild = by_name(record, "wild")
    assert wild["normalised_rmse"][-1] is None and wild["correlation"][-1] == [None] * 3
    assert None not in by_name(record, "plain")["normalised_rmse"]
    assert (
        "at 6 h; it diverges after 18 h; it has 5.96e+16 times the"
        in forecast_report.findings(record)[1]
    )
    stored = json.loads((folder / "results.json").read_text())
    assert forecast_report.markdown(stored) + "\n" == (folder / "table.md").read_text()
    assert "nan" not in (folder / "table.md").read_text()
    assert "nan%" not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lead_hours": 7}, "multiple of the models' step"),
        ({"lead_hours": 600}, "shorter lead_hours"),
        ({"channels": ("humidity",)}, "not in the archive"),
        ({"small_scales": (0.9, 0.95)}, r"holds no degree of 0\.\.7; widen it"),
        ({"climatology": Climatology(annual=1)}, r"lower climatology\.annual"),
    ],
)
def test_what_the_archive_cannot_give_is_refused(plain, tmp_path, monkeypatch, changes, message):
    """Before a state is read, and nothing is left behind."""
    monkeypatch.setattr(Archive, "read", lambda *_: pytest.fail("read a state"))
    monkeypatch.setattr(forecast, "evaluate", lambda task: pytest.fail("evaluated"))
    with pytest.raises((ConfigError, DataError), match=message):
        forecast.run_forecast(make_config(plain, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ({"constants": []}, ConfigError, "reads 1 constants, its run names"),
        ({"constants": ["orography"]}, ConfigError, "choose the archive it was trained on"),
        ({"channels": list(CHANNELS[:2])}, ConfigError, "forecasts 3 channels"),
        ({"train": [{"stop": "1999"}]}, DataError, "no state of the training period"),
    ],
)
def test_runs_that_do_not_fit_the_archive_are_refused(archive, tmp_path, told, error, message):
    run = write_run(tmp_path / "run", archive, **told)
    with pytest.raises(error, match=message):
        forecast.run_forecast(make_config(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("told", [{"step_hours": 12}, {"missing": "fill"}])
def test_runs_that_differ_are_refused(plain, archive, tmp_path, told):
    other = write_run(tmp_path / "other", archive, **told)
    with pytest.raises(ConfigError, match=rf"differ in data\.{next(iter(told))}"):
        forecast.run_forecast(make_config(plain, other), tmp_path)


def test_every_run_that_is_missing_is_named(plain, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"no step 3; it has \[7\]"):
        find(EmulatorEntry(path=str(plain), step=3))
    entries = (EmulatorEntry(path="nowhere"), EmulatorEntry(path="lost"))
    missing = replace(make_config(plain), models=entries)
    lines = forecast.problems(missing)
    assert [line.split(":")[0] for line in lines] == ["model 'nowhere'", "model 'lost'"]
    with pytest.raises(ConfigError) as error:
        forecast.run_forecast(missing, tmp_path / "out")
    assert list(error.value.problems) == lines
    run_forecast(missing, workdir=tmp_path / "out", dry_run=True)
    assert capsys.readouterr().out.count("# not found yet: model") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "at least one"),
        ({"models": [{"path": "a"}, {"path": "b/a"}]}, "each with its own name"),
        ({"models": [{"path": "runs/truth"}]}, "names of baselines"),
        ({"models": [{"path": ""}]}, "path is empty"),
        ({"models": [{"path": "/"}]}, "path='/' has no name of its own; set name"),
        ({"models": [{"path": "a"}], "map_leads": [24, 6]}, "ascending"),
        ({"models": [{"path": "a"}], "small_scales": [0.5, 0.5]}, "two ascending fractions"),
        ({"models": [{"path": "a"}], "batch_size": 0}, "batch_size=0 must be >= 1"),
        ({"models": [{"path": "a"}], "climatology": {"states": 0}}, "states=0 must be >= 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(ForecastConfig, {"kind": "forecast", **settings})
