# SPDX-License-Identifier: Apache-2.0
"""The one form of a packed tensor: integer codes, what turns them back, and a few exact entries.

An element is `scale * level + offset + residual`: `level` is the code itself or what a table holds
for it, and `residual` belongs to the few elements of a row that have a slot of their own. Scales
and offsets are shared by rectangles of rows and columns, so per-token, per-channel and group-wise
quantization are one form. How to choose codes is `sqzjax.quant`'s affair; this is what they mean.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.packing import unpack, unpadded, wide_bits, widen, words_of


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "offset", "table", "residual", "place"],
    meta_fields=["bits", "width", "bias"],
)
@dataclass(frozen=True)
class QTensor:
    """A packed `[..., S, H]` tensor: S rows (tokens) of H = `width` columns (channels).

    * `codes`: uint32 `[..., S, words_of(H, bits)]`, or an 8-bit float type `[..., S, H]`, whose
      values are the levels (then `table` is None);
    * `scale`: any float `[..., S', H']`, S' dividing S and H' dividing H: entry (i, j) serves a
      rectangle of S/S' rows and H/H' columns; `offset` likewise or None for zero;
    * `table`: float `[..., 1, 2**bits]` of levels, the same for all rows, or None: the level of a
      code is the code less `bias`;
    * `residual`: float `[..., S, E]`, added to the columns `place` (uint8 or uint16) `[..., S, E]`
      of its row; unused slots hold zero. None where there are no slots.

    Leading axes of `scale`, `offset` and `table` may be 1 and broadcast.
    """

    codes: Any
    scale: Any
    offset: Any
    table: Any
    residual: Any
    place: Any
    bits: int
    width: int
    bias: int = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of all arrays, from their shapes."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def average_bits(self) -> float:
        """Return the bits per element, scales, offsets, tables and slots included."""
        rows = math.prod(self.codes.shape[:-1])
        return 8 * self.nbytes / (rows * self.width)


def validate(tensor: QTensor) -> None:
    """Raise ValueError naming the first invariant of `QTensor` that does not hold."""
    rows, width = tensor.codes.shape[-2], tensor.width
    packed = tensor.codes.dtype == jnp.uint32
    columns = words_of(width, tensor.bits) if packed else width
    if tensor.codes.shape[-1] != columns:
        raise ValueError(
            f"codes.shape={tensor.codes.shape} must end in {columns} for width={width} and "
            f"bits={tensor.bits}; pack the codes with pallas_kernels.packing.pack"
        )
    for name, value in (("scale", tensor.scale), ("offset", tensor.offset)):
        if value is not None and (rows % value.shape[-2] or width % value.shape[-1]):
            raise ValueError(
                f"{name}.shape={value.shape} must end in divisors of the {rows} rows and "
                f"{width} columns of the tensor"
            )
    table = tensor.table
    if table is not None and (not packed or table.shape[-2:] != (1, 2**tensor.bits)):
        raise ValueError(
            f"table.shape={table.shape} must end in (1, {2**tensor.bits}) for bits={tensor.bits} "
            "and packed codes"
        )
    if (tensor.residual is None) != (tensor.place is None):
        raise ValueError("residual and place must be given together, or both be None")


def levels(tensor: QTensor, dtype: Any = jnp.float32) -> Array:
    """Return the levels `[..., S, H]` of a tensor's codes, before scales and offsets."""
    out = _levels(tensor, dtype)
    return out.reshape(*tensor.codes.shape[:-1], tensor.width)


def _levels(tensor: QTensor, dtype: Any) -> Array:
    """Return the levels `[..., S, P, H/P]`, P the planes in which the codes are packed, or 1."""
    bits, width = tensor.bits, tensor.width
    if tensor.codes.dtype != jnp.uint32:
        return tensor.codes.astype(dtype)[..., None, :]
    if unpadded(bits, width):
        words, wide = widen(tensor.codes, bits, width), wide_bits(bits)
        shifts = jnp.arange(0, 32, wide, dtype=jnp.uint32)[:, None]
        codes = (words[..., None, :] >> shifts) & (2**wide - 1)
    else:
        codes = unpack(tensor.codes, bits, width)[..., None, :]
    if tensor.table is None:
        return (codes.astype(jnp.int32) - tensor.bias).astype(dtype)
    return look_up(tensor.table[..., None, :], codes, bits, dtype)


def look_up(table: Array, codes: Array, bits: int, dtype: Any = jnp.float32) -> Array:
    """Return `table[..., 0, codes]` by a tree of selects, which vectorises where a gather does not.

    `table` `[..., 1, 2**bits]`, `codes` uint32 `[..., S, H]`; 2**bits - 1 selects per element.
    """
    entries = [table[..., :, i : i + 1].astype(dtype) for i in range(2**bits)]
    for bit in range(bits):
        high = (codes >> bit) & 1 == 1
        entries = [jnp.where(high, b, a) for a, b in zip(entries[::2], entries[1::2])]
    return entries[0]


def stretch(factors: Array, rows: int, width: int) -> Array:
    """Repeat factors `[..., S', H']` to `[..., S, H]`; sizes of one are left to broadcast."""
    *lead, down, across = factors.shape
    # Not jnp.repeat, which is a gather: a broadcast that is reshaped fuses into its reader.
    if down > 1:
        factors = jnp.broadcast_to(factors[..., None, :], (*lead, down, rows // down, across))
        down = rows
    if across > 1:
        factors = factors.reshape(*lead, down, across, 1)
        factors = jnp.broadcast_to(factors, (*lead, down, across, width // across))
        across = width
    return factors.reshape(*lead, down, across)


def dequantize(tensor: QTensor, dtype: Any = jnp.float32) -> Array:
    """Return the elements `[..., S, H]` of a (small) tensor; sums are made in `dtype`."""
    rows, width = tensor.codes.shape[-2], tensor.width
    out = _levels(tensor, dtype)
    *lead, _, planes, size = out.shape
    # Rows that share a scale are an axis of their own: were its factors repeated row by row, the
    # loop would find them by divisions and lose its vectors.
    down = math.lcm(*(x.shape[-2] for x in (tensor.scale, tensor.offset) if x is not None))
    out = out.reshape(*lead, down, rows // down, planes, size)

    def by_planes(factors: Array) -> Array:
        factors = factors.astype(dtype)
        if planes % factors.shape[-1] == 0:
            factors = stretch(factors, down, planes)[..., None]
        else:
            factors = stretch(factors, down, width)
            factors = factors.reshape(*factors.shape[:-1], planes, size)
        return factors[..., None, :, :]

    out *= by_planes(tensor.scale)
    if tensor.offset is not None:
        out += by_planes(tensor.offset)
    if tensor.residual is not None:
        out += spread(tensor, dtype).reshape(out.shape)
    # Loops over planes are what vectorises; after a reshape XLA would make one of single elements.
    return jax.lax.optimization_barrier(out).reshape(*tensor.codes.shape[:-1], width)


def spread(tensor: QTensor, dtype: Any = jnp.float32) -> Array:
    """Return the residuals of a tensor at their places, `[..., S, H]`, zero elsewhere.

    Compares every column with every slot: a handful of selects that fuse into the sum, where a
    scatter would run element by element.
    """
    column = jnp.arange(tensor.width, dtype=jnp.int32)
    out = jnp.zeros((), dtype)
    for slot in range(tensor.residual.shape[-1]):
        place = tensor.place[..., slot : slot + 1].astype(jnp.int32)
        value = tensor.residual[..., slot : slot + 1].astype(dtype)
        out = out + jnp.where(place == column, value, 0)
    return out


def rows_of(
    tensor: QTensor, start: Any, count: int, total: int, *, sequence: Any = None
) -> QTensor:
    """Return the rows `start .. start + count - 1` of a tensor of `total` rows.

    `start` may be traced; it and `count` must be multiples of the rows that share a scale. With
    `sequence`, an index into the first axis that may be traced too, only of that one (`[1, ...]`).
    """

    def cut(leaf: Array | None) -> Array | None:
        if leaf is None:
            return None
        starts, sizes = [0] * leaf.ndim, list(leaf.shape)
        if leaf.shape[-2] > 1:
            group = total // leaf.shape[-2]
            starts[-2], sizes[-2] = start // group, max(count // group, 1)
        if sequence is not None and leaf.shape[0] > 1:
            starts[0], sizes[0] = sequence, 1
        return leaf if sizes == list(leaf.shape) else jax.lax.dynamic_slice(leaf, starts, sizes)

    names = ("codes", "scale", "offset", "table", "residual", "place")
    cuts = {name: cut(getattr(tensor, name)) for name in names}
    return replace(tensor, **cuts)
