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

    An archive of at most `in_memory_bytes` is read once and kept; others are read when asked.
    """

    def __init__(self, archive: Archive, statistics: Statistics, *, in_memory_bytes: int = 0):
        self.archive = archive
        self.statistics = statistics.select(archive.channels)
        self._memory: np.ndarray | None = None
        if len(archive.times) * archive.state_bytes <= in_memory_bytes:
            self._memory = self._read_all()

    def _read_all(self) -> np.ndarray:
        archive = self.archive
        shape = (len(archive.times), len(archive.channels), *archive.grid.shape)
        out = np.zeros(shape, np.float32)
        size = max(1, _CHUNK_BYTES // archive.state_bytes)
        for begin in range(0, len(out), size):
            part = slice(begin, min(begin + size, len(out)))
            out[part] = self.statistics.normalise(archive.read(part))
        return out

    @property
    def in_memory(self) -> bool:
        """Whether the archive is held in memory."""
        return self._memory is not None

    def read(self, times: Sequence[int] | np.ndarray) -> Float[np.ndarray, "S C H W"]:
        """Return the states of these time indices, in their order."""
        if self._memory is not None:
            return self._memory[times]
        return self.statistics.normalise(self.archive.read(times))
