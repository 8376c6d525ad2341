# SPDX-License-Identifier: Apache-2.0
"""The schema of a training run. Nothing here imports jax: bad configurations fail fast."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from sqzjax.checks import check_seed
from sqzjax.errors import ConfigError
from sqzjax.models.config import Execution
from sqzjax.sharding_config import MeshConfig, Rule, check_rules
from train.continual import Branch
from train.data.config import AnyData, DataConfig
from train.model_source import AnyModel, ModelSource
from train.objectives import LanguageModeling, ObjectiveConfig
from train.optim import AdamW, Cosine, OptimizerConfig, ScheduleConfig


def _at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not least <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be >= {least}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Save every `interval` steps, and when `minutes` have passed since the last save (0: never).

    The last step is always saved. `keep` newest steps stay, and every multiple of `keep_every`;
    `keep_steps`, where branches start, are saved whatever the interval and stay too.
    """

    interval: int = 1000
    minutes: float = 30.0
    keep: int = 3
    keep_every: int | None = None
    keep_steps: tuple[int, ...] = ()
    async_save: bool = True

    def __post_init__(self) -> None:
        _at_least(0, interval=self.interval, minutes=self.minutes)
        _at_least(1, keep=self.keep)
        if self.keep_every is not None:
            _at_least(1, keep_every=self.keep_every)
        for step in self.keep_steps:
            _at_least(1, keep_steps=step)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Loss on `batches` held-out batches every `interval` steps and at the end; 0: off."""

    interval: int = 0
    batches: int = 8

    def __post_init__(self) -> None:
        _at_least(0, interval=self.interval)
        _at_least(1, batches=self.batches)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Every `interval` steps one line of metrics, averaged since the line before.

    `metrics.jsonl` is always written; `trackers` adds others. `peak_flops` (operations per second
    of all devices together) is needed for `throughput/mfu` on devices without a data sheet entry.
    """

    interval: int = 10
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        _at_least(1, interval=self.interval)
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"peak_flops={self.peak_flops} must be > 0, or null if unknown")


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """Clip the global gradient norm (null: never); stop after so many non-finite steps in a row."""

    clip_norm: float | None = 1.0
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        _at_least(1, max_bad_steps=self.max_bad_steps)
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm={self.clip_norm} must be > 0, or null for none")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Train low-rank adapters of the linear layers whose path `targets` (a regex) is found in."""

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"attn/(q|k|v|o)$"

    def __post_init__(self) -> None:
        _at_least(1, rank=self.rank)
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be > 0; 2 x rank is usual")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets={self.targets!r} is no regex: {error}") from None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    `batch_size` counts rows of `seq_len` tokens per step, over all devices and the `accumulation`
    microbatches that it is split into; emulators of fields count samples and ignore `seq_len`.
    `branch` starts from a checkpoint of another run and goes on to `steps`. `rules` are sharding
    rules that come before the default ones. `ema` is the decay of an average of the parameters,
    which then is what is evaluated and exported. `export` writes the final model as a Hugging Face
    folder.
    """

    model: AnyModel
    execution: Execution = Execution()
    data: AnyData = DataConfig()
    objective: ObjectiveConfig = LanguageModeling()
    optimizer: OptimizerConfig = AdamW()
    schedule: ScheduleConfig = Cosine()
    batch_size: int = 16
    seq_len: int = 256
    accumulation: int = 1
    steps: int = 1000
    seed: int = 0
    stability: StabilityConfig = StabilityConfig()
    mesh: MeshConfig = MeshConfig()
    rules: tuple[Rule, ...] = ()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    lora: LoRAConfig | None = None
    ema: float | None = None
    export: bool = False
    branch: Branch | None = None

    def __post_init__(self) -> None:
        _at_least(1, batch_size=self.batch_size, accumulation=self.accumulation, steps=self.steps)
        _at_least(2, seq_len=self.seq_len)
        check_seed(self.seed)
        if self.batch_size % self.accumulation:
            below = self.batch_size // self.accumulation * self.accumulation
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation="
                f"{self.accumulation}; use {f'{below} or ' if below else ''}"
                f"{below + self.accumulation}"
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in [0, 1), or null for no average")
        if self.eval.interval and not self.data.eval_fraction:
            raise ValueError(
                f"eval.interval={self.eval.interval} needs held-out documents and "
                "data.eval_fraction is 0; raise it or set eval.interval: 0"
            )
        self.schedule.check(self.steps)
        if self.branch is not None:
            self.branch.check(self.steps, self.schedule)
        self._check_family()
        check_rules(self.rules)
        self._check_precision()

    def _check_family(self) -> None:
        """Model, data and objective must speak of the same thing."""
        families = {
            name: getattr(getattr(self, name), "family", "text")
            for name in ("model", "data", "objective")
        }
        if len(set(families.values())) > 1:
            kinds = ", ".join(f"{name}.kind={getattr(self, name).kind!r}" for name in families)
            raise ValueError(
                f"{kinds} do not go together: a swin model needs fields as data and the objective "
                "forecast, and these need a swin model"
            )
        if self.family == "fields" and self.lora is not None:
            raise ValueError("lora adapts language models; remove it for a swin model")

    def _check_precision(self) -> None:
        if self.execution.dtype == "float16":
            raise ValueError(
                "execution.dtype='float16' cannot train: small gradients vanish without loss "
                "scaling; use bfloat16 or float32"
            )
        if self.execution.param_dtype != "float32" and self.lora is None:
            raise ValueError(
                f"execution.param_dtype={self.execution.param_dtype!r}: trained parameters are "
                "float32 (small updates would be rounded away); set execution.dtype for the "
                "compute dtype, or train adapters with lora"
            )

    def resolve_model(self) -> Any:
        """Return the architecture; ValueError if the run's other settings do not suit it."""
        config: Any = self.model.resolve()
        if self.family == "text" and self.seq_len > config.max_positions:
            raise ValueError(
                f"seq_len={self.seq_len} exceeds the model's max_positions={config.max_positions}; "
                "shorten it, or raise max_positions"
            )
        if self.family == "fields":
            config.check_mesh(self.mesh.lat, self.mesh.lon)
        elif self.export:
            self._check_export(config)
        self.objective.check(config, self.seq_len)
        if check_run := getattr(self.objective, "check_run", None):
            check_run(data_kind=self.data.kind, adapters=self.lora is not None)
        return config

    def _check_export(self, config: Any) -> None:
        """Refuse now what could not be written after all the training."""
        from sqzjax.io import hf_config

        try:
            hf_config.to_hf(config)
        except ConfigError as error:
            raise ConfigError(f"{p}, or set export: false" for p in error.problems) from None

    @property
    def reference(self) -> ModelSource | None:
        """The second, frozen model of the objective; None where it has none."""
        return getattr(self.objective, "reference", None)

    @property
    def family(self) -> str:
        """What the run is about: "text" or "fields"."""
        return self.model.family

    @property
    def row_length(self) -> int:
        """Tokens of a row; of fields, the consecutive states of a sample."""
        if self.family == "text":
            return self.seq_len
        model: Any = self.model.resolve()
        return model.context + getattr(self.objective, "rollout", 1)
