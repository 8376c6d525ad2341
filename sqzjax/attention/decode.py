# SPDX-License-Identifier: Apache-2.0
"""Decode attention over dense keys on any number of devices.

The kernels behind it see one device's arrays, so under a mesh the call is mapped over shards:
sequences over the batch axes, kv heads over `tensor`. Attention needs no communication there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from pallas_kernels.decode_attention import MAX_QUERIES, decode_attention
from sqzjax.attention.mask import Mask
from sqzjax.attention.partial import Partial
from sqzjax.sharding_config import AXES
from sqzjax.typing import Array, Float, Int

__all__ = ["MAX_QUERIES", "attend", "attend_span"]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    length: Int[Array, "B"],
    query_positions: Int[Array, "B T"],
    mask: Mask,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
) -> Partial:
    """Attend at most `MAX_QUERIES` queries to a cache whose slot p mod S holds position p.

    `length` is one more than the highest position written; the rest is as in `dense.attend`.
    """
    starts, limits = mask.span(query_positions, window)
    return attend_span(q, k, v, length, starts, limits, scale=scale, logit_softcap=logit_softcap)


def attend_span(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    length: Int[Array, "B"],
    starts: Int[Array, "B T"],
    limits: Int[Array, "B T"],
    *,
    scale: float | None = None,
    logit_softcap: float | None = None,
) -> Partial:
    """Attend each query to the positions in `[starts, limits)`; otherwise as `attend`."""
    call = partial(_local, scale=scale, softcap=logit_softcap)

    def specs(split: Split):
        return split.tokens, split.cache, split.cache, *(split.rows,) * 3

    call = over_shards(call, k.shape[0], k.shape[1], specs)
    return Partial(*call(q.astype(k.dtype), k, v, length, starts, limits))


def _local(q, k, v, length, starts, limits, *, scale, softcap):
    return tuple(
        decode_attention(
            q,
            k,
            v,
            length=length,
            starts=starts,
            limits=limits,
            scale=scale,
            softcap=softcap,
            ring=True,
        )
    )


class Split(NamedTuple):
    """How the mesh splits sequences and kv heads, as specs of what attention reads and returns."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def rows(self) -> PartitionSpec:
        """Of arrays `[B, ...]`."""
        return PartitionSpec(self.batch or None)

    @property
    def cache(self) -> PartitionSpec:
        """Of arrays `[B, K, ...]`."""
        return PartitionSpec(self.batch or None, self.heads or None)

    @property
    def tokens(self) -> PartitionSpec:
        """Of arrays `[B, T, N, ...]`."""
        return PartitionSpec(self.batch or None, None, self.heads or None)


def over_shards(
    call: Callable[..., Any], batch: int, kv_heads: int, specs: Callable[[Split], tuple[Any, ...]]
) -> Callable[..., Any]:
    """Map `call`, which returns (output, log-sum-exp), over the shards of the mesh, if any.

    `specs` gives those of its arguments.
    """
    split = Split(*_axes(batch, kv_heads))
    if not split.batch and not split.heads:
        return call
    return jax.shard_map(
        call,
        in_specs=specs(split),
        out_specs=(split.tokens, split.tokens),
        # All of them: an axis of size 1 left to the partitioner would still refuse a kernel.
        axis_names=set(jax.sharding.get_abstract_mesh().auto_axes),
        check_vma=False,
    )


def _axes(batch: int, kv_heads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the mesh axes that split sequences and kv heads; none where a size does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {name: mesh.shape[name] for name in mesh.auto_axes if mesh.shape[name] > 1}
    rows = tuple(name for name in AXES[:2] if name in sizes)
    ways = 1
    for name in rows:
        ways *= sizes[name]
    heads = ("tensor",) if kv_heads % sizes.get("tensor", kv_heads + 1) == 0 else ()
    return rows if batch % ways == 0 else (), heads
