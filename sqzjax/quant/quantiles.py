# SPDX-License-Identifier: Apache-2.0
"""Percentiles of many channels at once, from streams too long to be kept.

Two passes: the extent of each channel, then a histogram within it. A percentile is then off by at
most a bin, the extent over `bins`. Memory is channels times `bins`, however many samples come.
"""

import numpy as np
from jaxtyping import Float, Shaped


def grow(
    extent: Float[np.ndarray, "2 C"], samples: Float[np.ndarray, "n C"]
) -> Float[np.ndarray, "2 C"]:
    """Return least and greatest sample of each channel; an extent begins as (inf, -inf)."""
    if not len(samples):
        return extent
    return np.stack([np.minimum(extent[0], samples.min(0)), np.maximum(extent[1], samples.max(0))])


def count(
    counts: Shaped[np.ndarray, "C bins"],
    extent: Float[np.ndarray, "2 C"],
    samples: Float[np.ndarray, "n C"],
) -> None:
    """Add samples, which lie within the extent, to the histograms in place."""
    channels, bins = counts.shape
    low, width = _edges(extent, bins)
    index = np.clip(((samples - low) / width).astype(np.int64), 0, bins - 1)
    index += np.arange(channels) * bins
    found = np.bincount(index.reshape(-1), minlength=counts.size)
    counts += found.reshape(counts.shape).astype(counts.dtype)


def quantile(
    counts: Shaped[np.ndarray, "C bins"], extent: Float[np.ndarray, "2 C"], fraction: float
) -> Float[np.ndarray, "C"]:
    """Return the quantile of each channel as `numpy.quantile` defines it, to within a bin."""
    if fraction in (0.0, 1.0):
        return extent[int(fraction)].astype(np.float64)
    rank = fraction * (int(counts[0].sum()) - 1)
    lower = _of_rank(counts, extent, int(np.floor(rank)))
    upper = _of_rank(counts, extent, int(np.ceil(rank)))
    return lower + (rank - np.floor(rank)) * (upper - lower)


def _of_rank(counts: np.ndarray, extent: np.ndarray, rank: int) -> np.ndarray:
    """Return the sample of a rank, spreading the samples of a bin evenly over it."""
    low, width = _edges(extent, counts.shape[1])
    total = np.cumsum(counts, axis=1)
    place = np.argmax(total > rank, axis=1)
    rows = np.arange(len(counts))
    inside = counts[rows, place]
    before = total[rows, place] - inside
    return low + width * (place + (rank - before + 0.5) / inside)


def _edges(extent: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = extent.astype(np.float64)
    return low, np.maximum((high - low) / bins, np.finfo(np.float32).tiny)
