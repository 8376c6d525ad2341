# SPDX-License-Identifier: Apache-2.0
"""Simulated weather: finite, conserving, repeatable, resumable, and like an atmosphere."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("dinosaur", reason="simulating needs dinosaur-dycore (extra `weather`)")

from sqzjax import config as configs
from sqzjax.errors import ConfigError, DataError
from sqzjax.fields import open_archive
from sqzjax.sphere.grid import Grid
from tests import tolerances as tol
from train import simulate, simulation
from train.simulate_config import SimulateConfig

OPTIMIZED = True

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"
TINY = configs.load(SimulateConfig, CONFIGS / "simulate_tiny.yaml")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The folder of a tiny simulation, undisturbed."""
    folder = tmp_path_factory.mktemp("simulated")
    assert simulate.run(TINY, workdir=folder) == 0
    return folder


def values(folder):
    found = open_archive(folder)
    return found.read(slice(None)), found.constants()


def test_the_archive_has_the_layout_of_weatherbench(archive):
    found = open_archive(archive)
    assert found.grid == Grid(latitudes=8, longitudes=16, layout="gauss")
    assert found.channels[:3] == ("geopotential_500", "geopotential_850", "surface_pressure")
    assert len(found.channels) == 9
    assert len(found.times) == 48 == TINY.num_states
    assert str(found.times[5]).startswith("2000-01-02T06:00")
    assert found.constant_names == ("land_sea_mask", "orography", "cos_latitude")
    assert json.loads(found.attributes["simulation"])["days"] == 12
    import xarray

    raw = xarray.open_zarr(archive / "weather.zarr", consolidated=True, chunks=None)
    assert raw.temperature.dims == ("time", "level", "latitude", "longitude")
    assert raw.temperature.attrs["units"] == "K" and raw.latitude[0] > 0


def test_states_are_finite_and_like_an_atmosphere(archive):
    found = open_archive(archive)
    states = found.read(slice(None))
    mean = dict(zip(found.channels, states.mean((0, 2, 3))))
    assert np.isfinite(states).all()
    assert 200 < mean["temperature_500"] < mean["temperature_850"] < 310
    assert 4.5e4 < mean["geopotential_500"] < 6e4 and 1e4 < mean["geopotential_850"] < 1.6e4
    assert 0.8e5 < mean["surface_pressure"] < 1.02e5
    assert states.std(0).min() > 0
    land = found.constants(["land_sea_mask"])[0]
    area = (land * found.grid.area_weights()[:, None]).mean()
    assert abs(area - TINY.land_fraction) < tol.LAND_SHARE


def test_dry_mass_is_conserved(archive):
    found = open_archive(archive, channels=["surface_pressure"])
    weights = np.polynomial.legendre.leggauss(8)[1]
    mass = found.read(slice(None))[:, 0].astype(np.float64).mean(2) @ weights / 2
    assert np.abs(mass / mass[0] - 1).max() < tol.DRY_MASS


def test_seeds_differ_in_their_mountains_and_their_start():
    one, again, other = (simulation.build(replace(TINY, seed=seed)) for seed in (0, 0, 1))
    for name, field in one.constants.items():
        assert np.array_equal(field, again.constants[name])
        assert not np.array_equal(field, other.constants[name])
    pressures = [np.asarray(made.start().log_surface_pressure) for made in (one, again, other)]
    assert np.array_equal(pressures[0], pressures[1])
    assert not np.array_equal(pressures[0], pressures[2])


def test_layers_are_hydrostatic(archive):
    """The height between two pressures is R T / g times the logarithm of their ratio."""
    found = open_archive(archive, channels=["geopotential", "temperature", "surface_pressure"])
    states = found.read(slice(None)).astype(np.float64)
    above_ground = states[:, 4] > 9e4
    expected = 287.0 * (states[:, 2] + states[:, 3]) / 2 * np.log(850 / 500)
    thickness = states[:, 0] - states[:, 1]
    assert above_ground.mean() > 0.5
    np.testing.assert_allclose(
        thickness[above_ground], expected[above_ground], rtol=tol.HYPSOMETRIC
    )


def test_what_is_there_is_kept_and_other_settings_are_refused(archive, caplog):
    before = {path: path.stat().st_mtime_ns for path in archive.rglob("*") if "zarr" in str(path)}
    caplog.set_level(logging.INFO)
    assert simulate.run(TINY, workdir=archive) == 0
    assert "is there already" in caplog.text
    with pytest.raises(DataError, match=r"(?s)--resume never.*layers: 3 in the archive, 4 now"):
        simulate.run(replace(TINY, layers=4), workdir=archive)
    assert before == {path: path.stat().st_mtime_ns for path in before}


class _Stop:
    """A preemption that comes after some chunks."""

    def __init__(self, chunks):
        self.left = chunks

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0


def test_a_stopped_simulation_goes_on_bit_for_bit(archive, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(simulate, "Preemption", stopping(2))
        assert simulate.run(TINY, workdir=tmp_path) == 75
        assert not (tmp_path / "weather.zarr").exists()
        with pytest.raises(DataError, match="seed"):
            simulate.run(replace(TINY, seed=2), workdir=tmp_path)
    assert simulate.run(TINY, workdir=tmp_path) == 0
    assert np.array_equal(values(tmp_path)[0], values(archive)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "config.yaml",
        "simulate.log",
        "weather.zarr",
    ]


@pytest.fixture
def counting(monkeypatch):
    """Simulations whose states are their number, counted from the first of the spin-up."""
    calls = []

    def advance(state):
        calls.append(float(state) + 1)
        layers = np.full((2, 8, 16), calls[-1], np.float32)
        surface = {"surface_pressure": layers[0]}
        return jnp.float32(calls[-1]), dict.fromkeys(TINY.variables, layers) | surface

    made = simulation.Simulation(lambda: jnp.float32(0), advance, {})
    monkeypatch.setattr(simulate, "build", lambda config: made)
    return calls


def stopping(chunks):
    """A context that asks to stop after so many chunks."""

    class Stopping:
        def __enter__(self):
            return _Stop(chunks)

        def __exit__(self, *_):
            pass

    return Stopping


COUNTED = replace(TINY, chunk_states=4)  # the spin-up takes two chunks


def test_a_stop_in_the_spin_up_is_obeyed_and_nothing_is_computed_twice(
    counting, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(simulate, "Preemption", stopping(1))
        assert simulate.run(COUNTED, workdir=tmp_path) == 75
    assert len(counting) == 4
    assert simulate.run(COUNTED, workdir=tmp_path) == 0
    assert counting == list(range(1, 57))
    assert open_archive(tmp_path).read(slice(None))[:, 0, 0, 0].tolist() == list(range(9, 57))


def test_progress_of_another_simulation_completes_nothing(counting, tmp_path, monkeypatch):
    progress = tmp_path / simulate.PROGRESS
    assert simulate.run(COUNTED, workdir=tmp_path) == 0
    assert not progress.exists()
    simulate._save_progress(progress, jnp.float32(0), 48, COUNTED)  # killed before it was removed
    assert simulate.run(COUNTED, workdir=tmp_path) == 0
    assert not progress.exists()
    simulate._save_progress(progress, jnp.float32(0), 48, COUNTED)
    (tmp_path / "weather.zarr").rename(tmp_path / "elsewhere")
    other = replace(COUNTED, seed=5)
    with monkeypatch.context() as patched:
        patched.setattr(simulate, "Preemption", stopping(0))  # before anything is computed
        assert simulate.run(other, workdir=tmp_path) == 75
    assert not progress.exists()
    simulate._save_progress(progress, jnp.float32(0), 48, COUNTED)
    with pytest.raises(DataError, match=r"(?s)otherwise.*seed: 0 in the progress, 5 now"):
        simulate.run(other, workdir=tmp_path)
    progress.write_bytes(b"garbage")
    with pytest.raises(DataError, match="holds no state"):
        simulate.run(other, workdir=tmp_path)
    progress.unlink()
    assert simulate.run(other, workdir=tmp_path) == 0
    assert open_archive(tmp_path).read([47])[0, 0, 0, 0] == 56


def test_a_refused_command_changes_nothing_and_never_starts_anew(counting, tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, "Preemption", stopping(3))
    assert simulate.run(COUNTED, workdir=tmp_path) == 75
    told = (tmp_path / "config.yaml").read_text()
    other = replace(COUNTED, seed=2)
    with pytest.raises(DataError, match="seed: 0 in the archive, 2 now"):
        simulate.run(other, workdir=tmp_path)
    assert (tmp_path / "config.yaml").read_text() == told
    monkeypatch.setattr(simulate, "Preemption", stopping(99))
    assert simulate.run(other, workdir=tmp_path, resume="never") == 0
    assert "seed: 2" in (tmp_path / "config.yaml").read_text()
    del counting[:]
    assert simulate.run(COUNTED, workdir=tmp_path, resume="never") == 0
    assert counting == list(range(1, 57))
    assert json.loads(open_archive(tmp_path).attributes["simulation"])["seed"] == 0


def test_rows_go_south_and_winds_blow_as_their_stream_function_says():
    dino = simulation.load_package()
    coords, units = simulation._coordinates(dino, TINY), dino.scales.units
    specs = dino.primitive_equations.PrimitiveEquationsSpecs.from_si()
    grid = coords.horizontal
    zeros = jnp.zeros((TINY.layers, *grid.modal_shape))
    longitude, sine = (np.asarray(axis) for axis in np.meshgrid(*grid.nodal_axes, indexing="ij"))
    cosine = np.sqrt(1 - sine**2)
    speed = specs.nondimensionalize(10.0 * units.meter / units.second)
    stream = speed * (cosine * np.cos(longitude) - 2 * sine)  # degree 1: its Laplacian is -2 times
    pressure = specs.nondimensionalize(1e5 * units.pascal) * np.exp(0.1 * sine)
    state = dino.primitive_equations.State(
        vorticity=zeros + grid.to_modal(-2 * stream),
        divergence=zeros,
        temperature_variation=zeros,
        log_surface_pressure=grid.to_modal(np.log(pressure))[None],
    )
    recorder = simulation.Recorder(
        TINY, dino, coords, specs, np.zeros(TINY.layers), jnp.zeros(grid.modal_shape)
    )
    found = recorder.record(state)
    latitude = np.radians(TINY.grid.latitude())[:, None]
    east = np.radians(TINY.grid.longitude())
    wanted = {
        "u_component_of_wind": 10 * np.sin(latitude) * np.cos(east) + 20 * np.cos(latitude),
        "v_component_of_wind": -10 * np.sin(east) + 0 * latitude,
        "surface_pressure": 1e5 * np.exp(0.1 * np.sin(latitude)) + 0 * east,
    }
    for name, field in wanted.items():
        size = np.abs(field).max()
        for level in np.asarray(found[name]).reshape(-1, 8, 16):
            np.testing.assert_allclose(level / size, field / size, atol=tol.RECORDED)


def test_mountains_are_smooth_and_there_is_land():
    grid = simulation._coordinates(simulation.load_package(), TINY).horizontal
    height, land = (np.asarray(field) for field in simulation.terrain(TINY, grid))
    raw = np.maximum(np.asarray(grid.to_nodal(land)), 0)
    raw = np.asarray(grid.to_modal(raw * TINY.mountain_height / raw.max()))
    smooth = np.exp(-4 * (grid.modal_axes[1] / (TINY.wavenumbers + 1)) ** 4)
    size = np.abs(raw).max()
    np.testing.assert_allclose(height / size, raw * smooth / size, atol=tol.RECORDED)
    with pytest.raises(DataError, match=r"land_fraction=0\.0001 is less than one"):
        simulation.terrain(replace(TINY, land_fraction=1e-4), grid)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert simulate.run(SimulateConfig(), workdir=tmp_path / "x", dry_run=True) == 0
    assert "5,840 of 13 fields" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="auto or never"):
        simulate.run(TINY, workdir=tmp_path / "x", resume="7")


def test_columns_are_interpolated_linearly():
    rng = np.random.default_rng(0)
    known = np.sort(rng.normal(size=4)).astype(np.float32)
    columns = rng.normal(size=(4, 2, 3)).astype(np.float32)
    target = rng.uniform(known[0] - 1, known[-1] + 1, (5, 2, 3)).astype(np.float32)
    arguments = (jnp.asarray(columns), jnp.asarray(known), jnp.asarray(target))
    flat = np.asarray(simulation.interpolate(*arguments, extrapolate=False))
    line = np.asarray(simulation.interpolate(*arguments, extrapolate=True))
    for i, j in np.ndindex(2, 3):
        wanted = np.interp(target[:, i, j], known, columns[:, i, j])
        np.testing.assert_allclose(flat[:, i, j], wanted, atol=tol.INTERPOLATED)
    straight = 3.0 * known[:, None, None] - 1.0 + np.zeros((4, 2, 3), np.float32)
    found = simulation.interpolate(
        jnp.asarray(straight), arguments[1], arguments[2], extrapolate=True
    )
    np.testing.assert_allclose(found, 3.0 * target - 1.0, atol=tol.INTERPOLATED)
    inside = (target > known[0]) & (target < known[-1])
    assert np.array_equal(line[inside], flat[inside]) and not np.array_equal(line, flat)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wavenumbers": 32}, "wavenumbers=32 must be <= 31"),
        ({"time_step_minutes": 70}, "must divide interval_hours"),
        ({"time_step_minutes": 0}, "must divide interval_hours"),
        ({"interval_hours": 5, "time_step_minutes": 60}, "interval_hours=5 must divide 24"),
        ({"diffusion_hours": 0.0}, "diffusion_hours=0.0 must be > 0"),
        ({"variables": ["temperature", "temperature"]}, "name each once"),
        ({"levels": [850, 500]}, "ascend"),
        ({"levels": [500, 1200]}, "hPa"),
        ({"land_fraction": 1.0}, r"\(0, 1\)"),
        ({"start": "yesterday night"}, "ISO date"),
        ({"start": "now"}, "ISO date"),
        ({"start": ""}, "ISO date"),
        ({"start": "NaT"}, "ISO date"),
        ({"start": "20000101"}, "ISO date"),
        ({"start": "1500-01-01"}, "1678 to 2261"),
        ({"start": "2261-06-01"}, "beyond the year 2261"),
        ({"days": 0}, "days=0 must be >= 1"),
        ({"variables": ["vorticity"]}, "one of geopotential"),
    ],
)
def test_bad_configs(settings, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(SimulateConfig, {"kind": "simulate", **settings})


def test_a_simulation_that_breaks_down_says_what_to_change():
    fields = {"u_component_of_wind": np.full((2, 1, 2, 2), 10.0)}
    simulate.check_sane(fields, 0)
    with pytest.raises(DataError, match="lower time_step_minutes"):
        simulate.check_sane({"temperature": np.array([np.nan])}, 0)
    with pytest.raises(DataError, match="400 m/s"):
        simulate.check_sane({name: 40 * field for name, field in fields.items()}, 0)


@pytest.mark.slow
def test_the_real_setting_is_turbulent_and_hard_to_predict(tmp_path):
    """Sixty days of T31: winds of a real atmosphere, persistence that fails within two days."""
    config = replace(SimulateConfig(), days=60)
    assert simulate.run(config, workdir=tmp_path) == 0
    channels = ["u_component_of_wind_250", "v_component_of_wind_850"]
    states = open_archive(tmp_path, channels=channels).read(slice(None)).astype(np.float64)
    assert 40 < states[:, 0].max() < 120
    wind = states[:, 1] / states[:, 1].std()
    errors = {h: np.sqrt(np.mean((wind[h // 6 :] - wind[: -h // 6]) ** 2)) for h in (6, 48)}
    assert 0.1 < errors[6] < 0.5 and 0.9 < errors[48] < 1.6
    power = (np.abs(np.fft.rfft(wind, axis=-1)) ** 2)[:, 12:20].mean((0, 1))
    # Middle latitudes: much in waves 4 to 8, something in the smallest that T31 resolves.
    assert power[4:9].mean() > 30 * power[20:28].mean() > 1e-4 * power[4:9].mean()
