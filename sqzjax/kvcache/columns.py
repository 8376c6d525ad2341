# SPDX-License-Identifier: Apache-2.0
"""Attention probabilities as methods that judge tokens by them want to see them: by column.

Attention itself never forms the matrix of probabilities. A second pass recomputes it from the
log-sum-exps, p = exp(qk - lse), one tile of queries and slots at a time, and hands each tile to the
method. It costs one more product of queries and keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import round_up
from pallas_kernels.partials import fold
from pallas_kernels.products import score_keys
from sqzjax.kvcache.base import Query
from sqzjax.typing import Array, Bool, Float, Int, PyTree

SLOTS = 512
QUERIES = 64
"""The tile."""


class Columns(NamedTuple):
    """Probabilities of T queries on s slots; zero where a query does not see a slot."""

    weights: Array  # B K G T s, float32
    seen: Array  # B K T s
    positions: Array  # B T, of the queries; -1 for those that do not count


Observe = Callable[[PyTree, Columns], PyTree]
"""Return what a method remembers of s slots, leaves `[B, K, s, ...]`, after some more queries."""


def visible(
    positions: Int[Array, "#B #K S"], starts: Int[Array, "B T"], limits: Int[Array, "B T"]
) -> Bool[Array, "B #K T S"]:
    """Return which slots each query sees, by the positions that they hold (per kv head)."""
    held = positions[:, :, None]
    starts, limits = starts[:, None, :, None], limits[:, None, :, None]
    return (held >= 0) & (held >= starts) & (held < limits)


def counted(query: Query, length: Int[Array, "B"]) -> Query:
    """Return the queries with -1 as the position of those whose own token is not held.

    They are passes that store nothing, of a diffusion model for instance.
    """
    held = query.positions < length[:, None]
    return query._replace(positions=jnp.where(held, query.positions, -1))


def observe_all(
    observe: Observe,
    memory: PyTree,
    read: Callable[[Array, int], Array],
    positions: Int[Array, "B #K S"],
    query: Query,
    lse: Float[Array, "B T N"],
    *,
    end: Int[Array, ""] | int | None = None,
) -> PyTree:
    """Let a method see the queries' probabilities on all slots and return what it remembers then.

    `read(start, count)` gives the keys `[B, K, count, H]` of slots; `positions` says what slots
    hold; `memory` has leaves `[B, K, S, ...]`. Slots from `end` on are left out.
    """
    slots = positions.shape[2]
    tile = min(SLOTS, slots)
    queries = _query_tiles(query, lse)

    def visit(index, memory):
        start = jnp.minimum(index * tile, slots - tile)

        def cut(leaf):
            return jax.lax.dynamic_slice_in_dim(leaf, start, tile, axis=2)

        keys, held = read(start, tile), cut(positions)
        # The last tile may reach back into the one before it, which has been seen.
        fresh = start + jnp.arange(tile) >= index * tile

        def look(memory, one):
            return observe(memory, _columns(one, keys, held, query)), None

        def put(leaf, new):
            new = jnp.where(fresh.reshape(-1, *(1 for _ in leaf.shape[3:])), new, cut(leaf))
            return jax.lax.dynamic_update_slice_in_dim(leaf, new, start, axis=2)

        seen, _ = jax.lax.scan(look, jax.tree.map(cut, memory), queries)
        return jax.tree.map(put, memory, seen)

    end = slots if end is None else end
    return jax.lax.fori_loop(0, (end + tile - 1) // tile, visit, memory)


class _QueryTile(NamedTuple):
    q: Array  # B T N H
    lse: Array  # B T N
    positions: Array  # B T
    starts: Array
    limits: Array


def _query_tiles(query: Query, lse: Array) -> _QueryTile:
    """Return the queries in tiles on a leading axis; the last one is filled with padding."""
    length = query.q.shape[1]
    tile = min(QUERIES, length)
    extra = round_up(length, tile) - length

    def split(x, fill):
        x = jnp.pad(x, [(0, extra if axis == 1 else 0) for axis in range(x.ndim)], "constant",
                    constant_values=fill)  # fmt: skip
        return jnp.moveaxis(x.reshape(x.shape[0], -1, tile, *x.shape[2:]), 1, 0)

    starts, limits = query.span()
    parts = (query.q, 0), (lse, 0), (query.positions, -1), (starts, 0), (limits, 0)
    return _QueryTile(*(split(x, fill) for x, fill in parts))


def _columns(tile: _QueryTile, keys: Array, held: Array, query: Query) -> Columns:
    heads = keys.shape[1]
    seen = visible(held, tile.starts, tile.limits)
    scores = score_keys(fold(tile.q.astype(keys.dtype), heads), keys) * query.scale
    return columns(scores, fold(tile.lse, heads), seen, tile.positions)


def columns(
    scores: Float[Array, "B K R S"],
    lse: Float[Array, "B K R"],
    seen: Bool[Array, "B #K T S"],
    positions: Int[Array, "B T"],
) -> Columns:
    """Return probabilities from scaled scores and log-sum-exps of folded rows (R = G T)."""
    grouped = (*scores.shape[:2], -1, positions.shape[1])
    weights = jnp.exp(scores - lse[..., None]).reshape(*grouped, scores.shape[-1])
    return Columns(jnp.where(seen[:, :, None], weights, 0.0), seen, positions)
