# SPDX-License-Identifier: Apache-2.0
"""Archives of fields against xarray and numpy: layouts, channels, grids, statistics, samples."""

import importlib.util
import warnings

import numpy as np
import pytest
import xarray

from sqzjax.errors import DataError
from sqzjax.fields import Period, States, open_archive, periods, statistics_for
from sqzjax.fields import names as naming
from sqzjax.fields.placement import recognise
from sqzjax.fields.statistics import Moments, Statistics
from sqzjax.sphere.grid import Grid
from tests import tolerances as tol
from tests.sqzjax import weather


@pytest.fixture(scope="module")
def dataset():
    return weather.make()


@pytest.fixture(scope="module")
def plain(dataset, tmp_path_factory):
    """The dataset as a Zarr store in its own order."""
    return weather.write(dataset, tmp_path_factory.mktemp("plain") / "a.zarr")


def expected(dataset, channels):
    """States as xarray selects them by name, rows from north to south."""
    out = []
    for channel in channels:
        name, level = naming.split_channel(channel)
        array = dataset[name] if level is None else dataset[name].sel(level=level)
        out.append(array.transpose("time", "latitude", "longitude").values)
    return np.stack(out, 1)


def test_channels_are_variables_and_levels_by_name(dataset, plain):
    archive = open_archive(plain)
    assert archive.channels == (
        "surface_pressure",
        "temperature_500",
        "temperature_850",
        "u_component_of_wind_500",
        "u_component_of_wind_850",
    )
    assert archive.grid == Grid(latitudes=8, longitudes=16, layout="cells")
    states = archive.read(slice(None))
    assert states.dtype == np.float32
    assert np.array_equal(states, expected(dataset, archive.channels))
    assert np.array_equal(archive.times, dataset.time.values)


def test_times_are_read_in_any_order_and_may_repeat(dataset, plain):
    archive = open_archive(plain, channels=["t_850", "sp"])
    assert archive.channels == ("temperature_850", "surface_pressure")
    wanted = [7, 3, 3, 39, 0]
    assert np.array_equal(archive.read(wanted), expected(dataset, archive.channels)[wanted])
    assert archive.read([]).shape == (0, 2, 8, 16)
    with pytest.raises(IndexError):
        archive.read([40])


def _renamed(dataset):
    names = {"latitude": "lat", "longitude": "lon", "level": "isobaricInhPa", "time": "valid_time"}
    short = {"temperature": "t", "u_component_of_wind": "u", "surface_pressure": "sp"}
    return dataset.rename(names | short)


LAYOUTS = {
    "longitude_first": lambda d: d.transpose("time", "level", "longitude", "latitude"),
    "time_last": lambda d: d.transpose("latitude", "longitude", "level", "time"),
    "latitude_up": lambda d: d.sortby("latitude"),
    "levels_down": lambda d: d.sortby("level", ascending=False),
    "from_minus_180": lambda d: d.assign_coords(longitude=(d.longitude + 180) % 360 - 180).sortby(
        "longitude"
    ),
    "other_names": _renamed,
    "pressure_in_pascal": lambda d: d.assign_coords(
        level=("level", 100.0 * d.level.values, {"units": "Pa"})
    ),
    "an_ensemble_of_one": lambda d: d.expand_dims(number=1, axis=2),
}


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_states_grid_and_constants(
    dataset, plain, tmp_path, layout, suffix
):
    channels = ["surface_pressure", "temperature", "u_component_of_wind_850"]
    there = open_archive(plain, channels=channels)
    changed = LAYOUTS[layout](dataset)
    here = open_archive(weather.write(changed, tmp_path / f"b.{suffix}"), channels=channels)
    assert here.channels == there.channels
    assert here.grid == there.grid
    assert np.array_equal(here.read([5, 2]), there.read([5, 2]))
    assert here.constant_names == there.constant_names
    assert np.array_equal(here.constants(), there.constants())


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_packed_integers_are_unpacked_and_fill_values_are_missing(dataset, tmp_path, suffix):
    values = dataset.temperature.copy(deep=True)
    values[3, 1, 2, 5] = np.nan
    values.encoding = {
        "dtype": "int16",
        "scale_factor": 0.01,
        "add_offset": 270.0,
        "_FillValue": np.int16(-32768),
    }
    path = weather.write(values.to_dataset(), tmp_path / f"packed.{suffix}")
    with pytest.raises(DataError, match=r"1 values of temperature_850 at 2001-01-01T18"):
        open_archive(path).read([2, 3])
    archive = open_archive(path, missing="keep")
    states = archive.read(slice(None))
    assert np.isnan(states[3, 1, 2, 5]) and np.isnan(states).sum() == 1
    np.testing.assert_allclose(states, values.values, atol=tol.PACKED_TEMPERATURE)
    normal = States(archive, statistics_for(archive, range(40), step_hours=6)).read([3])
    assert normal[0, 1, 2, 5] == 0.0 and np.isfinite(normal).all()


def test_constants_are_scaled_as_the_emulator_reads_them(dataset, plain, tmp_path):
    archive = open_archive(plain)
    height = dataset.geopotential_at_surface.values
    mask, mountains, cosine = archive.constants()
    assert np.array_equal(mask, dataset.land_sea_mask.values.astype(np.float32))
    wanted = (height - height.min()) / height.max()
    np.testing.assert_allclose(mountains, wanted, rtol=tol.FIELD_REL)
    latitude = dataset.latitude.values
    np.testing.assert_allclose(cosine[:, 3], np.cos(np.radians(latitude)), rtol=tol.FIELD_REL)
    assert archive.constants(["cos_latitude"]).shape == (1, 8, 16)
    bare = weather.write(dataset.drop_vars("land_sea_mask"), tmp_path / "bare.zarr")
    assert open_archive(bare).constant_names == ("orography", "cos_latitude")
    with pytest.raises(DataError, match="leave it out of `constants`"):
        open_archive(bare).constants(["land_sea_mask"])


GRIDS = [
    Grid(latitudes=19, longitudes=36),
    Grid(latitudes=18, longitudes=36, layout="no_south_pole"),
    Grid(latitudes=32, longitudes=64, layout="cells"),
    Grid(latitudes=32, longitudes=64, layout="gauss"),
    Grid(latitudes=12, longitudes=24, layout="cells", west=7.5),
    Grid(latitudes=33, longitudes=49, layout="region", north=59.0, west=350.0, spacing=0.25),
    Grid(latitudes=5, longitudes=9, layout="region", north=10.0, west=170.0, spacing=2.5),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.layout}{grid.latitudes}")
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("upwards", [False, True])
def test_grids_are_recognised_from_float32_coordinates(grid, centred, upwards):
    longitude = grid.longitude() % 360
    if centred:
        longitude = (longitude + 180) % 360 - 180
    longitude = np.sort(longitude).astype(np.float32)
    latitude = grid.latitude().astype(np.float32)[:: -1 if upwards else 1]
    found = recognise(latitude, longitude)
    assert found.grid == grid
    np.testing.assert_allclose(latitude[found.rows], grid.latitude(), rtol=0, atol=tol.DEGREES)
    east = (longitude[found.columns] - grid.longitude() + 180) % 360 - 180
    np.testing.assert_allclose(east, 0, atol=tol.DEGREES)


def test_the_south_pole_can_be_dropped():
    whole = Grid(latitudes=721, longitudes=1440)
    found = recognise(whole.latitude(), whole.longitude(), drop_south_pole=True)
    assert found.grid == Grid(latitudes=720, longitudes=1440, layout="no_south_pole")
    halves = Grid(latitudes=8, longitudes=16, layout="cells")
    with pytest.raises(DataError, match="drop_south_pole"):
        recognise(halves.latitude(), halves.longitude(), drop_south_pole=True)


@pytest.mark.parametrize(
    ("latitude", "longitude", "message"),
    [
        ([10, 5, 1], [0, 5, 10], "latitudes are neither"),
        ([10, 5, 0], [0, 2, 4], "rows are 5 degrees apart and columns 2"),
        ([10, 5, 0], [0, 5, 11, 17], "not evenly spaced"),
        ([90, 0, -90], [0, 120, 240, 360], "longitudes repeat"),
        ([10], [0, 5], "at least 2"),
    ],
)
def test_what_is_no_grid_is_refused(latitude, longitude, message):
    with pytest.raises(DataError, match=message):
        recognise(np.array(latitude), np.array(longitude))


def _broken(dataset, change):
    return {
        "no_latitude": lambda: dataset.rename(latitude="rows"),
        "times_repeat": lambda: dataset.isel(time=[0, 0, 1]),
        "times_fall": lambda: dataset.isel(time=[2, 1, 0]),
        "numbers_for_times": lambda: dataset.assign_coords(time=np.arange(40)),
        "only_constants": lambda: dataset[["land_sea_mask", "time"]],
    }[change]()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no_latitude", r"none of \['latitude'\]"),
        ("times_repeat", "must ascend"),
        ("times_fall", "must ascend"),
        ("numbers_for_times", "not dates"),
        ("only_constants", "no variable over time"),
    ],
)
def test_unusable_archives_are_refused(dataset, tmp_path, change, message):
    path = weather.write(_broken(dataset, change), tmp_path / "broken.zarr")
    with pytest.raises(DataError, match=message):
        open_archive(path)


def test_wrong_requests_name_what_there_is(plain, tmp_path):
    with pytest.raises(DataError, match="did you mean 'temperature_500'"):
        open_archive(plain, channels=["temperatur_500"])
    with pytest.raises(DataError, match="more than once"):
        open_archive(plain, channels=["temperature", "t_500"])
    with pytest.raises(DataError, match="does not exist"):
        open_archive(tmp_path / "nothing.zarr")
    (tmp_path / "garbage.nc").write_bytes(b"garbage" * 100)
    with pytest.raises(DataError, match="cannot read the archive"):
        open_archive(tmp_path / "garbage.nc")


def test_archives_are_read_through_fsspec(dataset, plain, tmp_path):
    wanted = open_archive(plain).read([4])
    assert np.array_equal(open_archive(f"file://{plain}").read([4]), wanted)
    file = weather.write(dataset, tmp_path / "c.nc")
    options = {"simplecache": {"cache_storage": str(tmp_path / "cache")}}
    remote = open_archive(f"simplecache::file://{file}", storage_options=options)
    assert np.array_equal(remote.read([4]), wanted)


def test_fingerprints_differ_where_archives_do(dataset, plain, tmp_path):
    first = open_archive(plain).fingerprint
    assert open_archive(plain).fingerprint == first
    assert open_archive(plain, channels=["temperature"]).fingerprint != first
    later = weather.write(dataset.isel(time=slice(1, None)), tmp_path / "later.zarr")
    assert open_archive(later).fingerprint != first


def test_statistics_are_those_of_float64(dataset, plain, tmp_path, monkeypatch):
    from sqzjax.fields import statistics

    archive = open_archive(plain)
    monkeypatch.setattr(statistics, "_CHUNK_BYTES", 7 * archive.state_bytes)
    chosen = np.r_[0:11, 13:30]
    path = tmp_path / "deep" / "statistics.json"
    found = statistics_for(archive, chosen, step_hours=12, path=path)
    states = expected(dataset, archive.channels).astype(np.float64)
    np.testing.assert_allclose(found.mean, states[chosen].mean((0, 2, 3)), rtol=tol.FLOAT64_REL)
    np.testing.assert_allclose(found.std, states[chosen].std((0, 2, 3)), rtol=tol.FLOAT64_REL)
    pairs = [number for number in chosen if number + 2 in chosen]
    change = states[np.add(pairs, 2)] - states[pairs]
    np.testing.assert_allclose(found.step_std, change.std((0, 2, 3)), rtol=tol.FLOAT64_REL)
    normal = found.normalise(archive.read(chosen))
    np.testing.assert_allclose(normal.mean((0, 2, 3)), 0, atol=tol.NORMALISED_MEAN)
    error = np.abs(found.denormalise(normal) - archive.read(chosen)).max((0, 2, 3))
    assert (error / np.abs(states).max((0, 2, 3)) < tol.DENORMALISED_REL).all()


def test_stored_statistics_are_used_for_what_they_are_of_and_only_that(
    plain, tmp_path, monkeypatch
):
    from sqzjax.fields import statistics

    archive, path = open_archive(plain), tmp_path / "statistics.json"
    first = statistics_for(archive, range(20), step_hours=6, path=path)
    assert Statistics.load(path).digest == first.digest
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "compute", None)
        assert statistics_for(archive, range(20), step_hours=6, path=path).digest == first.digest
    assert statistics_for(archive, range(21), step_hours=6, path=path).digest != first.digest
    path.write_text("{}")
    with pytest.raises(DataError, match="holds no statistics"):
        Statistics.load(path)
    assert statistics_for(archive, range(20), step_hours=6, path=path).digest == first.digest


def test_statistics_of_other_channels(plain):
    archive = open_archive(plain)
    every = statistics_for(archive, range(40), step_hours=6)
    few = every.select(("temperature_850", "surface_pressure"))
    assert few.mean.tolist() == [every.mean[2], every.mean[0]]
    with pytest.raises(DataError, match="lack"):
        every.select(("vorticity",))


def test_a_channel_that_does_not_vary_is_refused(dataset, tmp_path):
    still = dataset.assign(surface_pressure=dataset.surface_pressure * 0 + 1)
    archive = open_archive(weather.write(still, tmp_path / "still.zarr"))
    with pytest.raises(DataError, match=r"\['surface_pressure'\] do not vary"):
        statistics_for(archive, range(40), step_hours=6)


def test_moments_do_not_count_what_is_missing():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(9, 2, 3, 4)) + 1e4
    states[rng.random(states.shape) < 0.3] = np.nan
    states[4, 1] = np.nan
    moments = Moments(2)
    for part in np.array_split(states, [4, 5]):
        moments.add(part)
    np.testing.assert_allclose(moments.mean, np.nanmean(states, (0, 2, 3)), rtol=tol.FLOAT64_REL)
    np.testing.assert_allclose(moments.std, np.nanstd(states, (0, 2, 3)), rtol=tol.MOMENTS_REL)


def test_states_from_memory_and_from_the_archive_are_equal(plain):
    archive = open_archive(plain)
    statistics = statistics_for(archive, range(30), step_hours=6)
    memory = States(archive, statistics, in_memory_bytes=40 * archive.state_bytes)
    lazy = States(archive, statistics, in_memory_bytes=40 * archive.state_bytes - 1)
    assert memory.in_memory and not lazy.in_memory
    assert np.array_equal(memory.read([3, 9, 3]), lazy.read([3, 9, 3]))


def brute_force(times, bounds, hours, length):
    """Samples by trying every start."""
    step, found = np.timedelta64(hours, "h"), []
    place = {time: number for number, time in enumerate(times)}
    for begin, end in bounds:
        for start in range(begin, end):
            row = [place.get(times[start] + number * step) for number in range(length)]
            if all(at is not None and at < end for at in row):
                found.append(row)
    return np.array(sorted(found), np.int64).reshape(-1, length)


@pytest.mark.parametrize("hours", [3, 6, 12])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_samples_never_reach_over_gaps_or_ends(hours, length):
    whole = np.datetime64("2001-01-01", "ns") + np.arange(64) * np.timedelta64(3, "h")
    times = np.delete(whole, [10, 11, 30, 45])
    chosen = (Period(stop="2001-01-04"), Period(start=0.6, stop="2001-01-07T09"))
    bounds = [period.bounds(times) for period in chosen]
    assert bounds == [(0, np.sum(times < np.datetime64("2001-01-04"))), (36, bounds[1][1])]
    found = periods.samples(times, chosen, step_hours=hours, length=length)
    assert np.array_equal(found, brute_force(times, bounds, hours, length))
    assert len(found) > 3


def test_without_gaps_a_period_loses_stride_times_window_minus_one():
    times = np.datetime64("2001-01-01", "ns") + np.arange(100) * np.timedelta64(1, "h")
    found = periods.samples(times, (Period(),), step_hours=6, length=3)
    assert len(found) == 100 - 6 * (3 - 1)
    assert found[0].tolist() == [0, 6, 12] and found[-1].tolist() == [87, 93, 99]


def test_splits_must_not_share_times():
    times = np.datetime64("2001-01-01", "ns") + np.arange(10) * np.timedelta64(1, "h")
    first, second = (Period(stop=0.5),), (Period(start=0.5),)
    periods.check_apart(times, train=first, valid=second)
    with pytest.raises(DataError, match="train and valid share 1 times from 2001-01-01T04"):
        periods.check_apart(times, train=first, valid=(Period(start=0.4),))


@pytest.mark.parametrize(
    "bounds", [{"start": "tomorrow"}, {"stop": 2017.0}, {"start": 0.5, "stop": 0.2}, {"start": ""}]
)
def test_bad_periods(bounds):
    with pytest.raises(ValueError, match=r"date|fraction|before"):
        Period(**bounds)


def test_real_monthly_means_of_netcdf_3(shared_data):
    path = shared_data / "eraint_uvz.nc"
    archive = open_archive(path, channels=["u", "v_850", "z_500"])
    assert archive.grid == Grid(latitudes=241, longitudes=480)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = xarray.open_dataset(path, engine="scipy")
    states = archive.read([1])
    # Its longitudes begin at -180, those of the grid at 0.
    wanted = np.roll(reference.z.sel(month=7, level=500).values, -240, axis=-1)
    np.testing.assert_allclose(states[0, 4], wanted, rtol=tol.FIELD_REL)
    assert archive.channels[:3] == tuple(f"u_component_of_wind_{n}" for n in (200, 500, 850))
    assert archive.times[1] - archive.times[0] == np.timedelta64(182, "D")
    whole = open_archive(path, channels=["z_500"], drop_south_pole=True)
    assert whole.grid == Grid(latitudes=240, longitudes=480, layout="no_south_pole")
    assert np.array_equal(whole.read([1])[0, 0], states[0, 4, :-1])


def test_real_hourly_temperature_of_a_region(shared_data):
    if importlib.util.find_spec("h5py") is None:
        pytest.skip("NetCDF 4 needs the package h5py (extra `weather`)")
    path = shared_data / "era5_t2m_uk_2019-03.nc"
    archive = open_archive(path)
    assert archive.channels == ("2m_temperature",) and len(archive.times) == 744
    assert archive.grid.layout == "region" and archive.grid.spacing == 0.25
    assert archive.grid.shape == (33, 49)
    with xarray.open_dataset(path, engine="h5netcdf") as reference:
        values = reference["2m_temperature"].sortby("latitude", ascending=False)
        np.testing.assert_allclose(archive.read([5])[0, 0], values[5], rtol=tol.FIELD_REL)
    found = periods.samples(archive.times, (Period(),), step_hours=6, length=3)
    assert len(found) == 744 - 6 * 2
