# SPDX-License-Identifier: Apache-2.0
"""LoSA: locality-aware sparse attention of block diffusion models (arXiv 2604.12056).

While a block is denoised its context is frozen, so the attention of a token to the context changes
only with the token's query, and few queries change between steps. The first step of a block is
dense; later ones recompute the context's part for the few tokens whose queries moved most, over
pages chosen as Quest does, and reuse it for the others. The block itself is always read densely and
merged exactly. Training-free; pick it for the exact cache of block-causal models (SDAR) and
thousands of tokens of context; under 1,000 it gains nothing. A step reads the bounds of all pages
and the union of the pages of `active_tokens` queries instead of a whole block's.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from sqzjax.attention.partial import Partial, merge
from sqzjax.checks import check_count
from sqzjax.kvcache import pages
from sqzjax.kvcache.base import Attended, AttentionSpec, Query
from sqzjax.kvcache.quest import (
    Paged,
    PagedState,
    Split,
    block_width,
    check_query,
    count,
    is_long,
    split_context,
)
from sqzjax.typing import Array, Bool, Leaf


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["start", "positions", "q", "out", "lse"],
    meta_fields=[],
)
@dataclass(frozen=True)
class BlockMemory:
    """The block being denoised: attention of its W queries to the tokens before `start`.

    Invariant: `out` and `lse` belong to the tokens 0 .. start - 1 as the cache holds them; a row
    whose `start` is -1 has no block.
    """

    start: Leaf  # B int32
    positions: Leaf  # B W int32: of the queries, -1 for none
    q: Leaf  # B W N H: reference queries
    out: Leaf  # B W N H float32, normalised
    lse: Leaf  # B W N float32


@dataclass(frozen=True, kw_only=True)
class LoSA(Paged):
    """Recompute the context's attention of a block's most changed tokens only.

    `active_tokens` of a block are recomputed in a step, those with the largest mean squared change
    of the rotated query since the previous step (`reference` "last") or since their part was
    computed ("computed", which bounds the drift of slowly changing tokens). `block_size`: tokens
    of a block that can be remembered, at least the model's. A token that was just committed is
    recognised by its change alone: steps must fill no more than `active_tokens`, or what the others
    ask for is missed (README). Truncating to a block's start makes its next pass a dense one,
    as the decoder does before the pass that leaves a finished block's keys. Causal models have no
    block to reuse: they decode as with `Quest`.
    """

    kind: Literal["losa"] = "losa"
    active_tokens: int = 8
    reference: Literal["last", "computed"] = "last"
    block_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("active_tokens", self.active_tokens, 0, "8 of a block of 16 are usual")
        check_count("block_size", self.block_size, 1, "16 is usual")

    def attend(self, state: PagedState, query: Query) -> Attended:
        check_query(query)
        if is_long(query, self.page_size):
            return self._attend_dense(state, query)
        if query.mask.kind == "causal":
            return self._attend_chosen(state, query)
        if query.mask.block_size > self.block_size:
            raise ValueError(
                f"block_size={self.block_size} of the cache must be at least the model's, "
                f"{query.mask.block_size}"
            )
        split = split_context(state, query, self.page_size)
        asking = query.positions >= 0
        fresh = jnp.any(asking, axis=1) & ~_is_remembered(state.memory, query, split)
        state = self._open(state, query, split, fresh)
        state = self._recompute(state, query, split, asking & ~fresh[:, None])
        length = query.q.shape[1]
        part = Partial(state.memory.out[:, :length], state.memory.lse[:, :length])
        part = pages.only(part, asking)
        width = block_width(query, self.page_size)
        block = pages.attend_block(state.tokens, query, split.start, width=width)
        return Attended(merge(part, block), state, query.carry)

    def _open(self, state: PagedState, query: Query, split: Split, fresh: Array) -> PagedState:
        """Attend to all of the context of the rows that begin a block, and remember that."""
        memory, tokens = state.memory, state.tokens
        asking = fresh[:, None] & (query.positions >= 0)

        def read():
            part = pages.attend_prefix(tokens, query, split.prefix, asking=asking)
            return _keep(memory.out, part.out, asking), _keep(memory.lse, part.lse, asking)

        out, lse = jax.lax.cond(jnp.any(fresh), read, lambda: (memory.out, memory.lse))
        positions = _padded(query.positions, self.block_size)
        memory = BlockMemory(
            start=jnp.where(fresh, split.start, memory.start),
            positions=jnp.where(fresh[:, None], positions, memory.positions),
            q=_keep(memory.q, query.q, asking),
            out=out,
            lse=lse,
        )
        return count(replace(state, memory=memory), split, self.page_size, fresh)

    def _recompute(
        self, state: PagedState, query: Query, split: Split, asking: Bool[Array, "B T"]
    ) -> PagedState:
        """Attend the most changed of the `asking` tokens to pages chosen by all of them."""
        memory, tokens, length = state.memory, state.tokens, query.q.shape[1]
        rows, number = jnp.any(asking, axis=1), min(self.active_tokens, length)
        read = jnp.zeros_like(split.start)
        active = jnp.zeros(asking.shape, bool)
        if number:
            place = _most_changed(query.q, memory.q[:, :length], asking, number)
            moved = jnp.take_along_axis(asking, place, axis=1)
            q = jnp.take_along_axis(query.q, place[..., None, None], axis=1)
            place = jnp.where(moved, place, self.block_size)
            row = jnp.arange(len(rows))[:, None]
            active = active.at[row, place].set(True, mode="drop")

            def attend():
                rule = {"page_size": self.page_size, "budget": self.budget}
                chosen = pages.select(state.bounds, q, moved, split.prefix, **rule)
                part = pages.attend_chosen(
                    tokens,
                    query._replace(q=q),
                    chosen,
                    split.prefix,
                    asking=moved,
                    page_size=self.page_size,
                )
                out = memory.out.at[row, place].set(part.out, mode="drop")
                lse = memory.lse.at[row, place].set(part.lse, mode="drop")
                return out, lse, jnp.sum(chosen.count, axis=1)

            out, lse, read = jax.lax.cond(
                jnp.any(rows), attend, lambda: (memory.out, memory.lse, read)
            )
            memory = replace(memory, out=out, lse=lse)
        renewed = asking if self.reference == "last" else active
        memory = replace(memory, q=_keep(memory.q, query.q, renewed))
        return count(replace(state, memory=memory), split, self.page_size, rows, read)

    def _remember(self, spec: AttentionSpec, batch: int) -> BlockMemory:
        shape = (batch, self.block_size, spec.num_heads, spec.head_dim)
        part = pages.nothing(shape)
        return BlockMemory(
            start=jnp.full(batch, -1, jnp.int32),
            positions=jnp.full(shape[:2], -1, jnp.int32),
            q=jnp.zeros(shape, jnp.dtype(spec.dtype)),
            out=part.out,
            lse=part.lse,
        )

    def _forget(self, state: PagedState, changed: Array) -> PagedState:
        memory = state.memory
        start = jnp.where(changed < memory.start, -1, memory.start)
        return replace(state, memory=replace(memory, start=start))


def _is_remembered(memory: BlockMemory, query: Query, split: Split) -> Array:
    """Return which rows `[B]` ask for the block, and at the positions, that they remember."""
    positions = _padded(query.positions, memory.positions.shape[1])
    same = jnp.all(memory.positions == positions, axis=1)
    return same & (memory.start == split.start)


def _most_changed(q: Array, reference: Array, asking: Array, number: int) -> Array:
    """Return the places `[B, number]` of the asking tokens whose query moved most."""
    moved = q.astype(jnp.float32) - reference.astype(jnp.float32)
    change = jnp.mean(jnp.square(moved), axis=(2, 3))
    return jax.lax.top_k(jnp.where(asking, change, -1.0), number)[1]


def _padded(positions: Array, width: int) -> Array:
    return jnp.pad(positions, ((0, 0), (0, width - positions.shape[1])), constant_values=-1)


def _keep(old: Array, new: Array, renewed: Array) -> Array:
    """Replace the first tokens of `old` `[B, W, ...]` by `new` `[B, T, ...]` where `renewed`."""
    length = new.shape[1]
    mask = renewed.reshape(*renewed.shape, *(1,) * (new.ndim - 2))
    return old.at[:, :length].set(jnp.where(mask, new.astype(old.dtype), old[:, :length]))
