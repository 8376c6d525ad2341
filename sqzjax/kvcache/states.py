# SPDX-License-Identifier: Apache-2.0
"""The caches of a whole model: one state per layer, or one stacked state under a layer scan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sqzjax.kvcache.base import AttentionSpec, KVCache, Ring
from sqzjax.typing import Array, Int, Leaf, PyTree


@partial(jax.tree_util.register_dataclass, data_fields=["states"], meta_fields=["policies"])
@dataclass(frozen=True)
class CacheStates:
    """States of all layers with their policies.

    Unrolled: `states` is a tuple with one state per layer and `policies` has the same length.
    Stacked: `states` is one state whose leaves lead with the layer axis, `policies` has one entry
    and `num_stacked` layers share it.
    """

    states: Leaf
    policies: tuple[KVCache, ...]

    @property
    def stacked(self) -> bool:
        """Whether the layers' states are stacked on axis 0."""
        return not isinstance(self.states, tuple)

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens that each sequence holds (the same in every layer)."""
        if self.stacked:
            return jax.vmap(self.policies[0].lengths)(self.states)[0]
        return self.policies[0].lengths(self.states[0])

    def first_carry(self) -> PyTree:
        """Return the value that enters the first layer, None for most policies."""
        first = jax.tree.map(lambda leaf: leaf[0], self.states) if self.stacked else self.states[0]
        return self.policies[0].init_carry(first)


def init_states(
    policy: KVCache, specs: tuple[AttentionSpec, ...], batch: int, *, stacked: bool
) -> CacheStates:
    """Return empty caches for one spec per layer.

    Stacked states need equal specs and policies; ValueError otherwise, naming the remedy.
    """
    policies = tuple(policy.layer_policy(i, len(specs)) for i in range(len(specs)))
    if not stacked:
        pairs = zip(policies, specs)
        return CacheStates(tuple(p.init(spec, batch) for p, spec in pairs), policies)
    if len(set(specs)) > 1 or len(set(policies)) > 1:
        raise ValueError(
            f"policy {policy} differs between layers, which a scan over layers cannot hold; "
            "use Execution(scan_layers=False)"
        )
    state = policies[0].init(specs[0], batch)
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(specs), axis=0), state)
    return CacheStates(copies, policies[:1])


def truncate(caches: CacheStates, length: Int[Array, "B"]) -> CacheStates:
    """Forget tokens at positions >= `length` in every layer."""
    return _each(caches, lambda policy, state: policy.truncate(state, length))


def reorder(caches: CacheStates, rows: Int[Array, "B2"]) -> CacheStates:
    """Fork, drop and permute sequences in every layer."""
    return _each(caches, lambda policy, state: policy.reorder(state, rows))


def nbytes(caches: CacheStates) -> int:
    """Return the bytes that all layers' states occupy."""
    if caches.stacked:
        return caches.policies[0].nbytes(caches.states)
    return sum(p.nbytes(state) for p, state in zip(caches.policies, caches.states))


def report(caches: CacheStates) -> dict[str, int]:
    """Return, on the host, the counts that the policies kept, added up over all layers."""
    policies, states = caches.policies, caches.states
    total: dict[str, int] = {}
    for policy, state in zip(policies, (states,) if caches.stacked else states):
        for name, value in policy.report(state).items():
            total[name] = total.get(name, 0) + value
    return total


def check_room(length: Any, new_tokens: int, capacity: int) -> None:
    """Raise ValueError, on the host, if `new_tokens` more would overflow any sequence."""
    fullest = int(np.max(np.asarray(length), initial=0))
    if fullest + new_tokens > capacity:
        raise ValueError(
            f"cache of capacity={capacity} holds {fullest} tokens and cannot take {new_tokens} "
            f"more; create it with capacity >= {fullest + new_tokens}"
        )


def check_new(
    caches: CacheStates, windows: Sequence[int | None], tokens: int, positions: Any
) -> None:
    """Raise ValueError if `tokens` new ones, written at once, overwrite what the first still sees.

    `windows` are those of the layers, `positions` `[B, T]`; traced ones may be any.
    """
    states = (caches.states,) if caches.stacked else caches.states
    for policy, state, window in zip(caches.policies, states, windows):
        ring = policy.ring(state, window)
        if ring is not None and tokens > ring.most and not _fits(ring, positions):
            raise ValueError(
                f"{tokens} new tokens at once exceed the {ring.most} that a layer with window="
                f"{window} can take here: they would overwrite keys which the first of them sees; "
                f"create the caches with max_new={tokens}, or pass fewer tokens a call"
            )


def _fits(ring: Ring, positions: Any) -> bool:
    """Whether tokens are known to lie where more than `ring.most` may be written."""
    if isinstance(positions, Tracer) or not getattr(positions, "is_fully_addressable", 1):
        return False
    held = np.asarray(positions)
    end = held.max(axis=1) + 1
    start = np.where(held >= 0, held, np.iinfo(np.int32).max).min(axis=1)
    return bool(np.all((end <= ring.first) | (end - start <= ring.most)))


def _each(caches: CacheStates, change: Callable[[KVCache, Any], Any]) -> CacheStates:
    if caches.stacked:
        policy = caches.policies[0]
        return replace(caches, states=jax.vmap(partial(change, policy))(caches.states))
    pairs = zip(caches.policies, caches.states)
    return replace(caches, states=tuple(change(policy, state) for policy, state in pairs))
