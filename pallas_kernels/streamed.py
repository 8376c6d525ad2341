# SPDX-License-Identifier: Apache-2.0
"""Attention over keys and values that exist one tile at a time: the XLA path of coded caches.

A cache that holds codes says how to read a tile of its slots; this loop visits the tiles that any
row sees, in an online softmax (arXiv 2205.14135). Nothing larger than a tile is ever decoded.
Not reverse-differentiable.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.partials import masked_exp, normalised


class Tile(NamedTuple):
    """What attention asks of one tile of `block` slots; both are called once.

    `scores()` returns the float32 products `[B, K, R, block]` of the queries and the tile's keys,
    unscaled; `weigh(p)` the float32 sums `[B, K, R, H]` of its values by weights `p`.
    """

    scores: Callable[[], Array]
    weigh: Callable[[Array], Array]


def attend_tiles(
    read: Callable[[Any], Tile],
    *,
    shape: tuple[int, ...],
    positions: Array,
    span: tuple[Any, Any],
    starts: Array,
    limits: Array,
    block: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Return output `[B, K, R, H]` = `shape` and log-sum-exp `[B, K, R]`, float32.

    `read(start)` gives the tile of the slots `start .. start + block - 1`, `start` a traced
    multiple of `block` or, for the last tile, the number of slots less `block`. `positions` int32
    `[B, S]` says what each slot holds, negative for nothing. Row r sees the positions in
    `[starts, limits)` `[B, R]`; `span` are the first and end of the slots that any row sees.
    """
    slots = positions.shape[1]
    block = min(block, slots)

    def body(index, carry):
        top, total, out = carry
        start = jnp.minimum(index * block, slots - block)
        tile = read(start)
        held = jax.lax.dynamic_slice_in_dim(positions, start, block, axis=1)
        # The last tile may reach back into the one before it.
        held = jnp.where(start + jnp.arange(block) >= index * block, held, -1)[:, None]
        seen = (held >= 0) & (held >= starts[..., None]) & (held < limits[..., None])
        # The barriers keep XLA from making masks and scores anew for each of their readers.
        seen = jax.lax.optimization_barrier(seen)[:, None]
        scores = tile.scores() * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jax.lax.optimization_barrier(jnp.where(seen, scores, MASK_VALUE))
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jax.lax.optimization_barrier(masked_exp(scores, new_top[..., None]))
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1)
        return new_top, total, out * shrink[..., None] + tile.weigh(weights)

    empty = (
        jnp.full(shape[:3], MASK_VALUE, jnp.float32),
        jnp.zeros(shape[:3], jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    first, end = (jnp.asarray(bound, jnp.int32) for bound in span)
    top, total, out = jax.lax.fori_loop(first // block, (end + block - 1) // block, body, empty)
    return normalised(out, top, total)
