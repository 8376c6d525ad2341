# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with codes that are never written out as floats.

Keys: `q . (scale * code + offset) = (q * scale) . code + q . offset`; values likewise, with the
weights. So the inner loop of a tile is mask, convert and multiply-add of whole words, and what
scales do to a tile is done to a few rows. Fields are not even shifted down: the power of two by
which they are too large is taken from the few rows, too. For many rows the codes would be unpacked
over and over: pick `dequantize` and a matrix product there (`suits_keys`, `suits_values`).

`results/quantized_cpu.json` says how long a cache takes against one in float32; `cpu_bench` makes
it. Look there before this is rewritten: the form of each loop decides whether XLA gives it vector
instructions.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.packing import Fields, fields_of, unpadded, wide_bits, widen
from pallas_kernels.qtensor import QTensor, stretch

FEW = 16
"""Rows up to which unpacking codes is cheaper than writing the tile out with its scales."""
FEWEST = 2
"""Rows of weights up to which values are unpacked once per row."""
_STEP = 32
"""Tokens added up in one pass. Below 16 XLA unrolls the loop inside and loses its vectors."""
_SHARED = 8
"""Tokens that must share a key's scale for it to be multiplied into the queries."""


def suits_keys(tile: QTensor, rows: int) -> bool:
    """Return whether `score` can do the keys of a tile, and for `rows` queries should."""
    down, across = tile.scale.shape[-2:]
    slots = tile.codes.shape[-2]
    if rows > FEW or not _plain(tile):
        return False
    shared = down == 1 or slots // down >= _SHARED
    return shared or (down == slots and _whole_planes(tile, across))


def suits_values(tile: QTensor, rows: int) -> bool:
    """Return whether `weigh` can do the values of a tile, and for `rows` weights should."""
    return rows <= FEW and _plain(tile) and _whole_planes(tile, tile.scale.shape[-1])


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
    fields = fields_of(bits)
    queries *= np.repeat(fields.unit, size)
    # The barriers keep loops of additions apart, which fused would be scalar.
    queries = jax.lax.optimization_barrier(queries)
    words = words.reshape(batch, heads, groups, 1, slots // groups, size)
    total = jnp.zeros((), jnp.float32)
    for part in range(parts):
        each = jnp.zeros((), jnp.float32)
        for first in range(part * tile.width // parts, (part + 1) * tile.width // parts, size):
            levels = fields.levels(words, tile.bias, first // size)
            each += queries[..., None, first : first + size] * levels
        total += each if fold else each * scale[:, :, None, None, :, part, None]
    total = jax.lax.optimization_barrier(total) @ jnp.ones(size, jnp.float32)
    out = jnp.moveaxis(total, 2, 3).reshape(*q.shape[:3], slots)
    return out if tile.offset is None else out + _score_offsets(q, tile.offset, slots)


def weigh(weights: Array, tile: QTensor) -> Array:
    """Return the sums `[B, K, R, H]` of a tile's values by float32 weights `[B, K, R, S]`."""
    words, fields = widen(tile.codes, tile.bits, tile.width), fields_of(wide_bits(tile.bits))
    slots, groups = words.shape[-2], tile.scale.shape[-1]
    factors = stretch(tile.scale.astype(jnp.float32), slots, groups)
    factors = weights[:, :, :, None] * jnp.swapaxes(factors, -1, -2)[:, :, None]
    factors = jax.lax.optimization_barrier(factors)  # B K R groups S
    sums = _add_up if weights.shape[2] <= FEWEST else _write_and_add_up
    total = sums(factors, words, fields, tile.bias) * fields.unit.reshape(groups, -1, 1)
    out = total.reshape(*weights.shape[:3], tile.width)
    return out if tile.offset is None else out + _weigh_offsets(weights, tile.offset, tile.width)


def _add_up(factors: Array, words: Array, fields: Fields, bias: int) -> Array:
    """Return the sums `[B, K, R, groups, planes, words]`, fields unpacked for every row."""
    slots, planes = words.shape[2], fields.planes(factors.shape[3])
    words, factors = words[:, :, None, :, None, None], factors[..., None, None]
    stride = slots // math.gcd(slots, _STEP)
    total = jnp.zeros((), jnp.float32)
    for first in range(0, slots, stride):
        cut = slice(first, first + stride)
        levels = fields.levels(words[:, :, :, cut], bias, planes)
        total += levels * jnp.swapaxes(factors[..., cut, :, :], 3, 4)
    return jnp.sum(jax.lax.optimization_barrier(total), axis=3)


def _write_and_add_up(factors: Array, words: Array, fields: Fields, bias: int) -> Array:
    """Return the same, all levels of the tile written once, plane by plane.

    That loop runs over the words of all slots: over those of one XLA would unroll it into scalars.
    """
    batch, heads, slots, size = words.shape
    flat = jax.lax.optimization_barrier(words).reshape(batch, heads, 1, -1)
    levels = jax.lax.optimization_barrier(fields.levels(flat, bias, fields.planes(1)[0]))
    levels = levels.reshape(batch, heads, 1, factors.shape[3], -1, slots, size)
    return jnp.sum(levels * factors[:, :, :, :, None, :, None], axis=5)


def _score_offsets(q: Array, offset: Array, slots: int) -> Array:
    """Return the products `[B, K, R, S]` of queries and the offsets of keys."""
    sums = q.reshape(*q.shape[:3], offset.shape[-1], -1).sum(-1)
    products = sums @ jnp.swapaxes(offset.astype(jnp.float32), -1, -2)
    return jnp.swapaxes(stretch(jnp.swapaxes(products, -1, -2), slots, q.shape[2]), -1, -2)


def _weigh_offsets(weights: Array, offset: Array, width: int) -> Array:
    """Return the sums `[B, K, R, H]` of the offsets of values by weights."""
    sums = weights.reshape(*weights.shape[:3], offset.shape[-2], -1).sum(-1)
    return stretch(sums @ offset.astype(jnp.float32), weights.shape[2], width)
