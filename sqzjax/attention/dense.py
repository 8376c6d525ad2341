# SPDX-License-Identifier: Apache-2.0
"""Exact attention of a few or many queries over keys stored kv-head major (`B K S H`).

Query heads of one kv head are folded into rows, so grouped-query attention never repeats keys.
Three forms, chosen from static shapes: one product for small score matrices; a loop over key
blocks for decoding, which stops at the longest live context and never copies the cache; a loop
over query blocks for long prefill and training, whose memory is linear in T.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.products import score_keys, weigh_values
from sqzjax.attention.mask import Mask, same_segment
from sqzjax.attention.partial import Partial, from_scores
from sqzjax.numerics import MASK_VALUE
from sqzjax.typing import Array, Float, Int

KEY_BLOCK = 1024
"""Keys per step of the decode loop: 1,024 x 128 floats stay in a core's second-level cache."""
QUERY_BLOCK = 512
_MAX_SCORES = 1 << 24
"""Scores (64 MB in float32) that may exist at once before queries are processed in blocks."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    mask: Mask,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    live: Int[Array, ""] | None = None,
) -> Partial:
    """Attend `q` to `k`, `v` under `mask` on positions; scores and softmax are float32.

    `scale` defaults to 1/sqrt(H). `live` bounds the storage slots that hold keys, so that decoding
    with a nearly empty cache costs what the context costs, not what the capacity costs; with it
    the function is not reverse-differentiable.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    query_segments = None if key_segments is None else query_segments

    def part(q, query_positions, query_segments):
        seen = mask.visible(query_positions, key_positions, window)
        if query_segments is not None and key_segments is not None:
            seen &= same_segment(query_segments, key_segments)
        return _whole(q, k, v, seen, scale, logit_softcap)

    batch, length, heads, _ = q.shape
    slots = k.shape[2]
    if live is not None and length * heads <= 4096 and slots >= 2 * KEY_BLOCK:
        return _over_keys(
            q, k, v, query_positions, key_positions, mask, window, scale, logit_softcap, live
        )
    if batch * heads * length * slots > _MAX_SCORES and length > QUERY_BLOCK:
        return _over_queries(part, q, query_positions, query_segments)
    return part(q, query_positions, query_segments)


def fold_heads(q: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K Q H"]:
    """Group query heads by kv head and fold them with time: Q = G * T, head-major."""
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, num_kv_heads, heads // num_kv_heads, width)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, width)


def unfold_heads(x: Array, length: int) -> Array:
    """Undo `fold_heads` on `[B, K, Q, ...]`, giving `[B, T, N, ...]`."""
    batch, kv_heads, rows = x.shape[:3]
    grouped = x.reshape(batch, kv_heads, rows // length, length, *x.shape[3:])
    moved = jnp.moveaxis(grouped, 3, 1)
    return moved.reshape(batch, length, kv_heads * (rows // length), *x.shape[3:])


def _scores(q, k, scale, softcap):
    scores = score_keys(q, k) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _rows(seen, group):
    """Repeat a `[B, T, S]` visibility for the G heads folded into rows."""
    return jnp.tile(seen, (1, group, 1))[:, None] if group > 1 else seen[:, None]


def _whole(q, k, v, seen, scale, softcap) -> Partial:
    length, kv_heads = q.shape[1], k.shape[1]
    scores = _scores(fold_heads(q, kv_heads), k, scale, softcap)
    out, lse = from_scores(scores, _rows(seen, q.shape[2] // kv_heads), v)
    return Partial(unfold_heads(out, length), unfold_heads(lse, length))


def _over_queries(part, q, positions, segments) -> Partial:
    """Run `part` over blocks of queries, recomputing each block's scores in the backward pass."""
    batch, length = positions.shape
    padding = -length % QUERY_BLOCK

    def blocks(x, fill):
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, -1, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    inputs = (blocks(q, 0), blocks(positions, -1))
    if segments is not None:
        inputs += (blocks(segments, -1),)
    body = jax.checkpoint(lambda args: part(*args, *([None] * (3 - len(args)))))
    out = jax.lax.map(body, inputs)
    return Partial(
        *(jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length] for x in out)
    )


def _over_keys(
    q, k, v, query_positions, key_positions, mask, window, scale, softcap, live
) -> Partial:
    """Online softmax over blocks of keys (arXiv 2205.14135), up to slot `live`.

    `dynamic_slice` inside `fori_loop` reads the cache in place; blocks made by reshape and scan
    would copy it. The last block is moved back to end at the capacity, and the slots that it then
    shares with its predecessor are masked.
    """
    length, kv_heads, slots = q.shape[1], k.shape[1], k.shape[2]
    rows = fold_heads(q, kv_heads)
    group = q.shape[2] // kv_heads

    def body(index, carry):
        top, total, out = carry
        start = jnp.minimum(index * KEY_BLOCK, slots - KEY_BLOCK)
        keys = jax.lax.dynamic_slice_in_dim(k, start, KEY_BLOCK, axis=2)
        values = jax.lax.dynamic_slice_in_dim(v, start, KEY_BLOCK, axis=2)
        positions = jax.lax.dynamic_slice_in_dim(key_positions, start, KEY_BLOCK, axis=1)
        fresh = start + jnp.arange(KEY_BLOCK) >= index * KEY_BLOCK
        seen = mask.visible(query_positions, jnp.where(fresh, positions, -1), window)
        seen = _rows(seen, group)
        scores = jnp.where(seen, _scores(rows, keys, scale, softcap), MASK_VALUE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        product = weigh_values(weights.astype(v.dtype), values)
        total = total * shrink + jnp.sum(weights, axis=-1)
        return new_top, total, out * shrink[..., None] + product

    shape = rows.shape[:3]
    start = (
        jnp.full(shape, MASK_VALUE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
    )
    steps = jnp.minimum((live + KEY_BLOCK - 1) // KEY_BLOCK, -(-slots // KEY_BLOCK))
    top, total, out = jax.lax.fori_loop(0, steps, body, start)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(safe), MASK_VALUE)
    return Partial(unfold_heads(out / safe[..., None], length), unfold_heads(lse, length))
