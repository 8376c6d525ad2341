# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compile cases of `decode_attention` on Hopper GPUs, at sizes of real models."""

import jax
import jax.numpy as jnp

from pallas_kernels.common import current_target
from pallas_kernels.decode_attention.mosaic_gpu import decode_attention_mosaic_gpu
from tests.aot import Case

# name: batch, kv heads, rows (query heads per kv head x tokens), head width, slots
SHAPES = {
    "h64_r8_8k": (8, 8, 8, 64, 8192),
    "h64_r64_8k": (8, 8, 64, 64, 8192),
    "h80_r1_8k": (1, 32, 1, 80, 8192),
    "h96_r8_8k": (1, 8, 8, 96, 8192),
    "h96_r64_8k": (1, 8, 64, 96, 8192),
    "h128_r1_8k": (1, 32, 1, 128, 8192),
    "h128_r4_8k": (1, 8, 4, 128, 8192),
    "h128_r16_8k": (8, 8, 16, 128, 8192),
    "h128_r32_8k": (8, 8, 32, 128, 8192),
    "h128_r64_8k": (8, 8, 64, 128, 8192),
    "h128_r4_128k": (1, 8, 4, 128, 131072),
    "h128_r256_128k": (1, 8, 256, 128, 131072),
    "h128_r4_tail": (1, 8, 4, 128, 8184),
    "h256_r8_8k": (4, 8, 8, 256, 8192),
    "h256_r16_128k": (1, 8, 16, 256, 131072),
    "h256_r64_8k": (1, 8, 64, 256, 8192),
}
# Every width, tile of rows, end of the slots and variant of the scores.
QUICK = (
    "h64_r8_8k",
    "h80_r1_8k",
    "h96_r64_8k",
    "h128_r256_128k",
    "h128_r4_tail",
    "h256_r16_128k",
    "h256_r64_8k",
    "float16",
    "softcap_r64",
)


def _case(name, shape, dtype="bfloat16", **options):
    batch, kv_heads, rows, width, slots = shape
    fixed = {"scale": width**-0.5, "softcap": None, "sinks": 0, **options}
    cache = jax.ShapeDtypeStruct((batch, kv_heads, slots, width), dtype)
    q = jax.ShapeDtypeStruct((batch, kv_heads, rows, width), dtype)
    of_batch = [
        jax.ShapeDtypeStruct(x, jnp.int32) for x in ((batch,), (batch, 2), *2 * ((batch, rows),))
    ]

    def fn(*arrays):
        return decode_attention_mosaic_gpu(*arrays, **fixed, target=current_target())

    return Case(
        f"decode_attention_{name}",
        fn,
        (q, cache, cache, *of_batch),
        targets=("h100", "h200"),
        min_blocks_per_sm=1 if width > 128 and rows > 16 else 2,
        # 14 instructions per 16-bit element of a step's 64 keys and values, by 128 threads: what
        # the bandwidth of an H200 leaves time for. What is counted includes the epilogue, which
        # is as long as the loop for many rows.
        max_sass_loop=14 * width if rows <= 32 else None,
        # Partial outputs and padded rows, never a copy of the cache.
        max_temporaries=batch * kv_heads * slots * width * 3 // 2,
        slow=name not in QUICK,
    )


def aot_cases():
    """Return one case per shape, and one per variant of the scores."""
    cases = [_case(name, shape) for name, shape in SHAPES.items()]
    common = SHAPES["h128_r4_8k"]
    cases.append(_case("float16", common, "float16"))
    cases.append(_case("softcap", common, softcap=50.0))
    cases.append(_case("softcap_r64", SHAPES["h128_r64_8k"], softcap=50.0, sinks=4))
    cases.append(_case("sinks", common, sinks=4))
    return cases
