# SPDX-License-Identifier: Apache-2.0
"""Quest: page-wise sparse attention (arXiv 2406.10774), and the base of policies like it.

Keeps every key; at each step a query reads only the pages whose keys may score highest, by an
upper bound from the minimum and maximum of each page. Training-free; pick it for long contexts
(thousands of tokens) decoded at small batches, where reading the cache is what a step costs. A
step reads 1/page_size of the cache's bytes as bounds and `budget` tokens per query: several
queries at once (a block, a draft) read the union of their pages.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import round_up
from sqzjax.attention.partial import merge
from sqzjax.checks import check_count
from sqzjax.kvcache import pages
from sqzjax.kvcache.base import Attended, AttentionSpec, KVCache, NewTokens, Query, Storage
from sqzjax.kvcache.dense import Dense
from sqzjax.typing import Array, Int, Leaf


class Counts(NamedTuple):
    """Pages counted since the cache was made, each `B` int32, summed over kv heads."""

    read: Leaf  # gathered by sparse steps
    held: Leaf  # that the contexts of those steps held: read / held is the density
    dense: Leaf  # of the contexts of steps that read all of them, prompts apart


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "bounds", "counts", "memory"],
    meta_fields=[],
)
@dataclass(frozen=True)
class PagedState:
    """Invariant: bounds hold for every token of a page; they may be loose after a truncation."""

    tokens: Leaf  # DenseState; slots a multiple of the page size
    bounds: Leaf  # B K P 2 H: maximum and minimum of each page's keys
    counts: Leaf  # Counts
    memory: Leaf  # what the policy keeps between steps, or None


class Split(NamedTuple):
    """Where each row's newest block begins, and how many tokens are held before it (context)."""

    start: Array  # B
    prefix: Array  # B


@dataclass(frozen=True, kw_only=True)
class Paged(KVCache[PagedState]):
    """Base of policies that read chosen pages of an otherwise dense cache.

    `budget`: tokens of the context that each query chooses; the pages of the first and of the
    newest one are always among them. `dense_layers`: first layers that stay dense (they are hardly
    sparse, arXiv 2406.10774); 0 under a scan over layers. `dtype` None stores the dtype that the
    model computes in. New tokens of a row, and its queries, lie at consecutive positions.
    """

    budget: int = 1024
    page_size: int = 16
    dense_layers: int = 2
    dtype: Storage | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("page_size", self.page_size, 1, "16 is usual")
        check_count("dense_layers", self.dense_layers, 0)
        check_count("budget", self.budget, 1)
        if self.budget < 2 * self.page_size or self.budget % self.page_size:
            low = max(2, self.budget // self.page_size) * self.page_size
            raise ValueError(
                f"budget={self.budget} must be a multiple of page_size={self.page_size}, at least "
                f"two pages (the first and the newest); use {low} or {low + self.page_size}"
            )

    def layer_policy(self, index: int, num_layers: int) -> KVCache:
        return self._inner if index < self.dense_layers else self

    def init(self, spec: AttentionSpec, batch: int) -> PagedState:
        _check_window(spec.window)
        slots = round_up(spec.capacity, self.page_size)
        tokens = self._inner.init(replace(spec, capacity=slots), batch)
        tokens = replace(tokens, capacity=spec.capacity)
        shape = (batch, spec.num_kv_heads, slots // self.page_size, 2, spec.head_dim)
        counts = Counts(*(jnp.zeros(batch, jnp.int32) for _ in Counts._fields))
        bounds = jnp.zeros(shape, tokens.k.dtype)
        return PagedState(tokens, bounds, counts, self._remember(spec, batch))

    def update(self, state: PagedState, new: NewTokens) -> PagedState:
        tokens = self._inner.update(state.tokens, new)
        valid = (new.positions >= 0) & (new.positions < tokens.capacity)
        first = jnp.min(jnp.where(valid, new.positions, tokens.k.shape[2]), axis=1)
        bounds = pages.rebound(
            state.bounds, tokens, first, new.positions.shape[1], page_size=self.page_size
        )
        return self._forget(replace(state, tokens=tokens, bounds=bounds), first)

    def truncate(self, state: PagedState, length: Int[Array, "B"]) -> PagedState:
        tokens = self._inner.truncate(state.tokens, length)
        # A block that is undone altogether begins anew.
        return self._forget(replace(state, tokens=tokens), tokens.length - 1)

    def lengths(self, state: PagedState) -> Int[Array, "B"]:
        return state.tokens.length

    def report(self, state: PagedState) -> dict[str, int]:
        """Return the pages counted so far: `pages_read`, `pages_held` and `pages_dense`.

        `pages_read / pages_held` is the density of the sparse steps, all rows together.
        """
        host = jax.device_get(state.counts)
        return {f"pages_{name}": int(n.sum(dtype=int)) for name, n in host._asdict().items()}

    def bytes_read(self, state: PagedState, *, pages: int | float, block: int) -> dict[str, float]:
        """Return what a sparse step of one layer reads for one sequence, from shapes.

        `pages`: read in that step, summed over kv heads (as `pages_read` counts them). `block`:
        tokens attended to densely. "pages" and "block" are keys and values, "bounds" all of the
        metadata, "memory" what the policy keeps between steps.
        """
        batch, heads, _, width = state.tokens.k.shape
        row = 2.0 * width * state.tokens.k.dtype.itemsize
        return {
            "pages": pages * self.page_size * row,
            "bounds": state.bounds.nbytes / batch,
            "block": block * heads * row,
            "memory": sum(leaf.nbytes for leaf in jax.tree.leaves(state.memory)) / batch,
        }

    @property
    def _inner(self) -> Dense:
        return Dense(dtype=self.dtype)

    def _remember(self, spec: AttentionSpec, batch: int) -> Any:
        """Return the empty memory of the policy."""
        return None

    def _forget(self, state: PagedState, changed: Array) -> PagedState:
        """Drop what was computed from tokens at positions >= `changed` `[B]`."""
        return state

    def _attend_dense(self, state: PagedState, query: Query) -> Attended:
        return self._inner.attend(state.tokens, query)._replace(state=state)

    def _attend_chosen(self, state: PagedState, query: Query) -> Attended:
        """Attend every query to pages chosen now, and to the newest block."""
        split = split_context(state, query, self.page_size)
        asking = query.positions >= 0
        rule = {"page_size": self.page_size, "budget": self.budget}
        chosen = pages.select(state.bounds, query.q, asking, split.prefix, **rule)
        part = pages.attend_chosen(
            state.tokens, query, chosen, split.prefix, asking=asking, page_size=self.page_size
        )
        block = pages.attend_block(
            state.tokens, query, split.start, width=block_width(query, self.page_size)
        )
        read = jnp.sum(chosen.count, axis=1)
        state = count(state, split, self.page_size, jnp.any(asking, axis=1), read)
        return Attended(merge(part, block), state, query.carry)


@dataclass(frozen=True, kw_only=True)
class Quest(Paged):
    """Choose pages anew for every query, at every step.

    The newest block, causal: page, of each row is read densely, and the first `dense_layers` layers
    and prompts (more queries than a block or a page holds) attend to everything.
    """

    kind: Literal["quest"] = "quest"

    def attend(self, state: PagedState, query: Query) -> Attended:
        check_query(query)
        if is_long(query, self.page_size):
            return self._attend_dense(state, query)
        return self._attend_chosen(state, query)


def check_query(query: Query) -> None:
    """Raise ValueError for windows, and for masks whose contexts are not what is before a block."""
    _check_window(query.window)
    if query.mask.kind not in ("causal", "block_causal"):
        raise ValueError(
            f"mask.kind={query.mask.kind!r}: pages are chosen before the newest block, which needs "
            "a causal or block-causal model; use the dense cache"
        )


def _check_window(window: Any) -> None:
    if window is not None:
        raise ValueError(
            f"window={window}: pages are chosen from full contexts; use the dense cache, whose "
            "ring is small, for a model with sliding-window layers"
        )


def is_long(query: Query, page_size: int) -> bool:
    """Whether the queries read a prompt: they are more than a block (causal: a page) holds."""
    return query.q.shape[1] > _block_size(query, page_size)


def split_context(state: PagedState, query: Query, page_size: int) -> Split:
    """Return where each row's newest block begins; all its queries see what lies before.

    Block-causal: the block of the last query. Causal: the page of the first one. A row without
    queries has no context.
    """
    positions, last = query.positions, jnp.max(query.positions, axis=1)
    edge = last
    if query.mask.kind == "causal":
        edge = jnp.min(jnp.where(positions >= 0, positions, last[:, None]), axis=1)
    size = _block_size(query, page_size)
    start = jnp.maximum(edge // size * size, 0)
    return Split(start, jnp.minimum(start, state.tokens.length))


def block_width(query: Query, page_size: int) -> int:
    """Return how many positions, from the start of the newest block, its queries may see."""
    size = _block_size(query, page_size)
    return size if query.mask.kind == "block_causal" else size + query.q.shape[1] - 1


def count(
    state: PagedState,
    split: Split,
    page_size: int,
    rows: Array,
    read: Array | None = None,
) -> PagedState:
    """Count the pages that a step reads for the marked rows `[B]`: `read` `[B]`, None for all."""
    held = (split.prefix + page_size - 1) // page_size * state.bounds.shape[1]
    held = jnp.where(rows, held, 0)
    counts = state.counts
    if read is None:
        return replace(state, counts=counts._replace(dense=counts.dense + held))
    read = counts.read + jnp.where(rows, read, 0)
    counts = counts._replace(read=read, held=counts.held + held)
    return replace(state, counts=counts)


def _block_size(query: Query, page_size: int) -> int:
    return query.mask.block_size if query.mask.kind == "block_causal" else page_size
