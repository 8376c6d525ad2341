# SPDX-License-Identifier: Apache-2.0
"""Attention to chosen pages on Hopper GPUs: the kernel of `decode_attention`, fed from a list."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import Target, check
from pallas_kernels.decode_attention import mosaic_gpu as dense


def paged_decode_attention_mosaic_gpu(
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

    Raises NotImplementedError for what `decode_attention` does not serve, and for pages that are
    no multiple of 8 slots or neither divide a tile nor are divided by it.
    """
    batch, kv_heads, rows, width = q.shape
    slots = pages.shape[2] * page_size
    tile = dense.row_tile(rows, width, None)
    if config is None:
        row_tiles = -(-rows // tile)
        config = dense.default_config(batch, kv_heads, slots, width, row_tiles, tile, target)
    dense.check_supported(k, target, config, interpret)
    block = config.block_kv
    if page_size % 8 or (block % page_size and page_size % block):
        rule = f"must be a multiple of 8, and divide tiles of {block} slots or be divided by them"
        raise NotImplementedError(f"mosaic_gpu: page_size={page_size} {rule}")
    shared, rule = config.shared_bytes(width, tile), "does not fit a block's shared memory"
    good = shared <= dense.SHARED_BYTES
    check("config", config, good, f"{rule} ({shared} bytes); lower its stages")
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    plan = dense.Plan(
        config, slots, width, tile, k.dtype, scale, None, 0, interpret or None, page=page_size
    )
    return dense.launch(plan, held, pages, q, k, v, jnp.zeros_like(limits), limits)
