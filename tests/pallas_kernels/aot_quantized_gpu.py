# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilations of the Hopper kernel of decode attention over packed caches."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import current_target
from pallas_kernels.packing import words_of
from pallas_kernels.quantized_decode_attention import gpu_elements, gpu_tiles
from pallas_kernels.quantized_decode_attention.form import form_of
from pallas_kernels.quantized_decode_attention.mosaic_gpu import (
    quantized_decode_attention_mosaic_gpu,
)
from pallas_kernels.quantized_decode_attention.shapes import SHAPES
from pallas_kernels.rotary import Rotary
from tests.aot import Case
from tests.pallas_kernels import packed
from tests.pallas_kernels.packed import Packed

HOPPER = ("h100", "h200")
# name: shape, query rows per kv head, keys, values
VARIANTS = {
    "int8": ("llama3_8b_32k", 4, packed.INT8, packed.INT8),
    "int4": ("llama3_8b_32k", 4, packed.INT4, packed.INT4),
    "int4_r16": ("llama3_8b_32k", 16, packed.INT4, packed.INT4),
    "int4_symmetric": ("llama2_7b_4k", 1, packed.SYMMETRIC, packed.SYMMETRIC),
    "int4_groups": ("llama3_8b_32k", 4, packed.INT4_GROUPS, packed.INT4_GROUPS),
    "int3": ("llama3_8b_32k", 4, Packed(3), Packed(3)),
    "int2": ("llama3_8b_32k", 4, Packed(2), Packed(2)),
    "static4": ("llama3_8b_32k", 4, Packed(4, "static"), packed.INT4),
    "kivi2": ("llama3_8b_32k", 4, packed.KIVI_KEYS, packed.KIVI_VALUES),
    "kivi4": ("llama3_8b_32k", 4, Packed(4, "channel", 32), packed.INT4_GROUPS),
    "kvquant4": ("llama3_8b_32k", 4, packed.NUQ4_KEYS, packed.NUQ4_VALUES),
    "kvquant3": ("llama3_8b_32k", 4, packed.NUQ3_KEYS, packed.NUQ3_VALUES),
    "kvquant2": ("llama3_8b_32k", 4, packed.NUQ2_KEYS, packed.NUQ2_VALUES),
    "normal_float4": ("llama3_8b_32k", 4, packed.NORMAL_FLOAT, packed.NORMAL_FLOAT),
    "kivi2_g128": ("llama3_8b_32k", 4, Packed(2, "channel", 128), Packed(2)),
}

# Other ones meet their branches.
SLOW = (
    *("int8", "int4", "int4_r16", "int3", "int2", "static4", "kivi4", "kivi2_g128"),
    *("kvquant4", "kvquant2", "normal_float4"),
)


def _case(name, shape, rows, keys, values):
    size = SHAPES[shape]
    cache = (size.batch, size.kv_heads, size.slots, size.head_dim)

    rotary = Rotary(tuple(5e5 ** (-np.arange(64) / 64))) if name.startswith("kvquant") else None

    def fn(*arrays):
        return quantized_decode_attention_mosaic_gpu(
            *arrays,
            query_positions=rotary and arrays[-1] - 1,
            rotary=rotary,
            scale=0.1,
            softcap=None,
            target=current_target(),
        )

    batch = size.batch
    of_batch = [
        jax.ShapeDtypeStruct(x, jnp.int32) for x in ((batch,), (batch, 2), *2 * ((batch, rows),))
    ]
    q = jax.ShapeDtypeStruct((*cache[:2], rows, size.head_dim), jnp.bfloat16)
    k, v = keys.struct(cache), values.struct(cache)
    return Case(
        f"quantized_{name}",
        fn,
        (q, k, v, *of_batch),
        targets=HOPPER,
        min_blocks_per_sm=2,
        # What is counted includes the epilogue, some 300 instructions.
        max_sass_loop=1900 if rotary else 1600,
        max_temporaries=(k.nbytes + v.nbytes) // 2,
        slow=name in SLOW,
    )


def decoder(which, bits):
    """Return a kernel, and its arguments, that multiplies decoded tokens by `other`.

    It multiplies as decode attention does, so what comes out tells where in the operand each token
    lies. The codes are those of the second of two tiles; the second of two blocks, which do the
    same, has them in its second buffer.
    """
    rows, depth = (64, 128) if which == "keys" else (128, 64)
    words = (2 * words_of(128, bits), 64)

    def body(words_ref, other_ref, out_ref, words_smem, other_smem, barrier):
        slot = lax.axis_index("i")
        plgpu.copy_gmem_to_smem(words_ref, words_smem.at[slot], barrier)
        other_smem[...] = plgpu.load(other_ref, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()
        plgpu.barrier_wait(barrier)
        digits = getattr(gpu_tiles, which)(words_smem.at[slot], 1, bits, None)

        def multiply(acc):
            plgpu.wgmma(acc, digits, other_smem.transpose((1, 0)))
            return acc[...]

        accumulator = plgpu.ACC((rows, depth), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        out_ref[...] = pl.run_scoped(multiply, accumulator)

    body.__name__ = f"decode_{which}_{bits}"
    scratch = [
        plgpu.SMEM((2, *words), jnp.uint32),
        plgpu.SMEM((depth, depth), jnp.bfloat16),
        plgpu.Barrier(),
    ]
    out = jax.ShapeDtypeStruct((rows, depth), jnp.float32)
    kernel = plgpu.kernel(body, out_type=out, scratch_types=scratch, grid=(2,), grid_names=("i",))
    other = jax.ShapeDtypeStruct((depth, depth), jnp.bfloat16)
    return kernel, (jax.ShapeDtypeStruct(words, jnp.uint32), other)


# keys or values, and their form
ELEMENTS = {
    "keys_2": ("keys", packed.NUQ2_KEYS),
    "keys_3": ("keys", packed.NUQ_KEYS),
    "keys_4": ("keys", packed.NUQ4_KEYS),
    "keys_4_rotated": ("keys", packed.NUQ4_KEYS),
    "keys_3_groups_rotated": ("keys", Packed(3, group=32, table=True, exact=1)),
    "keys_2_pairs": ("keys", Packed(2, group=64, offset=False, bias=1, exact=1)),
    "values_2": ("values", packed.NUQ2_VALUES),
    "values_3": ("values", packed.NUQ_VALUES),
    "values_4": ("values", packed.NORMAL_FLOAT),
    "values_4_pairs": ("values", Packed(4, group=64, table=True, exact=1)),
}


def element_arrays(name, tensor, rotary=None):
    """Return what `gpu_elements` reads of a tensor of one tile, by name."""
    which, form = ELEMENTS[name][0], form_of(tensor, "mosaic_gpu")
    found = {"table": gpu_elements.table_words(tensor)}
    if which == "keys" and form.sharing == "static":
        found["factors"] = gpu_elements.key_factors(tensor)[0, 0]
    found |= {
        key: value[0, 0] if key == "codes" else value.reshape(-1)
        for key in ("codes", "scale", "offset", "residual", "place")
        if (value := getattr(tensor, key)) is not None
        and not (key in ("scale", "offset") and form.sharing == "static")
    }
    found["codes"] = found["codes"].reshape(-1, 64)
    if rotary is not None:
        found["spins"] = gpu_elements.spins(rotary, form.bits)
    return dict(sorted(found.items()))  # as jax orders them


def element_decoder(name):
    """Return a kernel, and its arguments, that multiplies decoded numbers by `other`.

    As `decoder` does; codes lie in the second of two buffers.
    """
    which, packing = ELEMENTS[name]
    rows, depth = (64, 128) if which == "keys" else (128, 64)
    tensor = packing.struct((1, 1, 64, 128))
    form = form_of(tensor, "mosaic_gpu")
    rotary = Rotary(tuple(np.ones(64))) if "rotated" in name else None
    arrays = jax.eval_shape(lambda tensor: element_arrays(name, tensor, rotary), tensor)
    names = list(arrays)

    def body(*refs):
        given = dict(zip((*names, "other", "out", *(f"{x}_smem" for x in names)), refs))
        *_, other_smem, barrier = refs
        held = {x: given[f"{x}_smem"] for x in names}
        held["codes"] = held["codes"].at[lax.axis_index("i")]
        for x in names:
            plgpu.copy_gmem_to_smem(given[x], held[x], barrier)
        loaded = plgpu.load(given["other"], layout=plgpu.Layout.WGMMA, optimized=False)
        other_smem[...] = loaded
        plgpu.commit_smem()
        plgpu.barrier_wait(barrier)
        numbers = getattr(gpu_elements, which)(form, held, None)

        def multiply(acc):
            plgpu.wgmma(acc, numbers, other_smem.transpose((1, 0)))
            return acc[...]

        accumulator = plgpu.ACC((rows, depth), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        given["out"][...] = pl.run_scoped(multiply, accumulator)

    body.__name__ = f"elements_{name}"
    scratch = [
        plgpu.SMEM((2, *arrays[x].shape) if x == "codes" else arrays[x].shape, arrays[x].dtype)
        for x in names
    ]
    scratch += [plgpu.SMEM((depth, depth), jnp.float16), plgpu.Barrier(num_arrivals=len(names))]
    out = jax.ShapeDtypeStruct((rows, depth), jnp.float32)
    kernel = plgpu.kernel(body, out_type=out, scratch_types=scratch, grid=(2,), grid_names=("i",))
    other = jax.ShapeDtypeStruct((depth, depth), jnp.float16)
    return kernel, (*arrays.values(), other)


def taker(dtype):
    """Return a kernel, and its arguments, that takes entries of an array, one per row."""

    def body(entries_ref, index_ref, out_ref, entries_smem, barrier):
        plgpu.copy_gmem_to_smem(entries_ref, entries_smem, barrier)
        plgpu.barrier_wait(barrier)
        index = plgpu.load(index_ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        out_ref[...] = gpu_tiles.take(entries_smem, index, None)

    body.__name__ = f"take_{dtype}"
    entries = jax.ShapeDtypeStruct((256,), dtype)
    index = jax.ShapeDtypeStruct((128,), jnp.int32)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(index.shape, jnp.float32),
        scratch_types=[plgpu.SMEM(entries.shape, dtype), plgpu.Barrier()],
    )
    return kernel, (entries, index)


def aot_cases():
    """Return one case per form of keys and values, and the decoders alone."""
    cases = [_case(name, *variant) for name, variant in VARIANTS.items()]
    for which in ("keys", "values"):
        for bits in gpu_tiles.BASE:
            cases.append(Case(f"quantized_{which}_{bits}", *decoder(which, bits), targets=HOPPER))
    for name in ELEMENTS:
        built = element_decoder(name)
        slow = name not in ("keys_4_rotated", "values_3")
        cases.append(Case(f"quantized_elements_{name}", *built, targets=HOPPER, slow=slow))
    for dtype in ("bfloat16", "float16"):
        cases.append(Case(f"quantized_take_{dtype}", *taker(dtype), targets=HOPPER))
    return cases
