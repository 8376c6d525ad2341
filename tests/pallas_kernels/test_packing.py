# SPDX-License-Identifier: Apache-2.0
"""Planar packing: exact for every width of codes and every length of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.packing import PLANES, pack, unpack, unpadded, wide_bits, widen, words_of

BITS = sorted(PLANES)
run_pack = jax.jit(pack, static_argnums=1)
run_unpack = jax.jit(unpack, static_argnums=(1, 2))


def draw_codes(seed, shape, bits):
    return np.random.default_rng(seed).integers(0, 2**bits, shape, np.int32)


def planar(codes, bits):
    """The words of one row, bit by bit from the definition."""
    words, shift = [], 0
    for plane in PLANES[bits]:
        size = -(-len(codes) * plane // 32)
        part = [0] * size
        for place, code in enumerate(codes):
            digit = (int(code) >> shift) % 2**plane
            part[place % size] |= digit << (place // size * plane)
        words += part
        shift += plane
    return words


@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from(BITS), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_packing_is_planar_and_exact(bits, count, seed):
    codes = draw_codes(seed, (3, count), bits)
    words = run_pack(codes, bits)
    assert words.dtype == jnp.uint32 and words.shape == (3, words_of(count, bits))
    np.testing.assert_array_equal(words, [planar(row, bits) for row in codes])
    np.testing.assert_array_equal(run_unpack(words, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint32"])
def test_extreme_codes_of_any_integer_type(bits, dtype):
    for code in (0, 2**bits - 1):
        codes = np.full((2, 96), code, dtype)
        np.testing.assert_array_equal(run_unpack(run_pack(codes, bits), bits, 96), codes)


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_packed_alone(bits):
    codes = draw_codes(0, (2, 5, 64), bits)
    whole = run_pack(codes, bits)
    each = [run_pack(codes[:, row : row + 1], bits) for row in range(5)]
    np.testing.assert_array_equal(whole, np.concatenate(each, axis=1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "count"), [(64, 128), (7, 96), (1, 32)])
def test_widened_words_hold_the_same_codes_in_one_plane(bits, rows, count):
    assert unpadded(bits, count)
    codes = draw_codes(1, (2, rows, count), bits)
    words = jax.jit(widen, static_argnums=(1, 2))(run_pack(codes, bits), bits, count)
    np.testing.assert_array_equal(words, run_pack(codes, wide_bits(bits)))


def test_padding_is_known():
    assert [bits for bits in BITS if not unpadded(bits, 48)] == [1, 3]
    assert not any(unpadded(bits, 33) for bits in BITS)


@pytest.mark.parametrize("bits", [0, 5, 7, 16])
def test_unknown_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be one of 1, 2, 3, 4, 6, 8"):
        pack(jnp.zeros(8, jnp.int32), bits)


def test_words_of_another_row_length_are_refused():
    with pytest.raises(ValueError, match=r"must end in 6 words for 64 codes of 3 bits"):
        unpack(jnp.zeros((2, 5), jnp.uint32), 3, 64)
