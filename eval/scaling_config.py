# SPDX-License-Identifier: Apache-2.0
"""What a scaling-law report fits, and to which runs. Imports no jax."""

import math
from dataclasses import dataclass, field
from typing import Literal

Schedule = Literal["cooldown", "cosine", "trunk"]
SizeName = Literal["params", "counted_params", "body_params"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A compute (FLOPs) to extend laws to, with the measured loss and size where known."""

    flops: float
    loss: float | None = None
    size: float | None = None

    def __post_init__(self) -> None:
        _check_positive(flops=self.flops, loss=self.loss, size=self.size)


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How uncertainty is found: `resamples` of the runs, `akima_resamples` of the loss's noise.

    `scheme` residuals redraws what the parabolas leave of the losses, runs draws runs with
    replacement (wider, since few runs make a budget). `noise` is the relative deviation of a loss
    for the Akima variant; by default that of the residuals. `known_deviation` is that of optima
    which the file gives beside its runs.
    """

    resamples: int = 4000
    akima_resamples: int = 1000
    scheme: Literal["residuals", "runs"] = "residuals"
    confidence: float = 0.95
    noise: float | None = None
    known_deviation: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("resamples", "akima_resamples"):
            if getattr(self, name) < 10:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 10")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence} must lie between 0 and 1")
        for name in ("noise", "known_deviation"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a number >= 0, a relative deviation")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Fits of all runs of one schedule and one loss in `points`, the `results.json` of a sweep.

    `schedule` and `loss_kind` choose among the runs; left out, a file that mixes several is
    refused, since their losses do not compare. `size` is the count of parameters that is N in
    every fit (others are reported beside it). `log_loss` fits parabolas to ln L in place of L.
    `tokens_per_sample` turns samples into the tokens of C = 6ND. The laws are tried on the
    `held_out` largest budgets, and extended to `targets`.
    """

    kind: Literal["scaling"] = "scaling"
    points: str
    schedule: Schedule | None = None
    loss_kind: str | None = None
    size: SizeName = "params"
    log_loss: bool = False
    tokens_per_sample: float | None = None
    parametric: bool = True
    held_out: int = 1
    targets: tuple[Target, ...] = ()
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    title: str = "Scaling laws"
    workdir: str = "runs/scaling"

    def __post_init__(self) -> None:
        if self.held_out < 0:
            raise ValueError(f"held_out={self.held_out} must be >= 0, a number of budgets")
        _check_positive(tokens_per_sample=self.tokens_per_sample)


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be a number > 0; leave it out if unknown")
