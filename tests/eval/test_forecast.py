# SPDX-License-Identifier: Apache-2.0
"""Forecast evaluation: scores against plain loops in float64, baselines, runs from disk, page."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import forecast, forecast_climate, forecast_report
from eval.forecast_config import Climatology, EmulatorEntry
from eval.forecast_models import find
from eval.forecast_scores import Scores, band_power, score, sharpness
from sqzjax.errors import DataError
from sqzjax.sphere import Transform, forward, power_spectrum
from tests.eval.forecast_runs import (
    CHANNELS,
    GRID,
    LEADS,
    by_name,
    loop_scores,
    make_config,
    make_task,
    physical,
    waves,
    write_archive,
    write_run,
)
from tests.tolerances import FLOAT64_REL, FORECAST_REL


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Fifteen days of drifting waves."""
    return write_archive(tmp_path_factory.mktemp("archive") / "waves.zarr", waves())


@pytest.fixture(scope="module")
def runs(archive, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "plain": write_run(folder / "plain", archive),
        "context": write_run(folder / "context", archive, context=2, seed=1),
        "units": write_run(folder / "units", archive, shift=0.5),
    }


@pytest.fixture(scope="module")
def record(runs, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("record")
    shown = {"channels": CHANNELS[1:], "map_leads": (24,), "spectrum_leads": (6, 24, 240)}
    config = make_config(runs["plain"], runs["context"], **shown)
    return forecast.run_forecast(config, folder) | {"folder": folder}


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
    found = find(EmulatorEntry(path=str(runs[name])))
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
    record = forecast.evaluate(make_task(runs["plain"], runs["units"], lead_hours=6))[0]
    found = find(EmulatorEntry(path=str(runs["units"])))
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
    whole = forecast.evaluate(make_task(runs["plain"], runs["context"], batch_size=7))[0]
    for entry in record["forecasts"]:
        again = by_name(whole, entry["name"])["normalised_rmse"]
        np.testing.assert_allclose(entry["normalised_rmse"], again, rtol=FORECAST_REL)


def test_files_hold_record_maps_and_page(archive, record):
    folder = record["folder"]
    stored = json.loads((folder / "results.json").read_text())
    assert stored["forecasts"] == record["forecasts"]
    with np.load(folder / "maps.npz") as maps:
        assert set(maps) == {
            f"{name}_24" for name in ("truth", "plain", "context", "persistence", "climatology")
        }
        np.testing.assert_allclose(maps["truth_24"], physical(archive)[53, 1:], rtol=FORECAST_REL)
    page = (folder / "report.html").read_text()
    headings = ("Findings", "Scores", "Anomaly correlation", "Spectra", "Sharpness", "Maps")
    for heading in headings:
        assert f"<h2>{heading}</h2>" in page
    assert "bias (forecast minus truth), 24 h" in page
    assert "knows no seasons" in page
    assert "plain - truth" in page or "matplotlib is not installed" in page
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
    entries[0] |= {"normalised_rmse": [0.1, None, None], "sharpness": [0.5, None, None]}
    said = forecast_report.findings({"leads": leads, "forecasts": entries})
    assert said == [
        "m beats persistence to 6 h and beats climatology to 6 h; it diverges after 6 h; it has "
        "50% of the truth's small-scale power after the first step."
    ]
    entries[0]["normalised_rmse"] = [None, None, None]
    said = forecast_report.findings({"leads": leads, "forecasts": entries})
    assert "does not beat climatology at 6 h; it diverges within 6 h; it has" in said[0]


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
    with pytest.raises(DataError, match="no state of the training period"):
        forecast_climate.fit(config, lambda rows: states[rows], np.arange(0), when[:0], 1)


def test_scores_of_equal_fields_and_of_none():
    fields = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8, 16)), jnp.float32)
    sums = score(fields, fields, jnp.zeros_like(fields), jnp.array([1.0, 0.0]), GRID)
    np.testing.assert_allclose(sums["correlation"], 1.0, rtol=FORECAST_REL)
    assert not sums["square"].any() and not sums["error"].any()
    scores = Scores(1)
    for _ in range(3):
        scores.add(0, {"square": np.array([4.0, 9.0]), "count": 1.0})
    np.testing.assert_allclose(scores.rmse, [[2.0, 3.0]], rtol=FLOAT64_REL)
    flat = np.zeros((1, 2, 9))
    assert np.isnan(sharpness(flat + 1.0, flat)).all()  # nothing to compare with
