# SPDX-License-Identifier: Apache-2.0
"""Attention over one segment of the context, and the one place where segments meet.

Softmax attention over a union of disjoint key sets is a weighted mean of the attention over each
set, the weights being the softmax of their log-sum-exps. Sinks, a quantized body, a recent window,
a shared prefix and retrieved clusters are therefore all segments of one mechanism.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.products import weigh_values


class Partial(NamedTuple):
    """Attention output over a segment, normalised within it, with its log-sum-exp.

    `out` is float32 `[B, T, N, H]`, `lse` float32 `[B, T, N]` (natural). A row that sees no key of
    the segment has `out = 0` and `lse = MASK_VALUE` (finite), hence no weight in a merge.
    """

    out: Array
    lse: Array


def merge(*parts: Partial) -> Partial:
    """Combine attention over disjoint segments into attention over their union.

    Raises ValueError when called without a part. Rows empty in every part stay zero.
    """
    if not parts:
        raise ValueError("merge needs at least one Partial; got none")
    if len(parts) == 1:
        return parts[0]
    lse = jnp.stack([part.lse for part in parts])
    top = lax.stop_gradient(jnp.max(lse, axis=0))
    # In a row empty everywhere top equals MASK_VALUE, and exp(0) would give every part weight 1.
    weights = jnp.where(lse > MASK_VALUE, jnp.exp(lse - top), 0.0)
    total = jnp.sum(weights, axis=0)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.zeros_like(parts[0].out)
    for part, weight in zip(parts, weights):
        out += part.out * (weight / safe)[..., None]
    return Partial(out, jnp.where(total > 0, top + jnp.log(safe), MASK_VALUE))


def from_scores(scores: Array, seen: Array, v: Array) -> tuple[Array, Array]:
    """Return softmax(scores) @ values `[B, K, R, H]` and the log-sum-exp `[B, K, R]`.

    `scores` float32 `[B, K, R, S]`, `seen` boolean and broadcastable to it. The probabilities are
    cast to the dtype of the values for the product, which accumulates in float32.
    """
    # The barrier keeps XLA from masking anew for every reader.
    scores = lax.optimization_barrier(jnp.where(seen, scores, MASK_VALUE))
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = masked_exp(scores, top)
    total = jnp.sum(weights, axis=-1)
    return normalised(weigh_values(weights.astype(v.dtype), v), top[..., 0], total)


def masked_exp(scores: Array, top: Array) -> Array:
    """Return exp(scores - top), zero for scores of MASK_VALUE also where `top` is no higher."""
    return jnp.exp(scores - jnp.maximum(top, MASK_VALUE / 2))


def normalised(out: Array, top: Array, total: Array) -> tuple[Array, Array]:
    """Return output and log-sum-exp of an online softmax; rows that saw nothing are empty."""
    safe = jnp.where(total > 0, total, 1.0)
    return out / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), MASK_VALUE)


def fold(x: Array, kv_heads: int) -> Array:
    """Return `[B, T, N, ...]` as `[B, K, R, ...]`: the rows R = G * T of each kv head, head-major.

    So grouped queries read the keys of their head without repeating them.
    """
    batch, length, heads = x.shape[:3]
    x = x.reshape(batch, length, kv_heads, heads // kv_heads, *x.shape[3:])
    return jnp.moveaxis(x, 1, 3).reshape(batch, kv_heads, -1, *x.shape[4:])


def unfold(x: Array, length: int) -> Array:
    """Undo `fold`."""
    batch, kv_heads, rows = x.shape[:3]
    x = x.reshape(batch, kv_heads, rows // length, length, *x.shape[3:])
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(batch, length, kv_heads * (rows // length), *x.shape[4:])
