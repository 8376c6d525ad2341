# SPDX-License-Identifier: Apache-2.0
"""Names of variables, dimensions and channels. Nothing here imports jax.

WeatherBench2's names are used throughout; short names of ECMWF's files are translated. A channel is
a variable, with its pressure level in hPa where it has one: `2m_temperature`, `temperature_500`.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np

from sqzjax.errors import DataError

TIME = ("time", "valid_time", "date", "month")
LEVEL = ("level", "pressure_level", "isobaricInhPa", "plev", "lev")
LATITUDE = ("latitude", "lat")
LONGITUDE = ("longitude", "lon")

_ALIASES = {
    "geopotential": ("z", "phi"),
    "temperature": ("t", "air_temperature"),
    "u_component_of_wind": ("u", "eastward_wind"),
    "v_component_of_wind": ("v", "northward_wind"),
    "vertical_velocity": ("w",),
    "specific_humidity": ("q",),
    "relative_humidity": ("r",),
    "2m_temperature": ("t2m", "2t"),
    "2m_dewpoint_temperature": ("d2m", "2d"),
    "10m_u_component_of_wind": ("u10", "10u", "u10m"),
    "10m_v_component_of_wind": ("v10", "10v", "v10m"),
    "mean_sea_level_pressure": ("msl", "mslp"),
    "surface_pressure": ("sp", "ps"),
    "total_column_water_vapour": ("tcwv",),
    "sea_surface_temperature": ("sst",),
    "total_precipitation": ("tp",),
    "land_sea_mask": ("lsm",),
    "geopotential_at_surface": ("z_sfc", "surface_geopotential"),
    "orography": ("orog", "oro"),
}
STATIC = ("land_sea_mask", "orography", "geopotential_at_surface")
"""Constant in time, although ECMWF's files repeat them at every time."""
_HPA = ("hpa", "hectopascal", "hectopascals", "millibar", "millibars", "mb", "mbar")
_PA = ("pa", "pascal", "pascals")
_CANONICAL = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}


def canonical(name: str) -> str:
    """Return WeatherBench2's name of a variable; unknown names stay as they are."""
    return _CANONICAL.get(name, name)


def channel_name(variable: str, level: float | None = None) -> str:
    """Return the channel of a variable at a level in hPa."""
    return variable if level is None else f"{variable}_{level:g}"


def split_channel(channel: str) -> tuple[str, float | None]:
    """Return variable and level of a channel, the variable by WeatherBench2's name."""
    found = re.fullmatch(r"(.+)_(\d+(?:\.\d+)?)", channel)
    return (canonical(found[1]), float(found[2])) if found else (canonical(channel), None)


def canonical_channel(channel: str) -> str:
    """Return WeatherBench2's name of a channel: `temperature_850` for `t_850`."""
    return channel_name(*split_channel(channel))


def find_dimension(names: Sequence[str], aliases: Sequence[str]) -> str | None:
    """Return the first alias that is among the names."""
    return next((alias for alias in aliases if alias in names), None)


def choose_channels(
    wanted: Sequence[str],
    available: Mapping[str, Sequence[float | None]],
    left_out: Mapping[str, str] | None = None,
) -> tuple[tuple[str, float | None], ...]:
    """Return (variable, level) of the channels asked for, in their order; all if none are named.

    `available` gives the levels of each variable, `(None,)` for one without. A variable that is
    named without a level stands for all of its levels. DataError names what is not there, and of
    what was `left_out` the reasons.
    """
    every = [(name, level) for name, levels in available.items() for level in levels]
    chosen: list[tuple[str, float | None]] = []
    for text in wanted:
        found = [pair for pair in every if pair[0] == canonical(text)]
        found = found or [pair for pair in every if pair == split_channel(text)]
        if not found:
            known = [channel_name(*pair) for pair in every]
            close = get_close_matches(text, [*known, *available], n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(
                f"the archive has no channel {text!r}; {hint}it has {known}{reasons(left_out)}"
            )
        chosen += found
    twice = sorted({channel_name(*pair) for pair in chosen if chosen.count(pair) > 1})
    if twice:
        raise DataError(f"channels {twice} are asked for more than once; name each once")
    return tuple(chosen or every)


def reasons(left_out: Mapping[str, str] | None) -> str:
    """Return why variables were left out, as the end of a message."""
    told = ", ".join(f"{name} ({reason})" for name, reason in (left_out or {}).items())
    return f"; left out: {told}" if told else ""


def levels_in_hpa(values: np.ndarray, units: str) -> tuple[float, ...]:
    """Return pressure levels in hPa; without units, what exceeds any pressure in hPa is Pa.

    DataError if units are not of pressure, as those of model levels, or a level repeats.
    """
    levels, unit = np.asarray(values, np.float64), units.strip().lower()
    if unit in _PA or (not unit and levels.max(initial=0) > 2000):
        levels = levels / 100
    elif unit and unit not in _HPA:
        raise DataError(
            f"levels have the units {units!r}, which are not of pressure; interpolate to pressure "
            "levels in hPa or Pa, or select one level and drop its dimension"
        )
    if not np.isfinite(levels).all() or len(set(levels)) < len(levels):
        raise DataError(f"levels {levels.tolist()} hPa must be numbers, each there once")
    return tuple(float(level) for level in levels)
