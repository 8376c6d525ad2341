# SPDX-License-Identifier: Apache-2.0
"""Planar packing of small unsigned codes into 32-bit words, exact for 1, 2, 3, 4, 6 and 8 bits.

Word w of a row of W words holds the codes w, w + W, w + 2 W, ... from its low bits up, so that
unpacking shifts whole rows and the rotary partner of a channel lies in another plane. Codes of 3
and 6 bits are two planes, of 2 + 1 and 4 + 2 bits (the low bits first): none straddles a word.
A row whose length does not fill its words is padded with zero codes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.common import check

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
"""Bits of the planes that codes of each width are split into, low bits first."""


def words_of(count: int, bits: int) -> int:
    """Return how many 32-bit words hold `count` codes of `bits` bits."""
    check("bits", bits, bits in PLANES, f"must be one of {', '.join(map(str, PLANES))}")
    return sum(-(-count * plane // 32) for plane in PLANES[bits])


def pack(codes: Array, bits: int) -> Array:
    """Return codes `[..., n]` (any integer type, 0 .. 2**bits - 1) as uint32 `[..., words]`."""
    count = codes.shape[-1]
    words_of(count, bits)
    codes, parts, shift = codes.astype(jnp.uint32), [], 0
    for plane in PLANES[bits]:
        per, words = 32 // plane, -(-count * plane // 32)
        digits = (codes >> shift) & (2**plane - 1)
        missing = [(0, 0)] * (codes.ndim - 1) + [(0, per * words - count)]
        digits = jnp.pad(digits, missing).reshape(*codes.shape[:-1], per, words)
        offsets = jnp.arange(0, 32, plane, dtype=jnp.uint32)[:, None]
        # The digits of a word do not overlap: their sum is their union.
        parts.append(jnp.sum(digits << offsets, axis=-2, dtype=jnp.uint32))
        shift += plane
    return jnp.concatenate(parts, axis=-1)


def unpack(words: Array, bits: int, count: int) -> Array:
    """Return the uint32 codes `[..., count]` of words made by `pack`."""
    total, start, shift = jnp.uint32(0), 0, 0
    rule = f"must end in {words_of(count, bits)} words for {count} codes of {bits} bits"
    check("words.shape", words.shape, words.shape[-1] == words_of(count, bits), rule)
    for plane in PLANES[bits]:
        size = -(-count * plane // 32)
        part = words[..., None, start : start + size]
        offsets = jnp.arange(0, 32, plane, dtype=jnp.uint32)[:, None]
        # A broadcast that is reshaped fuses into its reader; joined slices would not.
        digits = ((part >> offsets) & (2**plane - 1)).reshape(*words.shape[:-1], -1)
        total += digits[..., :count] << shift
        start, shift = start + size, shift + plane
    return total


def wide_bits(bits: int) -> int:
    """Return the bits of the one plane that `widen` makes of codes: 4 or 8."""
    return 4 if bits <= 4 else 8


def widen(words: Array, bits: int, count: int) -> Array:
    """Return the words of the same codes in one plane of `wide_bits(bits)`.

    What reads the result handles one plane of at least 16 words where H = 128, whatever the width
    of the codes: a plane of p bits in W words becomes one of P bits by shifting P/p copies of
    itself. Needs planes without padding.
    """
    wide = wide_bits(bits)
    if bits == wide:
        return words
    *lead, rows, _ = words.shape
    # A tile is cut out once, not by the index arithmetic of every word.
    words = jax.lax.optimization_barrier(words)
    total, start, shift = jnp.uint32(0), 0, 0
    for plane in PLANES[bits]:
        size = count * plane // 32
        offsets = np.arange(0, wide, plane, dtype=np.uint32)[:, None]
        mask = sum((2**plane - 1) << field for field in range(0, 32, wide))
        copies = (words[..., None, start : start + size] >> offsets) & np.uint32(mask)
        total |= copies.reshape(*lead, rows, -1) << shift
        start, shift = start + size, shift + plane
    return jax.lax.optimization_barrier(total)


def unpadded(bits: int, count: int) -> bool:
    """Return whether rows of `count` codes fill the words of every plane."""
    return all(count * plane % 32 == 0 for plane in PLANES[bits])


class Fields(NamedTuple):
    """Where the fields of a word lie, to read them without shifting them down.

    `unit` times what `levels` returns are the levels: a power of two that belongs to the other
    factor of a product. The uppermost is shifted by its own width: as an integer with a sign it
    would be negative, and AVX2 cannot convert others.
    """

    shift: np.ndarray  # P uint32
    mask: np.ndarray  # P uint32
    unit: np.ndarray  # P float32

    def levels(self, words: Array, bias: int, planes: Any) -> Array:
        """Return fields of every word: `planes` is an index, or indices `[..., P, 1]`."""
        level = ((words >> self.shift[planes]) & self.mask[planes]).astype(jnp.int32)
        level = level.astype(jnp.float32)
        return level - np.float32(bias) / self.unit[planes] if bias else level

    def planes(self, groups: int) -> np.ndarray:
        """Return the indices of all planes `[groups, P / groups, 1]`."""
        return np.arange(len(self.unit)).reshape(groups, -1, 1)


def fields_of(bits: int) -> Fields:
    """Return where words hold their codes of 1, 2, 4 or 8 bits."""
    lowest = np.arange(0, 32, bits)
    shift = np.where(lowest == lowest[-1], bits, 0)
    mask, unit = (2**bits - 1) << (lowest - shift), 2.0 ** (shift - lowest)
    return Fields(shift.astype(np.uint32), mask.astype(np.uint32), unit.astype(np.float32))
