# SPDX-License-Identifier: Apache-2.0
"""Rows of `seq_len` tokens from documents of any length.

`PackedRows` joins the documents of an epoch, in a fresh order, and cuts the stream into rows: no
position is wasted but at the end of the epoch. `PaddedRows` gives each document a row: simple, and
right for short prompt-response pairs, but it cuts long documents and computes on padding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from train.data.order import derive_key, epochs_of, permute
from train.data.store import TokenStore

Batch = dict[str, np.ndarray]


class Piece(NamedTuple):
    """Tokens [begin, end) of one document."""

    document: int
    begin: int
    end: int


@dataclass
class PackedRows:
    """Rows of one source; every token appears exactly once per epoch.

    The order of an epoch takes 16 bytes of memory per document and is kept for one epoch at a time.
    """

    store: TokenStore
    seq_len: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of one epoch, the same for each."""
        return -(-self.store.num_tokens // self.seq_len)

    def pieces(self, epoch: int, row: int) -> list[Piece]:
        """Return what a row of an epoch is made of."""
        order, starts = self._layout(epoch)
        begin = row * self.seq_len
        end = min(begin + self.seq_len, self.store.num_tokens)
        found = []
        place = int(np.searchsorted(starts, begin, side="right")) - 1
        while begin < end:
            start, stop = int(starts[place]), min(int(starts[place + 1]), end)
            found.append(Piece(int(order[place]), begin - start, stop - start))
            begin, place = stop, place + 1
        return found

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the documents, and where each begins in the stream."""
        cached = self._epoch
        if cached is not None and cached[0] == epoch:
            return cached[1:]
        count = self.store.num_documents
        order = np.arange(count)
        if self.shuffle:
            order = permute(order, count, derive_key(self.seed, "documents", epoch))
        starts = np.concatenate([[0], np.cumsum(self.store.lengths[order])])
        # One assignment, so that a prefetching thread never sees half of it.
        self._epoch = (epoch, order, starts)
        return order, starts


@dataclass
class PaddedRows:
    """One document per row; tokens beyond `seq_len` are cut off (`truncated_tokens`)."""

    store: TokenStore
    seq_len: int
    seed: int
    shuffle: bool = True

    @property
    def num_rows(self) -> int:
        """Rows of one epoch: the number of documents."""
        return self.store.num_documents

    @property
    def truncated_tokens(self) -> int:
        """Tokens that no row shows."""
        return int(np.maximum(self.store.lengths - self.seq_len, 0).sum())

    def pieces(self, epoch: int, row: int) -> list[Piece]:
        """Return what a row of an epoch is made of."""
        del epoch
        offsets = self.store.offsets
        return [Piece(row, 0, min(int(offsets[row + 1] - offsets[row]), self.seq_len))]


Rows = PackedRows | PaddedRows


def locate(
    rows: Rows, indices: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return epoch and row for row numbers of an endless stream, shuffled within each epoch."""
    inside = epochs_of(indices, rows.num_rows, rows.seed, "rows", shuffle=rows.shuffle)
    return indices // rows.num_rows, inside


def empty_batch(batch_size: int, seq_len: int, pad_id: int) -> Batch:
    """Return a batch of padding."""
    shape = (batch_size, seq_len)
    return {
        "tokens": np.full(shape, pad_id, np.int32),
        "positions": np.full(shape, -1, np.int32),
        "segment_ids": np.full(shape, -1, np.int32),
        "loss_mask": np.zeros(shape, np.bool_),
    }


def fill_rest(batch: Batch, row: int, token: int) -> None:
    """Continue a row's only document to the end of the row with `token`, a target each time."""
    size = int((batch["segment_ids"][row] >= 0).sum())
    width = batch["tokens"].shape[1]
    batch["tokens"][row, size:] = token
    batch["positions"][row, size:] = np.arange(size, width)
    batch["segment_ids"][row, size:] = 0
    batch["loss_mask"][row, size:] = True


def fill_row(batch: Batch, row: int, store: TokenStore, pieces: list[Piece], mask: bool) -> None:
    """Write pieces into a row of a batch; `mask` keeps the documents apart.

    Positions count from 0 in each piece, also in the continuation of a document that began in an
    earlier row: its beginning is not there to be attended to.
    """
    at = 0
    for segment, piece in enumerate(pieces):
        size = piece.end - piece.begin
        span = slice(at, at + size)
        begin = store.offsets[piece.document] + piece.begin
        batch["tokens"][row, span] = store.tokens[begin : begin + size]
        batch["positions"][row, span] = np.arange(size) if mask else np.arange(at, at + size)
        batch["segment_ids"][row, span] = segment if mask else 0
        targets = np.arange(piece.begin, piece.end) >= store.skips[piece.document]
        batch["loss_mask"][row, span] = targets
        at += size
