# SPDX-License-Identifier: Apache-2.0
"""The training step as one compiled, donated program.

Loss and gradients are sums over tokens or samples, divided once by the total weight, so
microbatches and devices add up exactly. A step whose loss, gradient norm or new parameters are not
finite leaves parameters, optimizer state and average as they were; so does one without any target.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sqzjax.errors import ConfigError
from sqzjax.typing import Array, PyTree
from train import guard, lora
from train.config import LoRAConfig
from train.ema import Average
from train.objectives import LossOutput, Objective, Reference
from train.state import Frozen, TrainState

# Roles of random keys: one seed, folded with the role and then with the step.
INIT_KEY, LORA_KEY, LOSS_KEY, EVAL_KEY, REFERENCE_KEY = range(5)


def role_key(seed: int, role: int) -> Array:
    """Return the PRNG key of one role."""
    return jax.random.fold_in(jax.random.key(seed), role)


@dataclass(frozen=True)
class Step:
    """Everything static about a step; `train` and `evaluate` are pure and traceable.

    `rate` maps the step (a traced int32) to the learning rate; `reference` is the definition of
    the objective's second model, whose parameters come with the frozen ones.
    """

    model: Any
    objective: Objective
    optimizer: Any
    rate: Callable[[Array], Array]
    seed: int = 0
    accumulation: int = 1
    clip_norm: float | None = 1.0
    lora: LoRAConfig | None = None
    reference: Any = None
    average: Average | None = None

    def train(
        self, state: TrainState, frozen: Frozen, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Return the next state and device metrics: "loss" and the objective's as (sum, weight)."""
        key = jax.random.fold_in(role_key(self.seed, LOSS_KEY), state.step)
        loss, grads = self._accumulate(
            lambda micro: self._gradients(state.trained, frozen, micro, key), batch
        )
        has_weight = loss.weight > 0
        per_weight = jnp.where(has_weight, 1.0 / jnp.where(has_weight, loss.weight, 1.0), 0.0)
        norm = global_norm(grads) * per_weight
        finite = jnp.isfinite(loss.sum) & jnp.isfinite(norm)
        with jax.named_scope("update"):
            rate = self.rate(state.step).astype(jnp.float32)
            new = self._update(state, grads, per_weight * self._clip(norm), rate)
            finite &= guard.finite(new[0])
        accept = finite & has_weight
        kept = guard.select(accept, new, (state.trained, state.opt_state, state.average))
        bad = (~finite).astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            trained=kept[0],
            opt_state=kept[1],
            average=kept[2],
            rejected=state.rejected + bad,
            rejected_in_row=jnp.where(finite, 0, state.rejected_in_row + 1),
        )
        return state, {
            "loss": (loss.sum, loss.weight),
            **loss.metrics,
            "grad_norm": norm,
            "learning_rate": rate,
            "rejected": state.rejected,
            "rejected_in_row": state.rejected_in_row,
        }

    def evaluate(
        self, trained: PyTree, frozen: Frozen, batch: dict[str, Array], index: Array
    ) -> LossOutput:
        """Return the loss of held-out batch `index`, with the same key at every evaluation."""
        key = jax.random.fold_in(role_key(self.seed, EVAL_KEY), index)
        return self._accumulate(
            lambda micro: self._loss(trained, frozen, micro, key, train=False), batch
        )

    def _loss(self, trained, frozen: Frozen, batch, key, *, train: bool) -> LossOutput:
        extra: dict[str, Any] = {"train": train}
        if self.reference is not None:
            extra["reference"] = Reference(self.reference, frozen.reference)
        if frozen is not None and frozen.tables is not None:
            extra["tables"] = frozen.tables
        if self.lora is None:
            return self.objective.loss(self.model, trained, batch, key, **extra)
        extra["lora"] = lora.scaled(self.lora, trained)
        return self.objective.loss(self.model, frozen.base, batch, key, **extra)

    def _gradients(self, trained, frozen, batch, key) -> tuple[LossOutput, PyTree]:
        def summed(trained):
            out = self._loss(trained, frozen, batch, key, train=True)
            return out.sum, out

        (_, out), grads = jax.value_and_grad(summed, has_aux=True)(trained)
        return out, grads

    def _accumulate(self, one: Callable[[dict[str, Array]], Any], batch: dict[str, Array]) -> Any:
        """Sum what `one` returns over microbatches; one at a time is in memory."""
        rows, count = jax.tree.leaves(batch)[0].shape[0], self.accumulation
        batch = {**batch, "row": jnp.arange(rows, dtype=jnp.int32)}
        if count == 1:
            return one(batch)

        def split(leaf):
            # Rows a, a + count, ... form a microbatch, so each device keeps its own rows.
            return jnp.swapaxes(leaf.reshape(-1, count, *leaf.shape[1:]), 0, 1)

        micros = jax.tree.map(split, batch)
        shapes = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], micros))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def body(sums, micro):
            return jax.tree.map(jnp.add, sums, one(micro)), None

        return jax.lax.scan(body, zeros, micros)[0]

    def _clip(self, norm: Array) -> Array:
        if self.clip_norm is None:
            return jnp.float32(1.0)
        return jnp.minimum(1.0, self.clip_norm / jnp.maximum(norm, 1e-30))

    def _update(self, state: TrainState, grads: PyTree, factor: Array, rate: Array):
        """Return trained parameters, optimizer state and average after the update."""
        grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        directions, opt_state = self.optimizer.update(grads, state.opt_state, state.trained)
        trained = jax.tree.map(
            lambda p, d: (p - rate * d.astype(jnp.float32)).astype(p.dtype),
            state.trained,
            directions,
        )
        average = self.average and self.average.update(state.average, trained)
        return trained, opt_state, average


def global_norm(tree: PyTree) -> Array:
    """Return the Euclidean norm of all numbers of a tree, in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0.0)))


class Program:
    """A function compiled once, ahead of time, for fixed shapes; other shapes are refused."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        out_shardings: Any = None,
        donate: tuple[int, ...] = (),
    ):
        jitted = jax.jit(function, out_shardings=out_shardings, donate_argnums=donate)
        self._expected = jax.tree.map(lambda leaf: leaf.shape, arguments)
        self.compiled = jitted.lower(*arguments).compile()

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.compiled(*arguments)
        except TypeError as error:
            shapes = jax.tree.map(lambda leaf: leaf.shape, arguments)
            if shapes == self._expected:
                raise
            raise ConfigError(
                f"shapes changed after compilation, which would compile again: {error}"
            ) from None

    @property
    def temporary_bytes(self) -> int | None:
        """Bytes of intermediate results on each device, if the backend tells."""
        analysis = self.compiled.memory_analysis()
        return None if analysis is None else analysis.temp_size_in_bytes
