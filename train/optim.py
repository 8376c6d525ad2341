# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules as configurations.

An optimizer builds a transformation that turns a gradient into a *direction*: the train step
subtracts `learning_rate(step) * direction`. The rate is thus a pure function of the step, in no
state. Weight decay is decoupled (arXiv 1711.05101) and spares norms and biases.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from train.continual import Continual

_MOMENT_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Decay:
    """Weight decay of the matrices; embeddings and head only with `decay_embeddings`."""

    weight_decay: float = 0.1
    decay_embeddings: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be >= 0")

    def mask(self, params: Any) -> Any:
        """Return a tree of booleans: which leaves decay."""
        import jax

        pattern = r"/(kernel|a|b|embedding)$" if self.decay_embeddings else r"/(kernel|a|b)$"

        def decays(path: Any, leaf: Any) -> bool:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if not self.decay_embeddings and name.startswith("head/"):
                return False
            return re.search(pattern, name) is not None

        return jax.tree_util.tree_map_with_path(decays, params)

    def _chain(self, *parts: Any) -> Any:
        import optax

        if self.weight_decay:
            parts = (*parts, optax.add_decayed_weights(self.weight_decay, self.mask))
        return optax.chain(*parts)


@dataclass(frozen=True, kw_only=True)
class AdamW(Decay):
    """AdamW; `moment_dtype` is that of the first moment, the second stays float32."""

    kind: Literal["adamw"] = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rates(b1=self.b1, b2=self.b2)
        if not 0 < self.eps < math.inf:
            raise ValueError(
                f"eps={self.eps} must be > 0: embeddings of unseen tokens divide by it"
            )

    def build(self) -> Any:
        """Return the optax transformation."""
        import optax

        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype)
        return self._chain(adam)


@dataclass(frozen=True, kw_only=True)
class Lion(Decay):
    """Lion (arXiv 2302.06675): one moment; wants a rate 3 to 10 times lower than AdamW's."""

    kind: Literal["lion"] = "lion"
    b1: float = 0.9
    b2: float = 0.99
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rates(b1=self.b1, b2=self.b2)

    def build(self) -> Any:
        """Return the optax transformation."""
        import optax

        return self._chain(optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.moment_dtype))


@dataclass(frozen=True, kw_only=True)
class Adafactor(Decay):
    """Adafactor without momentum (arXiv 1804.04235): second moments as rows and columns.

    With `relative`, updates are scaled by the parameter's root mean square, as in the paper.
    """

    kind: Literal["adafactor"] = "adafactor"
    decay_rate: float = 0.8
    clip: float = 1.0
    relative: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rates(decay_rate=self.decay_rate)
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip={self.clip} must be > 0; 1 is the paper's")

    def build(self) -> Any:
        """Return the optax transformation."""
        import optax

        parts = [
            optax.scale_by_factored_rms(decay_rate=self.decay_rate),
            optax.clip_by_block_rms(self.clip),
        ]
        if self.relative:
            parts.append(optax.scale_by_param_block_rms())
        return self._chain(*parts)


@dataclass(frozen=True, kw_only=True)
class SGD(Decay):
    """Gradient descent with momentum; without weight decay unless asked for."""

    kind: Literal["sgd"] = "sgd"
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rates(momentum=self.momentum)

    def build(self) -> Any:
        """Return the optax transformation."""
        import optax

        return self._chain(optax.trace(self.momentum, self.nesterov))


@dataclass(frozen=True, kw_only=True)
class Muon(Decay):
    """Muon for the layers' matrices, Adam with Nesterov momentum for everything else.

    Updates are orthogonalised by `ns_steps` Newton-Schulz iterations and rescaled to AdamW's
    typical size (0.2 sqrt(max dimension), arXiv 2502.16982), so AdamW's rate carries over.
    """

    kind: Literal["muon"] = "muon"
    beta: float = 0.95
    ns_steps: int = 5
    b1: float = 0.9
    b2: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rates(beta=self.beta, b1=self.b1, b2=self.b2)
        if self.ns_steps < 1:
            raise ValueError(f"ns_steps={self.ns_steps} must be >= 1")

    def build(self) -> Any:
        """Return the optax transformation."""
        import optax
        from optax import contrib

        muon = contrib.muon(
            1.0,
            ns_steps=self.ns_steps,
            beta=self.beta,
            adam_b1=self.b1,
            adam_b2=self.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrix_axes,
        )
        return self._chain(muon, optax.scale(-1.0))  # optax's own update already descends


OptimizerConfig = AdamW | Lion | Adafactor | SGD | Muon


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """Peak rate and linear warm-up; step 0 already has a rate above 0."""

    learning_rate: float = 1e-3
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be a number > 0; 3e-4 is usual"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be >= 0")

    def check(self, steps: int) -> None:
        """Raise ValueError if the warm-up does not end within the run."""
        if self.warmup_steps >= steps and self.warmup_steps > 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below steps={steps}")

    def _warm(self, step: Any, rate: Any) -> Any:
        import jax.numpy as jnp

        if not self.warmup_steps:
            return rate
        rising = self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        return jnp.where(step < self.warmup_steps, rising, rate)


@dataclass(frozen=True, kw_only=True)
class Constant(Warmup):
    """Constant after the warm-up."""

    kind: Literal["constant"] = "constant"

    def rate(self, step: Any, steps: int) -> Any:
        """Return the float32 rate of a step (a traced scalar) in a run of `steps`."""
        import jax.numpy as jnp

        del steps
        return self._warm(step, jnp.float32(self.learning_rate))


@dataclass(frozen=True, kw_only=True)
class Cosine(Warmup):
    """Half a cosine from the peak to `final_ratio` of it (arXiv 1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio("final_ratio", self.final_ratio)

    def rate(self, step: Any, steps: int) -> Any:
        """Return the float32 rate of a step (a traced scalar) in a run of `steps`."""
        import jax.numpy as jnp

        span = max(1, steps - self.warmup_steps)
        done = jnp.clip((step - self.warmup_steps) / span, 0.0, 1.0)
        shape = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        return self._warm(
            step, self.learning_rate * (self.final_ratio + (1 - self.final_ratio) * shape)
        )


@dataclass(frozen=True, kw_only=True)
class WSD(Warmup):
    """Warm-up, stable, then a cooldown of 1 - sqrt(t) (arXiv 2405.18392) over the last part.

    The rate of the stable part does not depend on `steps`, so a run can be prolonged from any
    checkpoint before its cooldown.
    """

    kind: Literal["wsd"] = "wsd"
    cooldown: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio("cooldown", self.cooldown)

    def check(self, steps: int) -> None:
        """Raise ValueError if the cooldown does not fit behind the warm-up."""
        super().check(steps)
        span = round(self.cooldown * steps)
        if self.warmup_steps + span > steps:
            raise ValueError(
                f"a cooldown of {span} steps and warmup_steps={self.warmup_steps} exceed "
                f"steps={steps}; shorten one of them"
            )

    def rate(self, step: Any, steps: int) -> Any:
        """Return the float32 rate of a step (a traced scalar) in a run of `steps`."""
        import jax.numpy as jnp

        span = max(1, round(self.cooldown * steps))
        done = jnp.clip((step - (steps - span)) / span, 0.0, 1.0)
        return self._warm(step, self.learning_rate * (1.0 - jnp.sqrt(done)))


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Warmup):
    """Peak times sqrt(w / step) after a warm-up of w steps (at least 1), as in arXiv 1706.03762."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"

    def rate(self, step: Any, steps: int) -> Any:
        """Return the float32 rate of a step (a traced scalar) in a run of `steps`."""
        import jax.numpy as jnp

        del steps
        start = max(1, self.warmup_steps)
        falling = self.learning_rate * jnp.sqrt(start / jnp.maximum(step, start))
        return self._warm(step, falling)


ScheduleConfig = Constant | Cosine | WSD | InverseSqrt | Continual


def _matrix_axes(params: Any) -> Any:
    """Mark the layers' kernels for Muon; leading axes (stacked layers) are a batch."""
    import jax
    from optax import contrib

    def axes(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("layers") and name.endswith("/kernel"):
            return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


def _check_rates(**rates: float) -> None:
    for name, value in rates.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must lie in [0, 1)")


def _check_ratio(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1]")
