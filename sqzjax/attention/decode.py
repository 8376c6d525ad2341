# SPDX-License-Identifier: Apache-2.0
"""Decode attention over dense keys on any number of devices.

The kernels behind it see one device's arrays, so under a mesh the call is mapped over shards:
sequences over the batch axes, kv heads over `tensor`. Attention needs no communication there.
"""

from functools import partial

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
    batch, heads = axes(k.shape[0], k.shape[1])
    if batch or heads:
        rows, cache = PartitionSpec(batch or None), PartitionSpec(batch or None, heads or None)
        tokens = PartitionSpec(batch or None, None, heads or None)
        call = jax.shard_map(
            call,
            in_specs=(tokens, cache, cache, rows, rows, rows),
            out_specs=(tokens, tokens),
            # All of them: an axis of size 1 left to the partitioner would still refuse a kernel.
            axis_names=set(jax.sharding.get_abstract_mesh().auto_axes),
            check_vma=False,
        )
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


def axes(batch: int, kv_heads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the mesh axes that split sequences and kv heads; none where a size does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {name: mesh.shape[name] for name in mesh.auto_axes if mesh.shape[name] > 1}
    rows = tuple(name for name in AXES[:2] if name in sizes)
    ways = 1
    for name in rows:
        ways *= sizes[name]
    heads = ("tensor",) if kv_heads % sizes.get("tensor", kv_heads + 1) == 0 else ()
    return rows if batch % ways == 0 else (), heads
