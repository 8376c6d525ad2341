# SPDX-License-Identifier: Apache-2.0
"""ALISA's sparse window attention: read the newest tokens and the lately heavy ones.

Of arXiv 2403.17312 only the choice of tokens, anew at every step; its tiers of memory are not here.
Every token stays, by choice as INT8 (a scale and an offset per token and kv head). A step reads the
sums of all tokens and `budget` keys and values. Pick it as the baseline that forgets nothing.

Unconfirmed, as there is no published code: how far back sums reach. Here each query shrinks them by
a share 1/n, n being the local tokens, which is the memory of about n queries. The paper codes
channels with fixed factors; here each token has its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.partials import fold, from_scores, unfold
from pallas_kernels.products import score_keys
from pallas_kernels.qtensor import QTensor, dequantize, rows_of
from pallas_kernels.quantized_decode_attention import quantized_decode_attention
from sqzjax.attention.partial import Partial, merge
from sqzjax.kvcache.base import Attended, AttentionSpec, KVCache, NewTokens, Query
from sqzjax.kvcache.columns import Columns, columns, counted, observe_all, visible
from sqzjax.kvcache.dense import Dense, DenseState
from sqzjax.kvcache.evicting import (
    budget_slots,
    check_budget,
    check_full,
    check_mask,
    first_position,
    valid_positions,
)
from sqzjax.kvcache.slots import write
from sqzjax.quant import Uniform
from sqzjax.typing import Array, Int, Leaf, PyTree

_INT8 = Uniform(bits=8)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "sums", "length"],
    meta_fields=["capacity", "budget"],
)
@dataclass(frozen=True)
class ALISAState:
    """The token of position p lies in slot p."""

    k: Leaf  # B K S H, rotated: an array or a QTensor
    v: Leaf
    sums: Leaf  # B K S float32, of the probabilities that recent queries gave
    length: Leaf  # B int32
    capacity: int
    budget: int  # tokens that a step reads


@dataclass(frozen=True, kw_only=True)
class ALISA(KVCache[ALISAState]):
    """Read a share `local` of the `budget` from the newest tokens, the rest by recent sums.

    `budget`: above 1 in tokens per kv head, else a share of the capacity. Several queries at once
    (prompts, drafts) read everything. `int8` keeps keys and values in 8 bits.
    """

    kind: Literal["alisa"] = "alisa"
    budget: int | float = 0.2
    local: float = 0.5
    int8: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        if not 0 < self.local <= 1:
            raise ValueError(f"local={self.local} must be above 0 and at most 1: a share of budget")

    def init(self, spec: AttentionSpec, batch: int) -> ALISAState:
        check_full(spec.window)
        shape = (batch, spec.num_kv_heads, spec.capacity, spec.head_dim)
        body = _INT8.empty(shape) if self.int8 else jnp.zeros(shape, spec.dtype)
        sums, zero = jnp.zeros(shape[:3], jnp.float32), jnp.zeros(batch, jnp.int32)
        budget = budget_slots(self.budget, spec.capacity)
        copy = jax.tree.map(jnp.copy, body)  # keys and values must not share a donated buffer
        return ALISAState(body, copy, sums, zero, spec.capacity, budget)

    def lengths(self, state: ALISAState) -> Int[Array, "B"]:
        return state.length

    def truncate(self, state: ALISAState, length: Int[Array, "B"]) -> ALISAState:
        return replace(state, length=jnp.minimum(state.length, length).astype(jnp.int32))

    def exact_new(self, tokens: int) -> bool:
        return self.int8 and tokens > 1

    def update(self, state: ALISAState, new: NewTokens) -> ALISAState:
        positions = valid_positions(new.positions, state.capacity)
        top = jnp.max(positions, axis=1) + 1

        def put(buffer, x):
            coded = _INT8.encode(x) if self.int8 else x
            place = partial(write, slots=positions, valid=positions >= 0)
            return jax.tree.map(lambda leaf, part: place(leaf, part), buffer, coded)

        nothing = jnp.zeros((*positions.shape, state.sums.shape[1]), jnp.float32)
        length = jnp.maximum(state.length, top)
        k, v, sums = put(state.k, new.k), put(state.v, new.v), state.sums
        sums = write(sums, nothing, positions, positions >= 0)
        return replace(state, k=k, v=v, sums=sums, length=length)

    def extend(
        self, state: ALISAState, new: NewTokens, query: Query, attend_new: Callable[[], Partial]
    ) -> Attended:
        if not self.exact_new(new.positions.shape[1]):
            return super().extend(state, new, query, attend_new)
        state = self.update(state, new)
        first = first_position(new.positions)
        part = merge(self._attend_all(state, query._replace(before=first)), attend_new())
        return Attended(part, self._look(state, query, part.lse), query.carry)

    def attend(self, state: ALISAState, query: Query) -> Attended:
        check_mask(query, self)
        if query.q.shape[1] > 1:
            part = self._attend_all(state, query)
            state = self._look(state, counted(query, state.length), part.lse)
            return Attended(part, state, query.carry)
        ids, seen = self._choose(state, query)
        heads = state.sums.shape[1]
        k, v = (_gathered(x, ids) for x in (state.k, state.v))
        scores = score_keys(fold(query.q.astype(k.dtype), heads), k) * query.scale
        out, lse = from_scores(scores, seen, v)
        at = counted(query, state.length).positions
        seen &= (at >= 0)[:, None, :, None]
        row, head = jnp.arange(len(at))[:, None, None], jnp.arange(heads)[:, None]
        given = jnp.sum(columns(scores, lse, seen, at).weights, axis=(2, 3))
        shrink = jnp.where(at >= 0, 1 - 1 / self._local(state), 1.0)[..., None]
        sums = (state.sums * shrink).at[row, head, ids].add(given)
        part = Partial(unfold(out, 1), unfold(lse, 1))
        return Attended(part, replace(state, sums=sums), query.carry)

    def _local(self, state: ALISAState) -> int:
        return max(1, int(self.local * state.budget))

    def _choose(self, state: ALISAState, query: Query) -> tuple[Array, Array]:
        """Return the slots `[B, K, budget]` that a step reads, and which of them its query sees."""
        slots = jnp.arange(state.sums.shape[2], dtype=jnp.int32)
        usable = visible(slots[None, None], *query.span())[:, 0]
        usable &= slots < state.length[:, None, None]
        newest = slots >= (query.positions + 1 - self._local(state))[..., None]
        worth = jnp.where(newest, jnp.inf, state.sums)
        best, ids = jax.lax.top_k(jnp.where(usable, worth, -jnp.inf), state.budget)
        return ids, (best > -jnp.inf)[:, :, None]

    def _attend_all(self, state: ALISAState, query: Query) -> Partial:
        starts, limits = query.span()
        if self.int8:
            limits = jnp.minimum(limits, state.length[:, None])
            rows = {"length": state.length, "starts": starts, "limits": limits}
            return quantized_decode_attention(query.q, state.k, state.v, **rows, scale=query.scale)
        tokens = DenseState(state.k, state.v, state.length, state.capacity)
        return Dense().attend(tokens, query).partial

    def _look(self, state: ALISAState, query: Query, lse: Array) -> ALISAState:
        """Add the probabilities of the queries to the sums of all tokens."""
        total = state.sums.shape[2]
        slots = jnp.arange(total, dtype=jnp.int32)
        held = jnp.where(slots < state.length[:, None], slots, -1)[:, None]
        shrink = 1 - 1 / self._local(state)

        def read(start, count):
            if isinstance(state.k, QTensor):
                return dequantize(rows_of(state.k, start, count, total))
            return jax.lax.dynamic_slice_in_dim(state.k, start, count, axis=2)

        end = jnp.max(state.length)
        add = partial(_add, shrink)
        sums = observe_all(add, state.sums, read, held, query, lse, end=end)
        return replace(state, sums=sums)


def _add(shrink: float, sums: Array, seen: Columns) -> Array:
    """Return sums that shrink with every query and grow by its probabilities."""
    asks = seen.positions >= 0
    later = jnp.cumsum(asks[:, ::-1], axis=1)[:, ::-1] - asks  # queries after each one
    weights = jnp.einsum("bkgts,bt->bks", seen.weights, shrink**later)
    count = jnp.sum(asks, axis=1)[:, None, None]
    return sums * shrink**count + weights


def _gathered(buffer: PyTree, ids: Array) -> Array:
    """Return the rows `[B, K, n, H]` of an array or a QTensor at `ids` `[B, K, n]`."""
    take = jax.vmap(jax.vmap(lambda leaf, ids: leaf[ids]))
    chosen = jax.tree.map(lambda leaf: take(leaf, ids), buffer)
    return dequantize(chosen) if isinstance(chosen, QTensor) else chosen
