# SPDX-License-Identifier: Apache-2.0
"""Which variables of an archive are fields, and which are states. Nothing here imports jax."""

from collections.abc import Collection, Mapping
from typing import Any

from sqzjax.errors import DataError
from sqzjax.fields import names

_SURFACE = "geopotential_at_surface"


def gather(dataset: Any, dimensions: Mapping[str, str]) -> dict[str, Any]:
    """Return the variables over latitude and longitude by WeatherBench2's names, sorted.

    Geopotential without a level is that of the surface, as in ECMWF's files of single levels.
    DataError if two variables have one name.
    """
    found: dict[str, Any] = {}
    own: dict[str, str] = {}
    for text in sorted(map(str, dataset.data_vars)):  # stores list them in any order
        array, name = dataset[text], names.canonical(text)
        if not {dimensions["latitude"], dimensions["longitude"]} <= set(array.dims):
            continue
        if name in found:
            raise DataError(
                f"the variables {own[name]!r} and {text!r} both stand for {name}; rename or remove "
                "one of them"
            )
        found[name], own[name] = array, text
    height = found.get("geopotential")
    # A file of one level may have it as a number beside the variable.
    if height is not None and _SURFACE not in found and not set(names.LEVEL) & set(height.coords):
        found[_SURFACE] = found.pop("geopotential")
    return dict(sorted(found.items()))


def choose(
    fields: Mapping[str, Any],
    dimensions: Mapping[str, str],
    levels: tuple[float, ...],
    named: Collection[str],
) -> tuple[dict[str, tuple[float | None, ...]], dict[str, str]]:
    """Return the levels of every variable that has states, and why the others have none.

    Fields that are constant by their name are left out unless they are `named`.
    """
    found: dict[str, tuple[float | None, ...]] = {}
    left_out: dict[str, str] = {}
    for name, array in fields.items():
        reason = _reason(name, array, dimensions, named)
        if reason:
            left_out[name] = reason
        else:
            over_levels = dimensions.get("level") in array.dims
            found[name] = tuple(sorted(levels)) if over_levels else (None,)
    return found, left_out


def _reason(
    name: str, array: Any, dimensions: Mapping[str, str], named: Collection[str]
) -> str | None:
    if dimensions["time"] not in array.dims:
        return "without time"
    if name in names.STATIC and name not in named:
        return "constant in time; name it to have it"
    if array.dtype.kind not in "biuf":
        return f"of {array.dtype}, not numbers"
    for dim in set(map(str, array.dims)) - set(dimensions.values()):
        if dim in names.LEVEL:
            return f"over a second dimension of levels, {dim}"
        if array.sizes[dim] > 1:
            return f"over {array.sizes[dim]} values of {dim}; select one"
    return None
