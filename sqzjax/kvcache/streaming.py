# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: the first tokens and a window of the newest (arXiv 2309.17453).

Nothing is scored: softmax needs somewhere to put its weight, and the first tokens of a text are
where models learnt to put it. Pick it for endless streams of which only the recent part matters; it
does not remember. Memory and time per step do not depend on the length of the text.

Positions are those within the cache, so that a model never meets a longer text than it was trained
on. Rotations are relative: between two tokens of the window the distance is that of the text, and
from the window to the first tokens it is shorter by what was dropped between them. So keys are kept
rotated, and the queries are turned anew for the first tokens alone; no key is rotated twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.common import round_up
from pallas_kernels.decode_attention import MAX_QUERIES, slot_positions
from sqzjax.attention import decode, dense
from sqzjax.attention.partial import Partial, merge
from sqzjax.checks import check_count
from sqzjax.kvcache.base import Attended, AttentionSpec, KVCache, NewTokens, Query
from sqzjax.kvcache.evicting import (
    budget_slots,
    check_budget,
    check_full,
    check_mask,
    first_position,
    valid_positions,
)
from sqzjax.kvcache.slots import write
from sqzjax.typing import Array, Int, Leaf

_ALIGNED = 8


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "window", "length", "dropped"],
    meta_fields=["capacity", "kept"],
)
@dataclass(frozen=True)
class StreamingState:
    """Invariant: of a text of `length` tokens, the first ones lie in `first`, then `dropped` are
    not to be seen, and the token of position p after them in slot (p - first) modulo the ring."""

    first: Leaf  # keys and values, B K sinks H
    window: Leaf  # keys and values, B K W H: a ring of `kept` tokens or a few more
    length: Leaf  # B int32, of the text
    dropped: Leaf  # B int32
    capacity: int  # of the text
    kept: int  # newest tokens that are seen


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(KVCache[StreamingState]):
    """Keep the first `sinks` tokens, and the newest in the rest of the `budget`.

    `budget`: above 1 in tokens, else a share of the capacity. `positions` "text" leaves them as
    they are in the text (for models that take any length).
    """

    kind: Literal["streaming_llm"] = "streaming_llm"
    budget: int | float = 0.2
    sinks: int = 4
    positions: Literal["slots", "text"] = "slots"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, 0)
        check_budget(self.budget)
        if self.budget > 1:
            self._check_window(int(self.budget))

    def init(self, spec: AttentionSpec, batch: int) -> StreamingState:
        check_full(spec.window)
        slots = budget_slots(self.budget, spec.capacity)
        self._check_window(slots, f" of capacity={spec.capacity}")

        def empty(tokens):
            shape = (batch, spec.num_kv_heads, tokens, spec.head_dim)
            return jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype)

        # What holds no multiple of 8 slots is copied at every step on a TPU.
        window = empty(round_up(slots - self.sinks, _ALIGNED))
        # Each in a buffer of its own, so that a step may take them over.
        length, dropped = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)
        kept = slots - self.sinks
        return StreamingState(empty(self.sinks), window, length, dropped, spec.capacity, kept)

    def _check_window(self, slots: int, context: str = "") -> None:
        if slots <= self.sinks:
            raise ValueError(
                f"budget={self.budget} is {slots} tokens{context}, which leaves no window beside "
                f"sinks={self.sinks}; use a larger budget"
            )

    def lengths(self, state: StreamingState) -> Int[Array, "B"]:
        return state.length

    def truncate(self, state: StreamingState, length: Int[Array, "B"]) -> StreamingState:
        shorter = jnp.minimum(state.length, length).astype(jnp.int32)
        dropped = jnp.minimum(state.dropped, jnp.maximum(shorter - self.sinks, 0))
        return replace(state, length=shorter, dropped=dropped)

    def update(self, state: StreamingState, new: NewTokens) -> StreamingState:
        positions = valid_positions(new.positions, state.capacity)
        state = self.truncate(state, first_position(positions))
        length = jnp.maximum(state.length, jnp.max(positions, axis=1) + 1)
        ring = state.window[0].shape[2]
        early = (positions >= 0) & (positions < self.sinks)
        # Of new tokens that share a slot only the newest may be written.
        late = (positions >= self.sinks) & (positions >= length[:, None] - state.kept)

        def put(buffers, slots, valid):
            if not buffers[0].shape[2]:
                return buffers
            return tuple(write(b, x, slots, valid) for b, x in zip(buffers, (new.k, new.v)))

        return StreamingState(
            put(state.first, positions, early),
            put(state.window, (positions - self.sinks) % ring, late),
            length,
            jnp.maximum(state.dropped, length - self.sinks - state.kept),
            state.capacity,
            state.kept,
        )

    def extend(
        self,
        state: StreamingState,
        new: NewTokens,
        query: Query,
        attend_new: Callable[[], Partial],
    ) -> Attended:
        if new.positions.shape[1] == 1:
            return super().extend(state, new, query, attend_new)
        # Several tokens attend to what was held before they take its place.
        held = self.truncate(state, first_position(valid_positions(new.positions, state.capacity)))
        part = merge(self.attend(held, query).partial, attend_new())
        return Attended(part, self.update(held, new), query.carry)

    def attend(self, state: StreamingState, query: Query) -> Attended:
        check_mask(query, self)
        zero = jnp.zeros_like(state.length)
        turned = query
        if self.positions == "slots":
            here = jnp.maximum(query.positions - state.dropped[:, None], 0)
            turned = query._replace(q=query.rotate(query.q_pre, here))
        parts = [self._attend(state, query, state.window, self.sinks, state.dropped)]
        if self.sinks:
            parts.append(self._attend(state, turned, state.first, 0, zero))
        return Attended(merge(*parts), state, query.carry)

    def _attend(
        self, state: StreamingState, query: Query, buffers, offset: int, skipped: Array
    ) -> Partial:
        """Attend to a ring of the tokens at positions `offset + skipped` and later."""
        k, v = buffers
        size = k.shape[2]
        count = jnp.maximum(state.length - offset, 0)
        if not offset:
            count = jnp.minimum(count, size)
        if query.q.shape[1] <= MAX_QUERIES:
            starts, limits = (bound - offset for bound in query.span())
            starts = jnp.maximum(starts, skipped[:, None])
            return decode.attend_span(query.q, k, v, count, starts, limits, scale=query.scale)
        held = slot_positions(count, size)
        positions = held + offset
        seen = (held >= 0) & (held >= skipped[:, None])
        if query.before is not None:
            seen &= positions < query.before[:, None]
        return dense.attend(
            query.q,
            k,
            v,
            query_positions=query.positions,
            key_positions=jnp.where(seen, positions, -1),
            mask=query.mask,
            scale=query.scale,
        )
