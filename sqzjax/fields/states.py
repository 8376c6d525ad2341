# SPDX-License-Identifier: Apache-2.0
"""Normalised states, from memory where the archive is small. Nothing here imports jax."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sqzjax.fields.archive import Archive
from sqzjax.fields.statistics import Statistics

_CHUNK_BYTES = 1 << 26


class States:
    """What a model reads: float32 of mean 0 and deviation 1 per channel, missing values 0.

    The states at `times` (indices, all if none are named) are read once and kept if they take at
    most `in_memory_bytes`; others are read when asked.
    """

    def __init__(
        self,
        archive: Archive,
        statistics: Statistics,
        *,
        in_memory_bytes: int = 0,
        times: Sequence[int] | np.ndarray | None = None,
    ):
        self.archive = archive
        self.statistics = statistics.select(archive.channels)
        count = len(archive.times)
        kept = np.arange(count) if times is None else np.unique(times)
        self._place = np.full(count, -1)  # of a time among those in memory
        self._memory: np.ndarray | None = None
        if len(kept) * archive.state_bytes <= in_memory_bytes:
            self._memory = self._read_all(kept)
            self._place[kept] = np.arange(len(kept))

    def _read_all(self, times: np.ndarray) -> np.ndarray:
        archive = self.archive
        out = np.zeros((len(times), len(archive.channels), *archive.grid.shape), np.float32)
        size = max(1, _CHUNK_BYTES // archive.state_bytes)
        for begin in range(0, len(out), size):
            part = slice(begin, begin + size)
            out[part] = self.statistics.normalise(archive.read(times[part]))
        return out

    @property
    def in_memory(self) -> bool:
        """Whether states are held in memory."""
        return self._memory is not None

    def read(self, times: Sequence[int] | np.ndarray) -> Float[np.ndarray, "S C H W"]:
        """Return the states of these time indices, in their order."""
        places = self._place[np.asarray(times, np.int64)]
        if self._memory is not None and (places >= 0).all():
            return self._memory[places]
        return self.statistics.normalise(self.archive.read(times))
