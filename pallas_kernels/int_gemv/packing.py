# SPDX-License-Identifier: Apache-2.0
"""Integer weights as they are stored for `int_gemv`, and how to make and undo that form.

One array of codes serves every backend of a platform without a copy per call. GPUs and CPUs read
layout "words": rows of outputs, with codes in `uint32` words ordered so that one logic instruction
turns two codes into two floats. TPUs read layout "rows": jax's own int4 or int8, inputs first.
A weight takes `bits / 8` bytes per element plus `4 / group_size` for its scales.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import PartitionSpec

from pallas_kernels.common import Target, check, current_target

Layout = Literal["words", "rows"]
LAYOUTS = ("words", "rows")
WORDS_PER_TILE = 8
"""Words that one row of a tensor core fragment spans; the order of codes repeats with it."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales"),
    meta_fields=("bits", "group_size", "layout"),
)
@dataclass(frozen=True)
class PackedWeights:
    """A `[K_in, N]` linear kernel of signed integer codes with a scale per group and output.

    Weight `[k, n]` is `scales[k // group_size, n] * code[k, n]`. What holds:

    * `bits` is 4 or 8; a code lies in `-2**(bits-1) .. 2**(bits-1) - 1`; there is no zero point;
    * layout "words": `codes` is uint32 `[N, K_in * bits / 32]`, stored with `2**(bits-1)` added for
      4 bits and in two's complement for 8; `group_size` is a multiple of 32, and K_in one of
      `256 / bits`; `word_order` says where each channel lies;
    * layout "rows": `codes` is jnp.int4 or jnp.int8 `[K_in, N]`;
    * `scales` is float32 `[K_in / group_size, N]` in both;
    * leading axes (stacked layers) may be mapped over: shapes are read off the arrays.
    """

    codes: Any  # N W uint32, or K_in N int4 | int8
    scales: Any  # K_in/group_size N float32
    bits: int
    group_size: int
    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        """Return (K_in, N)."""
        if self.layout == "rows":
            return self.codes.shape[-2:]
        return self.codes.shape[-1] * 32 // self.bits, self.codes.shape[-2]

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales on a device."""
        bits = 32 if self.layout == "words" else self.bits
        return math.prod(self.codes.shape) * bits // 8 + 4 * math.prod(self.scales.shape)

    def specs(self, outputs: Any = None, inputs: Any = None) -> "PackedWeights":
        """Return the tree of PartitionSpecs that shards N over `outputs` and K_in over `inputs`.

        Each device's share must satisfy the invariants by itself; with K_in sharded, the product
        is a partial sum.
        """
        codes = (outputs, inputs) if self.layout == "words" else (inputs, outputs)
        return PackedWeights(
            PartitionSpec(*codes),
            PartitionSpec(inputs, outputs),
            self.bits,
            self.group_size,
            self.layout,
        )


def word_order(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (word, field) of each channel of a tile of eight words; field f starts at bit f*bits.

    A thread of a warpgroup holds words 2q and 2q+1 of its rows of a tile, and wants the channels
    8i + 2q and 8i + 2q + 1 of every 8-channel column i as the two halves of one register: fields j
    and j + 16/bits of a word, which `(word >> bits * j) & mask` brings there.
    """
    half = 16 // bits
    even, j, q, z = np.meshgrid(*map(np.arange, (2, half, 4, 2)), indexing="ij")
    return (2 * q + even).reshape(-1), (j + half * z).reshape(-1)


def fits_words(inputs: int, bits: int, group_size: int) -> bool:
    """Say whether layout "words" can hold a kernel of these sizes."""
    return inputs % (32 * WORDS_PER_TILE // bits) == 0 and group_size % 32 == 0


def _choose_layout(inputs: int, bits: int, group_size: int, target: Target | None) -> Layout:
    target = current_target() if target is None else target
    return (
        "rows" if target.platform == "tpu" or not fits_words(inputs, bits, group_size) else "words"
    )


def pack(
    codes: Array | np.ndarray,
    scales: Array | np.ndarray,
    *,
    bits: int,
    target: Target | None = None,
    layout: Layout | None = None,
) -> PackedWeights:
    """Return codes `[K_in, N]` (int8 or int4) and scales `[K_in/group_size, N]` in stored form.

    The layout is that of the platform of `target` (default: the current one) unless given. Codes
    out of range raise ValueError where their values are known, and wrap around under `jit`.
    """
    group_size = _check_codes(codes, scales, bits)
    inputs, outputs = codes.shape
    if layout is None:
        layout = _choose_layout(inputs, bits, group_size, target)
    check("layout", layout, layout in LAYOUTS, f"is unknown; use one of {', '.join(LAYOUTS)}")
    scales = jnp.asarray(scales, jnp.float32)
    if layout == "rows":
        rows = jnp.asarray(codes).astype(jnp.int4 if bits == 4 else jnp.int8)
        return PackedWeights(rows, scales, bits, group_size, layout)
    check(
        "layout",
        layout,
        fits_words(inputs, bits, group_size),
        f"needs K_in a multiple of {256 // bits} and groups of a multiple of 32, not "
        f"K_in={inputs} and group_size={group_size}; use layout='rows'",
    )
    word, field = word_order(bits)
    # Channel of each (word, field) of a tile: the inverse of word_order.
    channel = np.lexsort((field, word)).reshape(WORDS_PER_TILE, 32 // bits)
    bias = 8 if bits == 4 else 0
    unsigned = (jnp.asarray(codes).T.astype(jnp.int32) + bias) & (2**bits - 1)
    tiles = unsigned.astype(jnp.uint32).reshape(outputs, -1, word.size)
    shifted = tiles[:, :, channel] << jnp.arange(0, 32, bits, dtype=jnp.uint32)
    words = shifted.sum(-1, dtype=jnp.uint32).reshape(outputs, -1)
    return PackedWeights(words, scales, bits, group_size, layout)


def unpack(weights: PackedWeights) -> tuple[Array, Array]:
    """Return the int8 codes `[K_in, N]` and the scales that `pack` was given."""
    if weights.layout == "rows":
        return weights.codes.astype(jnp.int8), weights.scales
    return decode_words(weights.codes, weights.bits).T.astype(jnp.int8), weights.scales


def decode_words(words: Array, bits: int) -> Array:
    """Return the int32 codes `[N, K_in]` of words `[N, W]`, in the order of the channels."""
    fields = [decode_field(words, bits, field) for field in range(32 // bits)]
    rows, half = words.shape[0], 16 // bits
    codes = jnp.stack(fields, -1).reshape(rows, -1, 4, 2, 2, half)  # N tile q even z j
    return codes.transpose(0, 1, 3, 5, 2, 4).reshape(rows, -1)


def decode_field(words: Array, bits: int, field: int) -> Array:
    """Return the int32 codes in one field of each word."""
    unsigned = (words >> jnp.uint32(bits * field)) & jnp.uint32(2**bits - 1)
    if bits == 4:
        return unsigned.astype(jnp.int32) - 8
    return unsigned.astype(jnp.int8).astype(jnp.int32)


def quantize(kernel: Array | np.ndarray, *, bits: int, group_size: int) -> tuple[Array, Array]:
    """Return (codes, scales) of a float kernel `[K_in, N]`: symmetric, by the largest magnitude.

    A group's scale is its largest magnitude over `2**(bits-1) - 1`, codes are rounded to nearest
    and span `-2**(bits-1) + 1 .. 2**(bits-1) - 1`: the lowest code is not used, so that zero is the
    middle. A group of zeros gets scale 0.
    """
    check("bits", bits, bits in (4, 8), "must be 4 or 8")
    kernel = jnp.asarray(kernel)
    rule = "must have two axes of a floating type [K_in, N]"
    floating = jnp.issubdtype(kernel.dtype, jnp.floating)
    check("kernel", f"{kernel.dtype}{kernel.shape}", kernel.ndim == 2 and floating, rule)
    inputs, outputs = kernel.shape
    divides = group_size > 0 and inputs % group_size == 0
    check("group_size", group_size, divides, f"must divide K_in={inputs}; use K_in for one group")
    groups = kernel.astype(jnp.float32).reshape(-1, group_size, outputs)
    highest = 2 ** (bits - 1) - 1
    scales = jnp.abs(groups).max(axis=1) / highest
    codes = jnp.round(groups / jnp.where(scales > 0, scales, 1)[:, None])
    # A subnormal scale is rounded coarsely enough to push a code past the highest.
    codes = jnp.clip(codes, -highest, highest)
    return codes.reshape(inputs, outputs).astype(jnp.int8), scales


def _check_codes(codes: Any, scales: Any, bits: int) -> int:
    """Check what `pack` is given and return the group size."""
    check("bits", bits, bits in (4, 8), "must be 4 or 8")
    kinds = ("int8", "int4")
    good = codes.ndim == 2 and str(codes.dtype) in kinds and 0 not in codes.shape
    rule = "must be int8 (or int4) [K_in, N]; cast integer codes with .astype(int8)"
    check("codes", f"{codes.dtype}{tuple(codes.shape)}", good, rule)
    inputs, outputs = codes.shape
    good = scales.ndim == 2 and scales.shape[1] == outputs and scales.shape[0] > 0
    rule = f"must have shape [K_in/group_size, N={outputs}]"
    check("scales", tuple(scales.shape), good, rule)
    rule = "must be a floating type; codes are integers, scales are not"
    check("scales", str(scales.dtype), jnp.issubdtype(scales.dtype, jnp.floating), rule)
    rule = f"groups must divide K_in={inputs}; give one row of scales per group"
    check("scales", tuple(scales.shape), inputs % scales.shape[0] == 0, rule)
    if bits == 4 and str(codes.dtype) == "int8" and not isinstance(codes, Tracer):
        low, high = int(codes.min()), int(codes.max())
        rule = "must lie in -8..7 for bits=4; quantize anew or use bits=8"
        check("codes", f"{low}..{high}", low >= -8 and high <= 7, rule)
    return inputs // scales.shape[0]
