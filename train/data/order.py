# SPDX-License-Identifier: Apache-2.0
"""Random orders as functions of (seed, index): no state to save, nothing to replay on resume.

`permute` is a Feistel network with cycle walking: a seeded permutation of [0, size) evaluated at
single points, in constant memory. It is ours rather than numpy's so that a run resumes identically
under another numpy version.
"""

import hashlib
from functools import lru_cache

import numpy as np
from jaxtyping import Int

ROUNDS = 8


def derive_key(*parts: int | str) -> int:
    """Mix a seed and names of purposes into a 64-bit key."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permute(indices: Int[np.ndarray, " n"], size: int, key: int) -> Int[np.ndarray, " n"]:
    """Map indices in [0, size) through the permutation named by `key`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = np.asarray(indices, np.uint64)
    keys = _round_keys(key)
    values = _encrypt(values, half, keys)
    # Values beyond the end walk on along their cycle until they fall inside: still a bijection.
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _encrypt(values[outside], half, keys)
    return values.astype(np.int64)


def epochs_of(
    numbers: Int[np.ndarray, " n"], size: int, *purpose: int | str, shuffle: bool = True
) -> Int[np.ndarray, " n"]:
    """Map rows of an endless stream to places in [0, size), each once an epoch.

    With `shuffle` every epoch has an order of its own, named by `purpose` (a seed first).
    """
    epochs, places = np.divmod(numbers, size)
    for epoch in np.unique(epochs) if shuffle else ():
        chosen = epochs == epoch
        places[chosen] = permute(places[chosen], size, derive_key(*purpose, int(epoch)))
    return places


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(derive_key(key, number)) for number in range(ROUNDS))


def _encrypt(values: np.ndarray, half: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit values (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Mixture:
    """Deal row numbers to sources in proportion to weights, statelessly.

    Rows come in blocks of `PERIOD`; each block holds a fixed number of rows of each source
    (weights rounded to 1 / PERIOD, at least one), in an order drawn per block.
    """

    PERIOD = 1000

    def __init__(self, weights: tuple[float, ...], seed: int):
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self._seed = seed
        self._counts = _quotas(self.weights, self.PERIOD)
        self._period = int(self._counts.sum())
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def locate(
        self, rows: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return, for rows of the whole stream, the source and the row within that source."""
        sources, local = np.zeros_like(rows), np.zeros_like(rows)
        if len(self.weights) == 1:
            return sources, rows
        blocks = rows // self._period
        for block in np.unique(blocks):
            chosen = blocks == block
            owner, rank = self._deal(int(block))
            inside = rows[chosen] % self._period
            sources[chosen] = owner[inside]
            local[chosen] = block * self._counts[owner[inside]] + rank[inside]
        return sources, local

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each row of a block and its rank among that source's rows."""
        cached = self._block
        if cached is not None and cached[0] == block:
            return cached[1:]
        cards = np.repeat(np.arange(len(self._counts)), self._counts)
        key = derive_key(self._seed, "mixture", block)
        owner = cards[permute(np.arange(self._period), self._period, key)]
        rank = np.zeros_like(owner)
        for source in range(len(self._counts)):
            mine = owner == source
            rank[mine] = np.arange(int(mine.sum()))
        # One assignment, so that a prefetching thread never sees half of it.
        self._block = (block, owner, rank)
        return owner, rank


def _quotas(weights: tuple[float, ...], period: int) -> np.ndarray:
    exact = np.array(weights) * period
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    short = period - int(counts.sum())
    # The largest remainders get what rounding left over.
    for source in np.argsort(-(exact - counts), kind="stable")[: max(0, short)]:
        counts[source] += 1
    return counts
