# SPDX-License-Identifier: Apache-2.0
"""Recompute only the tokens of a pass that have changed: the adaptive part of dLLM-Cache.

In a bidirectional model every committed token changes all others a little and few of them much.
A layer projects the values of all tokens of the pass, compares them with those it holds, and runs
attention and feed-forward for the share whose values differ most; the others take over what both
added to their residual stream when they were last run (arXiv 2506.06295). A pass then costs one
projection, a quarter of the rest and no fewer bytes of weights: for long answers, whose passes are
bound by compute. Beside keys and values it holds 2 D elements per token and layer.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp

from sqzjax.kvcache.base import Attended, AttentionSpec, KVCache, LayerParts
from sqzjax.kvcache.dense import Dense, DenseState
from sqzjax.typing import Array, Int, Leaf


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["held", "attended", "fed"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SimilarState:
    """Keys and values, and what each position's attention and feed-forward added last."""

    held: DenseState
    attended: Leaf  # B S D
    fed: Leaf  # B S D


@dataclass(frozen=True, kw_only=True)
class Similar(KVCache[SimilarState]):
    """Run `share` of the tokens of a pass in each layer, rounded up; 1 runs and records them all.

    Tokens that were never recorded count as zeros, so a pass over all must come first. States do
    not depend on `share`: passes over one state may differ in it.
    """

    share: float = 1.0
    dense: Dense = field(default_factory=Dense)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must lie in (0, 1]; 1 runs every token")

    def init(self, spec: AttentionSpec, batch: int) -> SimilarState:
        shape = (batch, spec.capacity, spec.model_dim)
        # Two arrays: one could not be donated twice.
        attended, fed = (jnp.zeros(shape, jnp.dtype(spec.dtype)) for _ in range(2))
        # A ring would not tell a token's values from those of the one that it overwrote.
        held = self.dense.init(replace(spec, window=None), batch)
        return SimilarState(held, attended, fed)

    def update(self, state, new):
        return replace(state, held=self.dense.update(state.held, new))

    def attend(self, state, query):
        part, held, carry = self.dense.attend(state.held, query)
        return Attended(part, replace(state, held=held), carry)

    def truncate(self, state: SimilarState, length: Int[Array, "B"]) -> SimilarState:
        return replace(state, held=self.dense.truncate(state.held, length))

    def lengths(self, state: SimilarState) -> Int[Array, "B"]:
        return self.dense.lengths(state.held)

    def layer(self, parts: LayerParts, x: Array, state: SimilarState):
        if self.share == 1:
            attended, state, carry = parts.attend(x, state, None)
            x = x + attended
            fed = parts.feed_forward(x)
            state = _record(state, parts.positions, attended=attended, fed=fed)
            return x + fed, state, carry
        index = self._changed(parts.values(x), state, parts.positions)
        positions = jnp.where(index >= 0, _rows(parts.positions, index), -1)
        attended, state, carry = parts.attend(_rows(x, index), state, index)
        state = _record(state, positions, attended=attended)
        x = x + _rows(state.attended, parts.positions)
        fed = parts.feed_forward(_rows(x, index))
        state = _record(state, positions, fed=fed)
        return x + _rows(state.fed, parts.positions), state, carry

    def _changed(self, values: Array, state: SimilarState, positions: Array) -> Array:
        """Return the rows `[B, n]` whose values have the lowest cosine to those held; -1 beyond.

        A sequence counts its own tokens: n is the share of the widest, the others run fewer.
        """
        at = jnp.maximum(positions, 0)[:, None, :, None]
        held = jnp.take_along_axis(state.held.v, at, axis=2)  # the pass, not the cache, is turned
        held = jnp.moveaxis(held, 1, 2).reshape(values.shape).astype(jnp.float32)
        fresh = values.astype(jnp.float32)
        norms = jnp.linalg.norm(held, axis=-1) * jnp.linalg.norm(fresh, axis=-1)
        cosine = jnp.sum(held * fresh, axis=-1) / jnp.maximum(norms, 1e-20)
        own = positions >= 0
        order = jnp.argsort(jnp.where(own, cosine, jnp.inf), axis=1)
        most = math.ceil(self.share * positions.shape[1])
        count = jnp.ceil(self.share * jnp.sum(own, axis=1, keepdims=True))
        return jnp.where(jnp.arange(most) < count, order[:, :most], -1)


def _rows(x: Array, index: Array) -> Array:
    """Return `x[b, index[b, i]]` of `[B, T, ...]`; any row where the index is negative."""
    index = jnp.maximum(index, 0).reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _record(state: SimilarState, positions: Array, **added: Array) -> SimilarState:
    """Write what was added to the residual stream of tokens at their positions; -1 drops."""
    rows = jnp.arange(positions.shape[0])[:, None]
    place = jnp.where(positions >= 0, positions, state.fed.shape[1])

    def put(buffer, new):
        return buffer.at[rows, place].set(new.astype(buffer.dtype), mode="drop")

    return replace(state, **{k: put(getattr(state, k), new) for k, new in added.items()})
