# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with codes that are never written out as floats.

Keys: `q . (scale * code + offset) = (q * scale) . code + q . offset`; values likewise, with the
weights. So the inner loop of a tile is shift, mask, convert and multiply-add of whole words, and
what scales do to a tile is done to a few rows. For many rows the codes would be unpacked over and
over: pick `dequantize` and a matrix product there (`suits_keys` and `suits_values` tell).

`results/quantized_cpu.json` says how long a cache takes against one in float32; `cpu_bench` makes
it. Look there before this is rewritten: the form of each loop decides whether XLA gives it vector
instructions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.packing import unpadded, wide_bits, widen
from pallas_kernels.qtensor import QTensor, stretch

FEW_QUERIES = 8
"""Queries up to which unpacking keys once per row is cheaper than writing the tile out."""
FEW_WEIGHTS = 2
"""Likewise of values, whose product with more rows is far cheaper than that of keys."""
_STEP = 32
"""Tokens added up in one pass. Below 16 XLA unrolls the loop inside and loses its vectors."""
_SHARED = 8
"""Tokens that must share a key's scale for it to be multiplied into the queries."""


def suits_keys(tile: QTensor, rows: int) -> bool:
    """Return whether `score` can do the keys of a tile, and for `rows` queries should."""
    down, across = tile.scale.shape[-2:]
    slots = tile.codes.shape[-2]
    if rows > FEW_QUERIES or not _plain(tile):
        return False
    shared = down == 1 or slots // down >= _SHARED
    return shared or (down == slots and _whole_planes(tile, across))


def suits_values(tile: QTensor, rows: int) -> bool:
    """Return whether `weigh` can do the values of a tile, and for `rows` weights should."""
    return rows <= FEW_WEIGHTS and _plain(tile) and _whole_planes(tile, tile.scale.shape[-1])


def _plain(tile: QTensor) -> bool:
    packed = tile.codes.dtype == jnp.uint32 and unpadded(tile.bits, tile.width)
    return packed and tile.table is None and tile.residual is None


def _whole_planes(tile: QTensor, groups: int) -> bool:
    """Whether each of `groups` groups of channels fills a number of planes of a widened row."""
    return (8 if tile.bits <= 4 else 4) % groups == 0


def score(q: Array, tile: QTensor) -> Array:
    """Return the products `[B, K, R, S]` of float32 queries `[B, K, R, H]` and a tile's keys."""
    words, bits = widen(tile.codes, tile.bits, tile.width), wide_bits(tile.bits)
    batch, heads, slots, size = words.shape
    scale = tile.scale.astype(jnp.float32)
    down, across = scale.shape[-2:]
    fold = down == 1 or slots // down >= _SHARED
    parts, groups = (1, down) if fold else (across, 1)
    queries = q[:, :, None]
    if fold:
        queries = queries * stretch(scale, down, tile.width)[:, :, :, None]
    # The barriers keep loops of additions apart, which fused would be scalar.
    queries = jax.lax.optimization_barrier(queries)
    words = words.reshape(batch, heads, groups, 1, slots // groups, size)
    total = jnp.zeros((), jnp.float32)
    for part in range(parts):
        each = jnp.zeros((), jnp.float32)
        for first in range(part * tile.width // parts, (part + 1) * tile.width // parts, size):
            digits = _digit(words, first // size * bits, bits, tile)
            each += queries[..., None, first : first + size] * digits
        total += each if fold else each * scale[:, :, None, None, :, part, None]
    total = jax.lax.optimization_barrier(total) @ jnp.ones(size, jnp.float32)
    out = jnp.moveaxis(total, 2, 3).reshape(*q.shape[:3], slots)
    return out if tile.offset is None else out + _score_offsets(q, tile.offset, slots)


def weigh(weights: Array, tile: QTensor) -> Array:
    """Return the sums `[B, K, R, H]` of a tile's values by float32 weights `[B, K, R, S]`."""
    words, bits = widen(tile.codes, tile.bits, tile.width), wide_bits(tile.bits)
    slots, groups = words.shape[-2], tile.scale.shape[-1]
    factors = stretch(tile.scale.astype(jnp.float32), slots, groups)
    factors = weights[:, :, :, None] * jnp.swapaxes(factors, -1, -2)[:, :, None]
    factors = jax.lax.optimization_barrier(factors)[..., None, None]
    words = words[:, :, None, :, None, None]
    shifts = np.arange(0, 32, bits, dtype=np.uint32).reshape(groups, -1, 1)
    stride = slots // math.gcd(slots, _STEP)
    total = jnp.zeros((), jnp.float32)
    for first in range(0, slots, stride):
        cut = slice(first, first + stride)
        digits = _digit(words[:, :, :, cut], shifts, bits, tile)
        total += digits * jnp.swapaxes(factors[..., cut, :, :], 3, 4)
    total = jnp.sum(jax.lax.optimization_barrier(total), axis=3)
    out = total.reshape(*weights.shape[:3], tile.width)
    return out if tile.offset is None else out + _weigh_offsets(weights, tile.offset, tile.width)


def _digit(words: Array, shift: Any, bits: int, tile: QTensor) -> Array:
    """Return one field of every word as the float32 level that it stands for."""
    code = ((words >> shift) & (2**bits - 1)).astype(jnp.int32)
    return (code - tile.bias if tile.bias else code).astype(jnp.float32)


def _score_offsets(q: Array, offset: Array, slots: int) -> Array:
    """Return the products `[B, K, R, S]` of queries and the offsets of keys."""
    sums = q.reshape(*q.shape[:3], offset.shape[-1], -1).sum(-1)
    products = sums @ jnp.swapaxes(offset.astype(jnp.float32), -1, -2)
    return jnp.swapaxes(stretch(jnp.swapaxes(products, -1, -2), slots, q.shape[2]), -1, -2)


def _weigh_offsets(weights: Array, offset: Array, width: int) -> Array:
    """Return the sums `[B, K, R, H]` of the offsets of values by weights."""
    sums = weights.reshape(*weights.shape[:3], offset.shape[-2], -1).sum(-1)
    return stretch(sums @ offset.astype(jnp.float32), weights.shape[2], width)
