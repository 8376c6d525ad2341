# SPDX-License-Identifier: Apache-2.0
"""What every dataset is to the trainer: batch = f(seed, step), columns, and a fingerprint.

There is no iterator state. `state(step)` records the step and a fingerprint of everything that
shaped the batches; `check_state` refuses to continue with other data and names what differs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from sqzjax.errors import DataError
from sqzjax.io.tokenizer import Tokenizer
from train.data.order import epochs_of
from train.data.packing import Batch
from train.data.prefetch import Prefetcher


@dataclass(frozen=True)
class Share:
    """The rows of a batch of `batch_size` that process `index` of `count` makes."""

    batch_size: int
    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be >= 1")
        if not 0 <= self.index < self.count:
            raise ValueError(f"process_index={self.index} must lie in [0, {self.count})")
        if self.batch_size % self.count:
            near = -(-self.batch_size // self.count) * self.count
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of process_count={self.count}; "
                f"use {near}"
            )

    def rows(self, step: int) -> Int[np.ndarray, " rows"]:
        """Return the numbers, in the stream of all batches, of this process's rows of a step."""
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
            raise ValueError(f"step={step} must be an integer >= 0")
        rows = self.batch_size // self.count
        return np.arange(rows, dtype=np.int64) + int(step) * self.batch_size + self.index * rows


class Pipeline(ABC):
    """Batches of `batch_size` rows over all processes; `batch` returns those of this process."""

    batch_size: int
    branch_may_change: ClassVar[tuple[str, ...]] = ()
    """Fields of the fingerprint that a branch of a run may set otherwise than the run.

    A field that changes how many samples there are, such as the window of fields, changes the order
    too: the epoch in which the branch begins shows some samples twice and others not at all.
    """

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Return the batch of a step, the same whenever and wherever it is asked for."""

    @abstractmethod
    def eval_batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield the held-out rows once, in order; the last batch is filled with padding."""

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, str | int]:
        """Everything that determines the batches; JSON values."""

    @property
    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counts for logs and reports."""

    @abstractmethod
    def epochs(self, step: int) -> tuple[float, ...]:
        """Return how many times each source has been read before `step`."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape of a row and dtype of everything in a batch."""

    def prefetch(self, start: int, stop: int | None = None, depth: int = 2) -> Prefetcher:
        """Iterate over (step, batch) from `start`, prepared by a thread `depth` steps ahead."""
        return Prefetcher(self.batch, start, stop, depth)

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on with step `step`."""
        return {"step": int(step), "fingerprint": self.fingerprint}

    def check_state(self, state: Mapping[str, Any], *, branch: bool = False) -> int:
        """Return the step of a stored state, or raise naming every field that differs.

        With `branch`, fields of `branch_may_change` may differ.
        """
        stored = state.get("fingerprint")
        if not isinstance(stored, Mapping) or not isinstance(state.get("step"), int):
            raise DataError(
                f"the stored data state {state!r:.200} has no step and fingerprint; it was not "
                "written by this pipeline"
            )
        now = self.fingerprint
        if branch:
            stored = {**stored, **{name: now.get(name) for name in self.branch_may_change}}
        if different := differences(stored, now, "checkpoint"):
            raise DataError(
                "the data differs from the checkpoint's, so the run would not continue where it "
                "stopped; restore the old setting or start a new run:\n  " + "\n  ".join(different)
            )
        return state["step"]


class Samples(Pipeline):
    """Rows of fixed content: `_train` in an order of its own each epoch, `_held_out` in order.

    A subclass sets the arrays of row numbers, `_share`, `seed` and `config.shuffle`, and writes
    `_batch_of`.
    """

    purpose: ClassVar[str]
    """Names the random order among those that the seed gives."""
    config: Any
    seed: int
    _share: Share
    _train: np.ndarray
    _held_out: np.ndarray

    @abstractmethod
    def _batch_of(self, rows: np.ndarray, size: int) -> Batch:
        """Return a batch of these rows, filled with padding to `size`."""

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, the same whenever and wherever it is asked for."""
        numbers, shuffle = self._share.rows(step), self.config.shuffle
        places = epochs_of(numbers, len(self._train), self.seed, self.purpose, shuffle=shuffle)
        return self._batch_of(self._train[places], len(places))

    def eval_batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield the held-out rows once, in order; the last batch is filled with padding.

        Every process gets every row.
        """
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size={size} must be >= 1")
        for begin in range(0, len(self._held_out), size):
            yield self._batch_of(self._held_out[begin : begin + size], size)

    def epochs(self, step: int) -> tuple[float, ...]:
        """Return how many times the rows have been read before `step`."""
        return (step * self.batch_size / len(self._train),)


class TokenPipeline(Pipeline):
    """Rows of `seq_len` tokens made by `tokenizer`."""

    tokenizer: Tokenizer
    seq_len: int

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape of a row and dtype of everything in a batch."""
        row = (self.seq_len,)
        integers = dict.fromkeys(("tokens", "positions", "segment_ids"), (row, np.int32))
        return {**integers, "loss_mask": (row, np.bool_)}

    @property
    def pad_id(self) -> int:
        """Id at unused positions: the tokenizer's pad, else its eos, else 0."""
        for number in (self.tokenizer.pad_id, self.tokenizer.eos_id):
            if number is not None:
                return number
        return 0


def differences(stored: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Return a line for each field in which two fingerprints differ."""
    return [
        f"{name}: {stored.get(name)!r} in the {where}, {now.get(name)!r} now"
        for name in {**now, **stored}
        if stored.get(name) != now.get(name)
    ]
