# SPDX-License-Identifier: Apache-2.0
"""Small archives of known content, written with xarray, for the tests of fields."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray

from sqzjax.fields import names

LEVELS = (500, 850)


def make(
    times: int = 40, latitudes: int = 8, longitudes: int = 16, hours: int = 6, seed: int = 0
) -> xarray.Dataset:
    """Return a dataset in WeatherBench2's layout, rows from north to south.

    Temperature at time t is about 250 + t, so that a state tells which time it is of.
    """
    rng = np.random.default_rng(seed)
    row = 90 - 180 / latitudes * (np.arange(latitudes) + 0.5)
    clock = np.arange(times, dtype=float)[:, None, None, None]
    shape = (times, len(LEVELS), latitudes, longitudes)
    dims = ("time", "level", "latitude", "longitude")
    surface = 1e5 + 500 * rng.normal(size=(times, latitudes, longitudes))
    return xarray.Dataset(
        {
            "temperature": (dims, (250 + clock + rng.normal(size=shape)).astype(np.float32)),
            "u_component_of_wind": (dims, (10 * rng.normal(size=shape)).astype(np.float32)),
            "surface_pressure": (("time", *dims[2:]), surface.astype(np.float32)),
            "geopotential_at_surface": (dims[2:], 1e3 * rng.random((latitudes, longitudes)) - 50),
            "land_sea_mask": (dims[2:], rng.random((latitudes, longitudes))),
        },
        coords={
            "time": np.datetime64("2001-01-01", "ns")
            + np.arange(times) * np.timedelta64(hours, "h"),
            "level": list(LEVELS),
            "latitude": row,
            "longitude": 360 / longitudes * np.arange(longitudes),
        },
    )


def write(dataset: xarray.Dataset, path: Path) -> Path:
    """Write a Zarr store of format 2 with consolidated metadata, or NetCDF 3 by its suffix."""
    if path.suffix == ".nc":
        dataset.to_netcdf(path, engine="scipy")
    else:
        dataset.to_zarr(path, mode="w", zarr_format=2, consolidated=True)
    return path


def expected(dataset: xarray.Dataset, channels: Sequence[str]) -> np.ndarray:
    """Return states as xarray selects them by name, rows from north to south."""
    out = []
    for channel in channels:
        name, level = names.split_channel(channel)
        array = dataset[name] if level is None else dataset[name].sel(level=level)
        out.append(array.transpose("time", "latitude", "longitude").values)
    return np.stack(out, 1)
