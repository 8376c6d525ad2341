# SPDX-License-Identifier: Apache-2.0
"""Attention over one segment of the context, and the one place where segments meet.

Softmax attention over a union of disjoint key sets is a weighted mean of the attention over each
set, the weights being the softmax of their log-sum-exps. Sinks, a quantized body, a recent window,
a shared prefix and retrieved clusters are therefore all segments of one mechanism.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.products import weigh_values
from sqzjax.numerics import MASK_VALUE
from sqzjax.typing import Array, Float


class Partial(NamedTuple):
    """Attention output over a segment, normalised within it, with its log-sum-exp.

    `out` is float32 `[B, T, N, H]`, `lse` float32 `[B, T, N]`. A row that sees no key of the
    segment has `out = 0` and `lse = MASK_VALUE` (finite), hence no weight in a merge.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]


def merge(*parts: Partial) -> Partial:
    """Combine attention over disjoint segments into attention over their union.

    Raises ValueError when called without a part. Rows empty in every part stay zero.
    """
    if not parts:
        raise ValueError("merge needs at least one Partial; got none")
    if len(parts) == 1:
        return parts[0]
    lse = jnp.stack([part.lse for part in parts])
    top = jnp.max(lse, axis=0)
    # In a row empty everywhere top equals MASK_VALUE, and exp(0) would give every part weight 1.
    weights = jnp.where(lse > MASK_VALUE, jnp.exp(lse - top), 0.0)
    total = jnp.sum(weights, axis=0)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.zeros_like(parts[0].out)
    for part, weight in zip(parts, weights):
        out += part.out * (weight / safe)[..., None]
    return Partial(out, jnp.where(total > 0, top + jnp.log(safe), MASK_VALUE))


def from_scores(
    scores: Float[Array, "B K Q S"], visible: Array, values: Float[Array, "B K S H"]
) -> tuple[Float[Array, "B K Q H"], Float[Array, "B K Q"]]:
    """Return softmax(scores) @ values and the log-sum-exp over the visible keys.

    `scores` float32, `visible` boolean and broadcastable to it. The probabilities are cast to the
    dtype of `values` for the product, which accumulates in float32.
    """
    scores = jnp.where(visible, scores, MASK_VALUE)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    out = weigh_values(weights.astype(values.dtype), values)
    lse = jnp.where(total > 0, top + jnp.log(safe), MASK_VALUE)
    return out / safe, lse[..., 0]
