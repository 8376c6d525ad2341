# SPDX-License-Identifier: Apache-2.0
"""Read archives of gridded fields: Zarr in WeatherBench2's layout, or NetCDF, here or in a cloud.

Nothing is read before it is asked for. Dimensions may come in any order, latitudes up or down,
longitudes from -180 or 0, values packed as integers; what `read` returns is float32, rows from
north to south and columns eastward. Grids that end before the poles are regions, not periodic, even
if they go all the way round. Needs xarray, and zarr or a NetCDF reader (extra `weather`). Nothing
here imports jax.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from sqzjax.errors import DataError
from sqzjax.fields import axes, files, names, variables
from sqzjax.fields.files import DEFAULT_NAME
from sqzjax.fields.placement import recognise
from sqzjax.sphere.grid import Grid

__all__ = ["DEFAULT_NAME", "Archive", "Missing", "open_archive"]

Missing = Literal["error", "keep"]
_log = logging.getLogger(__name__)


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
    means all, by name and level, but for those that are constant in time (`names.STATIC`).
    `drop_south_pole` leaves out the last row: 721 -> 720 halve well. `missing="keep"` returns
    values that are missing, or infinite, as NaN instead of refusing them.
    `storage_options` are handed to fsspec, such as `{"token": "anon"}`.
    """
    text = files.find(path)
    dataset = files.open_dataset(text, dict(storage_options or {}))
    try:
        return Archive(
            dataset, text, channels=channels, drop_south_pole=drop_south_pole, missing=missing
        )
    except ValueError as error:  # of a grid too
        raise DataError(f"{text}: {error}") from None


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
        self._dimensions = dimensions = axes.find_dimensions(dataset)
        self._placement = recognise(
            dataset[dimensions["latitude"]].values,
            dataset[dimensions["longitude"]].values,
            drop_south_pole=drop_south_pole,
        )
        self._data = variables.gather(dataset, dimensions)
        self._levels = axes.read_levels(dataset, dimensions.get("level"))
        self._chosen = self._choose(channels)
        self.times = axes.read_times(dataset, dimensions["time"])

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

    def _choose(self, channels: Sequence[str]) -> tuple[tuple[str, float | None], ...]:
        """Return variable and level of every channel; what is left out is logged."""
        named = [names.split_channel(text)[0] for text in channels]
        there, left_out = variables.choose(self._data, self._dimensions, self._levels, named)
        if left_out:
            _log.info("%s%s", self.path, names.reasons(left_out))
        chosen = names.choose_channels(channels, there, left_out)
        if not chosen:
            raise DataError(
                f"no variable over time, latitude and longitude{names.reasons(left_out)}"
            )
        return chosen

    def read(self, times: slice | int | Sequence[int] | np.ndarray) -> Float[np.ndarray, "S C H W"]:
        """Return the states of these time indices, in their order, in the archive's units.

        Indices may repeat, and negative ones count from the end; one alone gives S = 1. Each state
        is read once. DataError if a value is missing, unless the archive keeps those.
        """
        numbers = np.atleast_1d(np.arange(len(self.times))[times])
        unique, back = np.unique(numbers, return_inverse=True)
        out = self._read(unique)
        self._check_missing(out, unique)
        return out if np.array_equal(numbers, unique) else out[back]

    def _read(self, unique: np.ndarray) -> np.ndarray:
        """Return the states of ascending indices as they are, missing values and all."""
        out = np.zeros((len(unique), len(self._chosen), *self.grid.shape), np.float32)
        for variable in dict(self._chosen):
            slots = [slot for slot, pair in enumerate(self._chosen) if pair[0] == variable]
            levels = [self._chosen[slot][1] for slot in slots]
            out[:, slots] = self._read_variable(variable, levels, unique)
        return out

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
            f"{self.times[times[time]]} are missing; leave the channel out, or set missing: fill "
            "(`open_archive`: missing='keep')"
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
        """The sha256 of grid, times, channels, types, attributes, and the first and last state.

        Reads these two states, and misses a change of others alone.
        """
        grid = self.grid
        told = {
            "grid": [*grid.shape, grid.layout, grid.north, grid.west, grid.spacing],
            "channels": list(self.channels),
            "types": {name: str(self._data[name].dtype) for name in sorted(dict(self._chosen))},
            "missing": self.missing,
            "attributes": {name: str(value) for name, value in self.attributes.items()},
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        digest.update(self.times.astype("<M8[ns]").tobytes())
        digest.update(self._read(np.unique([0, len(self.times) - 1])).astype("<f4").tobytes())
        return digest.hexdigest()


def _as_slice(numbers: np.ndarray) -> slice | np.ndarray:
    """Return sorted numbers as a slice where they are evenly spaced: stores read those faster."""
    if len(numbers) == 1 or (len(numbers) and len(set(np.diff(numbers))) == 1):
        step = int(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
        return slice(int(numbers[0]), int(numbers[-1]) + 1, step)
    return numbers
