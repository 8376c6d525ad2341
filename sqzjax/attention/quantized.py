# SPDX-License-Identifier: Apache-2.0
"""Decode attention over packed keys and values on any number of devices.

As in `decode`, the kernels behind it see one device's arrays: sequences are split over the batch
axes and kv heads over `tensor`, without communication.
"""

from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention import quantized_decode_attention
from pallas_kernels.rotary import Rotary
from sqzjax.attention.decode import axes
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
    batch, heads = axes(*k.codes.shape[:2])
    if batch or heads:
        rows = PartitionSpec(batch or None)
        tokens = PartitionSpec(batch or None, None, heads or None)
        split = partial(_spec, batch=batch, heads=heads)
        call = jax.shard_map(
            call,
            in_specs=(tokens, *jax.tree.map(split, (k, v)), *(rows,) * 3, _rows_of(arrays, rows)),
            out_specs=(tokens, tokens),
            # All of them: an axis of size 1 left to the partitioner would still refuse a kernel.
            axis_names=set(jax.sharding.get_abstract_mesh().auto_axes),
            check_vma=False,
        )
    return Partial(*call(*arrays))


def _rows_of(arrays: tuple[Any, ...], rows: PartitionSpec) -> PartitionSpec | None:
    return None if arrays[-1] is None else rows


def _spec(leaf: Array, *, batch: tuple[str, ...], heads: tuple[str, ...]) -> PartitionSpec:
    """Return how a leaf of a packed tensor is split; one that all share stays whole."""
    sequences = batch if leaf.shape[0] > 1 else ()
    return PartitionSpec(sequences or None, (heads if leaf.shape[1] > 1 else ()) or None)


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
