# SPDX-License-Identifier: Apache-2.0
"""Exact attention of many queries over keys stored kv-head major (`B K S H`): prefill, training.

The library's types around `pallas_kernels.attention`, whose memory is linear in T and S.
"""

from pallas_kernels.attention import attention, noisy_clean_attention
from sqzjax.attention.mask import Mask
from sqzjax.attention.partial import Partial
from sqzjax.typing import Array, Float, Int


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    query_positions: Int[Array, "B T"] | None,
    key_positions: Int[Array, "B S"] | None,
    mask: Mask,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
) -> Partial:
    """Attend `q` to `k`, `v` under `mask` on positions; softmax and sums are float32.

    Positions None mean 0, 1, ..., with which the attention kernels of GPU and TPU libraries can
    serve. `q` is rounded to the dtype of the keys. `scale` defaults to 1/sqrt(H). Segments given
    for one side alone do not restrict anything.
    """
    if query_segments is None or key_segments is None:
        query_segments = key_segments = None
    if mask.kind == "noisy_clean":
        half = q.shape[1] // 2
        return noisy_clean_attention(
            q.astype(k.dtype),
            k,
            v,
            block_size=mask.block_size,
            positions=None if query_positions is None else query_positions[:, :half],
            segments=None if query_segments is None else query_segments[:, :half],
            scale=scale,
            softcap=logit_softcap,
        )
    return attention(
        q.astype(k.dtype),
        k,
        v,
        mask=mask.rule(window),
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
        scale=scale,
        softcap=logit_softcap,
    )
