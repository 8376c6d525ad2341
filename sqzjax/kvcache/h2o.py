# SPDX-License-Identifier: Apache-2.0
"""H2O: keep heavy hitters and the newest tokens (arXiv 2306.14048).

A token's score is the sum of the probabilities that all queries so far gave it, those of the prompt
included, over the queries of its kv head. Pick it where what matters was attended to early: tokens
that a question asks for much later are lost for good. Costs one float per token and kv head.

The published method sizes both halves from the length of the prompt (10 % and 10 %) and counts the
token of the step beyond them; here slots are fixed when the cache is made, and count it.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from sqzjax.kvcache.columns import Columns
from sqzjax.kvcache.evicting import EvictingCache
from sqzjax.typing import Array, Float, Int, PyTree


@dataclass(frozen=True, kw_only=True)
class H2O(EvictingCache):
    """Keep a share `recent` of the `budget` for the newest tokens, the rest for heavy hitters."""

    kind: Literal["h2o"] = "h2o"
    budget: int | float = 0.2
    recent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.recent < 1:
            raise ValueError(
                f"recent={self.recent} must be at least 0 and below 1: the share of the budget "
                "that belongs to the newest tokens"
            )
        super().__post_init__()

    def newest(self, slots: int) -> int:
        return int(self.recent * slots)

    def remember(self, shape: tuple[int, ...]) -> PyTree:
        return {"sum": jnp.zeros(shape, jnp.float32)}

    def observe(self, memory: PyTree, seen: Columns) -> PyTree:
        return {"sum": memory["sum"] + jnp.sum(seen.weights, axis=(2, 3))}

    def worth(self, memory: PyTree, age: Int[Array, "B K S"]) -> Float[Array, "B K S"]:
        return memory["sum"]
