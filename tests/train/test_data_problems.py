# SPDX-License-Identifier: Apache-2.0
"""Training on made-up problems: no held-out prompt, response targets, eos to the end of a row."""

import numpy as np
import pytest

from sqzjax import config as configs
from sqzjax import problems
from sqzjax.errors import DataError
from sqzjax.io.tokenizer import ByteTokenizer
from sqzjax.problems import Addition, Sorting
from train import data
from train.data.dataset import Dataset

BYTES = ByteTokenizer()
MIXED = (Addition(digits=2), Sorting(length=5))


def build(count: int = 60, kinds=MIXED, source=None, seq_len: int = 48, **changes) -> Dataset:
    options = {"packing": "padded", "eval_fraction": 0.0, "shuffle": False, **changes}
    made = data.Problems(problems=kinds, count=count, **(source or {}))
    return data.build(
        data.DataConfig(sources=(made,), **options), seed=0, batch_size=10, seq_len=seq_len
    )


def rows(dataset: Dataset, steps: int = 6):
    for step in range(steps):
        batch = dataset.batch(step)
        for row in range(len(batch["tokens"])):
            yield {name: values[row] for name, values in batch.items()}


def parts(row) -> tuple[str, str]:
    """Return the text that is no target, and the text that is."""
    real = row["segment_ids"] >= 0
    shown, wanted = real & ~row["loss_mask"], real & row["loss_mask"]
    return BYTES.decode(row["tokens"][shown]), BYTES.decode(row["tokens"][wanted])


def test_rows_hold_prompts_and_responses_of_all_kinds_in_turn():
    found = [parts(row) for row in rows(build())]
    streams = [problems.stream(kind, split="train", seed=0) for kind in MIXED]
    expected = [next(streams[index % 2])[:2] for index in range(60)]
    assert found == expected
    assert not any(problems.is_held_out(prompt) for prompt, _ in found)


def test_no_prompt_is_one_that_an_evaluation_asks():
    """All 100 sums of one digit: the run sees the others however long it trains."""
    seen = {parts(row)[0] for row in rows(build(count=600, kinds=(Addition(digits=1),)), steps=60)}
    every = {f"{a}+{b}=" for a in range(10) for b in range(10)}
    assert seen == {prompt for prompt in every if not problems.is_held_out(prompt)}


def test_the_source_is_configured_by_kind():
    text = {"kind": "problems", "problems": [{"kind": "addition", "digits": 2}], "count": 7}
    config = configs.load(data.DataConfig, {"sources": [text], "packing": "padded"})
    assert config.sources == (data.Problems(problems=(Addition(digits=2),), count=7),)
    for bad, words in (({"count": 0}, "count=0"), ({"problems": []}, "at least one kind")):
        with pytest.raises(ValueError, match=words):
            configs.load(data.DataConfig, {"sources": [text | bad]})


def test_what_was_asked_for_is_part_of_the_data_state(monkeypatch):
    def print_of(**changes) -> object:
        return build(**changes).fingerprint["files"]

    base = print_of()
    assert print_of() == base == print_of(source={"weight": 2.0})
    assert base != print_of(count=61)
    assert base != print_of(source={"seed": 1})
    assert base != print_of(kinds=MIXED[::-1])
    monkeypatch.setattr(problems, "VERSION", problems.VERSION + 1)
    assert print_of() != base


# eos to the end of the row


@pytest.mark.parametrize("add_eos", [True, False])
def test_eos_fills_the_row_as_a_target(add_eos):
    plain, filled = (build(add_eos=add_eos, pad_with_eos=on) for on in (False, True))
    for before, after in zip(rows(plain), rows(filled), strict=True):
        size = int((before["segment_ids"] >= 0).sum())
        assert 10 < size < 48
        for name in before:
            np.testing.assert_array_equal(before[name][:size], after[name][:size])
        assert (after["tokens"][size:] == BYTES.eos_id).all()
        assert after["loss_mask"][size:].all() and not before["loss_mask"][size:].any()
        np.testing.assert_array_equal(after["positions"], np.arange(48))
        assert (after["segment_ids"] == 0).all()


def test_a_document_that_is_cut_has_no_room_for_eos():
    plain, filled = (build(pad_with_eos=on, seq_len=8) for on in (False, True))
    for before, after in zip(rows(plain), rows(filled), strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_rows_beyond_the_last_held_out_document_stay_empty():
    dataset = build(eval_fraction=0.2, pad_with_eos=True)
    *_, last = dataset.eval_batches(64)
    count = dataset.stats["eval_documents"]
    assert 0 < count < 64
    assert last["loss_mask"][:count].any(axis=1).all()
    assert not last["loss_mask"][count:].any() and (last["segment_ids"][count:] == -1).all()


def test_filling_needs_padded_rows_and_an_eos_token(monkeypatch):
    with pytest.raises(ValueError, match="needs packing: padded, not 'packed'"):
        build(packing="packed", pad_with_eos=True)
    monkeypatch.setattr(ByteTokenizer, "eos_id", None)
    with pytest.raises(DataError, match="with an eos token"):
        build(add_eos=False, pad_with_eos=True)


def test_a_state_of_other_padding_is_refused():
    state = build().state(3)
    assert build().check_state(state) == 3
    with pytest.raises(DataError, match="packing"):
        build(pad_with_eos=True).check_state(state)
