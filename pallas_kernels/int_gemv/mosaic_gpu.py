# SPDX-License-Identifier: Apache-2.0
"""`int_gemv` on Hopper GPUs: tensor cores fed from registers by codes unpacked there.

The product is transposed, y^T = W x^T, so that 64 or 128 outputs fill the rows of the tensor core
and the few rows of x are its columns. Each block of outputs streams its codes, their scales and x
through a ring in shared memory. Blocks share K_in (`splits`) where there are too few outputs to
fill the device; XLA then adds their partial sums. For up to 16 rows the inner loop takes 2.3 to
2.8 instructions per 4-bit code and 3.9 to 4.3 per 8-bit code; the memory of an H200 leaves time for
3.5 and 7. 64 rows in groups of 32 take 5.6 per 4-bit code: there, instructions are the limit.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.common import Target, tuned
from pallas_kernels.int_gemv.packing import decode_words, fits_words
from pallas_kernels.varying import float32_output

_WGMMA = plgpu.Layout.WGMMA
_ROWS = _WGMMA.reduce(1)
_BASE = {jnp.dtype(jnp.bfloat16): 0x4300, jnp.dtype(jnp.float16): 0x6400}
"""Bit patterns of the power of two whose last mantissa bit is worth one: 128 and 1024."""


MAX_ROWS = 64
SHARED_BYTES = 227 * 1024
"""Shared memory of a Hopper multiprocessor that blocks can use."""


@dataclass(frozen=True)
class Config:
    """Tunable sizes: outputs and channels of a tile, tiles in flight, blocks that share K_in."""

    block_n: int
    block_k: int
    stages: int
    splits: int


def default_config(
    rows: int, inputs: int, outputs: int, *, group_size: int, bits: int, target: Target
) -> Config:
    """Return measured sizes where there are any, else ones that keep every multiprocessor busy."""
    key = tuning_key(rows, inputs, outputs, group_size=group_size, bits=bits)
    sizes = tuned("int_gemv", key, target)
    if sizes is not None:
        return Config(**sizes)
    # Many rows: every block reads all of x, so fewer and taller blocks; narrower ones then fit.
    # Of 64 rows and small groups, too many sums would be under way for the registers.
    tall = rows >= 32 and outputs % 128 == 0 and rows // group_size <= 1
    block_n = 128 if tall else 64
    block_k = _block_k(inputs, group_size, bits, longest=(512 if rows >= 32 else 1024) // bits)
    stage = block_k * (block_n * bits // 8 + 2 * rows) + 4 * block_n * max(1, block_k // group_size)
    result = 4 * block_n * rows
    stages = max(2, min(4, (SHARED_BYTES // 2 - 1024 - result) // stage))
    tiles, cores = inputs // block_k, target.cores or 132

    def cost(splits: int) -> int:
        # Bytes that the busiest multiprocessor moves: it runs two blocks at a time or more, each
        # starts with half a tile's delay, and its result is written and read again.
        blocks = max(2, -(-(outputs // block_n) * splits // cores))
        return blocks * (-(-tiles // splits) * stage + stage // 2 + 2 * result)

    return Config(block_n, block_k, stages, min(range(1, min(tiles, 16) + 1), key=cost))


def tuning_key(rows: int, inputs: int, outputs: int, *, group_size: int, bits: int) -> str:
    """Return the name of these sizes, with rows padded to 8, 16, 32 or 64, in tuning tables."""
    return f"m{rows}_k{inputs}_n{outputs}_b{bits}_g{group_size}"


def shared_bytes(config: Config, rows: int, *, group_size: int, bits: int) -> int:
    """Return the shared memory that a block takes, in bytes."""
    groups = max(1, config.block_k // group_size)
    stage = config.block_k * (config.block_n * bits // 8 + 2 * rows) + 4 * config.block_n * groups
    return config.stages * stage + 4 * config.block_n * rows + 1024


def _block_k(inputs: int, group_size: int, bits: int, longest: int) -> int:
    """Return the longest tile that divides K_in and either divides a group or holds whole ones."""
    shortest = 256 // bits
    size = longest
    while size >= shortest:
        if inputs % size == 0 and (size % group_size == 0 or group_size % size == 0):
            return size
        size //= 2
    raise NotImplementedError(
        f"mosaic_gpu: no tile of {shortest}..{longest} channels fits K_in={inputs} in groups of "
        f"{group_size}"
    )


def int_gemv_mosaic_gpu(
    x: Array,
    words: Array,
    scales: Array,
    *,
    group_size: int,
    bits: int,
    target: Target,
    config: Config | None = None,
    interpret: Any = None,
) -> Array:
    """Return x `[M, K_in]` times the kernel in layout "words", float32 `[M, N]`.

    M is at most 64, 21 for float32 x: that is multiplied as three bfloat16 terms, whose sum is
    exact. Codes are exact in 16 bits and scales multiply the float32 sum of a group.
    """
    if x.dtype == jnp.float32:
        return _in_three_terms(x, words, scales, group_size, bits, target, config, interpret)
    (count, inputs), outputs = x.shape, words.shape[0]
    _check_support(x, inputs, outputs, group_size, bits, target, interpret)
    rows = next(size for size in (8, 16, 32, 64) if size >= count)
    sizes = {"group_size": group_size, "bits": bits}
    if config is None:
        config = default_config(rows, inputs, outputs, **sizes, target=target)
    padded = jnp.pad(x, ((0, rows - count), (0, 0)))
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    partial_sums = _run(padded, words, scales, **sizes, config=config, interpret=interpret or None)
    return partial_sums.sum(axis=0)[:, :count].T


def _in_three_terms(x: Array, words: Array, scales: Array, *rest: Any) -> Array:
    """Multiply float32 x as the sum of three bfloat16 arrays, stacked as rows."""
    terms, remainder = [], x
    for _ in range(3):
        # Unlike a cast and back, reduce_precision is never optimised away.
        rounded = lax.reduce_precision(remainder, exponent_bits=8, mantissa_bits=7)
        terms.append(rounded.astype(jnp.bfloat16))
        remainder = remainder - rounded
    group_size, bits, target, config, interpret = rest
    stacked = int_gemv_mosaic_gpu(
        jnp.concatenate(terms),
        words,
        scales,
        group_size=group_size,
        bits=bits,
        target=target,
        config=config,
        interpret=interpret,
    )
    return stacked.reshape(3, *x.shape[:1], -1).sum(axis=0)


def _check_support(
    x: Array, inputs: int, outputs: int, group_size: int, bits: int, target: Target, interpret: Any
) -> None:
    if not interpret and target.capability is not None and target.capability[0] != 9:
        raise NotImplementedError(f"mosaic_gpu: needs a Hopper GPU, not {target.kind}")
    if x.dtype not in _BASE:
        raise NotImplementedError(f"mosaic_gpu: cannot multiply {x.dtype}")
    if not 0 < x.shape[0] <= MAX_ROWS:
        raise NotImplementedError(f"mosaic_gpu: takes 1..{MAX_ROWS} rows, not {x.shape[0]}")
    if outputs % 64 or outputs == 0:
        raise NotImplementedError(f"mosaic_gpu: N={outputs} is no multiple of 64")
    if not fits_words(inputs, bits, group_size):
        raise NotImplementedError(
            f"mosaic_gpu: K_in={inputs} in groups of {group_size} does not fit layout 'words'"
        )


def _run(
    x: Array,
    words: Array,
    scales: Array,
    *,
    group_size: int,
    bits: int,
    config: Config,
    interpret: Any,
) -> Array:
    """Return the partial sums [splits, N, rows] float32."""
    (rows, inputs), outputs = x.shape, words.shape[0]
    block_n, block_k, stages = config.block_n, config.block_k, config.stages
    width = block_k * bits // 32
    part = min(group_size, block_k)  # channels that one scale covers within a tile
    groups = block_k // part
    tiles = inputs // block_k
    share = -(-tiles // config.splits)

    def int_gemv(x_ref, w_ref, s_ref, o_ref, x_tiles, w_tiles, s_tiles, o_tile, ready):
        block, split = lax.axis_index("n"), lax.axis_index("k")
        columns = pl.ds(block * block_n, block_n)
        first = split * share
        steps = jnp.clip(tiles - first, 0, share)

        def fetch(i, slot):
            tile = first + i
            w_part = w_ref.at[columns, pl.ds(tile * width, width)]
            x_part = x_ref.at[:, pl.ds(tile * block_k, block_k)]
            s_part = s_ref.at[pl.ds(lax.div(tile * block_k, group_size), groups), columns]
            plgpu.copy_gmem_to_smem(w_part, w_tiles.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(x_part, x_tiles.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(s_part, s_tiles.at[slot], ready.at[slot])

        for i in range(stages):
            pl.when(i < steps)(functools.partial(fetch, i, i))

        def step(i, total):
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(ready.at[slot])
            total = _add_tile(
                total, w_tiles.at[slot], x_tiles.at[slot], s_tiles.at[slot], bits, part, interpret
            )
            plgpu.commit_smem()  # words and scales were read before the slot is filled again
            pl.when(i + stages < steps)(functools.partial(fetch, i + stages, slot))
            return total

        zeros = plgpu.layout_cast(jnp.zeros((block_n, rows), jnp.float32), _WGMMA)
        o_tile[...] = lax.fori_loop(0, steps, step, zeros)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_tile, o_ref.at[split, columns])
        plgpu.wait_smem_to_gmem(0)

    piece = max(part, 256 // bits)
    return plgpu.kernel(
        int_gemv,
        grid=(outputs // block_n, config.splits),
        grid_names=("n", "k"),
        interpret=interpret,
        out_type=float32_output((config.splits, outputs, rows), x, words, scales),
        scratch_types=[
            plgpu.SMEM((stages, rows, block_k), x.dtype, transforms=_swizzled(part, 16)),
            plgpu.SMEM(
                (stages, block_n, width), jnp.uint32, transforms=_swizzled(piece * bits // 32, 32)
            ),
            plgpu.SMEM((stages, groups, block_n), jnp.float32),
            plgpu.SMEM((block_n, rows), jnp.float32),
            plgpu.Barrier(num_barriers=stages, num_arrivals=3),
        ],
    )(x, words, scales)


def _swizzled(columns: int, bits: int) -> tuple[Any, ...]:
    """Return the widest layout of shared memory that slices of `columns` elements allow."""
    width = next(size for size in (128, 64, 32) if columns * bits % (8 * size) == 0)
    tiling = plgpu.TilingTransform((8, width * 8 // bits))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]


def _add_tile(total, w_tile, x_tile, s_tile, bits: int, part: int, interpret: Any):
    """Add the products of one tile to the running total (block_n, rows)."""
    block_k = x_tile.shape[1]
    piece = max(part, 256 // bits)  # words are loaded eight columns at a time
    for start in range(0, block_k, piece):
        columns = pl.ds(start * bits // 32, piece * bits // 32)
        words = plgpu.load(w_tile.at[:, columns], layout=_WGMMA)
        for i, codes in enumerate(_decode(words, bits, part, x_tile.dtype, interpret)):
            channel = start + i * part
            product = _dot(codes, x_tile.at[:, pl.ds(channel, part)], interpret)
            scale = plgpu.load(s_tile.at[channel // part], layout=_ROWS)
            total = total + product * lax.broadcast_in_dim(scale, product.shape, [0])
    return total


def _decode(words, bits: int, part: int, dtype: Any, interpret: Any) -> Any:
    """Turn words (R, C) in registers into exact codes of a 16-bit float type.

    They come as a sequence of arrays (R, part), in the order of the channels.
    """
    rows, columns = words.shape[0], words.shape[1] * 32 // bits
    if interpret:
        codes = decode_words(words, bits).astype(dtype)
        return [codes[:, start : start + part] for start in range(0, columns, part)]
    result = plgpu.ShapeDtypeStruct((rows, part), dtype, layout=_WGMMA)

    @plgpu.inline_mgpu(arg_types=(_WGMMA,), return_type=(result,) * (columns // part))
    def run(_, fragments):
        element = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
        pair = ir.VectorType.get((2,), element)
        source = fragments.registers.reshape(*fragments.registers.shape[:2], 2)
        half = 16 // bits
        registers = np.empty((rows // 64, columns // 8, 2), dtype=object)
        for row, tile, side in np.ndindex(*source.shape):
            for even in range(2):
                position = ir.DenseI64ArrayAttr.get([even])
                word = vector.extract(
                    source[row, tile, side], dynamic_position=[], static_position=position
                )
                for j in range(half):
                    value = _decode_pair(word, bits, j, _BASE[jnp.dtype(dtype)], pair)
                    registers[row, (2 * tile + even) * half + j, side] = value
        return tuple(
            _fragment(registers[:, start : start + part // 8], (rows, part))
            for start in range(0, columns // 8, part // 8)
        )

    return run(words)  # pyright: ignore[reportCallIssue]


def _fragment(registers: np.ndarray, shape: tuple[int, int]) -> Any:
    """Return registers (64-row tile, 8-column tile, upper or lower rows) as an array."""
    layout = mgpu.WGMMA_LAYOUT
    ordered = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=ordered, _layout=layout, _is_signed=None)


def _decode_pair(word: ir.Value, bits: int, field: int, base: int, pair: ir.Type) -> ir.Value:
    """Emit the code of two fields, `field` and the one 16 bits above, as a pair of floats."""
    i32 = ir.IntegerType.get_signless(32)

    def both(halves: int) -> ir.Value:
        return arith.constant(i32, ir.IntegerAttr.get(i32, halves * 0x10001))

    def masked(bits_kept: int) -> ir.Value:
        # (word & mask) | base: the float base + field.
        arguments = [word, both(bits_kept), both(base)]
        text = "lop3.b32 $0, $1, $2, $3, 0xEA;"
        return mgpu.utils.bitcast(llvm.inline_asm(i32, arguments, text, "=r,r,r,r"), pair)

    if field:
        word = arith.shrui(word, arith.constant(i32, ir.IntegerAttr.get(i32, bits * field)))
    if bits == 8:
        # Two's complement: low 7 bits minus 128 times the sign, each exact beside the base.
        return arith.subf(masked(0x7F), masked(0x80))
    offset = mgpu.utils.bitcast(both(base + 8), pair)
    return arith.subf(masked(0xF), offset)


def _dot(codes, x_tile, interpret: Any):
    """Return codes (R, k) in registers times x_tile (m, k) in shared memory: (R, m) float32."""
    if interpret:
        return jnp.dot(codes.astype(jnp.float32), x_tile[...].T.astype(jnp.float32))

    def multiply(accumulator):
        plgpu.wgmma(accumulator, codes, x_tile.transpose((1, 0)))
        return accumulator[...]

    shape = (codes.shape[0], x_tile.shape[0])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))  # pyright: ignore[reportPrivateImportUsage]
