# SPDX-License-Identifier: Apache-2.0
"""Turning packed tokens into operands of wgmma in the registers of a Hopper warpgroup.

Both operands come from words as they are stored, a token after the other, 128 channels each. Two
fields of a word that lie 16 bits apart become two bfloat16 numbers by a shift and one logic
instruction. Keys are read by words: a thread's two neighbouring columns are channels c and c + 64.
Values are transposed on the way into registers, as 16-bit pieces of words (`ldmatrix.trans`): a
thread's pair are then two tokens of one channel. The order of channels is any that suits; `keys`
and `values` state it. Codes of 3 bits join their two planes with two more instructions per pair.
"""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.packing import PLANES, unpack, words_of
from pallas_kernels.quantized_decode_attention import gpu_registers as reg

WIDTH = 128
TOKENS = 64
"""Tokens of a tile: the rows of wgmma for keys, its contraction for values."""
BASE = {2: 128, 3: 128, 4: 128, 8: -128}
"""What `keys` and `values` add to the codes of each width."""
_LAYOUT = plgpu.Layout.WGMMA
_ROWS = _LAYOUT.reduce(1)


def key_order(bits: int) -> np.ndarray:
    """Return the channel of each column of `keys`."""
    plane = PLANES[bits][0]
    half, words = 16 // plane, 4 * plane
    tile, q, z = np.meshgrid(np.arange(16), np.arange(4), np.arange(2), indexing="ij")
    both, field = np.divmod(tile, half)
    word = 8 * (both // 2) + 2 * q + both % 2
    return (word + words * (field + half * z)).reshape(-1)


def value_order(bits: int) -> np.ndarray:
    """Return the channel of each row of `values`."""
    plane = PLANES[bits][0]
    half, words = 16 // plane, 4 * plane
    i, warp, k, g = np.meshgrid(*map(np.arange, (2, 4, 2, 8)), indexing="ij")
    block, field = np.divmod(4 * warp + 2 * i + k, half)
    piece = 8 * block + g
    return (piece // 2 + words * (field + half * (piece % 2))).reshape(-1)


def keys(words_ref, tile: int, bits: int, interpret: Any):
    """Return tokens `[64, 128]` of one tile of a block: codes plus `BASE`, bfloat16."""
    count = words_of(WIDTH, bits)
    if interpret:
        codes = _plain(words_ref, tile, bits).reshape(TOKENS, 2, 16 // PLANES[bits][0], -1, 4, 2)
        return codes.transpose(0, 3, 5, 2, 4, 1).reshape(TOKENS, WIDTH)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(
            (TOKENS, WIDTH), jnp.dtype(jnp.bfloat16), layout=_LAYOUT
        ),
    )
    def run(_, ref):
        warp, group, q = reg.thread()
        token = reg.add(reg.mul(warp, 16), group)
        first = reg.add(reg.mul(token, 4 * count), 4 * tile * TOKENS * count)
        plane = PLANES[bits][0]
        half = 16 // plane
        registers = np.empty((1, 16, 2), dtype=object)
        for k in range(2):
            row = reg.add(first, 8 * k * 4 * count)
            top = None
            if bits == 3:
                place = reg.add(row, reg.add(reg.mul(reg.band(q, 1), 8), 32))
                top = [reg.shr(x, reg.shr(q, 1)) for x in reg.load_words(ref, place, 2)]
            for t in range(plane // 2):
                pair = reg.load_words(ref, reg.add(row, reg.add(reg.mul(q, 8), 32 * t)), 2)
                for e in range(2):
                    for j in range(half):
                        value = _floats(pair[e], bits, j, top[e] if top else None)
                        registers[0, (2 * t + e) * half + j, k] = value
        return reg.fragment(registers, (TOKENS, WIDTH))

    return run(words_ref)  # pyright: ignore[reportCallIssue]


def values(words_ref, tile: int, bits: int, interpret: Any):
    """Return channels `[128, 64]` of one tile of a block: codes plus `BASE`, bfloat16."""
    count = words_of(WIDTH, bits)
    if interpret:
        codes = _plain(words_ref, tile, bits).reshape(TOKENS, 2, 16 // PLANES[bits][0], -1)
        codes = codes.transpose(3, 1, 2, 0)  # a piece is a half of a word
        codes = codes.reshape(-1, 8, *codes.shape[2:]).swapaxes(1, 2).reshape(4, 2, 2, 8, TOKENS)
        return codes.swapaxes(0, 1).reshape(WIDTH, TOKENS)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(
            (WIDTH, TOKENS), jnp.dtype(jnp.bfloat16), layout=_LAYOUT
        ),
    )
    def run(_, ref):
        warp, _group, _q = reg.thread()
        lane = reg.band(mgpu.utils.thread_idx(), 31)
        row = reg.add(reg.mul(lane, 4 * count), 4 * tile * TOKENS * count)
        plane = PLANES[bits][0]
        half = 16 // plane
        # A warp has four of the (block of 8 pieces, field) of a token, see `value_order`.
        blocks = max(4 // half, 1)
        sharing = max(half // 4, 1)  # warps with the same pieces
        block = reg.mul(warp, blocks) if blocks > 1 else reg.shr(warp, sharing.bit_length() - 1)
        skipped = reg.mul(reg.band(warp, sharing - 1), 4 * plane)  # bits before its first field
        registers = np.empty((2, TOKENS // 8, 2), dtype=object)
        for part in range(TOKENS // 32):
            here = reg.add(row, 32 * part * 4 * count)
            loaded = [
                reg.load_transposed(ref, reg.add(here, reg.add(reg.mul(block, 16), 16 * n)))
                for n in range(blocks)
            ]
            if sharing > 1:
                loaded = [[reg.shr(x, skipped) for x in four] for four in loaded]
            top: Any = None
            if bits == 3:
                behind = reg.add(skipped, block)
                top = [reg.shr(x, behind) for x in reg.load_transposed(ref, reg.add(here, 32))]
            for i in range(2):
                for k in range(2):
                    n, j = divmod(2 * i + k, min(half, 4))
                    for c in range(4):
                        value = _floats(loaded[n][c], bits, j, top[c] if top else None)
                        registers[i, 4 * part + c, k] = value
        return reg.fragment(registers, (WIDTH, TOKENS))

    return run(words_ref)  # pyright: ignore[reportCallIssue]


def take(ref, index, interpret: Any):
    """Return 16-bit entries `ref.flat[index]` of shared memory as float32, one per row."""
    if interpret:
        return ref[...].reshape(-1)[index].astype(jnp.float32)
    size, dtype = index.shape, ref.dtype

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _ROWS),
        return_type=plgpu.ShapeDtypeStruct(size, dtype, layout=_ROWS),
    )
    def run(_, ref, index):
        element = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
        out = np.empty_like(index.registers)
        one = ir.VectorType.get((1,), element)
        for at, number in np.ndenumerate(index.registers):
            if isinstance(number.type, ir.VectorType):
                number = vector.extract(
                    number, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
                )
            kind = one if isinstance(index.registers[at].type, ir.VectorType) else element
            out[at] = llvm.load(kind, reg.pointer(ref, reg.mul(number, 2)), alignment=2)
        return mgpu.FragmentedArray(_registers=out, _layout=index.layout, _is_signed=None)

    found: Any = run(ref, index)  # pyright: ignore[reportCallIssue]
    return found.astype(jnp.float32)


def _plain(words_ref, tile: int, bits: int):
    """Return tokens of a tile in the order of their channels, for interpretation."""
    words = words_ref[...].reshape(-1, words_of(WIDTH, bits))
    codes = unpack(words[tile * TOKENS : (tile + 1) * TOKENS], bits, WIDTH)
    return (codes.astype(jnp.int32) + BASE[bits]).astype(jnp.bfloat16)


def _floats(word, bits: int, field: int, top):
    """Return fields `field` of both halves of a word as bfloat16, plus `BASE`.

    `top`, for 3 bits, holds the highest bit of a code in every other place.
    """
    plane = PLANES[bits][0]
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    if bits == 8:
        word = reg.shr(word, 8 * field)
        low = mgpu.utils.bitcast(_logic(word, 0x7F, 0x4300, "0xEA"), pair)
        # 256, or 128 where the highest bit is set.
        high = mgpu.utils.bitcast(_logic(word, 0x80, 0x4380, "0x6A"), pair)
        return arith.subf(low, high)
    value = _logic(reg.shr(word, plane * field), (1 << plane) - 1, 0x4300, "0xEA")
    if top is not None:
        top = reg.shr(top, 2 * field - 2) if field else reg.shl(top, 2)
        value = reg.logic(top, reg.twice(4), value, "0xEA")
    return mgpu.utils.bitcast(value, pair)


def _logic(word, mask: int, other: int, table: str):
    """Return (word & mask) | other ("0xEA") or ^ other ("0x6A"), in both halves."""
    return reg.logic(word, reg.twice(mask), reg.twice(other), table)
