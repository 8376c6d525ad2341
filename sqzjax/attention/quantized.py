# SPDX-License-Identifier: Apache-2.0
"""Decode attention over packed keys and values on any number of devices.

As in `decode`, the kernels behind it see one device's arrays: sequences are split over the batch
axes and kv heads over `tensor`, without communication.
"""

from functools import partial

import jax
from jax.sharding import PartitionSpec

from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention import quantized_decode_attention
from pallas_kernels.rotary import Rotary
from sqzjax.attention.decode import Split, over_shards
from sqzjax.attention.partial import Partial
from sqzjax.typing import Array, Float, Int

__all__ = ["attend_span"]


def attend_span(
    q: Float[Array, "B T N H"],
    k: QTensor,
    v: QTensor,
    length: Int[Array, "B"],
    starts: Int[Array, "B T"],
    limits: Int[Array, "B T"],
    *,
    query_positions: Int[Array, "B T"] | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
) -> Partial:
    """Attend each query to the positions in `[starts, limits)` of packed keys `[B, K, S, H]`.

    With `rotary` and `query_positions`, queries and keys are those before rotation.
    """
    call = partial(_local, rotary=rotary, scale=scale, softcap=logit_softcap)
    arrays = (q, k, v, length, starts, limits, query_positions)

    def specs(split: Split):
        packed = jax.tree.map(partial(_spec, split=split), (k, v))
        positions = None if query_positions is None else split.rows
        return split.tokens, *packed, *(split.rows,) * 3, positions

    call = over_shards(call, k.codes.shape[0], k.codes.shape[1], specs)
    return Partial(*call(*arrays))


def _spec(leaf: Array, *, split: Split) -> PartitionSpec:
    """Return how a leaf of a packed tensor is split; one that all share stays whole."""
    sequences = split.batch if leaf.shape[0] > 1 else ()
    return PartitionSpec(sequences or None, (split.heads if leaf.shape[1] > 1 else ()) or None)


def _local(q, k, v, length, starts, limits, query_positions, *, rotary, scale, softcap):
    return tuple(
        quantized_decode_attention(
            q,
            k,
            v,
            length=length,
            starts=starts,
            limits=limits,
            query_positions=query_positions,
            rotary=rotary,
            scale=scale,
            softcap=softcap,
        )
    )
