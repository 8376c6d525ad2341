# SPDX-License-Identifier: Apache-2.0
"""Read archives of gridded fields: Zarr in WeatherBench2's layout, or NetCDF, here or in a cloud.

Nothing is read before it is asked for. Dimensions may come in any order, latitudes up or down,
longitudes from -180 or 0, values packed as integers; what `read` returns is float32, rows from
north to south and columns eastward. Needs xarray, and zarr or a NetCDF reader (extra `weather`).
Nothing here imports jax.
"""

import hashlib
import json
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from sqzjax.errors import DataError
from sqzjax.fields import names
from sqzjax.fields.placement import Placement, recognise
from sqzjax.sphere.grid import Grid

Missing = Literal["error", "keep"]

DEFAULT_NAME = "weather.zarr"
"""What a run of `kind: simulate` calls its archive; a folder that holds one stands for it."""
_NETCDF = (".nc", ".nc4", ".nc3", ".cdf", ".netcdf", ".h5", ".hdf5")


def open_archive(
    path: str | Path,
    *,
    channels: Sequence[str] = (),
    drop_south_pole: bool = False,
    missing: Missing = "error",
    storage_options: Mapping[str, Any] | None = None,
) -> "Archive":
    """Open a Zarr store or a NetCDF file; `path` may be a URL that fsspec knows (`gs://...`).

    `channels` selects and orders (`"temperature_500"`; `"temperature"` for all its levels); none
    means all, by name and level. `drop_south_pole` leaves out the last row: 721 -> 720 halve well.
    `missing="keep"` returns values that are missing as NaN instead of refusing them.
    `storage_options` are handed to fsspec, such as `{"token": "anon"}`.
    """
    text = os.fspath(path)
    if "://" not in text and (Path(text) / DEFAULT_NAME).is_dir():
        text = str(Path(text) / DEFAULT_NAME)
    dataset = _open(text, dict(storage_options or {}))
    return Archive(
        dataset, text, channels=channels, drop_south_pole=drop_south_pole, missing=missing
    )


def _open(path: str, options: dict[str, Any]) -> Any:
    try:
        import xarray
    except ImportError as error:
        raise DataError(f"reading {path} needs xarray: install sqzjax[weather]") from error
    remote = "://" in path
    if not remote and not Path(path).exists():
        raise DataError(f"{path} does not exist; give a Zarr folder, a NetCDF file or a URL")
    common = {"chunks": None, "decode_timedelta": False}
    try:
        with warnings.catch_warnings():
            # Files in the wild have fill values of another type, which xarray rightly ignores.
            warnings.simplefilter("ignore", xarray.SerializationWarning)
            if not path.lower().endswith(_NETCDF):
                options = {"storage_options": options} if options else {}
                return xarray.open_dataset(path, engine="zarr", **common, **options)
            if remote:
                import fsspec

                opener: Any = fsspec.open(path, **options)
                file = opener.open()
                dataset = xarray.open_dataset(file, **common)
                weakref.finalize(dataset, file.close)
                return dataset
            return xarray.open_dataset(path, **common)
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the archive {path}: {error}") from error


class Archive:
    """States on a grid: `read(times)`; made by `open_archive`."""

    def __init__(
        self,
        dataset: Any,
        path: str,
        *,
        channels: Sequence[str] = (),
        drop_south_pole: bool = False,
        missing: Missing = "error",
    ):
        self.path, self.missing, self.attributes = path, missing, dict(dataset.attrs)
        self._dataset = dataset  # its end closes what it reads from
        self._dimensions = _dimensions(dataset, path)
        self._placement = self._place(dataset, drop_south_pole)
        self._data = {names.canonical(str(name)): dataset[name] for name in dataset.data_vars}
        self._levels = self._read_levels(dataset)
        self._chosen = names.choose_channels(channels, self._available())
        if not self._chosen:
            raise DataError(f"{path} has no variable over time, latitude and longitude")
        self.times = _read_times(dataset, self._dimensions["time"], path)

    @property
    def grid(self) -> Grid:
        """Where rows and columns lie."""
        return self._placement.grid

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, in the order in which `read` returns them."""
        return tuple(names.channel_name(*pair) for pair in self._chosen)

    @property
    def state_bytes(self) -> int:
        """Bytes of one state in float32."""
        return 4 * len(self._chosen) * self.grid.latitudes * self.grid.longitudes

    def _place(self, dataset: Any, drop_south_pole: bool) -> Placement:
        found = (dataset[self._dimensions[name]].values for name in ("latitude", "longitude"))
        try:
            return recognise(*found, drop_south_pole=drop_south_pole)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    def _read_levels(self, dataset: Any) -> tuple[float, ...]:
        name = self._dimensions.get("level")
        if name is None:
            return ()
        values = dataset[name]
        return names.levels_in_hpa(values.values, str(values.attrs.get("units", "")))

    def _available(self) -> dict[str, tuple[float | None, ...]]:
        """Return the levels of every variable that has states on the grid."""
        needed = {self._dimensions[name] for name in ("time", "latitude", "longitude")}
        level = self._dimensions.get("level")
        found: dict[str, tuple[float | None, ...]] = {}
        for name, array in sorted(self._data.items()):  # stores list them in any order
            sizes = dict(array.sizes)
            rest = [size for dim, size in sizes.items() if dim not in needed | {level}]
            if needed <= sizes.keys() and all(size == 1 for size in rest):
                found[name] = tuple(sorted(self._levels)) if level in sizes else (None,)
        return found

    def read(self, times: slice | Sequence[int] | np.ndarray) -> Float[np.ndarray, "S C H W"]:
        """Return the states of these time indices, in their order; they may repeat."""
        numbers = np.arange(len(self.times))[times]
        unique, back = np.unique(numbers, return_inverse=True)
        out = np.zeros((len(unique), len(self._chosen), *self.grid.shape), np.float32)
        for variable in dict(self._chosen):
            slots = [slot for slot, pair in enumerate(self._chosen) if pair[0] == variable]
            levels = [self._chosen[slot][1] for slot in slots]
            out[:, slots] = self._read_variable(variable, levels, unique)
        self._check_missing(out, unique)
        return out if np.array_equal(numbers, unique) else out[back]

    def _read_variable(
        self, variable: str, levels: Sequence[float | None], times: np.ndarray
    ) -> np.ndarray:
        array, dims = self._data[variable], self._dimensions
        selection: dict[str, Any] = {dims["time"]: _as_slice(times)}
        order = [dims["time"], dims["latitude"], dims["longitude"]]
        heights = [level for level in levels if level is not None]
        if heights:
            selection[dims["level"]] = [self._levels.index(level) for level in heights]
            order.insert(1, dims["level"])
        selection |= {dim: 0 for dim in array.dims if dim not in order}
        values = array.isel(selection).transpose(*order).values
        placed = values[..., self._placement.rows[:, None], self._placement.columns]
        return placed if heights else placed[:, None]

    def _check_missing(self, states: np.ndarray, times: np.ndarray) -> None:
        bad = ~np.isfinite(states)
        if not bad.any():
            return
        if self.missing == "keep":
            states[bad] = np.nan
            return
        time, channel = np.argwhere(bad.any((2, 3)))[0]
        raise DataError(
            f"{self.path}: {int(bad[time, channel].sum())} values of {self.channels[channel]} at "
            f"{self.times[times[time]]} are missing; leave the channel out, or set missing: fill"
        )

    @property
    def constant_names(self) -> tuple[str, ...]:
        """Names of the constant fields that there are."""
        there = {
            "land_sea_mask": "land_sea_mask" in self._data,
            "orography": self._orography is not None,
            "cos_latitude": True,
        }
        return tuple(name for name, found in there.items() if found)

    @property
    def _orography(self) -> str | None:
        return names.find_dimension(tuple(self._data), ("geopotential_at_surface", "orography"))

    def constants(self, wanted: Sequence[str] | None = None) -> Float[np.ndarray, "K H W"]:
        """Return constant fields as a model reads them, all there are if none are named.

        `land_sea_mask` as it is, `orography` (or surface geopotential) o as (o - min) / max,
        `cos_latitude` (arXiv 2603.25687).
        """
        wanted = self.constant_names if wanted is None else wanted
        lacking = [name for name in wanted if name not in self.constant_names]
        if lacking:
            raise DataError(
                f"{self.path} has no constant {lacking}; leave it out of `constants`; it has "
                f"{list(self.constant_names)}"
            )
        out = np.zeros((len(wanted), *self.grid.shape), np.float32)
        for slot, name in enumerate(wanted):
            out[slot] = self._constant(name)
        return out

    def _constant(self, name: str) -> np.ndarray:
        if name == "cos_latitude":
            return np.cos(np.radians(self.grid.latitude()))[:, None]
        array = self._data[self._orography or name if name == "orography" else name]
        order = (self._dimensions["latitude"], self._dimensions["longitude"])
        array = array.isel({dim: 0 for dim in array.dims if dim not in order}).transpose(*order)
        field = np.asarray(array.values, np.float64)
        field = field[self._placement.rows[:, None], self._placement.columns]
        if not np.isfinite(field).all():
            raise DataError(f"{self.path}: {name} has missing values; leave it out of `constants`")
        if name == "land_sea_mask":
            return field
        return (field - field.min()) / (field.max() if field.max() > 0 else 1.0)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of grid, times, channels and types; the content is not read."""
        grid = self.grid
        told = {
            "grid": [*grid.shape, grid.layout, grid.north, grid.west, grid.spacing],
            "channels": list(self.channels),
            "types": {name: str(self._data[name].dtype) for name in sorted(dict(self._chosen))},
            "missing": self.missing,
        }
        text = json.dumps(told, sort_keys=True).encode()
        return hashlib.sha256(text + self.times.astype("<M8[ns]").tobytes()).hexdigest()


def _dimensions(dataset: Any, path: str) -> dict[str, str]:
    """Return the archive's own name of time, latitude, longitude and, if it has one, level."""
    known = tuple(map(str, dataset.sizes))
    aliases = {
        "time": names.TIME,
        "latitude": names.LATITUDE,
        "longitude": names.LONGITUDE,
        "level": names.LEVEL,
    }
    found = {role: names.find_dimension(known, aliases[role]) for role in aliases}
    if lacking := [role for role in ("time", "latitude", "longitude") if found[role] is None]:
        raise DataError(
            f"{path} has dimensions {list(known)}, and none of {lacking}; known names are "
            f"{ {role: list(aliases[role]) for role in lacking} }"
        )
    return {role: name for role, name in found.items() if name is not None}


def _read_times(dataset: Any, name: str, path: str) -> np.ndarray:
    times = dataset[name].values
    if name == "month" and np.issubdtype(times.dtype, np.integer):
        # Monthly means without a year: a nominal one, so that they have an order.
        times = np.datetime64("2000-01") + (times.astype(np.int64) - 1).astype("timedelta64[M]")
    if not np.issubdtype(times.dtype, np.datetime64):
        raise DataError(
            f"{path}: {name!r} holds {times.dtype}, not dates; the archive needs CF time units of "
            "the standard calendar"
        )
    times = times.astype("datetime64[ns]")
    if len(times) == 0 or (np.diff(times) <= np.timedelta64(0, "ns")).any():
        raise DataError(f"{path}: times must ascend without repeating, and there must be some")
    return times


def _as_slice(numbers: np.ndarray) -> slice | np.ndarray:
    """Return sorted numbers as a slice where they are evenly spaced: stores read those faster."""
    if len(numbers) == 1 or (len(numbers) and len(set(np.diff(numbers))) == 1):
        step = int(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
        return slice(int(numbers[0]), int(numbers[-1]) + 1, step)
    return numbers
