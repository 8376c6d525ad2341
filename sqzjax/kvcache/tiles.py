# SPDX-License-Identifier: Apache-2.0
"""Attention to a coded body that is read tile by tile: what the caches that do so share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import round_up
from pallas_kernels.decode_attention.api import slot_span
from pallas_kernels.decode_attention.xla import slot_positions
from pallas_kernels.partials import unfold
from pallas_kernels.qtensor import QTensor, rows_of
from pallas_kernels.streamed import Tile, attend_tiles
from sqzjax.attention.partial import Partial
from sqzjax.kvcache.base import Query
from sqzjax.kvcache.coded import TILE, CodedState
from sqzjax.typing import Array, Int

Read = Callable[[Any], Tile]
"""Gives the tile of the slots from `start` on, for queries folded `[B, K, R, H]`."""


def attend(
    read: Read,
    query: Query,
    *,
    held: Int[Array, "B"],
    slots: int,
    block: int,
    kv_heads: int,
    width: int,
    starts: Int[Array, "B T"],
    limits: Int[Array, "B T"],
) -> Partial:
    """Attend to the `held` tokens, position p in slot p mod `slots`, at `[starts, limits)`.

    `block` slots are read at a time; the tiles' weighted sums end in `width`.
    """
    batch, length, heads = query.q.shape[:3]
    span = slot_span(held, starts, limits, 0, slots)
    some = span[:, 1] > span[:, 0]
    group = heads // kv_heads
    out, lse = attend_tiles(
        read,
        shape=(batch, kv_heads, group * length, width),
        positions=slot_positions(held, slots),
        span=(jnp.min(jnp.where(some, span[:, 0], slots)), jnp.max(span[:, 1])),
        starts=jnp.tile(starts, (1, group)),
        limits=jnp.tile(limits, (1, group)),
        block=block,
        scale=query.scale,
    )
    return Partial(unfold(out, length), unfold(lse, length))


def tile_size(state: CodedState) -> int:
    """Return how many slots to read at a time; it divides the slots."""
    return min(round_up(TILE, state.group), state.slots)


def cut(stored: Any, start: Any, count: int, slots: int) -> Any:
    """Return the rows `start .. start + count - 1` of a packed or plain `[B, A, slots, W]`."""
    if isinstance(stored, QTensor):
        return rows_of(stored, start, count, slots)
    return jax.lax.dynamic_slice_in_dim(stored, start, count, axis=2)
