# SPDX-License-Identifier: Apache-2.0
"""The instructions of `ptx` that move and multiply matrices across the lanes of warps.

Written from the PTX ISA's figures of `ldmatrix`, `stmatrix` and `wgmma`, not from any compiler's
use of them. Registers are uint64 per lane, as everywhere in `ptx`.
"""

import numpy as np

_SWIZZLE_128 = 1
_LANES = 128


def load(memory: np.ndarray, starts: np.ndarray, count: int, transposed: bool) -> list[np.ndarray]:
    """Return the registers that `ldmatrix` fills with `count` 8 x 8 matrices of 16-bit numbers."""
    pieces = memory[_places(starts, count)].view(np.uint16)
    if transposed:
        pieces = pieces.swapaxes(2, 3)
    registers = np.ascontiguousarray(pieces).reshape(-1, count, 32, 2).view(np.uint32)
    return [registers[:, i].reshape(-1).astype(np.uint64) for i in range(count)]


def store(memory: np.ndarray, starts: np.ndarray, values: list[np.ndarray], transposed: bool):
    """Write as `stmatrix` does: the reverse of `load`."""
    registers = np.stack([x.astype(np.uint32).reshape(-1, 32) for x in values], axis=1)
    pieces = registers.view(np.uint16).reshape(-1, len(values), 8, 8)
    if transposed:
        pieces = pieces.swapaxes(2, 3)
    memory[_places(starts, len(values))] = np.ascontiguousarray(pieces).view(np.uint8)


def _places(starts: np.ndarray, count: int) -> np.ndarray:
    """Return the 16 bytes of each row: lane 8 m + r of a warp points at row r of matrix m."""
    rows = starts.reshape(-1, 4, 8)[:, :count]
    if (rows % 16).any():
        raise ValueError("a row of a matrix does not start at a multiple of 16 bytes")
    return rows[..., None] + np.arange(16)


def multiply(
    memory: np.ndarray,
    descriptor: np.ndarray,
    a: list[np.ndarray],
    acc: list[np.ndarray],
    dtype: type,
) -> list[np.ndarray]:
    """Return the registers of `acc + a @ b` of a wgmma with 16-bit `a` `[64, 16]` in registers.

    `descriptor` tells where rows of `b`, 16 numbers each, lie in `memory`.
    """
    warp, group, q = _lanes()
    left = np.zeros((64, 16))
    for i, register in enumerate(a):
        pair = register.astype(np.uint32).view(np.uint16).view(dtype).reshape(_LANES, 2)
        for z in range(2):
            left[16 * warp + group + 8 * (i % 2), 2 * q + z + 8 * (i // 2)] = pair[:, z]
    product = left @ _operand(memory, descriptor, 2 * len(acc), dtype).T
    result = []
    for i, register in enumerate(acc):
        row, column = 16 * warp + group + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * q + i % 2
        total = register.astype(np.uint32).view(np.float32) + product[row, column]
        result.append(total.astype(np.float32).view(np.uint32).astype(np.uint64))
    return result


def _lanes():
    """Return warp, lane / 4 and lane % 4 of the lanes of a warpgroup."""
    lane = np.arange(_LANES)
    return lane // 32, lane % 32 // 4, lane % 4


def _operand(memory: np.ndarray, descriptor: np.ndarray, rows: int, dtype: type) -> np.ndarray:
    """Return `[rows, 16]`: eight rows 128 bytes apart, the next eight a stride further."""
    number = int(descriptor[0])
    if (descriptor != number).any() or number >> 62 != _SWIZZLE_128 or number >> 49 & 7:
        raise NotImplementedError(f"descriptor {number:#x}")
    start, stride = (number & 0x3FFF) << 4, (number >> 32 & 0x3FFF) << 4
    row, byte = np.meshgrid(np.arange(rows), np.arange(32), indexing="ij")
    place = start + row // 8 * stride + row % 8 * 128 + byte
    place ^= (place >> 7 & 7) << 4
    return memory[place].view(dtype).astype(np.float64)
