# SPDX-License-Identifier: Apache-2.0
"""Scissorhands: drop tokens that stay unimportant, several at a time (arXiv 2305.17118).

A token is unimportant to a query that gives it less than 1/t, t being the tokens of the text so
far. Where a kv head is full, the tokens that were so to most of the last queries leave at once, so
that choosing is rare. Pick it as the baseline of "importance persists". Costs `history` bits per
token and kv head: one per query, in a ring.

Unconfirmed, as there is no published code: the defaults of `history` (400, here whole words),
`recent` and `drop`; 1/t as the threshold once tokens were dropped; for grouped queries, the mean of
a group's probabilities; prompts are reduced to the full budget, all layers have the same.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from sqzjax.checks import check_count
from sqzjax.kvcache.columns import Columns
from sqzjax.kvcache.evicting import EvictingCache, EvictingState
from sqzjax.typing import Array, Float, Int, PyTree


@dataclass(frozen=True, kw_only=True)
class Scissorhands(EvictingCache):
    """Keep the `recent` newest tokens; when full, drop a share `drop` of the `budget`.

    Tokens count as unimportant over the last `history` queries, a multiple of 32. Among equals the
    older goes first.
    """

    kind: Literal["scissorhands"] = "scissorhands"
    budget: int | float = 0.2
    recent: int = 10
    drop: float = 0.5
    history: int = 416

    def __post_init__(self) -> None:
        check_count("recent", self.recent, 1, "the token of the query itself is one of them")
        if not 0 < self.drop <= 1:
            raise ValueError(f"drop={self.drop} must be above 0 and at most 1: a share of budget")
        check_count("history", self.history, 1, "416 is usual")
        if self.history % 32:
            raise ValueError(
                f"history={self.history} must be a multiple of 32, which fill words of bits; use "
                f"{max(32, self.history // 32 * 32)}"
            )
        super().__post_init__()

    def newest(self, slots: int) -> int:
        return self.recent

    def remember(self, shape: tuple[int, ...]) -> PyTree:
        return {"below": jnp.zeros((*shape, self.history // 32), jnp.uint32)}

    def observe(self, memory: PyTree, seen: Columns) -> PyTree:
        positions = seen.positions
        uniform = 1.0 / jnp.maximum(positions + 1, 1).astype(jnp.float32)
        below = seen.seen & (jnp.mean(seen.weights, axis=2) < uniform[:, None, :, None])
        # Of queries that share a bit of the ring, the newest owns it.
        newest = jnp.max(positions, axis=1, keepdims=True)
        owner = (positions >= 0) & (positions > newest - self.history)
        place = jnp.maximum(positions, 0) % self.history
        bit = jnp.where(owner, jnp.uint32(1) << (place % 32).astype(jnp.uint32), 0)
        word = place[..., None] // 32 == jnp.arange(self.history // 32)
        bits = jnp.where(word, bit[..., None], 0).astype(jnp.uint32)
        # Bits of different queries differ: their sum is their union.
        clear = jnp.sum(bits, axis=1, dtype=jnp.uint32)[:, None, None]
        found = jnp.einsum("bkts,btw->bksw", below.astype(jnp.uint32), bits)
        return {"below": memory["below"] & ~clear | found}

    def worth(self, memory: PyTree, age: Int[Array, "B K S"]) -> Float[Array, "B K S"]:
        count = jnp.sum(jax.lax.population_count(memory["below"]), axis=-1)
        age = jnp.maximum(age, 0).astype(jnp.float32)
        return -(count.astype(jnp.float32) + age / (1 + age))

    def make_room(self, state: EvictingState, full: Array) -> EvictingState:
        slots = state.positions.shape[2]
        number = max(1, min(int(self.drop * slots), slots - self.recent))

        def empty(positions):
            order = self.ranked(state.memory, positions, state.length, slots)
            _, worst = jax.lax.top_k(-order, number)
            row, head = (jnp.arange(n) for n in positions.shape[:2])
            dropped = positions.at[row[:, None, None], head[:, None], worst].set(-1)
            return jnp.where(full[..., None], dropped, positions)

        positions = jax.lax.cond(jnp.any(full), empty, lambda x: x, state.positions)
        return replace(state, positions=positions)
