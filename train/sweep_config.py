# SPDX-License-Identifier: Apache-2.0
"""The schema of a scaling sweep: sizes x budgets as branched cooldowns. Nothing imports jax."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from sqzjax import config as configs
from sqzjax.errors import ConfigError
from train.config import TrainConfig
from train.continual import Continual

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# What the plan sets, and what must not change between a trunk and its branches.
_PLANNED = ("steps", "branch", "schedule.kind", "schedule.cooldown", "schedule.cooldown_steps")
_INHERITED = ("model", "batch_size", "seq_len", "seed", "optimizer", "ema", "lora")
_INHERITED += ("schedule.learning_rate", "schedule.warmup_steps")
# What makes the losses of all jobs comparable.
_COMMON = ("data", "eval", "export")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Some of the sizes and budgets; an empty list means all of them."""

    sizes: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()

    def includes(self, size: str, budget: float) -> bool:
        """Return whether a point of the sweep is selected."""
        return size in (self.sizes or (size,)) and budget in (self.budgets or (budget,))


@dataclass(frozen=True, kw_only=True)
class Variant(Selection):
    """Another cooldown from the same checkpoints: `overrides` as for a size, say of the loss."""

    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CosineBaseline(Selection):
    """Runs of their own with a cosine schedule and the same steps, to compare cooldowns to."""

    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio={self.final_ratio} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class LocalExecutor:
    """Run `workers` jobs at a time on this machine.

    `cpus_per_job` pins each job to so many cores of its own (null: jobs share all of them);
    `environment` is set for every job.
    """

    kind: Literal["local"] = "local"
    workers: int = 2
    cpus_per_job: int | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_job"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be >= 1")


@dataclass(frozen=True, kw_only=True)
class RayExecutor:
    """Run jobs as tasks of a Ray cluster whose machines share the working directory.

    `address` is that of a running cluster ("auto": the one of this machine); null starts one here
    for the sweep, with `num_cpus` CPUs (null: all). Needs the package ray.
    """

    kind: Literal["ray"] = "ray"
    address: str | None = None
    num_cpus: int | None = None
    cpus_per_job: float = 1.0
    gpus_per_job: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("cpus_per_job", "gpus_per_job"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a number >= 0")
        if self.cpus_per_job == self.gpus_per_job == 0:
            raise ValueError("cpus_per_job=0 and gpus_per_job=0: all jobs would start at once")
        if self.num_cpus is not None and self.num_cpus < self.cpus_per_job:
            raise ValueError(
                f"num_cpus={self.num_cpus} is less than cpus_per_job={self.cpus_per_job:g}: no job "
                "would ever start; raise one or lower the other"
            )
        if self.num_cpus is not None and (self.num_cpus < 1 or self.address is not None):
            raise ValueError(
                f"num_cpus={self.num_cpus} must be >= 1 and needs address: null (a cluster that "
                "the sweep starts)"
            )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Train every size for every budget of FLOPs, as cooldowns off one trunk per size.

    `train` is the configuration of a run, from which all jobs derive (`train: {base: FILE}` takes
    it from a file); each of `sizes` maps keys of it, also dotted ones, to values. A budget (FLOPs)
    gives a size `round(budget / FLOPs per step)` steps, the last `int(cooldown * steps)` of which
    cool down; pairs outside `min_steps`..`max_steps` are left out. `variants` are further cooldowns
    from the same checkpoints. A job that crashes is tried again `retries` times. `epoch_size`
    (samples, or tokens) and `flops_per_second` (of one job) serve the plan alone.
    """

    kind: Literal["sweep"] = "sweep"
    # Kept as written: what is derived from a width, say that of a head, must follow an override.
    # Not a dict by type, in which `base` would be a key like others instead of an included file.
    train: Any
    sizes: dict[str, dict[str, Any]]
    budgets: tuple[float, ...]
    cooldown: float = 0.05
    variants: dict[str, Variant] = field(default_factory=dict)
    cosine: CosineBaseline | None = None
    min_steps: int = 1000
    max_steps: int = 120_000
    executor: LocalExecutor | RayExecutor = LocalExecutor()
    retries: int = 2
    epoch_size: int | None = None
    flops_per_second: float | None = None

    def __post_init__(self) -> None:
        problems = [*self._bad_names(), *self._bad_numbers(), *self._bad_selections()]
        try:
            problems += self.bad_training(self.base)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)

    @cached_property
    def base(self) -> TrainConfig:
        """The run that `train` describes; `ConfigError` lists what is wrong with it."""
        if not isinstance(self.train, Mapping):
            raise ConfigError(f"train={self.train!r} must be a mapping, such as {{base: FILE}}")
        return self.derive("train")

    def _bad_names(self) -> list[str]:
        problems = []
        if not self.sizes:
            problems.append("sizes={} must name at least one size")
        for kind, names in (("sizes", self.sizes), ("variants", self.variants)):
            problems += [
                f"{kind}: the name {name!r} must be letters, digits, '.', '-' and '_'"
                for name in names
                if not _NAME.fullmatch(name)
            ]
        if "cosine" in self.variants or "trunk" in self.variants:
            problems.append("variants: 'cosine' and 'trunk' name other jobs; choose another name")
        overrides = {f"sizes.{name}": one for name, one in self.sizes.items()}
        variants = {f"variants.{k}.overrides": v.overrides for k, v in self.variants.items()}
        for chosen, keys, reason in (
            (overrides, _PLANNED, "the sweep sets it; remove it"),
            (variants, _PLANNED + _INHERITED, "a cooldown keeps its trunk's; remove it"),
            (overrides | variants, _COMMON, "all jobs share it; set it in train"),
        ):
            problems += [
                f"{where}.{key}: {reason}"
                for where, one in chosen.items()
                for key in _touching(one, keys)
            ]
        return problems

    def _bad_numbers(self) -> list[str]:
        problems = []
        budgets = self.budgets
        if not budgets or not all(0 < b < math.inf for b in budgets):
            problems.append(f"budgets={list(budgets)} must be numbers of FLOPs > 0, at least one")
        elif len({number_name(budget) for budget in budgets}) < len(budgets):
            problems.append(f"budgets={list(budgets)} must be different")
        if not 0 < self.cooldown < 1:
            problems.append(f"cooldown={self.cooldown} must lie in (0, 1); 0.05 to 0.2 is usual")
        if not 1 <= self.min_steps <= self.max_steps:
            problems.append(
                f"min_steps={self.min_steps} must lie in [1, max_steps={self.max_steps}]"
            )
        if self.retries < 0:
            problems.append(f"retries={self.retries} must be >= 0")
        for name in ("epoch_size", "flops_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                problems.append(f"{name}={value} must be > 0, or null if unknown")
        return problems

    def bad_training(self, train: TrainConfig, where: str = "train") -> list[str]:
        """Return what makes a run unfit for a trunk, in terms of the settings at `where`."""
        problems = []
        schedule = train.schedule
        if not isinstance(schedule, Continual):
            problems.append(f"{where}.schedule.kind={schedule.kind!r} must be continual")
        elif (schedule.cooldown, schedule.cooldown_steps) != (None, None):
            problems.append(
                f"{where}.schedule.cooldown={schedule.cooldown} and cooldown_steps="
                f"{schedule.cooldown_steps} must be null: the sweep's own cooldown sets them"
            )
        elif int(self.cooldown * self.min_steps) < 1:
            problems.append(
                f"cooldown={self.cooldown} of min_steps={self.min_steps} is no step; raise one"
            )
        elif self.min_steps - int(self.cooldown * self.min_steps) < schedule.warmup_steps:
            problems.append(
                f"{where}.schedule.warmup_steps={schedule.warmup_steps} must end before the "
                f"cooldown of the shortest run (min_steps={self.min_steps}) begins; shorten it or "
                "raise min_steps"
            )
        if not train.eval.interval:
            problems.append(f"{where}.eval.interval=0: the held-out loss is the sweep's result")
        for name in ("branch", "export"):
            if getattr(train, name):
                problems.append(f"{where}.{name} has no meaning in a sweep; remove it")
        return problems

    def _bad_selections(self) -> list[str]:
        chosen: dict[str, Selection] = {f"variants.{k}": v for k, v in self.variants.items()}
        if self.cosine is not None:
            chosen["cosine"] = self.cosine
        return [
            f"{where}.{field}: {value!r} is none of the sweep's {field}"
            for where, selection in chosen.items()
            for field in ("sizes", "budgets")
            for value in getattr(selection, field)
            if value not in getattr(self, field)
        ]

    def size_config(self, size: str) -> TrainConfig:
        """Return the run of a size, its trunk apart from the length."""
        return self.derive(f"sizes.{size}", self.sizes[size])

    def variant_config(self, size: str, variant: str) -> TrainConfig:
        """Return what a size's cooldowns of a variant derive from."""
        overrides = self.variants[variant].overrides
        return self.derive(f"variants.{variant}", self.sizes[size], overrides)

    def derive(self, where: str, *layers: Mapping[str, Any]) -> TrainConfig:
        """Return `train` with keys replaced, later layers on top; errors are named `where`."""
        overrides = [f"{key}={json.dumps(v)}" for layer in layers for key, v in layer.items()]
        try:
            return configs.parse(TrainConfig, self.train, overrides)
        except ConfigError as error:
            raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from None


def number_name(value: float) -> str:
    """Return a number as a file name has it: 1e12, 2.5e17."""
    text = f"{value:.6e}"
    digits, _, power = text.partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _touching(overrides: Mapping[str, Any], keys: tuple[str, ...], at: str = "") -> list[str]:
    """Return the dotted paths of `overrides` that are one of `keys` or lie inside one."""
    found = []
    for name, value in overrides.items():
        path = f"{at}{name}"
        if any(path == key or path.startswith(f"{key}.") for key in keys):
            found.append(path)
        elif isinstance(value, Mapping):
            found += _touching(value, keys, f"{path}.")
    return found
