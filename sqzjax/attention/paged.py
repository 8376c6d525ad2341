# SPDX-License-Identifier: Apache-2.0
"""Decode attention to chosen pages of dense keys on any number of devices; see `decode`."""

from functools import partial

import jax
from jax.sharding import PartitionSpec

from pallas_kernels.paged_decode_attention import paged_decode_attention
from sqzjax.attention.decode import axes
from sqzjax.attention.partial import Partial
from sqzjax.typing import Array, Bool, Float, Int


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    pages: Int[Array, "B K U"],
    count: Int[Array, "B K"],
    length: Int[Array, "B"],
    asking: Bool[Array, "B T"],
    page_size: int,
    scale: float | None = None,
) -> Partial:
    """Attend the `asking` queries to tokens below `length` of the first `count` listed pages.

    Pages ascend; the rest is as in `pallas_kernels.paged_decode_attention`.
    """
    call = partial(_local, page_size=page_size, scale=scale)
    batch, heads = axes(k.shape[0], k.shape[1])
    if batch or heads:
        rows, cache = PartitionSpec(batch or None), PartitionSpec(batch or None, heads or None)
        tokens = PartitionSpec(batch or None, None, heads or None)
        call = jax.shard_map(
            call,
            in_specs=(tokens, *(cache,) * 4, rows, rows),
            out_specs=(tokens, tokens),
            # All of them: an axis of size 1 left to the partitioner would still refuse a kernel.
            axis_names=set(jax.sharding.get_abstract_mesh().auto_axes),
            check_vma=False,
        )
    return Partial(*call(q.astype(k.dtype), k, v, pages, count, length, asking))


def _local(q, k, v, pages, count, length, asking, *, page_size, scale):
    lists = {"pages": pages, "count": count, "length": length, "asking": asking}
    return tuple(paged_decode_attention(q, k, v, **lists, page_size=page_size, scale=scale))
