# SPDX-License-Identifier: Apache-2.0
"""One-dimensional k-means against brute force and Lloyd, streaming percentiles against numpy."""

import itertools
import time

import numpy as np
import pytest

from sqzjax.quant.codebooks import normal_float
from sqzjax.quant.kmeans import Histogram, kmeans, objective
from sqzjax.quant.quantiles import count, grow, quantile
from tests.tolerances import BINNED_REL, FLOAT64_REL


def _sample(rng, count):
    """Numbers and weights as the calibration sees them: few weights are large."""
    return np.clip(0.4 * rng.normal(size=count), -1, 1), rng.normal(size=count) ** 4


def _brute_force(points, weights, clusters):
    order = np.argsort(points)
    points, weights = points[order], weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(points)), clusters - 1):
        parts = zip((0, *cuts), (*cuts, len(points)))
        cost = 0.0
        for begin, end in parts:
            x, w = points[begin:end], weights[begin:end]
            cost += np.sum(w * (x - np.average(x, weights=w)) ** 2)
        best = min(best, cost)
    return best


def _lloyd(points, weights, centroids, steps=50):
    """Plain Lloyd; also returns the objective of every step."""
    costs = [objective(points, weights, centroids)]
    for _ in range(steps):
        middles = (centroids[1:] + centroids[:-1]) / 2
        owner = np.searchsorted(middles, points)
        total = np.bincount(owner, weights, minlength=centroids.size)
        moment = np.bincount(owner, weights * points, minlength=centroids.size)
        centroids = np.sort(np.where(total > 0, moment / np.maximum(total, 1e-300), centroids))
        costs.append(objective(points, weights, centroids))
    return centroids, costs


@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
def test_equals_brute_force(clusters):
    rng = np.random.default_rng(clusters)
    for size in (clusters, 5, 9, 13):
        points, weights = _sample(rng, size)
        found = objective(points, weights, kmeans(points, weights, clusters))
        expected = _brute_force(points, weights, clusters)
        assert abs(found - expected) <= FLOAT64_REL * np.sum(weights)


@pytest.mark.parametrize("clusters", [4, 8, 16, 64])
def test_lloyd_is_never_better_and_cannot_improve_it(clusters):
    rng = np.random.default_rng(0)
    points, weights = _sample(rng, 3000)
    centroids = kmeans(points, weights, clusters)
    assert centroids.size == clusters and np.all(np.diff(centroids) > 0)
    best = objective(points, weights, centroids)
    for seed in range(3):
        start = np.sort(np.random.default_rng(seed).choice(points, clusters, replace=False))
        _, costs = _lloyd(points, weights, start)
        assert np.all(np.diff(costs) <= FLOAT64_REL * costs[0])
        assert best <= costs[-1] * (1 + FLOAT64_REL)
    again, costs = _lloyd(points, weights, centroids, steps=3)
    np.testing.assert_allclose(again, centroids, rtol=BINNED_REL)
    assert costs[-1] >= best * (1 - FLOAT64_REL)


def test_two_masses_are_recovered():
    points = np.array([-0.5] * 30 + [0.25] * 10)
    np.testing.assert_allclose(kmeans(points, np.ones(40), 2), [-0.5, 0.25], rtol=FLOAT64_REL)
    table = kmeans(points, np.ones(40), 4)  # fewer numbers than clusters
    assert np.all(np.diff(table) >= 0) and objective(points, np.ones(40), table) < FLOAT64_REL


def test_weights_count_like_copies_and_scale_does_not_matter():
    points = np.array([-0.9, -0.5, -0.45, 0.1, 0.3, 0.8])
    copies = np.array([1, 4, 2, 3, 1, 5])
    table = kmeans(points, copies.astype(float), 3)
    np.testing.assert_allclose(table, kmeans(np.repeat(points, copies), np.ones(16), 3))
    np.testing.assert_allclose(table, kmeans(points, 1e-20 * copies, 3), rtol=FLOAT64_REL)
    heavy = kmeans(points, np.array([0, 0, 0, 0, 1.0, 0]), 2)
    np.testing.assert_allclose(heavy, [0.3, 0.3])


def test_centroids_of_tiny_weights_lie_among_their_points():
    """Squared gradients span many orders of magnitude."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        points = np.sort(rng.uniform(-1, 1, rng.integers(3, 40)))
        weights = 10.0 ** rng.uniform(-30, 0, points.size)
        found = kmeans(points, weights, int(rng.integers(2, 9)))
        assert points[0] - FLOAT64_REL <= found[0] and found[-1] <= points[-1] + FLOAT64_REL


@pytest.mark.parametrize("bins", [1 << 12, 1 << 14])
def test_the_histogram_costs_less_than_a_thousandth(bins):
    points, weights = _sample(np.random.default_rng(1), 20_000)
    for clusters in (4, 16):
        exact = objective(points, weights, kmeans(points, weights, clusters))
        histogram = Histogram(bins)
        for part in np.array_split(np.arange(points.size), 7):
            histogram.add(points[part], weights[part])
        found = objective(points, weights, kmeans(*histogram.points(), clusters))
        assert found <= exact * (1 + BINNED_REL)


def test_streams_add_up_and_weightless_samples_do_not_count():
    points, weights = _sample(np.random.default_rng(2), 1000)
    weights[::3] = 0
    whole, parts = Histogram(), Histogram()
    whole.add(points, weights)
    for index in np.array_split(np.arange(1000), 3):
        parts.add(points[index], weights[index])
    np.testing.assert_allclose(whole.sums, parts.sums, rtol=FLOAT64_REL)
    assert whole.sums[2].sum() == np.count_nonzero(weights)
    means, held = whole.points()
    np.testing.assert_allclose(held.sum(), weights.sum())
    np.testing.assert_allclose(means @ held, points @ weights, rtol=BINNED_REL)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="bins=3"):
        Histogram(3)
    with pytest.raises(ValueError, match="no sample"):
        Histogram().points()
    with pytest.raises(ValueError, match="clusters=65"):
        kmeans(np.zeros(3), np.ones(3), 65)
    with pytest.raises(ValueError, match="positive weight"):
        kmeans(np.zeros(3), np.zeros(3), 2)
    with pytest.raises(ValueError, match="as many weights"):
        Histogram().add(np.zeros(3), np.ones(2))


@pytest.mark.slow
def test_a_hundred_million_samples_take_seconds():
    rng = np.random.default_rng(3)
    samples = np.clip(0.4 * rng.normal(size=10**7), -1, 1).astype(np.float32)
    weights = rng.random(10**7, dtype=np.float32)
    start = time.perf_counter()
    histogram = Histogram(1 << 13)
    for _ in range(10):
        histogram.add(samples, weights)
    table = kmeans(*histogram.points(), 16)
    seconds = time.perf_counter() - start
    assert table.size == 16 and histogram.sums[2].sum() > 0.9e8
    assert seconds < 20, f"{seconds:.1f} s"


@pytest.mark.parametrize("fraction", [0.0, 0.005, 0.3, 0.995, 1.0])
def test_percentiles_are_within_a_bin(fraction):
    rng = np.random.default_rng(4)
    scale = 10.0 ** np.arange(-2, 4)
    x = (scale * rng.normal(size=(5000, 6)) + 3 * scale).astype(np.float32)
    x[7, 2] *= 50
    extent = np.stack([np.full(6, np.inf), np.full(6, -np.inf)]).astype(np.float32)
    counts = np.zeros((6, 512), np.uint32)
    for part in np.array_split(x, 4):
        extent = grow(extent, part)
    for part in np.array_split(x, 4):
        count(counts, extent, part)
    assert np.all(counts.sum(1) == 5000)
    error = np.abs(quantile(counts, extent, fraction) - np.quantile(x, fraction, axis=0))
    assert np.all(error <= (extent[1] - extent[0]) / 512)


def test_percentiles_of_a_constant_channel():
    x = np.full((10, 1), -2.5, np.float32)
    extent = grow(np.array([[np.inf], [-np.inf]], np.float32), x)
    counts = np.zeros((1, 256), np.uint32)
    count(counts, extent, x)
    np.testing.assert_allclose(quantile(counts, extent, 0.25), [-2.5])
    np.testing.assert_array_equal(grow(extent, x[:0]), extent)


NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


def test_normal_float_levels():
    """The published table of 4 bits; the others have its shape."""
    np.testing.assert_allclose(normal_float(4), NF4, atol=BINNED_REL)
    for bits in (2, 3, 4, 6):
        levels = normal_float(bits)
        assert levels.size == 2**bits and np.all(np.diff(levels) > 0)
        assert levels[0] == -1 and levels[-1] == 1 and np.count_nonzero(levels == 0) == 1
        assert np.flatnonzero(levels == 0)[0] == 2 ** (bits - 1) - 1
    with pytest.raises(ValueError, match="bits=5"):
        normal_float(5)
