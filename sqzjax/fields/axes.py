# SPDX-License-Identifier: Apache-2.0
"""The axes of an archive: its dimensions, times and levels. Nothing here imports jax."""

from typing import Any

import numpy as np

from sqzjax.errors import DataError
from sqzjax.fields import names


def find_dimensions(dataset: Any) -> dict[str, str]:
    """Return the archive's own name of time, latitude, longitude and, if it has one, level.

    DataError if one of the first three is lacking, or one has no coordinates.
    """
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
            f"the archive has dimensions {list(known)}, and none of {lacking}; known names are "
            f"{ {role: list(aliases[role]) for role in lacking} }"
        )
    there = {role: name for role, name in found.items() if name is not None}
    # xarray would count from 0 in their place.
    if bare := [name for name in there.values() if name not in dataset.coords]:
        raise DataError(
            f"the dimensions {bare} have no coordinates; add a variable of that name with the "
            "values along each"
        )
    return there


def read_times(dataset: Any, name: str) -> np.ndarray:
    """Return the times, datetime64[ns], ascending; DataError if they are not."""
    times = dataset[name].values
    if name == "month" and np.issubdtype(times.dtype, np.integer):
        # Monthly means without a year: a nominal one, so that they have an order.
        times = np.datetime64("2000-01") + (times.astype(np.int64) - 1).astype("timedelta64[M]")
    if not np.issubdtype(times.dtype, np.datetime64):
        calendar = dataset[name].encoding.get("calendar") or dataset[name].attrs.get("calendar")
        calendar = calendar or getattr(times.flat[0] if times.size else None, "calendar", None)
        told = f"dates of the calendar {calendar!r}" if calendar else f"{times.dtype}, not dates"
        raise DataError(
            f"{name!r} holds {told}; the archive needs CF time units of the standard calendar"
        )
    times = times.astype("datetime64[ns]")
    # NaT compares as false with anything.
    if not len(times) or np.isnat(times).any() or (np.diff(times) <= np.timedelta64(0, "ns")).any():
        raise DataError(
            "times must ascend without repeating, none may be missing, and there must be some"
        )
    return times


def read_levels(dataset: Any, name: str | None) -> tuple[float, ...]:
    """Return the pressure levels in hPa, in the archive's order; none without the dimension."""
    if name is None:
        return ()
    values = dataset[name]
    return names.levels_in_hpa(values.values, str(values.attrs.get("units", "")))
