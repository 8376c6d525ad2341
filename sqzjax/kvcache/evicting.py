# SPDX-License-Identifier: Apache-2.0
"""What evicting caches share: a fixed number of slots per kv head, and tokens that must leave them.

Tokens are kept whole or not at all. Every kv head keeps its own; a method says what it remembers
of a token's attention probabilities and which tokens it would rather keep. Memory and time per step
do not depend on the length of the text.

A token that enters a full cache takes the place of another, before it is attended to: a query sees
at most `budget` tokens, its own among them. Several new tokens at once (prompts, drafts) attend
exactly to what was held and to each other; then all are reduced to the slots.

Truncating forgets tokens at positions >= the length; what was evicted meanwhile does not come back,
so a rollback is exact as long as nothing was evicted. Tokens must come in order: whatever was held
at or after the first new position is forgotten.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.partials import fold, from_scores, unfold
from pallas_kernels.products import score_keys
from sqzjax.attention import dense
from sqzjax.attention.partial import Partial, merge
from sqzjax.kvcache.base import Attended, AttentionSpec, KVCache, NewTokens, Query
from sqzjax.kvcache.columns import Columns, columns, counted, observe_all, visible
from sqzjax.kvcache.slots import write
from sqzjax.typing import Array, Float, Int, Leaf, PyTree

_FEW = 64
"""Query rows per kv head up to which scores of all slots are formed at once."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "positions", "memory", "length"],
    meta_fields=["capacity"],
)
@dataclass(frozen=True)
class EvictingState:
    """Invariant: a position below `length` is held by at most one slot of a kv head."""

    k: Leaf  # B K S H, rotated
    v: Leaf  # B K S H
    positions: Leaf  # B K S int32, -1 for a free slot
    memory: Leaf  # leaves B K S ..., what the method remembers of each token
    length: Leaf  # B int32, of the text
    capacity: int  # of the text


class EvictingCache(KVCache[EvictingState]):
    """Base of the evicting caches; a subclass is a frozen dataclass that defines what is below."""

    budget: int | float = 0.2
    """Slots per kv head: above 1 in tokens, else a share of the capacity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        if self.budget > 1:
            self._check_newest(int(self.budget))

    @abstractmethod
    def remember(self, shape: tuple[int, ...]) -> PyTree:
        """Return the memory of new tokens `[B, K, S]`, leaves `[B, K, S, ...]`."""

    @abstractmethod
    def observe(self, memory: PyTree, seen: Columns) -> PyTree:
        """Return the memory of some slots after the probabilities of some more queries."""

    @abstractmethod
    def worth(self, memory: PyTree, age: Int[Array, "B K S"]) -> Float[Array, "B K S"]:
        """Return how much each token is worth: the least goes first. The newest is of age 0."""

    @abstractmethod
    def newest(self, slots: int) -> int:
        """Return how many of the newest tokens of the text never leave a cache of `slots`."""

    def make_room(self, state: EvictingState, full: Array) -> EvictingState:
        """Drop several tokens at once from the kv heads marked `full` `[B, K]`, or none."""
        return state

    def init(self, spec: AttentionSpec, batch: int) -> EvictingState:
        check_full(spec.window)
        slots = budget_slots(self.budget, spec.capacity)
        self._check_newest(slots, f" of capacity={spec.capacity}")
        shape = (batch, spec.num_kv_heads, slots)
        k = jnp.zeros((*shape, spec.head_dim), jnp.dtype(spec.dtype))
        free = jnp.full(shape, -1, jnp.int32)
        length = jnp.zeros(batch, jnp.int32)
        memory = self.remember(shape)
        return EvictingState(k, jnp.zeros_like(k), free, memory, length, spec.capacity)

    def _check_newest(self, slots: int, context: str = "") -> None:
        if self.newest(slots) >= slots:
            raise ValueError(
                f"budget={self.budget} is {slots} tokens{context}, of which the newest "
                f"{self.newest(slots)} never leave; use a larger budget"
            )

    def lengths(self, state: EvictingState) -> Int[Array, "B"]:
        return state.length

    def truncate(self, state: EvictingState, length: Int[Array, "B"]) -> EvictingState:
        held = state.positions < length[:, None, None]
        shorter = jnp.minimum(state.length, length).astype(jnp.int32)
        return replace(state, positions=jnp.where(held, state.positions, -1), length=shorter)

    def update(self, state: EvictingState, new: NewTokens) -> EvictingState:
        positions = valid_positions(new.positions, state.capacity)
        state = self.truncate(state, first_position(positions))
        if positions.shape[1] == 1:
            return self._insert_one(state, new, positions)
        shape = (*state.positions.shape[:2], positions.shape[1])
        return self._insert(state, new, positions, self.remember(shape))

    def extend(
        self,
        state: EvictingState,
        new: NewTokens,
        query: Query,
        attend_new: Callable[[], Partial],
    ) -> Attended:
        if new.positions.shape[1] == 1:
            return super().extend(state, new, query, attend_new)
        check_mask(query, self)
        positions = valid_positions(new.positions, state.capacity)
        state = self.truncate(state, first_position(positions))
        part = merge(_attend(state, query), attend_new())
        state = self._look(state, query, part.lse)
        k = jnp.moveaxis(new.k, 2, 1).astype(state.k.dtype)
        shape = k.shape[:3]
        held = jnp.broadcast_to(positions[:, None], shape)
        memory = observe_all(
            self.observe, self.remember(shape), partial(_rows, k), held, query, part.lse
        )
        return Attended(part, self._insert(state, new, positions, memory), query.carry)

    def attend(self, state: EvictingState, query: Query) -> Attended:
        check_mask(query, self)
        heads = state.k.shape[1]
        if query.q.shape[1] * query.q.shape[2] // heads > _FEW:
            part = _attend(state, query)
            state = self._look(state, counted(query, state.length), part.lse)
            return Attended(part, state, query.carry)
        scores = score_keys(fold(query.q.astype(state.k.dtype), heads), state.k) * query.scale
        seen = visible(state.positions, *query.span())
        rows = jnp.tile(seen, (1, 1, scores.shape[2] // seen.shape[2], 1))
        out, lse = from_scores(scores, rows, state.v)
        positions = counted(query, state.length).positions
        seen &= (positions >= 0)[:, None, :, None]
        memory = self.observe(state.memory, columns(scores, lse, seen, positions))
        part = Partial(*(unfold(x, query.q.shape[1]) for x in (out, lse)))
        return Attended(part, replace(state, memory=memory), query.carry)

    def _look(self, state: EvictingState, query: Query, lse: Array) -> EvictingState:
        """Let the method see the probabilities of the queries on all slots."""
        read = partial(_rows, state.k)
        memory = observe_all(self.observe, state.memory, read, state.positions, query, lse)
        return replace(state, memory=memory)

    def ranked(self, memory: PyTree, positions: Array, length: Array, slots: int) -> Array:
        """Return the worth of tokens: infinity for the newest, minus infinity for free slots."""
        age = length[:, None, None] - 1 - positions
        worth = jnp.where(age < self.newest(slots), jnp.inf, self.worth(memory, age))
        return jnp.where(positions >= 0, worth, -jnp.inf)

    def _insert_one(self, state: EvictingState, new: NewTokens, positions: Array) -> EvictingState:
        """Write one token per row into a free slot or that of the least token."""
        valid = positions >= 0
        full = jnp.all(state.positions >= 0, axis=2) & valid
        state = replace(state, length=jnp.maximum(state.length, positions[:, 0] + 1))
        state = self.make_room(state, full)
        slots = state.positions.shape[2]
        order = self.ranked(state.memory, state.positions, state.length, slots)
        slot = jnp.argmin(order, axis=2)[..., None]
        target = jnp.where(valid[:, None], slot, slots)
        return self._put(state, new, positions, self.remember(target.shape), target)

    def _insert(
        self, state: EvictingState, new: NewTokens, positions: Array, memory: PyTree
    ) -> EvictingState:
        """Keep the best of the held and the new tokens; those that stay do not move."""
        slots = state.positions.shape[2]
        length = jnp.maximum(state.length, jnp.max(positions, axis=1) + 1)
        shape = (*state.positions.shape[:2], positions.shape[1])
        line = jnp.concatenate(
            [state.positions, jnp.broadcast_to(positions[:, None], shape)], axis=2
        )
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), state.memory, memory)
        best, chosen = jax.lax.top_k(self.ranked(both, line, length, slots), slots)
        row, head = _indices(shape)
        keep = jnp.zeros(line.shape, bool).at[row, head, chosen].set(best > -jnp.inf)
        stays, enters = keep[..., :slots], keep[..., slots:]
        free = jnp.argsort(stays, axis=2, stable=True)
        place = jnp.maximum(jnp.cumsum(enters, axis=2) - 1, 0)
        target = jnp.where(enters, jnp.take_along_axis(free, place, axis=2), slots)
        left = jnp.where(stays, state.positions, -1)
        state = replace(state, positions=left, length=length)
        return self._put(state, new, positions, memory, target)

    def _put(
        self,
        state: EvictingState,
        new: NewTokens,
        positions: Array,
        memory: PyTree,
        target: Array,
    ) -> EvictingState:
        """Write tokens at the slots `target` `[B, K, T]`; those beyond the last are dropped."""
        held = jnp.broadcast_to(positions[:, None], target.shape)
        k, v = jnp.moveaxis(new.k, 2, 1), jnp.moveaxis(new.v, 2, 1)
        return replace(
            state,
            k=_write(state.k, k, target),
            v=_write(state.v, v, target),
            positions=_write(state.positions, held, target),
            memory=jax.tree.map(lambda a, b: _write(a, b, target), state.memory, memory),
        )


def check_budget(budget: int | float) -> None:
    """Raise ValueError unless a budget is a number of tokens or a share of the capacity."""
    tokens = math.isfinite(budget) and budget > 1 and budget == int(budget)
    if not tokens and not 0 < budget <= 1:
        raise ValueError(
            f"budget={budget} must be a number of tokens above 1, or a share of the capacity above "
            "0 and at most 1"
        )


def budget_slots(budget: int | float, capacity: int) -> int:
    """Return a budget, in tokens or as a share of the capacity, as tokens."""
    return min(capacity, int(budget) if budget > 1 else max(1, int(budget * capacity)))


def check_full(window: Any) -> None:
    """Raise ValueError for sliding-window layers."""
    if window is not None:
        raise ValueError(
            f"window={window}: tokens are chosen from full contexts; use kind='dense', whose ring "
            "is small, for a model with sliding-window layers"
        )


def check_mask(query: Query, policy: KVCache) -> None:
    """Raise ValueError for queries that a cache of chosen tokens cannot serve."""
    check_full(query.window)
    if query.mask.kind == "bidirectional":
        raise ValueError(
            f"cache kind={getattr(policy, 'kind', '')!r} chooses among tokens of the past; a "
            "bidirectional model needs kind='dense'"
        )


def valid_positions(positions: Int[Array, "B T"], capacity: int) -> Int[Array, "B T"]:
    """Return positions with -1 for all tokens that are dropped."""
    return jnp.where((positions >= 0) & (positions < capacity), positions, -1).astype(jnp.int32)


def first_position(positions: Int[Array, "B T"]) -> Int[Array, "B"]:
    """Return the lowest position that is not negative, the highest integer if there is none."""
    return jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), axis=1)


def _attend(state: EvictingState, query: Query) -> Partial:
    """Attend to all slots; heads become rows of the batch, as each holds other positions."""
    batch, heads, slots, width = state.k.shape
    length, group = query.q.shape[1], query.q.shape[2] // heads
    q = query.q.astype(state.k.dtype).reshape(batch, length, heads, group, width)
    held = state.positions
    if query.before is not None:
        held = jnp.where(held < query.before[:, None, None], held, -1)
    part = dense.attend(
        jnp.moveaxis(q, 2, 1).reshape(batch * heads, length, group, width),
        state.k.reshape(batch * heads, 1, slots, width),
        state.v.reshape(batch * heads, 1, slots, width),
        query_positions=jnp.repeat(query.positions, heads, axis=0),
        key_positions=held.reshape(batch * heads, slots),
        mask=query.mask,
        scale=query.scale,
    )

    def back(x):
        x = jnp.moveaxis(x.reshape(batch, heads, length, group, *x.shape[3:]), 1, 2)
        return x.reshape(batch, length, heads * group, *x.shape[4:])

    return Partial(back(part.out), back(part.lse))


def _rows(k: Array, start: Array, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(k, start, count, axis=2)


def _indices(shape: tuple[int, ...]) -> tuple[Array, Array]:
    return jnp.arange(shape[0])[:, None, None], jnp.arange(shape[1])[None, :, None]


def _write(buffer: Array, new: Array, target: Array) -> Array:
    """Write `new` `[B, K, T, ...]` at the slots `[B, K, T]` of `buffer` `[B, K, S, ...]`."""
    batch, heads, slots = buffer.shape[:3]
    rows, rest = batch * heads, buffer.shape[3:]
    target = target.reshape(rows, -1)
    flat = buffer.reshape(rows, 1, slots, *rest)
    flat = write(flat, new.reshape(rows, -1, 1, *rest), target, target < slots)
    return flat.reshape(buffer.shape)
