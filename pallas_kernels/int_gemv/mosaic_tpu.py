# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with integer weights for TPU.

Codes are read as they are stored (two 4-bit codes per byte), turned into bfloat16 in registers,
which is exact for up to 8 bits, and multiplied group by group; the scales multiply the float32
partial sums of a group. Chips before v6e convert integers slowly; there, 4-bit codes are turned
into floats eight to a word by logic alone, which takes a quarter (v4) to three quarters (v5e, v5p)
of the instructions, at the price of an offset taken from the sums. Rows wider than bfloat16 are
split into two or three bfloat16 addends that ride along as further rows, so that float32 input
keeps float32 accuracy.

Cost: the codes are read once; a group of 32 or 64 inputs fills a quarter or a half of the matrix
unit, hence takes longer per code than one of 128.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Target, check, round_up
from pallas_kernels.varying import float32_output

LANES = 128
ROWS = 16
"""Rows of a bfloat16 tile."""
MAX_ROWS = 64
MAX_BLOCK_IN = 1024
STEP_BYTES = 1 << 20
"""Codes fetched per grid step: about 1.3 us of a v5e, 0.4 us of a v5p."""
SCALE_BYTES = 1 << 21
"""Scales of all groups of one block of outputs; they stay while the inputs are walked through."""
SUM_BYTES = 1 << 20
"""Float32 sums of one block of outputs; several temporaries are as large."""
OFFSET = 24
"""What words add to the codes: 8 to make them positive, 16 as a bfloat16 with its exponent."""
_ADDENDS = {"bfloat16": 1, "float16": 2, "float32": 3}


@dataclass(frozen=True)
class Config:
    """Tile sizes: inputs and outputs of the codes fetched per grid step.

    `words` is how 4-bit codes become floats: by logic on words of eight instead of a conversion.
    It is ignored for 8 bits and for groups of 32.
    """

    block_in: int
    block_out: int
    words: bool = False

    def __post_init__(self) -> None:
        for name in ("block_in", "block_out"):
            size = getattr(self, name)
            rule = f"must be a positive multiple of {LANES}; use {MAX_BLOCK_IN}"
            check(name, size, size > 0 and size % LANES == 0, rule)


def default_config(
    rows: int, inputs: int, outputs: int, group_size: int, bits: int, target: Target
) -> Config:
    """Return sizes that keep a step's transfer near `STEP_BYTES`, and the faster way to floats.

    `rows` counts the addends of rows. The inputs' block divides `inputs` if any of at least half
    the largest size does.
    """
    widest = min(inputs, MAX_BLOCK_IN) // LANES
    even = [n for n in range(widest, max(widest // 2, 1) - 1, -1) if inputs % (n * LANES) == 0]
    block_in = LANES * (even[0] if even else widest)
    block_out = STEP_BYTES * 8 // (bits * block_in)
    block_out = min(block_out, SCALE_BYTES // (4 * (inputs // group_size)), outputs)
    block_out = min(block_out, SUM_BYTES // (4 * rows))
    words = any(name in target.kind for name in ("v4", "v5"))
    return Config(block_in, max(block_out // LANES, 1) * LANES, words)


def int_gemv_mosaic_tpu(
    x: Array,
    codes: Array,
    scales: Array,
    *,
    group_size: int,
    bits: int,
    target: Target,
    config: Config | None = None,
    interpret: Any = None,
) -> Array:
    """Return `x @ (codes * scales)`, float32 `[M, N]`, scales repeated along groups of inputs.

    `x` is `[M, K_in]` with M <= 64, `codes` jnp.int4 or jnp.int8 `[K_in, N]`, `scales` float32
    `[K_in / group_size, N]`.
    """
    rows, inputs = x.shape
    outputs = codes.shape[1]
    _check_supported(x, codes, group_size, bits)
    padded = round_up(rows, ROWS)
    if config is None:
        stacked = padded * _ADDENDS[str(x.dtype)]
        config = default_config(stacked, inputs, outputs, group_size, bits, target)
    block_in, block_out = min(config.block_in, inputs), min(config.block_out, outputs)
    steps = -(-inputs // block_in)
    chunk = math.gcd(group_size, block_in)
    unit = math.gcd(chunk, LANES) if config.words and bits == 4 and chunk % (4 * ROWS) == 0 else 0
    fixed = _Fixed(inputs // group_size, group_size, block_in, chunk, unit)
    # Rows of zeros fill the tile; zero inputs silence the codes beyond the last row.
    x = jnp.pad(x, ((0, padded - rows), (0, steps * block_in - inputs)))
    x = jnp.concatenate(_addends(x))
    if unit:
        x = _in_order_of_words(x, unit)
    out = pl.pallas_call(
        functools.partial(_kernel, fixed),
        grid=(pl.cdiv(outputs, block_out), steps),
        in_specs=[
            pl.BlockSpec((x.shape[0], block_in), lambda n, k: (0, k)),
            pl.BlockSpec((block_in, block_out), lambda n, k: (k, n)),
            pl.BlockSpec((fixed.groups, block_out), lambda n, k: (0, n)),
        ],
        out_specs=pl.BlockSpec((padded, block_out), lambda n, k: (0, n)),
        out_shape=float32_output((padded, outputs), x, codes, scales),
        scratch_shapes=[pltpu.VMEM((x.shape[0], block_out), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret or False,
        name="int_gemv",
    )(x, codes, scales)
    return out[:rows]


def _check_supported(x: Array, codes: Array, group_size: int, bits: int) -> None:
    (rows, inputs), outputs = x.shape, codes.shape[1]
    stored = {4: jnp.int4, 8: jnp.int8}.get(bits)
    reasons = (
        (rows > MAX_ROWS, f"serves up to {MAX_ROWS} rows, not {rows}"),
        (str(x.dtype) not in _ADDENDS, f"does not take rows of {x.dtype}"),
        (codes.dtype != stored, f"does not take {codes.dtype} codes of {bits} bits"),
        (inputs % LANES, f"needs K_in, here {inputs}, to be a multiple of {LANES}"),
        (outputs % LANES, f"needs N, here {outputs}, to be a multiple of {LANES}"),
        (
            group_size % LANES and group_size not in (32, 64),
            f"needs groups of 32, 64 or a multiple of {LANES} inputs, not {group_size}",
        ),
    )
    for wrong, reason in reasons:
        if wrong:
            raise NotImplementedError(f"mosaic_tpu: {reason}")


class _Fixed(NamedTuple):
    """What is known when the kernel is traced."""

    groups: int
    group_size: int
    block_in: int
    chunk: int  # inputs that lie in one group wherever a block begins
    unit: int  # inputs turned to floats word by word at a time; 0 for plain conversion


def _addends(x: Array) -> list[Array]:
    """Split rows into bfloat16 addends whose sum has every bit of the rows.

    `reduce_precision` stays where XLA would drop a conversion to bfloat16 and back.
    """
    if x.dtype == jnp.bfloat16:
        return [x]
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(_ADDENDS[str(x.dtype)]):
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return parts


def _kernel(fixed: _Fixed, x, codes, scales, out, total) -> None:
    """Add one block of inputs to the sums of one block of outputs."""
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    total[...] += _block_sum(fixed, x, codes, scales, step * fixed.block_in)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        rows = out.shape[0]
        parts = [total[first : first + rows] for first in range(0, total.shape[0], rows)]
        out[...] = functools.reduce(jnp.add, parts[::-1])  # Small addends first.


def _block_sum(fixed: _Fixed, x, codes, scales, first_input) -> Array:
    """Return the float32 sums over one block of inputs, scaled group by group."""

    def scaled_part(first: int) -> Array:
        inputs = slice(first, first + fixed.chunk)
        if fixed.unit:
            part = _dot_by_words(fixed, x[:, inputs], codes[inputs, :])
        else:
            part = _dot(x[:, inputs], codes[inputs, :].astype(jnp.bfloat16))
        # Beyond the last group the inputs are zero, and any finite scale will do.
        group = jnp.minimum(lax.div(first_input + first, fixed.group_size), fixed.groups - 1)
        return part * scales[pl.ds(group, 1), :]

    return functools.reduce(jnp.add, map(scaled_part, range(0, fixed.block_in, fixed.chunk)))


def _dot_by_words(fixed: _Fixed, x, codes) -> Array:
    """Return the product of reordered rows and 4-bit codes, which are not converted one by one."""
    units = [slice(first, first + fixed.unit) for first in range(0, fixed.chunk, fixed.unit)]
    part = _dot(x, jnp.concatenate([_words_to_floats(codes[unit, :]) for unit in units]))
    return part - OFFSET * jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)


def _words_to_floats(codes) -> Array:
    """Return `OFFSET + codes` in bfloat16, rows in the order of `_in_order_of_words`.

    A word holds 8 rows, the first in its lowest bits. Shifted and masked, two of its codes are the
    upper mantissa bits of two bfloat16 of value 16 + code. (The lowest bits and 128 would do as
    well, but the larger the offset, the more digits cancel.)
    """
    word = pltpu.bitcast(codes, jnp.uint32) ^ jnp.uint32(0x88888888)

    def pair(field: int) -> Array:
        shifted = word << 3 if field == 0 else word >> (4 * field - 3)
        floats = (shifted & jnp.uint32(0x00780078)) | jnp.uint32(0x41804180)
        return pltpu.bitcast(floats, jnp.bfloat16)

    return jnp.concatenate([pair(field) for field in range(4)])


def _in_order_of_words(x: Array, unit: int) -> Array:
    """Move the inputs of every unit to where `_words_to_floats` has their codes.

    Bits 4j of word i hold row 8i + j, bits 4j + 16 row 8i + j + 4; rows of equal j lie together. A
    product with a permutation is exact, and keeps the inputs in lanes; a transposition would not.
    """
    source = np.arange(unit).reshape(unit // 8, 2, 4).transpose(2, 0, 1).reshape(-1)
    permutation = jnp.asarray(np.eye(unit)[:, source], x.dtype)
    units = x.reshape(x.shape[0], -1, unit)
    return jnp.einsum("mgu,uv->mgv", units, permutation).reshape(x.shape)


def _dot(a, b) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
