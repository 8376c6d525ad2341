# SPDX-License-Identifier: Apache-2.0
"""`int_gemv` in plain XLA: every device, any number of rows; also the reference for kernels.

No form holds more than a tile of weights as floats. Measured on two cores of an AMD EPYC, 4096 x
4096 with 4 bits: 1.4 ms for one row and 5.0 ms for eight, against 2.4 and 4.2 ms for a float32
product. All forms slice the weights, so shard them with `jax.shard_map`, not by the partitioner.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.common import Target
from pallas_kernels.int_gemv.packing import PackedWeights, decode_field, decode_words
from pallas_kernels.packing import fields_of

CPU_BLOCK = 256
"""Outputs whose codes are floats at one time: enough for XLA to share the loop among cores, and few
enough for their caches."""
_ROW_BLOCK = 128
"""Likewise for one row, of whose tile there is a float per word only."""
_REDUCED_ROWS = 4
"""Up to this many rows, a GPU reads the weights once per row rather than storing floats."""


def int_gemv_xla(x: Array, weights: PackedWeights, *, target: Target) -> Array:
    """Return x `[M, K_in]` times the weights, float32 `[M, N]`."""
    if weights.layout == "rows":
        return _by_groups(x, weights)
    if target.platform == "cpu":
        return _by_outputs(x, weights)
    if x.shape[0] <= _REDUCED_ROWS:
        return _by_reduction(x, weights)
    return _by_groups(x, weights)


def _by_groups(x: Array, weights: PackedWeights) -> Array:
    """Multiply group after group; the groups' float32 products are scaled and added."""
    bits, group_size = weights.bits, weights.group_size
    words = weights.layout == "words"
    # Whole tiles of words, so that a group of 32 channels may share one with the next.
    chunk = math.lcm(group_size, 256 // bits) if words else group_size
    groups = chunk // group_size

    def product(i: Any) -> Array:
        if words:
            codes = decode_words(_slice(weights.codes, i, chunk * bits // 32, 1), bits).T
        else:
            codes = _slice(weights.codes, i, chunk, 0)
        columns = _slice(x, i, chunk, 1)
        parts = []
        for group in range(groups):
            channels = slice(group * group_size, (group + 1) * group_size)
            part = jnp.matmul(
                columns[:, channels],
                codes[channels].astype(x.dtype),
                precision=lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            parts.append(part * weights.scales[i * groups + group])
        return sum(parts[1:], parts[0])

    # The first product starts the sum: inside shard_map, zeros would have the wrong type.
    count = weights.shape[0] // chunk
    return lax.fori_loop(1, count, lambda i, total: total + product(i), product(0))


def _by_outputs(x: Array, weights: PackedWeights) -> Array:
    """Multiply block after block of outputs, field after field of their words (CPU).

    XLA multiplies a float32 matrix fast on CPU, but not batches of small ones: scales are therefore
    multiplied into the codes of the block, in float32.
    """
    outputs, rows = weights.shape[1], x.shape[0]
    product, size = (_of_row, _ROW_BLOCK) if rows == 1 else (_of_rows, CPU_BLOCK)
    x = x.astype(jnp.float32)
    planes = _planes(x, weights.bits)

    def block(start: Any, size: int) -> Array:
        codes = lax.dynamic_slice_in_dim(weights.codes, start, size, 0)
        scales = lax.dynamic_slice_in_dim(weights.scales, start, size, 1).T
        return product(planes, codes, _scale_of_words(scales, weights), weights.bits)

    count = outputs // size
    parts = []
    if count:
        parts.append(lax.map(lambda i: block(i * size, size), jnp.arange(count)).reshape(-1, rows))
    if outputs % size:
        parts.append(block(count * size, outputs % size))
    total = jnp.concatenate(parts).T
    if rows > 1:
        return total
    # The codes of one row were read with half of their range added.
    sums = jnp.sum(x.reshape(rows, weights.scales.shape[0], -1), axis=2)
    return total - 2.0 ** (weights.bits - 1) * sums @ weights.scales


def _of_rows(planes: Array, words: Array, scales: Array, bits: int) -> Array:
    """Return the products `[N, M]`, every field of the words written as floats."""
    total = jnp.zeros((), jnp.float32)
    for field, plane in enumerate(planes):
        total = total + (decode_field(words, bits, field).astype(jnp.float32) * scales) @ plane.T
    return total


def _of_row(planes: Array, words: Array, scales: Array, bits: int) -> Array:
    """Return the products `[N, 1]` of one row with unsigned codes: only sums of words are written.

    The barriers keep the loops apart: fused, that over a row's words would lose its vectors.
    """
    if bits == 8:
        words = words ^ np.uint32(0x80808080)  # from two's complement
    fields, total = fields_of(bits), jnp.zeros((), jnp.float32)
    for field, plane in enumerate(lax.optimization_barrier(planes[:, 0] * fields.unit[:, None])):
        total += fields.levels(words, 0, field) * plane
    total = lax.optimization_barrier(total * lax.optimization_barrier(scales))
    return total @ jnp.ones((words.shape[1], 1), jnp.float32)


def _by_reduction(x: Array, weights: PackedWeights) -> Array:
    """Multiply elementwise and add up, which a GPU does in one pass over the words."""
    bits, outputs = weights.bits, weights.shape[1]
    planes = _planes(x.astype(jnp.float32), bits)
    rows = []
    for row in range(x.shape[0]):
        terms = [
            decode_field(weights.codes, bits, field).astype(jnp.float32) * plane[row]
            for field, plane in enumerate(planes)
        ]
        sums = sum(terms[1:], terms[0])
        if weights.group_size % (256 // bits):
            sums = sums.reshape(outputs, -1, 4, 2).sum(axis=2)  # halves of tiles
        groups = sums.reshape(outputs, weights.scales.shape[0], -1).sum(axis=2)
        rows.append((groups * weights.scales.T).sum(axis=1))
    return jnp.stack(rows)


def _planes(x: Array, bits: int) -> Array:
    """Return x `[M, K_in]` as `[fields, M, W]`: what field f of each word is multiplied with."""
    half = 16 // bits
    tiles = x.reshape(x.shape[0], -1, 2, half, 4, 2)  # M tile even j q z
    return tiles.transpose(5, 3, 0, 1, 4, 2).reshape(2 * half, x.shape[0], -1)


def _scale_of_words(scales: Array, weights: PackedWeights) -> Array:
    """Return scales `[N, groups]` repeated for each word: `[N, W]`."""
    outputs = scales.shape[0]
    tile = 256 // weights.bits
    if weights.group_size % tile == 0:
        return jnp.repeat(scales, weights.group_size * weights.bits // 32, axis=1)
    # A group of half a tile has every second word, or of a multiple and a half, both kinds.
    halves = jnp.repeat(scales, weights.group_size * 2 // tile, axis=1).reshape(outputs, -1, 1, 2)
    return jnp.broadcast_to(halves, (outputs, halves.shape[1], 4, 2)).reshape(outputs, -1)


def _slice(array: Array, index: Any, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(array, index * size, size, axis)
