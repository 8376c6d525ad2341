# SPDX-License-Identifier: Apache-2.0
"""Stateless orders: permutations are bijections, mixtures keep their proportions."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.order import Mixture, derive_key, permute

FIXED = [4, 7, 3, 8, 5, 0, 2, 9, 1, 6]
FIXED_KEY = 6366919446031559317


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int):
    order = permute(np.arange(size), size, key)
    assert sorted(order.tolist()) == list(range(size))


@given(size=st.integers(1, 2**40), index=st.integers(0, 2**40), key=st.integers(0, 2**64 - 1))
def test_single_points_of_large_permutations(size: int, index: int, key: int):
    index %= size
    alone = permute(np.array([index]), size, key)[0]
    assert 0 <= alone < size
    pair = permute(np.array([index, (index + 1) % size]), size, key)
    assert pair[0] == alone
    assert size == 1 or pair[1] != alone


def test_permutations_are_fixed_for_ever():
    """A change here would make old checkpoints resume with other data."""
    assert permute(np.arange(10), 10, 7).tolist() == FIXED
    assert derive_key(0, "rows", 1) == FIXED_KEY


def test_every_place_is_equally_likely():
    size, draws = 7, 3500
    places = [int(permute(np.array([3]), size, derive_key(seed))[0]) for seed in range(draws)]
    counts = np.array([Counter(places)[place] for place in range(size)])
    chi_square = float(((counts - draws / size) ** 2 / (draws / size)).sum())
    # 6 degrees of freedom, p = 0.001.
    assert chi_square < 22.46


@settings(deadline=None, max_examples=30)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    cut=st.integers(0, 5000),
)
def test_mixture_deals_each_source_in_order(weights: list[float], seed: int, cut: int):
    mixture = Mixture(tuple(weights), seed)
    rows = np.arange(3000)
    owners, local = mixture.locate(rows)
    for source in range(len(weights)):
        mine = local[owners == source]
        assert mine.tolist() == list(range(len(mine)))
    some = rows[cut % 3000 :]
    again = Mixture(tuple(weights), seed).locate(some)
    assert np.array_equal(again[0], owners[cut % 3000 :])
    assert np.array_equal(again[1], local[cut % 3000 :])


def test_mixture_proportions():
    owners, _ = Mixture((5.0, 3.0, 2.0), 1).locate(np.arange(10_000))
    assert np.bincount(owners).tolist() == [5000, 3000, 2000]
    owners, _ = Mixture((1.0, 1e-6), 1).locate(np.arange(1001))
    assert 1 <= np.bincount(owners)[1] <= 2


@pytest.mark.parametrize("weights", [(1.0,), (4.0,)])
def test_a_single_source_is_read_in_order(weights: tuple[float, ...]):
    owners, local = Mixture(weights, 3).locate(np.arange(50, 70))
    assert not owners.any()
    assert local.tolist() == list(range(50, 70))
