# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilations of the TPU kernel of decode attention over packed caches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import Target
from pallas_kernels.quantized_decode_attention.mosaic_tpu import (
    quantized_decode_attention_mosaic_tpu,
)
from pallas_kernels.quantized_decode_attention.shapes import SHAPES
from pallas_kernels.rotary import Rotary
from tests.aot import Case
from tests.pallas_kernels import packed
from tests.pallas_kernels.packed import Packed

TPU = Target("tpu", "TPU v6 lite")
# XLA for v4 and v5p keeps rows of 12 words in another order and copies such caches.
OF_12_WORDS = {"slow": True, "targets": ("v5e", "v6e")}
# name: shape, keys, values, keys before rotation, options
VARIANTS = {
    "int4": ("llama3_8b_4k", packed.INT4, packed.INT4, False, {"slow": ("v5e",)}),
    "int8": ("llama2_7b_4k", packed.INT8, packed.INT8, False, {"slow": True}),
    "int4_groups": ("llama3_8b_4k", packed.SYMMETRIC, packed.INT4_GROUPS, False, {"slow": True}),
    "int3": ("llama3_8b_4k", Packed(3), Packed(3), False, OF_12_WORDS),
    "kivi2": ("llama2_7b_32k", packed.KIVI_KEYS, packed.KIVI_VALUES, False, {"slow": True}),
    "kivi2_g128": (
        "llama3_8b_32k",
        Packed(2, "channel", 128),
        Packed(2, group=128),
        False,
        {"slow": True},
    ),
    "int4_pre": ("llama3_8b_4k", packed.INT4, packed.INT4, True, {"slow": True}),
    "kvquant3": ("llama3_8b_4k", packed.NUQ_KEYS, packed.NUQ_VALUES, True, OF_12_WORDS),
}


def _case(name, shape, keys, values, before, options):
    size = SHAPES[shape]
    cache = (size.batch, size.kv_heads, size.slots, size.head_dim)
    rows = size.heads // size.kv_heads
    rotary = Rotary(tuple(1e4 ** (-np.arange(64) / 64))) if before else None

    def fn(q, k, v, positions, *of_batch):
        return quantized_decode_attention_mosaic_tpu(
            q,
            k,
            v,
            *of_batch,
            query_positions=positions if before else None,
            rotary=rotary,
            scale=0.1,
            softcap=None,
            target=TPU,
        )

    # A kernel takes no float16 arguments on TPU: XLA copies them into integers first.
    keys, values = (replace(x, dtype="bfloat16") for x in (keys, values))
    batch = size.batch
    of_batch = [
        jax.ShapeDtypeStruct(x, jnp.int32) for x in ((batch,), (batch, 2), *2 * ((batch, rows),))
    ]
    q = jax.ShapeDtypeStruct((*cache[:2], rows, size.head_dim), jnp.bfloat16)
    k, v = keys.struct(cache), values.struct(cache)
    positions = of_batch[-1]
    args = (q, k, v, positions, *of_batch)
    limit = (k.nbytes + v.nbytes) // 4
    options = {"targets": ("tpu",), "max_temporaries": limit, **options}
    return Case(f"quantized_{name}", fn, args, **options)


def aot_cases():
    """Return one case per form of keys and values; that no cache is copied is what limits tell."""
    return [_case(name, *variant) for name, variant in VARIANTS.items()]
