# SPDX-License-Identifier: Apache-2.0
"""Attention over keys and values that are made again from something smaller, tile by tile.

Keys are rebuilt for every tile, because a rotation stands between them and the query. Values are
linear in what is stored: the weights mix the stored rows, and the projection is applied to the few
mixtures instead of all tokens (for a token and 32 heads, a hundredth of the work). Where queries
are so many that this costs more, as in a long prompt, values are rebuilt as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.decode_attention.xla import slot_positions
from pallas_kernels.partials import fold
from pallas_kernels.products import score_keys, weigh_values
from pallas_kernels.qtensor import QTensor, dequantize
from pallas_kernels.streamed import Tile
from sqzjax.attention.partial import Partial
from sqzjax.kvcache import tiles
from sqzjax.kvcache.base import Query
from sqzjax.kvcache.coded import CodedState
from sqzjax.typing import Array, Int


@dataclass(frozen=True, kw_only=True)
class Source:
    """How the tiles of `block` slots of a cache are read; A divides the K heads.

    `keys(start)` gives keys before rotation `[B, S, K, H]` of the slots from `start` on,
    `rows(start)` what values are linear in `[B, A, S, W]`, `values(start)` the values
    `[B, S, K, H]`. `lift` takes mixtures of rows `[B, T, N, W]`, by weights that add up to one, to
    mixtures of values `[B, T, N, H]`.
    """

    keys: Callable[[Any], Array]
    rows: Callable[[Any], Array]
    values: Callable[[Any], Array]
    lift: Callable[[Array], Array]
    num_kv_heads: int
    ways: int  # A
    width: int  # W
    slots: int
    block: int


def attend(
    source: Source,
    query: Query,
    held: Int[Array, "B"],
    starts: Int[Array, "B T"],
    limits: Int[Array, "B T"],
) -> Partial:
    """Attend to the `held` tokens, position p in slot p mod `slots`, at `[starts, limits)`."""
    batch, length, heads, head_dim = query.q.shape
    kv_heads, dtype = source.num_kv_heads, query.q.dtype
    mixes = mixes_rows(source.width, source.slots, length * heads, kv_heads, head_dim)
    width = source.width if mixes else head_dim
    q = fold(query.q, kv_heads)
    positions = slot_positions(held, source.slots)

    def read(start) -> Tile:
        def scores() -> Array:
            here = jax.lax.dynamic_slice_in_dim(positions, start, source.block, axis=1)
            keys = query.rotate(source.keys(start), jnp.maximum(here, 0))
            return score_keys(q, jnp.moveaxis(keys, 1, 2))

        def weigh(weights: Array) -> Array:
            weights = weights.astype(dtype)
            if not mixes:
                return weigh_values(weights, jnp.moveaxis(source.values(start), 1, 2))
            shared = weights.reshape(batch, source.ways, -1, source.block)
            return weigh_values(shared, source.rows(start)).reshape(*q.shape[:3], width)

        return Tile(scores, weigh)

    out, lse = tiles.attend(
        read,
        query,
        held=held,
        slots=source.slots,
        block=source.block,
        kv_heads=kv_heads,
        width=width,
        starts=starts,
        limits=limits,
    )
    if mixes:
        out = source.lift(out.astype(dtype)).astype(jnp.float32)
        # A row that saw nothing has weights that add up to zero: no bias either.
        out = jnp.where(lse[..., None] > MASK_VALUE, out, 0.0)
    return Partial(out, lse)


def mixes_rows(width: int, slots: int, queries: int, kv_heads: int, head_dim: int) -> bool:
    """Whether mixing rows of `width` takes fewer operations than rebuilding every value."""
    outputs = kv_heads * head_dim
    mixing = queries * width * (slots + outputs)
    return mixing <= slots * (width * outputs + queries * head_dim)


def inputs(read: Callable[[Any], Array], query: Query, state: CodedState) -> Source:
    """Return the source that projects layer inputs, `read(start)` giving `[B, 1, S, D]`."""
    form = jax.eval_shape(lambda: query.project_kv(read(0)[:, 0])[0])

    def lift(mixed: Array) -> Array:
        # All heads project every mixture and each keeps its own: no more than a few tokens cost.
        every = query.project_kv(mixed)[1]
        every = every.reshape(*every.shape[:2], form.shape[2], -1, *form.shape[2:])
        return jnp.einsum("btkgkh->btkgh", every).reshape(*mixed.shape[:3], -1)

    return Source(
        keys=lambda start: query.project_kv(read(start)[:, 0])[0],
        rows=read,
        values=lambda start: query.project_kv(read(start)[:, 0])[1],
        lift=lift,
        num_kv_heads=form.shape[2],
        ways=1,
        width=jax.eval_shape(read, 0).shape[-1],
        slots=state.slots,
        block=tiles.tile_size(state),
    )


def exact_inputs(x: Array, query: Query, positions: Array) -> tuple[Array, Array]:
    """Return rotated keys and values `[B, K, S, H]` of inputs `[B, 1, S, D]` at `positions`."""
    k, v = query.project_kv(x[:, 0])
    return headed(query, k, v, positions)


def headed(query: Query, k: Array, v: Array, positions: Array) -> tuple[Array, Array]:
    """Rotate keys `[B, S, K, H]`; return both kv-head major."""
    k = query.rotate(k, jnp.maximum(positions, 0))
    return jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)


def elements(stored: Any, dtype: Any = jnp.float32) -> Array:
    """Return the elements of a few rows, packed or plain."""
    if isinstance(stored, QTensor):
        stored = dequantize(stored)
    return stored.astype(dtype)
