# SPDX-License-Identifier: Apache-2.0
"""The uncompressed cache: keys and values as they are, kv-head major (`B K S H`).

The exact baseline of every other method. Sliding-window layers keep a true ring: window + max_new
slots whatever the context. Cost per token and layer: 2 K H elements.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import slot_positions
from sqzjax.attention import decode, dense
from sqzjax.kvcache.base import (
    Attended,
    AttentionSpec,
    KVCache,
    NewTokens,
    Query,
    Ring,
    Storage,
)
from sqzjax.kvcache.slots import write
from sqzjax.typing import Array, Int, Leaf


@partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "length"], meta_fields=["capacity"]
)
@dataclass(frozen=True)
class DenseState:
    """Invariant: the token of position p, if held, lies in slot p modulo the number of slots."""

    k: Leaf  # B K S H, rotated
    v: Leaf  # B K S H
    length: Leaf  # B, int32: one more than the highest position written
    capacity: int  # tokens accepted; more than S slots where the storage is a ring


@dataclass(frozen=True, kw_only=True)
class Dense(KVCache[DenseState]):
    """Keep every key and value. `dtype` None stores the dtype that the model computes in."""

    kind: Literal["dense"] = "dense"
    dtype: Storage | None = None

    def init(self, spec: AttentionSpec, batch: int) -> DenseState:
        slots = spec.capacity
        if spec.window is not None:
            # Older keys that the first of max_new queries still sees must survive their writing.
            slots = min(slots, spec.window + spec.max_new)
        shape = (batch, spec.num_kv_heads, slots, spec.head_dim)
        dtype = jnp.dtype(self.dtype or spec.dtype)
        length = jnp.zeros(batch, jnp.int32)
        return DenseState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), length, spec.capacity)

    def update(self, state: DenseState, new: NewTokens) -> DenseState:
        valid = (new.positions >= 0) & (new.positions < state.capacity)
        slots = new.positions % state.k.shape[2]
        top = jnp.max(jnp.where(valid, new.positions + 1, 0), axis=1)
        return DenseState(
            write(state.k, new.k, slots, valid),
            write(state.v, new.v, slots, valid),
            jnp.maximum(state.length, top.astype(jnp.int32)),
            state.capacity,
        )

    def attend(self, state: DenseState, query: Query) -> Attended:
        keys = {"k": state.k, "v": state.v, "query_positions": query.positions}
        rule = {"mask": query.mask, "window": query.window, "scale": query.scale}
        if query.q.shape[1] <= decode.MAX_QUERIES:
            part = decode.attend(query.q, **keys, **rule, length=state.length)
        else:
            held = slot_positions(state.length, state.k.shape[2])
            part = dense.attend(query.q, **keys, **rule, key_positions=held)
        return Attended(part, state, query.carry)

    def ring(self, state: DenseState, window: int | None) -> Ring | None:
        slots = state.k.shape[-2]
        if window is None or slots >= state.capacity:
            return None
        return Ring(slots, slots - (window - 1))  # the first query sees itself and window - 1 more

    def truncate(self, state: DenseState, length: Int[Array, "B"]) -> DenseState:
        shorter = jnp.minimum(state.length, length).astype(jnp.int32)
        return DenseState(state.k, state.v, shorter, state.capacity)

    def lengths(self, state: DenseState) -> Int[Array, "B"]:
        return state.length
