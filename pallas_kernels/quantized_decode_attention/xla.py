# SPDX-License-Identifier: Apache-2.0
"""Decode attention on codes through XLA: the reference of the kernels, and the path of CPUs."""

import math

import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import round_up
from pallas_kernels.decode_attention.xla import slot_positions
from pallas_kernels.products import score_keys, weigh_values
from pallas_kernels.qtensor import QTensor, dequantize, levels, rows_of, stretch
from pallas_kernels.rotary import Rotary, cos_sin, turn
from pallas_kernels.streamed import Tile, attend_tiles

BLOCK = 512
"""Slots of a tile, rounded up to whole groups of tokens that share a scale."""


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
) -> tuple[Array, Array]:
    """Return (out, log-sum-exp); the arguments are those of `api.quantized_decode_attention`.

    Queries are folded `[B, K, R, H]`, `starts`, `limits` and `query_positions` `[B, R]`.
    """
    slots = k.codes.shape[-2]
    block = min(round_up(BLOCK, math.lcm(_group(k), _group(v))), slots)
    positions = slot_positions(length, slots)

    def read(start) -> Tile:
        def scores() -> Array:
            keys = dequantize(rows_of(k, start, block, slots))
            if rotary is None:
                return score_keys(q.astype(jnp.float32), keys)
            return _rotated(q, keys, query_positions, positions, start, block, rotary)

        return Tile(scores, lambda weights: weigh(weights, rows_of(v, start, block, slots)))

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


def _rotated(q, keys, query_positions, positions, start, block, rotary) -> Array:
    """Return the scores of keys stored before rotation.

    A row's tile is turned relative to the position of its first slot: the table of the tile does
    not depend on where it lies, and the few queries are turned to meet it.
    """
    slots = positions.shape[1]
    held = positions[:, jnp.minimum(start, slots - 1)]
    here = start + jnp.arange(block)
    # Around the newest slot of a ring, the positions fall back by the number of slots.
    wrap = jnp.take(positions, here, axis=1) - held[:, None] - jnp.arange(block)
    cos, sin = cos_sin(rotary, jnp.arange(block) + wrap)
    keys = turn(keys, cos[:, None], sin[:, None])
    cos, sin = cos_sin(rotary, query_positions - held[:, None])
    return score_keys(turn(q.astype(jnp.float32), cos[:, None], sin[:, None]), keys)


def weigh(weights: Array, tile: QTensor) -> Array:
    """Return the weighted sum `[B, K, R, H]` of a tile's values by `[B, K, R, S]`.

    A scale that serves a whole row is multiplied into the weights instead of the values.
    """
    whole_row = tile.scale.shape[-1] == 1 and tile.residual is None
    if not whole_row or tile.scale.shape[-2] == 1:
        return weigh_values(weights, dequantize(tile))
    rows = tile.codes.shape[-2]
    factor = stretch(tile.scale.astype(jnp.float32), rows, 1)[..., 0]
    out = weigh_values(weights * factor[:, :, None], levels(tile))
    if tile.offset is None:
        return out
    offset = stretch(tile.offset.astype(jnp.float32), rows, 1)[..., 0]
    return out + jnp.sum(weights * offset[:, :, None], axis=-1, keepdims=True)
