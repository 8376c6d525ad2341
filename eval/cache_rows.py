# SPDX-License-Identifier: Apache-2.0
"""Lists of caches in a configuration: each entry is one row, or one row per value of a setting.

Settings stay plain until a row is run, so that one that is wrong, or does not suit a model, costs
its own row only. Imports no jax.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple


class CacheRow(NamedTuple):
    """A row's name and the settings of its cache policy, as they stand in a configuration."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """Settings of a cache policy with its `kind`, and values that stand in for `$name` in them.

    `{cache: {kind: kivi, bits: $bits}, vary: {bits: [2, 4]}}` is a row with 2 bits and one with 4.
    `name` defaults to the kind; the values are added to it.
    """

    cache: dict[str, Any]
    name: str = ""
    vary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.cache.get("kind"), str):
            raise ValueError(f"cache={self.cache} needs a kind, e.g. dense")
        used = {leaf[1:] for leaf in _leaves(self.cache) if str(leaf).startswith("$")}
        if used != set(self.vary):
            raise ValueError(
                f"cache={self.cache} stands for {sorted(used)} but vary has {sorted(self.vary)}; "
                "give values for each $name and no others"
            )
        for name, values in self.vary.items():
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"vary.{name}={values!r} must be a list of values, at least one")

    def rows(self) -> list[CacheRow]:
        """Return the rows that the entry stands for."""
        rows = []
        for values in product(*self.vary.values()):
            chosen = dict(zip(self.vary, values, strict=True))
            parts = [self.name or self.cache["kind"], *(f"{k} {v}" for k, v in chosen.items())]
            rows.append(CacheRow(", ".join(parts), _filled(self.cache, chosen)))
        return rows


def all_rows(entries: Sequence[CacheEntry]) -> list[CacheRow]:
    """Return the rows of all entries; ValueError unless there is one and names differ."""
    rows = [row for entry in entries for row in entry.rows()]
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not rows:
        raise ValueError("caches=() must hold at least one cache")
    if twice:
        raise ValueError(f"caches {twice} are there twice; give each entry its own name")
    return rows


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _filled(value: Any, chosen: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, chosen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(item, chosen) for item in value]
    return chosen[value[1:]] if isinstance(value, str) and value.startswith("$") else value
