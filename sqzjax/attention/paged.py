# SPDX-License-Identifier: Apache-2.0
"""Decode attention to chosen pages of dense keys on any number of devices; see `decode`."""

from functools import partial

from pallas_kernels.paged_decode_attention import paged_decode_attention
from sqzjax.attention.decode import Split, over_shards
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

    def specs(split: Split):
        return split.tokens, *(split.cache,) * 4, split.rows, split.rows

    call = over_shards(call, k.shape[0], k.shape[1], specs)
    return Partial(*call(q.astype(k.dtype), k, v, pages, count, length, asking))


def _local(q, k, v, pages, count, length, asking, *, page_size, scale):
    lists = {"pages": pages, "count": count, "length": length, "asking": asking}
    return tuple(paged_decode_attention(q, k, v, **lists, page_size=page_size, scale=scale))
