# SPDX-License-Identifier: Apache-2.0
"""Rotary angles against Python's integers: exact to the last bits of a float32 at any position."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.rotary import Rotary, cos_sin, turn
from tests.tolerances import KERNEL_ATOL, MERGE

INVERSE = tuple(float(x) for x in 5e5 ** -(np.arange(32) / 32))
EDGES = [0, 1, -1, 2, 65535, 65536, -65536, 10**6, 2**24 + 1, 2**31 - 1, -(2**31) + 1, -(2**31)]
run = jax.jit(lambda positions: cos_sin(Rotary(INVERSE), positions))


def exact(inverse, position):
    """Cosine and sine of position times frequency, the turns taken off in integers.

    A float64 frequency is a fraction of integers; a turn is known to 60 decimal places.
    """
    two_pi = 6283185307179586476925286766559005768394338798750211641949889
    numerator, denominator = float(inverse).as_integer_ratio()
    scale = 10**60
    angle = (numerator * position * scale // denominator) % two_pi
    return math.cos(angle / scale), math.sin(angle / scale)


def compare(positions, inverse=INVERSE, got=None):
    got = run(jnp.asarray(positions, jnp.int32)) if got is None else got
    expected = np.array([[exact(w, int(p)) for w in inverse] for p in positions])
    np.testing.assert_allclose(got[0], expected[..., 0], atol=MERGE)
    np.testing.assert_allclose(got[1], expected[..., 1], atol=MERGE)


def test_edges_of_the_range_of_positions():
    compare(EDGES)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=16, max_size=16))
def test_any_position(positions):
    compare(positions)


def test_float32_products_would_not_do():
    """The reference can tell: the plain product is wrong at a million tokens."""
    angle = np.float32(10**6) * np.asarray(INVERSE, np.float32)
    wrong = np.abs(np.cos(angle) - [exact(w, 10**6)[0] for w in INVERSE])
    assert wrong.max() > 100 * MERGE


@pytest.mark.parametrize("inverse", [1.0, 2 * math.pi, 7.5, 1e-6, math.pi])
def test_frequencies_beyond_a_turn_and_very_low_ones(inverse):
    positions = [0, 3, 4097, 10**6, -(10**6)]
    got = cos_sin(Rotary((inverse,)), jnp.asarray(positions, jnp.int32))
    compare(positions, (inverse,), got)


def test_the_factor_scales_both():
    positions = jnp.arange(5, dtype=jnp.int32)
    plain, scaled = (cos_sin(Rotary(INVERSE, factor), positions) for factor in (1.0, 1.5))
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(1.5 * one, other, atol=KERNEL_ATOL["float32"])


def test_turning_depends_on_the_difference_of_positions():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=64) / 8, jnp.float32) for _ in "qk")
    at = lambda x, position: turn(x, *run(jnp.int32(position)))  # noqa: E731
    for position in (0, 10**6, 2**30):
        product = at(q, position + 1000) @ at(k, position)
        np.testing.assert_allclose(product, at(q, 1000) @ k, atol=KERNEL_ATOL["float32"])
        np.testing.assert_allclose(product, q @ at(k, -1000), atol=KERNEL_ATOL["float32"])


def test_halves_are_pairs():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    cos, sin = jnp.asarray([0.0, 1.0]), jnp.asarray([1.0, 0.0])
    np.testing.assert_array_equal(turn(x, cos, sin), [-3.0, 2.0, 1.0, 4.0])
