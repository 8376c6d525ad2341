# SPDX-License-Identifier: Apache-2.0
"""Archives of fields against xarray and numpy: layouts, channels, grids, what is refused."""

import importlib.util
import warnings

import numpy as np
import pytest
import xarray

from sqzjax.errors import DataError
from sqzjax.fields import Period, States, open_archive, periods, statistics_for
from sqzjax.fields.placement import recognise
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
    assert np.array_equal(states, weather.expected(dataset, archive.channels))
    assert np.array_equal(archive.times, dataset.time.values)


def test_times_are_read_in_any_order_and_may_repeat(dataset, plain):
    archive = open_archive(plain, channels=["t_850", "sp"])
    assert archive.channels == ("temperature_850", "surface_pressure")
    wanted = [7, 3, 3, 39, 0]
    assert np.array_equal(archive.read(wanted), weather.expected(dataset, archive.channels)[wanted])
    assert archive.read([]).shape == (0, 2, 8, 16)
    assert np.array_equal(archive.read(5), archive.read([5]))
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
    "pressure_in_pascal_untold": lambda d: d.assign_coords(level=100 * d.level.values),
    "pressure_in_pascals": lambda d: d.assign_coords(
        level=("level", 100.0 * d.level.values, {"units": "Pascals"})
    ),
    "pressure_in_millibars": lambda d: d.assign_coords(
        level=("level", d.level.values, {"units": "millibars"})
    ),
    "constants_at_every_time": lambda d: d.drop_vars("geopotential_at_surface").assign(
        z=d.geopotential_at_surface.expand_dims(time=d.time),
        land_sea_mask=d.land_sea_mask.expand_dims(time=d.time),
    ),
    "an_ensemble_of_one": lambda d: d.expand_dims(number=1, axis=2),
}


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [*((layout, "zarr") for layout in LAYOUTS), ("other_names", "nc"), ("time_last", "nc")],
)
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
    infinite = values.copy(data=np.where(np.isnan(values), np.inf, values))
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
    normal = States(archive, statistics_for(archive, range(40))).read([3])
    assert normal[0, 1, 2, 5] == 0.0 and np.isfinite(normal).all()
    path = weather.write(infinite.to_dataset(), tmp_path / f"infinite.{suffix}")
    with pytest.raises(DataError, match="1 values of temperature_850"):
        open_archive(path).read([3])
    assert np.isnan(open_archive(path, missing="keep").read([3])[0, 1, 2, 5])


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
    below = height - 2000  # nowhere above 0: only the lowest point is taken off
    sea = dataset.assign(geopotential_at_surface=dataset.geopotential_at_surface - 2000)
    sea.land_sea_mask[2, 3] = np.nan
    sea = open_archive(weather.write(sea, tmp_path / "sea.zarr"))
    found = sea.constants(["orography"])[0]
    np.testing.assert_allclose(found, below - below.min(), rtol=tol.FIELD_REL)
    with pytest.raises(DataError, match="land_sea_mask has missing values; leave it out"):
        sea.constants(["land_sea_mask"])
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
    Grid(latitudes=5, longitudes=176, layout="region", north=10.0, west=14.0, spacing=2.0),
    Grid(latitudes=271, longitudes=20, layout="region", spacing=0.666666),
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


def test_a_region_of_two_thirds_of_a_degree_from_pole_to_pole_and_tiny_negative_longitudes():
    found = recognise(90 - 2 / 3 * np.arange(271), 2 / 3 * np.arange(20))
    assert found.grid.spacing == pytest.approx(2 / 3, abs=tol.DEGREES)
    longitude = 22.5 * np.arange(16) - 1e-6  # the first is 359.999999
    found = recognise(Grid(latitudes=8, longitudes=16, layout="cells").latitude(), longitude)
    assert found.columns.tolist() == list(range(16)) and found.grid.west == 0.0


def test_constants_are_channels_only_if_asked_for(dataset, tmp_path):
    every_time = LAYOUTS["constants_at_every_time"](dataset)
    path = weather.write(every_time, tmp_path / "a.zarr")
    assert open_archive(path).channels == open_archive(path, channels=()).channels
    assert not {"geopotential", "land_sea_mask"} & set(open_archive(path).channels)
    archive = open_archive(path, channels=["lsm", "geopotential_at_surface"])
    assert archive.channels == ("land_sea_mask", "geopotential_at_surface")
    # One level of geopotential, its pressure a number beside it, is no surface.
    one = dataset.temperature.rename("z").sel(level=500).to_dataset()
    assert open_archive(weather.write(one, tmp_path / "b.zarr")).channels == ("geopotential",)


def test_what_is_left_out_is_named_with_the_reason(dataset, tmp_path):
    level = xarray.DataArray([100, 200, 300], dims="plev")
    changed = dataset.assign(
        q=(dataset.surface_pressure * xarray.ones_like(level)).assign_coords(plev=level),
        r=dataset.surface_pressure.expand_dims(number=3),
        quality=xarray.full_like(dataset.surface_pressure, "a", dtype="U1"),
    )
    path = weather.write(changed, tmp_path / "a.zarr")
    assert open_archive(path).channels == open_archive(path, channels=["sp", "t", "u"]).channels
    message = (
        r"(?s)no channel 'q'.*quality \(of .*, not numbers\).*relative_humidity \(over 3 values of "
        r"number.*specific_humidity \(over a second dimension of levels, plev\)"
    )
    with pytest.raises(DataError, match=message):
        open_archive(path, channels=["q"])
    path = weather.write(changed[["r"]], tmp_path / "b.zarr")
    with pytest.raises(DataError, match=r"no variable over time.*over 3 values of number"):
        open_archive(path)


def _broken(dataset, change):
    return {
        "no_latitude": lambda: dataset.rename(latitude="rows"),
        "times_repeat": lambda: dataset.isel(time=[0, 0, 1]),
        "times_fall": lambda: dataset.isel(time=[2, 1, 0]),
        "a_time_is_missing": lambda: dataset.assign_coords(
            time=np.where(np.arange(40) == 7, np.datetime64("NaT", "ns"), dataset.time.values)
        ),
        "no_coordinates": lambda: dataset.drop_vars(["latitude", "level"]),
        "two_of_a_name": lambda: dataset.assign(t=dataset.temperature),
        "levels_of_a_model": lambda: dataset.assign_coords(level=("level", [1, 2], {"units": "1"})),
        "levels_repeat": lambda: dataset.assign_coords(level=[500, 500]),
        "beyond_the_pole": lambda: dataset.assign_coords(latitude=100 - 22.5 * np.arange(8)),
        "no_leap_years": lambda: dataset.assign_coords(
            time=("time", 6.0 * np.arange(40), {"units": "hours since 2001", "calendar": "noleap"})
        ),
        "numbers_for_times": lambda: dataset.assign_coords(time=np.arange(40)),
        "only_constants": lambda: dataset[["land_sea_mask", "time"]],
    }[change]()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no_latitude", r"none of \['latitude'\]"),
        ("times_repeat", "must ascend"),
        ("times_fall", "must ascend"),
        ("a_time_is_missing", "none may be missing"),
        ("no_coordinates", r"\['latitude', 'level'\] have no coordinates"),
        ("two_of_a_name", "'t' and 'temperature' both stand for temperature"),
        ("levels_of_a_model", "units '1', which are not of pressure"),
        ("levels_repeat", "each there once"),
        ("beyond_the_pole", r"broken\.zarr: .*sphere"),
        ("no_leap_years", "calendar 'noleap'"),
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
    (tmp_path / "a.grib").write_bytes(b"GRIB")
    with pytest.raises(DataError, match="cdo -f nc4 copy"):
        open_archive(tmp_path / "a.grib")
    (tmp_path / "garbage.nc").write_bytes(b"garbage" * 100)
    for several in (tmp_path, tmp_path / "*.nc"):
        with pytest.raises(DataError, match=r"cdo mergetime .*\.nc all\.nc"):
            open_archive(several)
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
    assert open_archive(plain, missing="keep").fingerprint != first
    changed = dataset.copy(deep=True)
    changed.temperature[39, 0, 0, 0] += 1
    gaps = dataset.copy(deep=True)
    gaps.temperature[0, 0, 0, 0] = np.nan
    others = {
        "later": dataset.isel(time=slice(1, None)),
        "last_state": changed,
        "first_state": gaps,
        "attributes": dataset.assign_attrs(source="other"),
        "types": dataset.astype(np.float64),
        "grid": dataset.assign_coords(longitude=dataset.longitude + 1),
    }
    for name, other in others.items():
        assert open_archive(weather.write(other, tmp_path / f"{name}.zarr")).fingerprint != first


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
