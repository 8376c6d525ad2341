# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compile cases of `int_gemv` on GPUs, at sizes of real models."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import current_target
from pallas_kernels.int_gemv import PackedWeights, int_gemv
from pallas_kernels.int_gemv.mosaic_gpu import _decode, int_gemv_mosaic_gpu
from pallas_kernels.int_gemv.shapes import SHAPES
from tests.aot import Case

HOPPER = ("h100", "h200")
# At full memory bandwidth an H200 has time for 3.5 instructions per 4-bit code and 7 per 8-bit
# code; a tile has 128 and 64 codes per thread.
LOOP = 448

# name: layer, rows, bits, group size (None: one group), dtype
VARIANTS = {
    "q": ("llama3-8b/q", 1, 4, 128, "bfloat16"),
    "gate_up": ("llama3-8b/gate_up", 1, 4, 128, "bfloat16"),
    "down": ("llama3-70b/down", 1, 4, 128, "bfloat16"),
    "head": ("llama3.2-1b/head", 1, 4, 128, "bfloat16"),
    "narrow": ("qwen2.5-1.5b/kv", 1, 4, 128, "bfloat16"),
    "odd_tiles": ("qwen2.5-72b/down", 1, 4, 64, "bfloat16"),
    "g32": ("llama3-8b/q", 1, 4, 32, "bfloat16"),
    "g64": ("llama3-8b/q", 1, 4, 64, "bfloat16"),
    "one_group": ("llama3-8b/q", 1, 4, None, "bfloat16"),
    "m16": ("llama3-8b/q", 16, 4, 128, "bfloat16"),
    "m32": ("llama3-8b/q", 32, 4, 128, "bfloat16"),
    "m64": ("llama3-8b/q", 64, 4, 128, "bfloat16"),
    "m64_g32": ("llama3-8b/q", 64, 4, 32, "bfloat16"),
    "m64_g64": ("llama3-8b/q", 64, 4, 64, "bfloat16"),
    "m32_g32": ("llama3-8b/q", 32, 4, 32, "bfloat16"),
    "int8": ("llama3-8b/q", 1, 8, 128, "bfloat16"),
    "int8_g32": ("llama3-8b/q", 8, 8, 32, "bfloat16"),
    "int8_m64": ("llama3-8b/q", 64, 8, 128, "bfloat16"),
    "float16": ("llama3-8b/q", 1, 4, 128, "float16"),
    "int8_float16": ("llama3-8b/q", 1, 8, 128, "float16"),
    "float32": ("llama3-8b/gate_up", 4, 4, 128, "float32"),
}
# Tiles within a group and of several groups, the shapes of many rows, both bits, every dtype.
QUICK = (
    "q",
    "odd_tiles",
    "g32",
    "one_group",
    "m64",
    "m64_g32",
    "int8_g32",
    "int8_float16",
    "float32",
)
DECODERS = tuple(
    (bits, dtype, part)
    for bits, part in ((4, 128), (4, 32), (8, 64), (8, 32))
    for dtype in ("bfloat16", "float16")
)


def _arguments(layer, rows, bits, group_size, dtype):
    inputs, outputs = SHAPES[layer]
    group_size = group_size or inputs
    x = jax.ShapeDtypeStruct((rows, inputs), dtype)
    words = jax.ShapeDtypeStruct((outputs, inputs * bits // 32), jnp.uint32)
    scales = jax.ShapeDtypeStruct((inputs // group_size, outputs), jnp.float32)
    return x, PackedWeights(words, scales, bits, group_size, "words")


def _kernel_case(name, variant):
    x, weights = _arguments(*variant)

    def fn(x, words, scales):
        return int_gemv_mosaic_gpu(
            x,
            words,
            scales,
            group_size=weights.group_size,
            bits=weights.bits,
            target=current_target(),
        )

    return Case(
        f"int_gemv_{name}",
        fn,
        (x, weights.codes, weights.scales),
        targets=HOPPER,
        min_blocks_per_sm=2,
        # The checker also takes a jump back from waiting at the end for a loop, which at 64 rows
        # spans the epilogue.
        max_sass_loop=LOOP if x.shape[0] <= 32 else None,
        max_temporaries=weights.nbytes if x.shape[0] >= 32 else weights.nbytes // 2,
        slow=name not in QUICK,
    )


def _xla_case(name, variant, temporaries, targets):
    return Case(
        f"int_gemv_xla_{name}",
        functools.partial(int_gemv, backend="xla"),
        _arguments(*variant),
        targets=targets,
        max_temporaries=temporaries,
    )


def decoder(bits, dtype, part):
    """Return a function of words (64, 16): they are decoded in registers and stored."""

    def body(w_ref, o_ref):
        words = plgpu.load(w_ref, layout=plgpu.Layout.WGMMA, optimized=False)
        for i, codes in enumerate(_decode(words, bits, part, jnp.dtype(dtype), None)):
            columns = o_ref.at[:, i * part : (i + 1) * part]
            if hasattr(plgpu, "store"):  # since jax 0.12
                plgpu.store(columns, codes, optimized=False)
            else:
                columns[...] = codes

    body.__name__ = f"decode_{bits}_{dtype}_{part}"
    return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((64, 512 // bits), dtype))


def aot_cases():
    """Return the kernel at real sizes, XLA's forms with their temporaries, the decoders alone."""
    cases = [_kernel_case(name, variant) for name, variant in VARIANTS.items()]
    one = VARIANTS["q"]
    many = ("llama3-8b/q", 256, 4, 128, "bfloat16")
    bytes_of_words = 4096 * 4096 // 2
    # One group of codes at a time, sums, and transposed scales: never a floating copy (32 MB).
    cases.append(_xla_case("one_row", one, bytes_of_words, ("cuda",)))
    cases.append(_xla_case("many_rows", many, 2 * bytes_of_words, ("cuda",)))
    cases += [
        Case(
            f"int_gemv_decoder_{bits}_{dtype}_{part}",
            decoder(bits, dtype, part),
            (jax.ShapeDtypeStruct((64, 16), jnp.uint32),),
            targets=HOPPER,
        )
        for bits, dtype, part in DECODERS
    ]
    return cases
