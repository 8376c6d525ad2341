# SPDX-License-Identifier: Apache-2.0
"""Instructions on 32-bit registers of a Hopper warpgroup, for code inside `plgpu.inline_mgpu`."""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector


def thread() -> tuple[Any, Any, Any]:
    """Return warp, lane / 4 and lane % 4 of this thread."""
    number = mgpu.utils.thread_idx()
    lane = band(number, 31)
    return band(shr(number, 5), 3), shr(lane, 2), band(lane, 3)


def constant(number: int) -> Any:
    """Return 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, number))


def twice(number: int) -> int:
    """Return 16 bits in both halves of a word."""
    return number * 0x10001


def add(a, b):
    """Return a + b."""
    return a if isinstance(b, int) and b == 0 else arith.addi(a, _value(b))


def sub(a, b):
    """Return a - b."""
    return arith.subi(_value(a), _value(b))


def mul(a, b):
    """Return a * b."""
    return a if isinstance(b, int) and b == 1 else arith.muli(a, _value(b))


def band(a, b):
    """Return a & b."""
    return arith.andi(a, _value(b))


def shr(a, b):
    """Return a >> b, zeros coming in."""
    return a if isinstance(b, int) and b == 0 else arith.shrui(a, _value(b))


def shl(a, b):
    """Return a << b."""
    return a if isinstance(b, int) and b == 0 else arith.shli(a, _value(b))


def logic(a, b, c, table: str):
    """Return what `table` says of each triple of bits: 0xF0, 0xCC and 0xAA stand for a, b and c."""
    return assembly(f"lop3.b32 $0, $1, $2, $3, {table};", a, b, c)


def permute(a, b, bytes_: Any):
    """Return the bytes of a (0 to 3) and b (4 to 7) that the four low digits of `bytes_` choose."""
    return assembly("prmt.b32 $0, $1, $2, $3;", a, b, bytes_)


def assembly(text: str, *operands):
    """Return the register `$0` that an instruction makes of operands `$1`, `$2`, ..."""
    i32 = ir.IntegerType.get_signless(32)
    values = [_value(x) for x in operands]
    return llvm.inline_asm(i32, values, text, ",".join(["=r", *["r"] * len(values)]))


def load(ref, offset, bits: int = 32) -> Any:
    """Return the 8, 16 or 32 bits that lie `offset` bytes into shared memory, zeros above them."""
    number = ir.IntegerType.get_signless(bits)
    value = llvm.load(number, pointer(ref, offset), alignment=bits // 8)
    return value if bits == 32 else arith.extui(ir.IntegerType.get_signless(32), value)


def load_words(ref, offset, count: int) -> list[Any]:
    """Return 2 or 4 neighbouring words, `offset` a multiple of their size."""
    i32 = ir.IntegerType.get_signless(32)
    kind = ir.VectorType.get((count,), i32)
    every = llvm.load(kind, pointer(ref, offset), alignment=4 * count)
    return [
        vector.extract(every, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(count)
    ]


def load_transposed(ref, offset) -> list[Any]:
    """Return four 8 x 8 blocks of 16-bit pieces, transposed; each lane points at one row."""
    i32 = ir.IntegerType.get_signless(32)
    four = llvm.StructType.get_literal([i32] * 4)
    text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    loaded = llvm.inline_asm(
        four, [pointer(ref, offset)], text, "=r,=r,=r,=r,r", has_side_effects=True
    )
    return [llvm.extractvalue(i32, loaded, [i]) for i in range(4)]


def pointer(ref, offset):
    """Return the address `offset` bytes into shared memory, 32 bits."""
    base = mgpu.utils.memref_ptr(ref)
    i8 = ir.IntegerType.get_signless(8)
    dynamic = -(2**31)
    return llvm.getelementptr(base.type, base, [offset], [dynamic], i8, llvm.GEPNoWrapFlags.none)


def fragment(registers: np.ndarray, shape: tuple[int, int]):
    """Return pairs of 16-bit floats `[M / 64, N / 8, 2]` as an operand of wgmma."""
    ordered = registers.reshape(mgpu.WGMMA_LAYOUT.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=ordered, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _value(x):
    return constant(x) if isinstance(x, int) else x
