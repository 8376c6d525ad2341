# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilations of the TPU kernels at real sizes.

A limit on temporaries below the size of the cache is what proves that XLA does not copy it into
another layout. Bundles are those of one grid step with its prologue.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.common import Target
from pallas_kernels.decode_attention.mosaic_tpu import Config, decode_attention_mosaic_tpu
from pallas_kernels.int_gemv.mosaic_tpu import int_gemv_mosaic_tpu
from tests.aot import Case

TPU = Target("tpu", "TPU v6 lite")
WORDS = Target("tpu", "TPU v5 lite")
"""Stands for all chips on which 4-bit codes become floats word by word."""
# name: batch, kv heads, rows (query heads per kv head x tokens), head width, slots
DECODE = {
    "llama3_8b": (8, 8, 4, 128, 8192),
    "llama3_70b_32k": (4, 8, 8, 128, 32768),
    "llama3_1b": (8, 8, 4, 64, 8192),
    "phi2": (4, 32, 1, 80, 4096),
    "phi3_mini": (4, 32, 1, 96, 4096),
    "verify_8_tokens": (8, 8, 32, 128, 8192),
    "diffusion_64_tokens": (4, 4, 448, 128, 4096),
}
# name: rows, inputs, outputs
PRODUCTS = {
    "llama3_8b_up": (8, 4096, 14336),
    "llama3_8b_down_64_rows": (64, 14336, 4096),
    "llama2_7b_down": (1, 11008, 4096),
    "qwen_72b_down": (8, 29568, 8192),
}
SLOW = ("v4", "v5p")
"""Targets for cases that take seconds to compile."""
# The default tests compile every case for one of the two targets that they have.
ON_V5E = {"slow": ("v6e",)}
ON_V6E = {"slow": ("v5e",)}


def decode_case(
    name, shape, *, dtype=jnp.bfloat16, softcap=None, sinks=0, config=None, copied=False, **checks
):
    """Return a case of decode attention; `checks` are fields of `Case`."""
    batch, heads, rows, head_dim, slots = shape
    fn = functools.partial(
        decode_attention_mosaic_tpu,
        scale=head_dim**-0.5,
        softcap=softcap,
        sinks=sinks,
        target=TPU,
        config=config,
    )
    cache = jax.ShapeDtypeStruct((batch, heads, slots, head_dim), dtype)
    q = jax.ShapeDtypeStruct((batch, heads, rows, head_dim), dtype)
    of_batch = [
        jax.ShapeDtypeStruct(s, jnp.int32) for s in ((batch,), (batch, 2), *2 * ((batch, rows),))
    ]
    limit = None if copied else math.prod(cache.shape) * cache.dtype.itemsize // 2
    args = (q, cache, cache, *of_batch)
    return Case(
        f"decode_{name}", fn, args, **{"targets": ("tpu",), **checks}, max_temporaries=limit
    )


def product_case(
    name, shape, *, bits=4, group_size=128, dtype=jnp.bfloat16, target=WORDS, **checks
):
    """Return a case of the product with integer weights; `checks` are fields of `Case`."""
    rows, inputs, outputs = shape
    fn = functools.partial(int_gemv_mosaic_tpu, group_size=group_size, bits=bits, target=target)
    args = (
        jax.ShapeDtypeStruct((rows, inputs), dtype),
        jax.ShapeDtypeStruct((inputs, outputs), jnp.int4 if bits == 4 else jnp.int8),
        jax.ShapeDtypeStruct((inputs // group_size, outputs), jnp.float32),
    )
    limit = inputs * outputs * bits // 16
    checks = {"targets": ("tpu",), "max_temporaries": limit, **checks}
    return Case(f"gemv_{name}", fn, args, **checks)


def aot_cases():
    """Return all cases: layers of models of 1B to 72B parameters, and every odd shape."""
    f32, f16 = jnp.float32, jnp.float16
    layer = (8, 4096, 4096)
    decode = [decode_case(name, shape, **ON_V6E) for name, shape in DECODE.items()]
    products = [product_case(name, shape, **ON_V5E) for name, shape in PRODUCTS.items()]
    return [
        *decode,
        decode_case("gemma_256", (4, 8, 2, 256, 8192), softcap=50.0, **ON_V5E),
        decode_case("f32", DECODE["llama3_8b"], dtype=f32, **ON_V5E),
        decode_case("f32_rows", DECODE["diffusion_64_tokens"], dtype=f32, targets=SLOW),
        decode_case("tail_sinks", (8, 8, 4, 128, 4104), sinks=4, **ON_V5E),
        decode_case("odd_f32", (3, 2, 5, 80, 1001), dtype=f32, copied=True, **ON_V5E),
        decode_case(
            "tail_of_one", (2, 2, 3, 64, 257), config=Config(128, 16), copied=True, **ON_V6E
        ),
        decode_case("tiny_cache", (2, 2, 3, 64, 20), copied=True, **ON_V6E),
        *products,
        product_case("converted", (8, 4096, 14336), target=TPU, **ON_V6E),
        product_case("converted_64", layer, group_size=64, target=TPU, **ON_V6E),
        product_case("head", (8, 4096, 128256), targets=SLOW),
        product_case("int8", (8, 4096, 14336), bits=8, **ON_V6E),
        product_case("group_64", layer, group_size=64, **ON_V5E),
        product_case("group_32", layer, group_size=32, targets=SLOW),
        product_case("int8_group_32", layer, group_size=32, bits=8, **ON_V6E),
        product_case("per_channel", (8, 11008, 4096), group_size=11008, targets=SLOW),
        product_case("f32", layer, dtype=f32, **ON_V6E),
        product_case("f32_64_rows", (64, 18944, 3584), dtype=f32, targets=SLOW),
        product_case("f16", layer, dtype=f16, targets=SLOW),
        product_case("narrow", (3, 896, 128), max_temporaries=None, **ON_V5E),
    ]
