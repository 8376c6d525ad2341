# SPDX-License-Identifier: Apache-2.0
"""Turning a tile of packed tokens into floats inside a TPU kernel.

Tokens lie along lanes and words along sublanes, so that a shift of whole registers uncovers the
channels of a plane. Uniform codes stay digits: three bit operations make two bfloat16 numbers out
of a word, in an order of channels that the query is given beforehand. Everything else (tables,
exact entries, rotation) becomes the values themselves, at 10 to 20 operations per element: there
codes save memory rather than time.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.packing import PLANES
from pallas_kernels.quantized_decode_attention.form import (
    BASE,
    Form,
    copies,
    digit_base,
    floats,
    plane_words,
)

LANES = 128


def rows_of_chunk(ref: Any, index: Any, count: int) -> Array:
    """Return the `count` rows of factors of chunk `index`, count being 1, 2, 4 or 8 n.

    A read begins at a multiple of 8 rows; fewer rows are chosen from the 8 around them.
    """
    if count % 8 == 0:
        return ref[pl.ds(pl.multiple_of(index * count, 8), count)]
    first, held = index * count, ref.shape[0]
    if held <= 8:
        around = floats(ref[...])
    else:
        around = floats(ref[pl.ds(pl.multiple_of(lax.div(first, 8) * 8, 8), 8)])
    found, place = around[:count], lax.rem(first, 8)
    for start in range(count, around.shape[0], count):
        found = jnp.where(place == start, around[start : start + count], found)
    return found


def digits(words: Array, form: Form, dtype: Any) -> Array:
    """Return the digits `[P, tokens]` of words `[W, tokens]` plus `digit_base(dtype)`."""
    parts = []
    for rows, plane, many, _ in _planes(words, form):
        for offset in range(0, 16, plane * many):
            for part in range(0, plane, 4):
                mask = ((1 << min(plane, 4)) - 1) * 0x10001
                pair = rows >> (offset + part) if offset + part else rows
                parts.append(pltpu.bitcast((pair & mask) | 0x43004300, jnp.bfloat16))
    found = jnp.concatenate(parts, axis=0).astype(dtype)
    return found - (BASE - digit_base(dtype)) if digit_base(dtype) != BASE else found


def codes(words: Array, form: Form) -> Array:
    """Return the codes `[H, tokens]` of words `[W, tokens]` as int32, in the order of channels."""
    total = None
    for rows, plane, many, shift in _planes(words, form):
        mask = (1 << plane) - 1
        fields = [(rows >> offset) & mask for offset in range(0, 32, plane * many)]
        digit = jnp.concatenate(fields, axis=0).astype(jnp.int32) << shift
        total = digit if total is None else total | digit
    assert total is not None
    return total


def _planes(words: Array, form: Form):
    """Yield (rows of words, bits, copies, shift) of each plane; a multiple of 8 rows."""
    first = 0
    for plane, count, shift in plane_words(form.width, form.bits):
        rows, many = words[first : first + count], copies(count)
        if many > 1:
            rows = jnp.concatenate([rows >> (plane * i) if i else rows for i in range(many)], 0)
        yield rows, plane, many, shift
        first += count


def supported(form: Form) -> bool:
    """Whether the planes of a row fill registers."""
    sizes = [count for _, count, _ in plane_words(form.width, form.bits)]
    return form.bits in PLANES and all(n and (n % 8 == 0 or 8 % n == 0) for n in sizes)


def values(form: Form, part: dict[str, Any]) -> Array:
    """Return the float32 values `[H, tokens]` of a tile whose arrays are in `part`.

    Keys are the names of a tensor's arrays: codes `[W, tokens]`, scale and offset `[C, tokens]`,
    `[groups, H]` or `[H, 1]`, table `[1, 128]`, residual and place `[E, tokens]`.
    """
    code = codes(part["codes"], form)
    tokens = code.shape[1]
    level = _look_up(part["table"], code) if form.table else (code - form.bias).astype(jnp.float32)
    out = level * _factors(form, floats(part["scale"]), tokens)
    if form.offset:
        out = out + _factors(form, floats(part["offset"]), tokens)
    if form.slots:
        channel = lax.broadcasted_iota(jnp.int32, out.shape, 0)
        place, residual = part["place"].astype(jnp.int32), floats(part["residual"])
        for slot in range(form.slots):
            here = channel == place[slot : slot + 1]
            out = out + jnp.where(here, residual[slot : slot + 1], 0.0)
    return out


def _look_up(table: Array, code: Array) -> Array:
    """Return entries of a table `[1, 128]`: a gather within registers, 128 tokens at a time."""
    rows = jnp.broadcast_to(table, (code.shape[0], LANES))
    pieces = [
        jnp.take_along_axis(rows, code[:, start : start + LANES], axis=1, mode="promise_in_bounds")
        for start in range(0, code.shape[1], LANES)
    ]
    return jnp.concatenate(pieces, axis=1)


def _factors(form: Form, x: Array, tokens: int) -> Array:
    """Return scales or offsets so that they broadcast against `[H, tokens]`."""
    if form.sharing == "static":
        return x
    if form.sharing == "channel":
        # A product with zeros and ones repeats each group's column for its tokens.
        groups = x.shape[0]
        token = lax.broadcasted_iota(jnp.int32, (groups, tokens), 1)
        group = lax.broadcasted_iota(jnp.int32, (groups, tokens), 0)
        ones = (lax.div(token, jnp.int32(form.tokens)) == group).astype(jnp.float32)
        return dot(x, ones, contract=(0, 0))
    if form.groups == 1:
        return x
    shape = (form.width // form.groups, tokens)
    return jnp.concatenate([jnp.broadcast_to(x[i : i + 1], shape) for i in range(form.groups)], 0)


def dot(a: Array, b: Array, *, contract: tuple[int, int]) -> Array:
    """Multiply along one axis of each, summed in float32; products of float32 are exact."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
