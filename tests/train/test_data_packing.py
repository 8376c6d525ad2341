# SPDX-License-Identifier: Apache-2.0
"""Packing: nothing lost, nothing twice, nothing out of order, whatever the document lengths."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.packing import Batch, PackedRows, PaddedRows, Rows, empty_batch, fill_row, locate
from train.data.store import StoreWriter, TokenStore

PAD = 60_000
LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=30)


def make_store(lengths: list[int], skips: list[int] | None = None) -> TokenStore:
    """Return documents whose tokens are all different: token = running number."""
    with tempfile.TemporaryDirectory() as name:
        writer = StoreWriter(Path(name), "toy", 65_536)
        begin = 0
        for length, skip in zip(lengths, skips or [0] * len(lengths), strict=True):
            numbers = np.arange(begin, begin + length)
            half = length // 2
            writer.add([numbers[:half].tolist(), numbers[half:]], skip)
            begin += length
        writer.close()
        return TokenStore(Path(name), "toy", 65_536)


def render(rows: Rows, epoch: int, mask: bool = True) -> Batch:
    """Return a whole epoch as one batch, in the order of the rows."""
    batch = empty_batch(rows.num_rows, rows.seq_len, PAD)
    for row in range(rows.num_rows):
        fill_row(batch, row, rows.store, rows.pieces(epoch, row), mask)
    return batch


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 33), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_packed_epoch_holds_every_token_once_and_in_order(
    lengths: list[int], seq_len: int, epoch: int, shuffle: bool
):
    store = make_store(lengths)
    batch = render(PackedRows(store, seq_len, 5, shuffle), epoch)
    real = batch["segment_ids"] >= 0
    stream = batch["tokens"][real]
    assert sorted(stream.tolist()) == list(range(sum(lengths)))
    # Within a document the numbers rise by one; documents are the runs of the stream.
    breaks = np.flatnonzero(np.diff(stream) != 1) + 1
    begins = set(store.offsets[:-1].tolist())
    assert all(int(stream[place]) in begins for place in breaks)
    # Padding only at the very end of the epoch.
    assert real.ravel()[: sum(lengths)].all()
    if not shuffle:
        assert stream.tolist() == list(range(sum(lengths)))


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 33), packed=st.booleans())
def test_positions_and_segments_agree(lengths: list[int], seq_len: int, packed: bool):
    store = make_store(lengths)
    kind = PackedRows if packed else PaddedRows
    batch = render(kind(store, seq_len, 5), 0)
    documents = np.searchsorted(store.offsets, batch["tokens"], side="right") - 1
    for row in range(len(batch["tokens"])):
        segments, positions = batch["segment_ids"][row], batch["positions"][row]
        size = int((segments >= 0).sum())
        assert (segments[size:] == -1).all() and (positions[size:] == -1).all()
        assert (batch["tokens"][row, size:] == PAD).all()
        assert not batch["loss_mask"][row, size:].any()
        for t in range(size):
            new = t == 0 or documents[row, t] != documents[row, t - 1]
            assert positions[t] == (0 if new else positions[t - 1] + 1)
            assert segments[t] == (0 if t == 0 else segments[t - 1] + new)


@settings(deadline=None)
@given(
    pairs=st.lists(
        st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
        min_size=1,
        max_size=15,
    ),
    seq_len=st.integers(2, 20),
    packed=st.booleans(),
)
def test_loss_mask_marks_exactly_the_targets(
    pairs: list[tuple[int, int]], seq_len: int, packed: bool
):
    lengths, skips = zip(*pairs, strict=True)
    store = make_store(list(lengths), list(skips))
    kind = PackedRows if packed else PaddedRows
    batch = render(kind(store, seq_len, 1), 0)
    shown = seq_len if not packed else 10**6
    wanted = [
        int(begin) + t
        for begin, length, skip in zip(store.offsets, lengths, skips, strict=False)
        for t in range(skip, min(length, shown))
    ]
    assert sorted(batch["tokens"][batch["loss_mask"]].tolist()) == wanted


def test_padded_rows_cut_and_fill():
    rows = PaddedRows(make_store([3, 12, 8]), 8, 0, shuffle=False)
    batch = render(rows, 0)
    assert batch["tokens"].tolist() == [
        [0, 1, 2, *[PAD] * 5],
        list(range(3, 11)),
        list(range(15, 23)),
    ]
    assert batch["positions"][0].tolist() == [0, 1, 2, *[-1] * 5]
    assert rows.truncated_tokens == 4


def test_without_document_mask_a_row_is_one_segment():
    batch = render(PackedRows(make_store([3, 4, 2]), 5, 0, shuffle=False), 0, mask=False)
    assert batch["segment_ids"].tolist() == [[0] * 5, [0] * 4 + [-1]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, -1]]


@pytest.mark.parametrize("packed", [True, False])
def test_epochs_differ_and_rows_are_shuffled(packed: bool):
    store = make_store([5] * 40)
    rows = (PackedRows if packed else PaddedRows)(store, 10, 3)
    count = rows.num_rows
    epochs, indices = locate(rows, np.arange(3 * count))
    assert epochs.tolist() == [e for e in range(3) for _ in range(count)]
    orders = indices.reshape(3, count)
    assert all(sorted(order) == list(range(count)) for order in orders.tolist())
    assert len({tuple(order) for order in orders.tolist()}) == 3
    if packed:
        assert not np.array_equal(render(rows, 0)["tokens"], render(rows, 1)["tokens"])


def test_shapes_and_types():
    batch = empty_batch(2, 3, 7)
    kinds = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
    assert kinds == {
        "tokens": ((2, 3), "int32"),
        "positions": ((2, 3), "int32"),
        "segment_ids": ((2, 3), "int32"),
        "loss_mask": ((2, 3), "bool"),
    }
