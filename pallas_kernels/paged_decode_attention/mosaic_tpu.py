# SPDX-License-Identifier: Apache-2.0
"""Attention to chosen pages on TPU: the kernel of `decode_attention`, its blocks made of pages.

A grid step fetches up to `PAGES` pages, each by a transfer of its own: pages of 64 tokens and more
keep the memory busy, pages of 16 (4 KB at 128 channels) hardly do.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import Target
from pallas_kernels.decode_attention import mosaic_tpu as dense

PAGES = 16
"""Most pages of a grid step, each with two buffers for its keys and two for its values."""


def paged_decode_attention_mosaic_tpu(
    q: Array,
    k: Array,
    v: Array,
    held: Array,
    pages: Array,
    limits: Array,
    *,
    page_size: int,
    scale: float,
    target: Target,
    config: dense.Config | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Return (out, log-sum-exp); the arguments are those of `paged_decode_attention_xla`.

    Raises NotImplementedError for float16, and for pages that do not fill the tiles in which a
    TPU stores the cache.
    """
    del target  # Every generation compiles the same program.
    config = dense.sizes(q, k, config)
    slots_last = dense.slots_last(k)
    tile = dense.LANES if slots_last else 32 // k.dtype.itemsize
    if page_size % tile or page_size > config.block_kv:
        rule = f"must be a multiple of {tile}, at most {config.block_kv}"
        raise NotImplementedError(f"mosaic_tpu: page_size={page_size} {rule}")
    fixed = dense.Fixed(
        slots=pages.shape[2] * page_size,
        block_kv=min(PAGES, config.block_kv // page_size) * page_size,
        slots_last=slots_last,
        sinks=0,
        scale=scale,
        softcap=None,
        page=page_size,
        lists=(pages.shape[1], pages.shape[2]),
    )
    held = held.reshape(-1)
    scalars = (held, jnp.zeros_like(held), held, pages.reshape(-1))
    return dense.launch(fixed, config, scalars, q, k, v, jnp.zeros_like(limits), limits, interpret)
