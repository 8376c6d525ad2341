# SPDX-License-Identifier: Apache-2.0
"""Decode attention through XLA: the reference of the kernels, and the path of CPUs.

A short or well filled cache is one pair of products. Of a long one with little in it only the
blocks inside `span` are read, in an online softmax (arXiv 2205.14135): a `dynamic_slice` in a
`fori_loop` copies a block at a time, where blocks made by reshape and scan would copy the cache.
Not reverse-differentiable in the long form.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.partials import from_scores, masked_exp, normalised
from pallas_kernels.products import score_keys, weigh_values

BLOCK = 1024
"""Slots per step: 1,024 x 128 floats stay in a core's second-level cache."""


def decode_attention_xla(
    q: Array,
    k: Array,
    v: Array,
    length: Array,
    span: Array,
    starts: Array,
    limits: Array,
    *,
    scale: float,
    softcap: float | None,
    sinks: int,
) -> tuple[Array, Array]:
    """Return (out, log-sum-exp); the arguments are those of `api.decode_attention_rows`."""
    slots = k.shape[2]
    positions = slot_positions(length, slots)

    def scores_of(keys, positions):
        seen = visible(positions, starts, limits, sinks)[:, None]
        scores = score_keys(q, keys) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        return scores, seen

    def whole():
        return from_scores(*scores_of(k, positions), v)

    if slots < 2 * BLOCK:
        return whole()
    # Blocks are sliced out, which costs as much again as reading them: worth it below half.
    first, end = _visited(span, slots)
    return jax.lax.cond(
        2 * (end - first) > slots,
        whole,
        lambda: _blockwise(q, k, v, positions, first, end, scores_of),
    )


def slot_positions(length: Array, slots: int) -> Array:
    """Return the position `[B, S]` held by each slot, negative for empty ones.

    The newest position congruent to the slot; with fewer tokens than slots that is the slot itself.
    """
    newest = length[:, None] - 1
    return newest - (newest - jnp.arange(slots, dtype=jnp.int32)) % slots


def visible(positions: Array, starts: Array, limits: Array, sinks: int) -> Array:
    """Return which positions `[B, S]` the rows `[B, R]` see, `[B, R, S]`."""
    held = positions[:, None, :]
    late = held >= starts[..., None]
    if sinks:
        late |= held < sinks
    return (held >= 0) & (held < limits[..., None]) & late


def _visited(span: Array, slots: int) -> tuple[Array, Array]:
    """Return the slots, first and end, that any sequence of the batch sees."""
    # An empty span must not pull the first slot to the front.
    first = jnp.min(jnp.where(span[:, 1] > span[:, 0], span[:, 0], slots))
    return first, jnp.max(span[:, 1])


def _blockwise(q, k, v, positions, first, end, scores_of) -> tuple[Array, Array]:
    """Loop over the blocks of slots from `first` to `end`.

    The last block is moved back to end at the capacity; the slots that it then shares with its
    predecessor are masked.
    """
    slots = k.shape[2]

    def body(index, carry):
        top, total, out = carry
        start = jnp.minimum(index * BLOCK, slots - BLOCK)
        keys = jax.lax.dynamic_slice_in_dim(k, start, BLOCK, axis=2)
        values = jax.lax.dynamic_slice_in_dim(v, start, BLOCK, axis=2)
        held = jax.lax.dynamic_slice_in_dim(positions, start, BLOCK, axis=1)
        fresh = start + jnp.arange(BLOCK) >= index * BLOCK
        scores, seen = scores_of(keys, jnp.where(fresh, held, -1))
        scores = jax.lax.optimization_barrier(jnp.where(seen, scores, MASK_VALUE))
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = masked_exp(scores, new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1)
        product = weigh_values(weights.astype(v.dtype), values)
        return new_top, total, out * shrink[..., None] + product

    shape = q.shape[:3]
    empty = (
        jnp.full(shape, MASK_VALUE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    steps = (first // BLOCK, (end + BLOCK - 1) // BLOCK)
    top, total, out = jax.lax.fori_loop(*steps, body, empty)
    return normalised(out, top, total)
