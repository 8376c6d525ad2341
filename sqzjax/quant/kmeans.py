# SPDX-License-Identifier: Apache-2.0
"""Weighted k-means in one dimension, solved exactly by dynamic programming.

Samples in [-1, 1] stream into a histogram that keeps each bin's weight and weighted mean, so memory
does not grow with them; the optimum over bins is that over samples but for the bins that a border
between two clusters cuts. Optimal clusters are intervals, and the best border moves monotonically
with the end of an interval, which divide and conquer exploits: N clusters of n points cost
O(N n log n), about 0.1 s for 16 clusters of 8,192 bins.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

MAX_CLUSTERS = 64
_LEAST_DEVIATION = 2.0**-14
_CHUNK = 1 << 16  # samples whose indices stay in the processor's cache


@dataclass
class Histogram:
    """Sums over the bins of [-1, 1]; float64 rows of `sums`: weight, weight times sample, count.

    Samples of weight 0 are not counted. Samples outside fall into the bins at the ends.
    """

    bins: int = 1 << 13
    sums: np.ndarray = field(default=None, repr=False)  # type: ignore[assignment]  # 3 bins

    def __post_init__(self) -> None:
        if not 1 << 10 <= self.bins <= 1 << 16:
            raise ValueError(f"bins={self.bins} must lie in [1024, 65536]; 8192 suits 64 clusters")
        if self.sums is None:
            self.sums = np.zeros((3, self.bins))

    def add(
        self,
        samples: Float[np.ndarray, "..."],
        weights: Float[np.ndarray, "..."] | None = None,
    ) -> None:
        """Add samples; `weights` >= 0 of the same shape, 1 if left out."""
        samples = samples.reshape(-1)
        weights = np.ones_like(samples) if weights is None else weights.reshape(-1)
        if samples.size != weights.size:
            raise ValueError(f"{samples.size} samples need as many weights, not {weights.size}")
        for start in range(0, samples.size, _CHUNK):
            x, w = samples[start : start + _CHUNK], weights[start : start + _CHUNK]
            index = ((x + 1) * (self.bins / 2)).astype(np.intp)
            np.clip(index, 0, self.bins - 1, out=index)
            for row, values in zip(self.sums, (w, x * w, w > 0)):
                row += np.bincount(index, values, minlength=self.bins)

    def points(self) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Return mean and weight of each bin that holds any; ValueError if none does."""
        weight, moment = self.sums[:2]
        held = weight > 0
        if not held.any():
            raise ValueError("no sample has a weight: give samples within the range, unmasked")
        return moment[held] / weight[held], weight[held]


def kmeans(
    points: Float[np.ndarray, "n"], weights: Float[np.ndarray, "n"], clusters: int
) -> Float[np.ndarray, "N"]:
    """Return the ascending centroids that minimise the weighted squared distance of the points.

    Float64. Where fewer points than clusters differ, the last centroid repeats.
    """
    if not 1 <= clusters <= MAX_CLUSTERS:
        raise ValueError(f"clusters={clusters} must lie in [1, {MAX_CLUSTERS}]")
    kept = np.flatnonzero(weights > 0)
    kept = kept[np.argsort(points[kept], kind="stable")]
    if not kept.size:
        raise ValueError("k-means needs a point of positive weight")
    points, weights = points[kept].astype(np.float64), weights[kept].astype(np.float64)
    sums = _Prefix(points, weights)
    borders = _borders(sums, kept.size, clusters)
    centroids, end = [], kept.size
    for begins in reversed(borders):
        begin = int(begins[end])
        # Not from the prefix sums, in which a cluster of tiny weights is lost.
        centroids.append(np.average(points[begin:end], weights=weights[begin:end]))
        end = begin
        if end == 0:
            break
    found = np.array(centroids[::-1])
    return np.concatenate([found, np.full(clusters - found.size, found[-1])])


def objective(
    points: Float[np.ndarray, "n"],
    weights: Float[np.ndarray, "n"],
    centroids: Float[np.ndarray, "N"],
) -> float:
    """Return the weighted squared distance of the points to their nearest centroids."""
    middles = (centroids[1:] + centroids[:-1]) / 2
    nearest = centroids[np.searchsorted(middles, points)]
    return float(np.sum(weights * np.square(points - nearest)))


def matching(histogram: Histogram, table: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """Return alpha, beta: `alpha * table + beta` decodes to the mean and deviation of the numbers.

    Each number counts once, and as its bin's middle.
    """
    counts, bins = histogram.sums[2], histogram.bins
    middles = (np.arange(bins) + 0.5) * (2 / bins) - 1
    decoded = table[np.searchsorted((table[1:] + table[:-1]) / 2, middles)]

    def moments(x: np.ndarray) -> tuple[float, float]:
        mean = np.average(x, weights=counts)
        return float(mean), float(np.sqrt(np.average((x - mean) ** 2, weights=counts)))

    (mean, deviation), (its_mean, its_deviation) = moments(middles), moments(decoded)
    alpha = deviation / max(its_deviation, _LEAST_DEVIATION)
    return alpha, mean - its_mean * alpha


class _Prefix:
    """Prefix sums that give the cost of any interval of sorted points at once."""

    def __init__(self, points: np.ndarray, weights: np.ndarray):
        weights = weights / weights.sum()
        powers = (weights, weights * points, weights * points**2)
        self.sums = [np.concatenate([[0.0], np.cumsum(power)]) for power in powers]

    def cost(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Return the squared distances of points `begin .. end - 1` to their mean."""
        weight, moment, square = (s[end] - s[begin] for s in self.sums)
        return np.maximum(square - moment**2 / np.maximum(weight, 1e-300), 0.0)


def _borders(sums: _Prefix, count: int, clusters: int) -> list[np.ndarray]:
    """Return, per cluster, where it begins if it ends at each point; at most `clusters` are used.

    Entry `[k][j]` is the first point of the last of k + 1 clusters of the first j points.
    """
    ends = np.arange(count + 1)
    best, found = sums.cost(np.zeros_like(ends), ends), [np.zeros_like(ends)]
    for _ in range(1, clusters):
        best, begins = _add_cluster(sums, best, count)
        found.append(begins)
    return found


def _add_cluster(sums: _Prefix, best: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best costs with one cluster more, and where the last one begins.

    Ends are visited from coarse to fine; those in between search between their neighbours' answers,
    all of a level at once.
    """
    costs, begins = np.zeros(count + 1), np.zeros(count + 1, np.intp)
    stride = 1 << count.bit_length()
    while stride > 1:
        half = stride // 2
        ends = np.arange(half, count + 1, stride)
        low, after = begins[ends - half], ends + half
        high = np.where(after <= count, begins[np.minimum(after, count)], count - 1)
        sizes = np.minimum(high, ends - 1) - low + 1
        firsts = np.cumsum(sizes) - sizes
        owner = np.repeat(np.arange(ends.size), sizes)
        tried = np.arange(sizes.sum()) - np.repeat(firsts - low, sizes)
        values = best[tried] + sums.cost(tried, ends[owner])
        least = np.minimum.reduceat(values, firsts)
        hits = np.flatnonzero(values == least[owner])[::-1]
        begins[ends[owner[hits]]] = tried[hits]  # the first of equals is written last
        costs[ends] = least
        stride = half
    return costs, begins
