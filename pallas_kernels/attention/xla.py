# SPDX-License-Identifier: Apache-2.0
"""Prefill and training attention through XLA: the reference of the kernels, the path of CPUs.

Few scores are one product. Many are flash attention (arXiv 2307.08691): blocks of queries times
blocks of keys with an online softmax, whose backward pass recomputes the probabilities of a tile
from the log-sum-exp, so that memory is linear in T and S in both directions. A loop over keys runs
from the first to the last block that its queries can see.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.attention.mask import AttentionMask
from pallas_kernels.common import MASK_VALUE, Target, round_up
from pallas_kernels.partials import fold, from_scores, masked_exp, normalised, unfold
from pallas_kernels.products import score_keys, weigh_values

_WHOLE_SCORES = 1 << 24
"""Most scores (64 MB in float32) that one product makes."""
_TILE_SCORES = 1 << 23
_NOTHING = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Config:
    """Sizes of the tiles, and the most scores that are one product instead of tiles."""

    block_q: int
    block_kv: int
    whole_scores: int


def default_config(q: Array, k: Array, mask: AttentionMask, target: Target) -> Config:
    """Return what is fast on a kind of device.

    A CPU's loops cost little, and small tiles skip more of what a mask hides and stay in its
    caches: at 16 x 256 tokens a causal training step takes two thirds of one product's time.
    """
    if target.platform != "cpu":
        return Config(512, 512, _WHOLE_SCORES)
    hides = mask.kind != "bidirectional" or mask.window is not None
    few = q.shape[1] * k.shape[2] < 256 * 256 or not hides
    return Config(128, 128, _WHOLE_SCORES if few else 0)


class Visible(NamedTuple):
    """What decides whether a query sees a key; a leading axis of 1 serves the whole batch.

    A key at position p is seen if start <= p < limit and the segments are equal. Starts are >= 0,
    padding queries have limit 0 and padding keys a negative position.
    """

    starts: Array  # B or 1, T
    limits: Array  # B or 1, T
    positions: Array  # B or 1, S
    query_segments: Array | None = None  # B T
    key_segments: Array | None = None  # B S


class Scoring(NamedTuple):
    """How products of queries and keys become scores."""

    scale: float
    softcap: float | None


def visibility(
    mask: AttentionMask,
    query_positions: Any,
    key_positions: Any,
    segments: tuple[Any, Any] | None,
    lengths: tuple[int, int],
) -> Visible:
    """Return what the XLA path needs to know about a mask; `lengths` are (T, S)."""
    if query_positions is None:
        query_positions = np.arange(lengths[0], dtype=np.int32)[None]
    if key_positions is None:
        key_positions = np.arange(lengths[1], dtype=np.int32)[None]
    starts, limits = mask.span(jnp.asarray(query_positions, jnp.int32))
    key_positions = jnp.asarray(key_positions, jnp.int32)
    if segments is None:
        return Visible(starts, limits, key_positions)
    query_segments, key_segments = (jnp.asarray(ids, jnp.int32) for ids in segments)
    limits = jnp.where(query_segments >= 0, limits, 0)
    return Visible(starts, limits, key_positions, query_segments, key_segments)


def attention_xla(
    q: Array,
    k: Array,
    v: Array,
    visible: Visible,
    *,
    scale: float,
    softcap: float | None,
    config: Config,
) -> tuple[Array, Array]:
    """Return (out `[B, T, N, H]`, log-sum-exp `[B, T, N]`), both float32 and differentiable."""
    batch, length, heads, _ = q.shape
    if batch * heads * length * k.shape[2] <= config.whole_scores:
        return _whole(q, k, v, visible, scale, softcap)
    return flash(q, k, v, visible, Scoring(scale, softcap), config)


def _seen(visible: Visible, group: int) -> Array:
    """Return the mask `[B or 1, 1, R, S]` of rows against keys."""
    held = visible.positions[:, None, :]
    seen = (held >= visible.starts[..., None]) & (held < visible.limits[..., None])
    if visible.query_segments is not None and visible.key_segments is not None:
        seen &= visible.query_segments[..., None] == visible.key_segments[:, None, :]
    return jnp.tile(seen, (1, group, 1))[:, None]


def _scores(rows: Array, k: Array, scale: float, softcap: float | None) -> Array:
    scores = score_keys(rows, k) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _whole(q, k, v, visible, scale, softcap) -> tuple[Array, Array]:
    length, kv_heads = q.shape[1], k.shape[1]
    seen = _seen(visible, q.shape[2] // kv_heads)
    scores = _scores(fold(q, kv_heads), k, scale, softcap)
    out, lse = from_scores(scores, seen, v)
    return unfold(out, length), unfold(lse, length)


class _Tiles(NamedTuple):
    """Blocks of queries, stacked on axis 0 for a scan, and the key blocks that each one sees."""

    rows: Array  # n B K R H
    starts: Array  # n B Q
    limits: Array  # n B Q
    segments: Array | None  # n B Q
    first: Array  # n
    last: Array  # n, exclusive


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash(q, k, v, visible: Visible, scoring: Scoring, config: Config) -> tuple[Array, Array]:
    """Return (out, log-sum-exp) tile by tile."""
    return _forward(q, k, v, visible, scoring, config)


def _forward(q, k, v, visible, scoring, config):
    tiles, size = _tile(q, k, visible, config)
    group = q.shape[2] // k.shape[1]

    def block(_, tile):
        def body(index, carry):
            top, total, out = carry
            keys, values, part, _ = _key_block(k, v, visible, tile, index, size)
            seen = _seen(part, group)
            scores = jnp.where(seen, _scores(tile.rows, keys, *scoring), MASK_VALUE)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = masked_exp(scores, new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=-1)
            product = weigh_values(weights.astype(v.dtype), values)
            return new_top, total, out * shrink[..., None] + product

        shape = tile.rows.shape
        empty = (
            jnp.full(shape[:-1], MASK_VALUE, jnp.float32),
            jnp.zeros(shape[:-1], jnp.float32),
            jnp.zeros(shape, jnp.float32),
        )
        top, total, out = lax.fori_loop(tile.first, tile.last, body, empty)
        return None, normalised(out, top, total)

    _, (out, lse) = lax.scan(block, None, tiles)
    length, count = q.shape[1], tiles.starts.shape[-1]
    return _joined(out, count, length), _joined(lse, count, length)


def flash_backward(
    q, k, v, visible: Visible, out, lse, cotangents, scoring: Scoring, config: Config
) -> tuple[Array, Array, Array]:
    """Return the cotangents of q, k and v, given those of `out` and `lse`.

    With P = exp(S - lse): dS = P * (dP - sum(out * d_out) + d_lse), where dP = d_out V'.
    """
    d_out, d_lse = cotangents
    tiles, size = _tile(q, k, visible, config)
    kv_heads, count = k.shape[1], tiles.starts.shape[-1]
    group = q.shape[2] // kv_heads
    shift = d_lse - jnp.sum(out * d_out, axis=-1)
    rows = tuple(_blocks(x, count, kv_heads) for x in (d_out, lse, shift))

    def block(carry, inputs):
        tile, (d_out, lse, shift) = inputs
        # Rounded as the operands of the forward pass, for the same matrix units.
        d_rows = d_out.astype(v.dtype)

        def body(index, carry):
            d_q, d_k, d_v = carry
            keys, values, part, start = _key_block(k, v, visible, tile, index, size)
            scores = _scores(tile.rows, keys, *scoring)
            weights = jnp.where(_seen(part, group), jnp.exp(scores - lse[..., None]), 0.0)
            d_scores = weights * (score_keys(d_rows, values) + shift[..., None]) * scoring.scale
            if scoring.softcap is not None:
                d_scores *= 1.0 - jnp.square(scores / scoring.softcap)
            d_scores = d_scores.astype(k.dtype)
            d_q += weigh_values(d_scores, keys)
            d_k = _add(d_k, _weigh_rows(d_scores, tile.rows), start)
            d_v = _add(d_v, _weigh_rows(weights.astype(v.dtype), d_rows), start)
            return d_q, d_k, d_v

        empty = jnp.zeros(tile.rows.shape, jnp.float32)
        d_q, d_k, d_v = lax.fori_loop(tile.first, tile.last, body, (empty, *carry))
        return (d_k, d_v), d_q

    empty = jnp.zeros(k.shape, jnp.float32)
    (d_k, d_v), d_q = lax.scan(block, (empty, empty), (tiles, rows))
    d_q = _joined(d_q, count, q.shape[1])
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _weigh_rows(weights: Array, rows: Array) -> Array:
    """Return the float32 sums `[B, K, S, H]` of rows `[B, K, R, H]` by `[B, K, R, S]`."""
    return jnp.einsum("bkrs,bkrh->bksh", weights, rows, preferred_element_type=jnp.float32)


def _add(total: Array, part: Array, start: Array) -> Array:
    old = lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=2)


def _tile(q: Array, k: Array, visible: Visible, config: Config) -> tuple[_Tiles, int]:
    """Return the blocks of queries and the size of the key blocks."""
    batch, length, heads, _ = q.shape
    size = min(config.block_kv, k.shape[2])
    count = min(config.block_q, length)
    while count > 128 and batch * heads * count * size > _TILE_SCORES:
        count //= 2
    # Blocks of equal length, as far as matrix units like: 300 queries are 3 x 112, not 3 x 128.
    count = min(count, round_up(-(-length // -(-length // count)), 16))
    starts, limits, segments = (
        None if x is None else _split(x, count)
        for x in (visible.starts, visible.limits, visible.query_segments)
    )
    assert starts is not None and limits is not None
    first, last = _key_range(starts, limits, segments, visible, size)
    return _Tiles(_blocks(q, count, k.shape[1]), starts, limits, segments, first, last), size


def _split(x: Array, count: int) -> Array:
    """Cut axis 1 into blocks on a new axis 0; zeros fill the last: as limits they hide rows."""
    padding = -x.shape[1] % count
    if padding:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, count, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _blocks(x: Array, count: int, kv_heads: int) -> Array:
    return jax.vmap(lambda block: fold(block, kv_heads))(_split(x, count))


def _joined(blocks: Array, count: int, length: int) -> Array:
    """Undo `_blocks`."""
    x = jnp.moveaxis(jax.vmap(lambda block: unfold(block, count))(blocks), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _key_range(starts, limits, segments, visible, size) -> tuple[Array, Array]:
    """Return for each block of queries the first block of keys that it may see, and the end."""
    slots = visible.positions.shape[1]
    held = visible.positions[:, _indices(slots, size)]
    low = jnp.min(jnp.where(held >= 0, held, _NOTHING), axis=-1)
    high = jnp.max(held, axis=-1)
    live = limits > 0
    start = jnp.min(jnp.where(live, starts, _NOTHING), axis=-1)[..., None]
    end = jnp.max(limits, axis=-1)[..., None]
    meet = (high >= start) & (low < end)
    if segments is not None:
        ids = visible.key_segments[:, _indices(slots, size)]
        least = jnp.min(jnp.where(live, segments, _NOTHING), axis=-1)[..., None]
        most = jnp.max(jnp.where(live, segments, -1), axis=-1)[..., None]
        meet &= (jnp.max(ids, axis=-1) >= least) & (jnp.min(ids, axis=-1) <= most)
    meet = jnp.any(meet, axis=1)  # blocks of queries, blocks of keys
    first = jnp.argmax(meet, axis=1).astype(jnp.int32)
    last = meet.shape[1] - jnp.argmax(meet[:, ::-1], axis=1).astype(jnp.int32)
    return first, jnp.where(jnp.any(meet, axis=1), last, first)


def _indices(slots: int, size: int) -> Array:
    """Slots of each key block; the last block reaches back so that it ends with the keys."""
    begins = jnp.minimum(jnp.arange(0, slots, size), slots - size)
    return begins[:, None] + jnp.arange(size)


def _key_block(k, v, visible, tile, index, size) -> tuple[Array, Array, Visible, Any]:
    """Return one block of keys and values, what decides their visibility, and the first slot."""
    slots = k.shape[2]
    start = jnp.minimum(index * size, slots - size)
    keys = lax.dynamic_slice_in_dim(k, start, size, axis=2)
    values = lax.dynamic_slice_in_dim(v, start, size, axis=2)
    positions = lax.dynamic_slice_in_dim(visible.positions, start, size, axis=1)
    if slots % size:
        # The last block repeats slots of the one before.
        positions = jnp.where(start + jnp.arange(size) >= index * size, positions, -1)
    segments = visible.key_segments
    if segments is not None:
        segments = lax.dynamic_slice_in_dim(segments, start, size, axis=1)
    part = Visible(tile.starts, tile.limits, positions, tile.segments, segments)
    return keys, values, part, start


def _flash_forward(q, k, v, visible, scoring, config):
    out, lse = _forward(q, k, v, visible, scoring, config)
    return (out, lse), (q, k, v, visible, out, lse)


def _flash_backward(scoring, config, saved, cotangents):
    q, k, v, visible, out, lse = saved
    grads = flash_backward(q, k, v, visible, out, lse, cotangents, scoring, config)
    return (*grads, None)


flash.defvjp(_flash_forward, _flash_backward)
