# SPDX-License-Identifier: Apache-2.0
"""Decode attention on codes through XLA: the reference of the kernels, and the path of CPUs."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import Target, round_up
from pallas_kernels.decode_attention.xla import slot_positions
from pallas_kernels.products import score_keys, weigh_values
from pallas_kernels.qtensor import QTensor, dequantize, rows_of
from pallas_kernels.quantized_decode_attention import folded
from pallas_kernels.rotary import Rotary, cos_sin, turn
from pallas_kernels.streamed import Tile, attend_tiles

BLOCK = 512
"""Most slots of a tile, rounded up to whole groups of tokens that share a scale; twice as many
where codes are read plane by plane, for loops long enough to be shared among cores."""
_LEAST = 128
_ELEMENTS = 2**20
"""Elements of a tile of all heads of the batch: 4 MB decoded, which caches hold."""
_ALONE = 512
"""Channels of all heads from which on a CPU takes the sequences of a batch one by one: in tiles as
long as those of a single one, and no further than each of them reaches."""


def quantized_decode_attention_xla(
    q: Array,
    k: QTensor,
    v: QTensor,
    length: Array,
    span: Array,
    starts: Array,
    limits: Array,
    *,
    query_positions: Array | None,
    rotary: Rotary | None,
    scale: float,
    softcap: float | None,
    target: Target,
) -> tuple[Array, Array]:
    """Return (out, log-sum-exp); the arguments are those of `api.quantized_decode_attention`.

    Queries are folded `[B, K, R, H]`, `starts`, `limits` and `query_positions` `[B, R]`.
    """
    rows = _Rows(q, length, span, starts, limits, query_positions)

    def attend(rows: _Rows, sequence: Any = None) -> tuple[Array, Array]:
        return _attend(rows, k, v, sequence, rotary=rotary, scale=scale, softcap=softcap)

    if target.platform != "cpu" or q.shape[0] == 1 or math.prod(q.shape[1::2]) < _ALONE:
        return attend(rows)

    def one(index: Any) -> tuple[Array, Array]:
        mine = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), rows)
        return jax.tree.map(lambda x: x[0], attend(mine, index))

    return jax.lax.map(one, jnp.arange(q.shape[0]))


class _Rows(NamedTuple):
    """What belongs to the sequences of a batch, their caches apart."""

    q: Array
    length: Array
    span: Array
    starts: Array
    limits: Array
    query_positions: Array | None


def _attend(
    rows: _Rows,
    k: QTensor,
    v: QTensor,
    sequence: Any,
    *,
    rotary: Rotary | None,
    scale: float,
    softcap: float | None,
) -> tuple[Array, Array]:
    """Attend to all sequences, or to number `sequence` alone, whose rows are then given."""
    q, length, span, starts, limits, query_positions = rows
    slots = k.codes.shape[-2]
    planes = rotary is None and q.shape[2] > folded.FEWEST
    most = 2 * BLOCK if planes else BLOCK
    block = min(most, max(_LEAST, _ELEMENTS // (math.prod(q.shape[:2]) * q.shape[3])))
    block = min(round_up(block, math.lcm(_group(k), _group(v))), slots)
    positions = slot_positions(length, slots)
    table = None if rotary is None else cos_sin(rotary, jnp.arange(block))

    def tile_of(tensor: QTensor, start: Any) -> QTensor:
        return rows_of(tensor, start, block, slots, sequence=sequence)

    def read(start) -> Tile:
        def scores() -> Array:
            tile = tile_of(k, start)
            if rotary is not None:
                keys = dequantize(tile)
                return _rotated(q, keys, query_positions, positions, start, table, rotary)
            return score(q.astype(jnp.float32), tile)

        return Tile(scores, lambda weights: weigh(weights, tile_of(v, start)))

    visited = span[:, 1] > span[:, 0]
    first = jnp.min(jnp.where(visited, span[:, 0], slots))
    return attend_tiles(
        read,
        shape=q.shape,
        positions=positions,
        span=(first, jnp.max(span[:, 1])),
        starts=starts,
        limits=limits,
        block=block,
        scale=scale,
        softcap=softcap,
    )


def _group(tensor: QTensor) -> int:
    """Return how many slots share a scale; 1 if all do, as they may then be cut anywhere."""
    rows = tensor.scale.shape[-2]
    return tensor.codes.shape[-2] // rows if rows > 1 else 1


def _rotated(q, keys, query_positions, positions, start, table, rotary) -> Array:
    """Return the scores of keys stored before rotation.

    A row's tile is turned relative to the position of its first slot: its angles, `table`, do not
    depend on where it lies, and the few queries are turned to meet it.
    """
    slots, block = positions.shape[1], keys.shape[2]
    held = positions[:, jnp.minimum(start, slots - 1)]
    here = start + jnp.arange(block)
    # Around the newest slot of a ring, the positions fall back by the number of slots.
    wrap = jnp.take(positions, here, axis=1) - held[:, None] - jnp.arange(block)
    cos, sin = jax.lax.cond(
        jnp.any(wrap != 0),
        lambda: cos_sin(rotary, jnp.arange(block) + wrap),
        lambda: tuple(jnp.broadcast_to(x, (*wrap.shape, x.shape[-1])) for x in table),
    )
    queries = cos_sin(rotary, query_positions - held[:, None])
    q = turn(q.astype(jnp.float32), *(x[:, None] for x in queries))
    cos, sin = cos[:, None], sin[:, None]
    (first, second), halves = jnp.split(keys, 2, axis=-1), jnp.split(q, 2, axis=-1)
    # Two products: joining the halves of the keys would cost as much as turning them.
    out = score_keys(halves[0], first * cos - second * sin)
    return out + score_keys(halves[1], second * cos + first * sin)


def score(q: Array, tile: QTensor) -> Array:
    """Return the products `[B, K, R, S]` of queries `[B, K, R, H]` and the keys of a tile."""
    if folded.suits_keys(tile, q.shape[2]):
        return folded.score(q, tile)
    return score_keys(q, dequantize(tile))


def weigh(weights: Array, tile: QTensor) -> Array:
    """Return the weighted sum `[B, K, R, H]` of a tile's values by `[B, K, R, S]`."""
    if folded.suits_values(tile, weights.shape[2]):
        return folded.weigh(weights, tile)
    return weigh_values(weights, dequantize(tile))
