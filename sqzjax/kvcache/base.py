# SPDX-License-Identifier: Apache-2.0
"""The cache seam: a frozen policy, a pytree state, pure functions between them.

A policy describes one layer. It is handed everything a method could want to keep (`NewTokens`:
rotated and pre-rotation keys, values, the layer's input) or to ask with (`Query`); under jit the
unused parts cost nothing. `attend` yields a `Partial`, so a cache may be built of caches, merged.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.rotary import Rotary
from sqzjax.attention.mask import Mask
from sqzjax.attention.partial import Partial, merge
from sqzjax.checks import check_literals
from sqzjax.typing import Array, Int, PyTree

S = TypeVar("S")

Storage = Literal["float32", "bfloat16", "float16"]
"""Types of elements that are stored as they are: those that attention reads."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer's cache must hold; static.

    `capacity` is in tokens per sequence. `max_new` is the most tokens that one update writes and
    also the deepest rollback that a ring (`window` set) must survive.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_dim: int
    capacity: int
    max_new: int
    window: int | None = None
    dtype: str = "float32"


class NewTokens(NamedTuple):
    """Tokens entering one layer's cache.

    `positions` says where each token belongs; -1 drops it (padding, finished rows). Positions at
    or beyond the capacity are dropped too: callers check lengths on the host first. `carry` is
    the value the layer below handed up (`KVCache.init_carry`), `fitted` what `KVCache.fit` made
    for this layer.
    """

    k: Array  # B T K H, rotated
    v: Array  # B T K H
    k_pre: Array  # B T K H, before rotation, after QK-norm
    x: Array  # B T D, the normed input of the layer's projections
    positions: Array  # B T
    carry: PyTree = None
    fitted: PyTree = None


class Query(NamedTuple):
    """Queries of one layer and what their attention needs.

    `window` is None, a static int, or a traced scalar where layers differ under a scan.
    `project_kv(x)` gives (k_pre, v) of layer inputs and `rotate(k, positions)` rotates keys, for
    caches that rebuild them; `rotary` is that rotation as the kernels know it. `finish_kv(k, v)`
    adds biases and QK-norm to bare products `[..., K, H]` of inputs and kernels; None where there
    are none. Where `before` `[B]` is given, only tokens at lower positions are asked for.
    """

    q: Array  # B T N H, rotated
    q_pre: Array  # B T N H, before rotation
    positions: Array  # B T
    mask: Mask
    window: Any
    scale: float
    project_kv: Callable[[Array], tuple[Array, Array]]
    rotate: Callable[[Array, Array], Array]
    rotary: Rotary | None = None
    finish_kv: Callable[[Array, Array], tuple[Array, Array]] | None = None
    before: Array | None = None
    carry: PyTree = None
    fitted: PyTree = None

    def span(self) -> tuple[Array, Array]:
        """Return the first position that each query asks for and the one after the last, `B T`."""
        starts, limits = self.mask.span(self.positions, self.window)
        if self.before is not None:
            limits = jnp.minimum(limits, self.before[:, None])
        return starts, limits


class LayerWeights(NamedTuple):
    """What `fit` may look at: one layer's projections `[D, K H]` and where the layer stands."""

    index: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    k: Array
    v: Array
    fingerprint: str  # of the whole model


class LayerParts(NamedTuple):
    """What a decoder layer is made of, with its norms; functions of the residual stream `x`.

    `attend(x, state, rows)` returns what attention adds to the stream, the new state and the value
    for the layer above; with `rows` `[B, n]`, `x` is that of those tokens of the pass (-1: none).
    """

    attend: Callable[[Array, Any, Array | None], tuple[Array, Any, PyTree]]
    feed_forward: Callable[[Array], Array]
    values: Callable[[Array], Array]  # B T K*H
    positions: Array  # B T

    def run(self, x: Array, state: Any) -> tuple[Array, Any, PyTree]:
        """Return the residual stream above the layer, the new state, the value handed up."""
        attended, state, carry = self.attend(x, state, None)
        x = x + attended
        return x + self.feed_forward(x), state, carry


class Attended(NamedTuple):
    """Result of `attend`: the partial attention, the new state, the value for the layer above."""

    partial: Partial
    state: Any
    carry: PyTree = None


class Ring(NamedTuple):
    """How many tokens a call may write where they take the place of older ones.

    Calls are exact that write `most` tokens or fewer, or whose tokens end before position `first`.
    """

    first: int
    most: int


class KVCache(ABC, Generic[S]):
    """Policy of one layer's cache: a frozen, hashable dataclass with pure methods.

    States are pytrees whose array leaves have the batch on axis 0.
    """

    def __post_init__(self) -> None:
        check_literals(self)

    @abstractmethod
    def init(self, spec: AttentionSpec, batch: int) -> S:
        """Return the empty state for `batch` sequences."""

    @abstractmethod
    def update(self, state: S, new: NewTokens) -> S:
        """Write tokens at their positions: append, or overwrite; the length never shrinks."""

    @abstractmethod
    def attend(self, state: S, query: Query) -> Attended:
        """Attend the queries to the cached tokens."""

    def extend(
        self, state: S, new: NewTokens, query: Query, attend_new: Callable[[], Partial]
    ) -> Attended:
        """Write new tokens, attend to them and to what was held: the step of a layer.

        `attend_new` attends to the new tokens as they came, apart from the cache. Methods that
        must see prompts before they reduce them override this.
        """
        state = self.update(state, new)
        if not self.exact_new(new.positions.shape[1]):
            return self.attend(state, query)
        last = jnp.iinfo(jnp.int32).max
        first = jnp.min(jnp.where(new.positions >= 0, new.positions, last), axis=1)
        held, state, carry = self.attend(state, query._replace(before=first))
        return Attended(merge(held, attend_new()), state, carry)

    def layer(self, parts: LayerParts, x: Array, state: S) -> tuple[Array, S, PyTree]:
        """Run a whole layer; methods that skip the work of some tokens override this."""
        return parts.run(x, state)

    @abstractmethod
    def truncate(self, state: S, length: Int[Array, "B"]) -> S:
        """Forget tokens at positions >= `length` (speculative rollback); longer is a no-op."""

    @abstractmethod
    def lengths(self, state: S) -> Int[Array, "B"]:
        """Return the number of tokens that each sequence holds."""

    def reorder(self, state: S, rows: Int[Array, "B2"]) -> S:
        """Fork, drop and permute sequences: row i of the result is row `rows[i]`."""
        return jax.tree.map(lambda leaf: leaf[rows], state)

    def nbytes(self, state: S) -> int:
        """Return the bytes that the state's arrays occupy, from their shapes."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    def report(self, state: S) -> dict[str, int]:
        """Return, on the host, counts that the method kept; those of layers may be added up."""
        return {}

    def fit(self, layer: LayerWeights) -> PyTree:
        """Return the arrays that the method needs beside a layer's parameters, None for most.

        Runs once, on the host. They travel with the parameters and arrive as `fitted`.
        """
        return None

    def exact_new(self, tokens: int) -> bool:
        """Whether `tokens` new tokens are to be attended to as they came, apart from the cache.

        Methods that lose precision say yes for prompts, whose own keys and values are at hand.
        """
        return False

    def ring(self, state: S, window: int | None) -> Ring | None:
        """Return what a call may write in a layer of that window; None for any number of tokens."""
        return None

    def init_carry(self, state: S) -> PyTree:
        """Return what the first layer, whose state is given, receives as `carry`."""
        return None

    def layer_policy(self, index: int, num_layers: int) -> "KVCache":
        """Return the policy of one layer, for methods whose settings differ between layers."""
        return self
