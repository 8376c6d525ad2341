# SPDX-License-Identifier: Apache-2.0
"""Gridded fields as training data. Nothing here imports jax."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sqzjax.fields.names import canonical_channel
from sqzjax.fields.periods import Period

Constant = Literal["land_sea_mask", "orography", "cos_latitude"]


@dataclass(frozen=True, kw_only=True)
class FieldData:
    """States of a Zarr or NetCDF archive of gridded fields, `step_hours` apart.

    `path` is a Zarr store, one NetCDF file, a URL of either, or the folder of a run of `kind:
    simulate`; `storage_options` go to fsspec. `channels` selects and orders (`temperature_500`;
    `temperature` for all levels; none: all) and `constants` are fields appended to every input.
    Every time of `train` starts a sample. Of `valid`, `eval_samples` evenly spaced ones are
    evaluated; `test` is only kept apart. Missing values are an error, or with `missing: fill` the
    mean of their channel. Means and deviations come from the file `statistics`, or from at most
    `statistics_states` evenly spaced states of `train`. An archive of at most `in_memory_bytes` is
    held in memory, of which only what is trained and evaluated on counts.
    """

    family: ClassVar[str] = "fields"

    kind: Literal["fields"] = "fields"
    path: str
    storage_options: dict[str, Any] = field(default_factory=dict, hash=False)
    channels: tuple[str, ...] = ()
    constants: tuple[Constant, ...] = ("land_sea_mask", "orography", "cos_latitude")
    step_hours: int = 6
    train: tuple[Period, ...] = (Period(stop=0.8),)
    valid: tuple[Period, ...] = (Period(start=0.8, stop=0.9),)
    test: tuple[Period, ...] = (Period(start=0.9),)
    shuffle: bool = True
    eval_samples: int = 256
    drop_south_pole: bool = False
    missing: Literal["error", "fill"] = "error"
    statistics: str | None = None
    statistics_states: int = 1000
    in_memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        least_of = {"step_hours": 1, "eval_samples": 0, "in_memory_bytes": 0}
        for name, least in (least_of | {"statistics_states": 2}).items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r} must be an integer >= {least}")
        if not self.path:
            raise ValueError("path is empty; name a Zarr store, a NetCDF file or a URL")
        if not self.train:
            raise ValueError("train is empty; give at least one period, such as {stop: 0.8}")
        if self.eval_samples and not self.valid:
            raise ValueError(
                f"eval_samples={self.eval_samples} needs a period in valid; set one, or "
                "eval_samples: 0"
            )
        for name in ("channels", "constants"):
            named = getattr(self, name)
            if len(set(map(canonical_channel, named))) < len(named):
                raise ValueError(f"{name}={list(named)} must name each once")

    @property
    def eval_fraction(self) -> float:
        """More than 0 if something is held out."""
        return 1.0 if self.eval_samples else 0.0
