# SPDX-License-Identifier: Apache-2.0
"""`QTensor`: what its arrays mean, against loops over the definition, and what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.packing import PLANES, pack
from pallas_kernels.qtensor import (
    QTensor,
    dequantize,
    levels,
    look_up,
    rows_of,
    stretch,
    validate,
)
from tests.tolerances import FLOAT64_REL, KERNEL_ATOL

run = jax.jit(dequantize, static_argnums=1)
run_pack = jax.jit(pack, static_argnums=1)
run_levels = jax.jit(levels)


def elements(tensor):
    """The elements of a tensor in float64, one by one."""
    *lead, rows, _ = tensor.codes.shape
    out = np.zeros((*lead, rows, tensor.width))
    codes = np.asarray(run_levels(replace(tensor, table=None, bias=0))).astype(np.float64)
    arrays = {
        name: np.asarray(value, np.float64)
        for name in ("scale", "offset", "table", "residual")
        if (value := getattr(tensor, name)) is not None
    }

    def pick(name, place, row, column):
        array = arrays[name]
        place = tuple(min(i, size - 1) for i, size in zip(place, array.shape))
        down, across = array.shape[-2:]
        return array[(*place, row * down // rows, column * across // tensor.width)]

    for *place, row, column in np.ndindex(out.shape):
        level = codes[(*place, row, column)]
        if tensor.table is not None:
            index = tuple(min(i, size - 1) for i, size in zip(place, tensor.table.shape))
            level = arrays["table"][(*index, 0, int(level))]
        value = pick("scale", place, row, column) * (level - tensor.bias)
        if "offset" in arrays:
            value += pick("offset", place, row, column)
        if "residual" in arrays:
            here = np.asarray(tensor.place)[(*place, row)] == column
            value += arrays["residual"][(*place, row)][here].sum()
        out[(*place, row, column)] = value
    return out


def random_tensor(seed, bits, lead, rows, width, scale, offset, *, table=False, slots=0, bias=0):
    """A tensor of elements of order 1; `scale` and `offset` are what their shapes end in."""
    rng = np.random.default_rng(seed)
    codes = run_pack(rng.integers(0, 2**bits, (*lead, rows, width), np.uint32), bits)
    top = 1 if table else 2**bits

    def factors(shape, low):
        first = lead if seed % 2 else (1,) * len(lead)
        return rng.uniform(low, 1, (*first, *shape))

    entries = residual = place = None
    if table:
        entries = rng.normal(0, 1, (1,) * (len(lead) + 1) + (2**bits,)).astype(np.float32)
    if slots:
        residual = rng.normal(0, 2, (*lead, rows, slots)).astype(np.float16)
        place = rng.integers(0, width, (*lead, rows, slots), np.uint8)
    scale = (factors(scale, 0.5) / top).astype(np.float16)
    offset = None if offset is None else factors(offset, -1).astype(np.float16)
    parts = jax.tree.map(jnp.asarray, (codes, scale, offset, entries, residual, place))
    return QTensor(*parts, bits, width, bias)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_elements_are_what_the_definition_says(data):
    draw = data.draw
    width = draw(st.sampled_from([64, 96, 20]))
    rows = 12
    down, across = st.sampled_from([1, 2, 3, rows]), st.sampled_from([1, 2, 4, width])
    tensor = random_tensor(
        draw(st.integers(0, 99)),
        draw(st.sampled_from(sorted(PLANES))),
        (2, 2),
        rows,
        width,
        (draw(down), draw(across)),
        draw(st.none() | st.tuples(down, across)),
        table=(table := draw(st.booleans())),
        slots=draw(st.sampled_from([0, 2])),
        bias=0 if table else draw(st.sampled_from([0, 3])),
    )
    validate(tensor)
    np.testing.assert_allclose(run(tensor), elements(tensor), atol=KERNEL_ATOL["float32"])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_codes_may_be_floats_of_eight_bits(dtype):
    codes = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 6, 16)), dtype)
    tensor = QTensor(codes, jnp.full((1, 1, 6, 1), 0.5), None, None, None, None, 8, 16)
    validate(tensor)
    np.testing.assert_allclose(run(tensor), np.asarray(codes, np.float64) / 2, rtol=FLOAT64_REL)


def test_sums_are_made_in_the_type_that_is_asked_for():
    tensor = random_tensor(1, 4, (1, 1), 6, 32, (6, 1), (6, 1))
    assert run(tensor, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_look_up_is_indexing(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 9)).astype(np.uint32)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2**bits)), jnp.float32)
    got = look_up(table, jnp.asarray(codes), bits)
    np.testing.assert_array_equal(got, np.asarray(table)[0][codes])


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (3, 4), (12, 2), (6, 8)])
def test_stretch_repeats_rows_and_columns(shape):
    factors = np.random.default_rng(0).normal(size=(2, *shape))
    got = np.broadcast_to(stretch(jnp.asarray(factors), 12, 8), (2, 12, 8))
    expected = factors.repeat(12 // shape[0], 1).repeat(8 // shape[1], 2)
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("form", ["token", "channel", "static"])
def test_rows_are_cut_with_what_belongs_to_them(form):
    scale = {"token": (24, 4), "channel": (6, 32), "static": (1, 32)}[form]
    tensor = random_tensor(3, 3, (2, 2), 24, 32, scale, scale, slots=2)
    whole = run(tensor)
    for start in (0, 8, 16):
        part = jax.jit(lambda start: dequantize(rows_of(tensor, start, 8, 24)))(start)
        np.testing.assert_array_equal(part, whole[:, :, start : start + 8])
    alone = jax.jit(lambda at: dequantize(rows_of(tensor, 8, 8, 24, sequence=at)))
    np.testing.assert_array_equal(alone(1), whole[1:, :, 8:16])


def test_bytes_and_bits_count_every_array():
    tensor = random_tensor(1, 3, (2, 4), 32, 64, (32, 2), (32, 2), slots=1)
    words, scales, slots = 6 * 4, 2 * 2 * 2, 2 + 1
    assert tensor.nbytes == 2 * 4 * 32 * (words + scales + slots)
    assert tensor.average_bits == 8 * (words + scales + slots) / 64


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"codes": jnp.zeros((1, 2, 12, 5), jnp.uint32)}, "must end in 4 for width=32 and bits=4"),
        ({"bits": 3}, r"must end in 3 for width=32 and bits=3.*packing.pack"),
        ({"codes": jnp.zeros((1, 2, 12, 16), "float8_e4m3fn")}, "must end in 32 for width=32"),
        ({"scale": jnp.ones((1, 2, 5, 1))}, "scale.shape=.* divisors of the 12 rows and 32"),
        ({"offset": jnp.ones((1, 2, 12, 3))}, "offset.shape=.* divisors"),
        ({"table": jnp.ones((1, 1, 1, 8))}, r"table.shape=.* must end in \(1, 16\)"),
        ({"table": jnp.ones((1, 1, 2, 16))}, r"must end in \(1, 16\) for bits=4"),
        ({"residual": jnp.ones((1, 2, 12, 1))}, "residual and place must be given together"),
    ],
)
def test_broken_invariants_are_named(change, match):
    tensor = random_tensor(1, 4, (1, 2), 12, 32, (12, 1), (12, 1))
    validate(tensor)
    with pytest.raises(ValueError, match=match):
        validate(replace(tensor, **change))


def test_a_table_needs_packed_codes():
    codes = jnp.zeros((1, 2, 12, 32), "float8_e4m3fn")
    tensor = random_tensor(1, 4, (1, 2), 12, 32, (12, 1), (12, 1), table=True)
    with pytest.raises(ValueError, match="packed codes"):
        validate(replace(tensor, codes=codes))
