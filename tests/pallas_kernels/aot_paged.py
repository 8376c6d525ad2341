# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compile cases of `paged_decode_attention`: a quarter of 32K tokens, by pages.

The limit on temporaries is below the size of what the pages hold: nothing gathers them.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import current_target
from pallas_kernels.paged_decode_attention.mosaic_gpu import paged_decode_attention_mosaic_gpu
from pallas_kernels.paged_decode_attention.mosaic_tpu import paged_decode_attention_mosaic_tpu
from tests.aot import Case

BATCH, SLOTS = 4, 32768
# name: kv heads, rows (query heads per kv head x tokens), head width, slots of a page
TPU = {
    "llama3_8b_p64": (8, 4, 128, 64),
    "block_of_16_p16": (8, 64, 128, 16),
    "slots_last": (8, 4, 64, 128),
}
GPU = {
    "llama3_8b_p16": (8, 4, 128, 16),
    "block_of_16_p16": (8, 64, 128, 16),
    "p64": (8, 4, 128, 64),
    "p256": (8, 4, 64, 256),
    "p8_h80": (8, 1, 80, 8),
}


def _case(name, shape, platform, **checks):
    heads, rows, width, page_size = shape
    most = SLOTS // page_size // 4
    cache = jax.ShapeDtypeStruct((BATCH, heads, SLOTS, width), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((BATCH, heads, rows, width), jnp.bfloat16)
    lists = [(BATCH, heads), (BATCH, heads, most), (BATCH, rows)]
    fixed = {"page_size": page_size, "scale": width**-0.5}

    def gpu(*arrays):
        return paged_decode_attention_mosaic_gpu(*arrays, **fixed, target=current_target())

    tpu = functools.partial(paged_decode_attention_mosaic_tpu, **fixed, target=None)
    return Case(
        f"paged_{platform}_{name}",
        gpu if platform == "gpu" else tpu,
        (q, cache, cache, *(jax.ShapeDtypeStruct(size, jnp.int32) for size in lists)),
        max_temporaries=BATCH * heads * most * page_size * width,
        **checks,
    )


def aot_cases():
    """Return one case per shape and platform."""
    gpu = {"targets": ("h100", "h200"), "min_blocks_per_sm": 2}
    return [
        _case("llama3_8b_p64", TPU["llama3_8b_p64"], "tpu", targets=("tpu",), slow=("v6e",)),
        _case("block_of_16_p16", TPU["block_of_16_p16"], "tpu", targets=("tpu",), slow=("v5e",)),
        _case("slots_last", TPU["slots_last"], "tpu", targets=("tpu",), slow=("v6e",)),
        *(_case(name, shape, "gpu", **gpu, slow=name == "p64") for name, shape in GPU.items()),
    ]
