# SPDX-License-Identifier: Apache-2.0
"""Needles in filler text: where they lie, and how finding them is counted."""

import jax
import numpy as np
import pytest

from eval import needle
from eval.config import Needle
from eval.scoring import Score
from sqzjax.errors import DataError
from sqzjax.io import tokenizer as tokenizers

BYTES = tokenizers.load("bytes")
TASK = Needle(lengths=(200, 400), depths=(0.0, 0.5, 1.0), samples=2, digits=4, alternatives=3)


class Reader:
    """Finds the number by reading the prompt, but only within its last `sight` characters."""

    tokenizer = BYTES
    fingerprint = "reader"

    def __init__(self, sight):
        self.sight = sight

    def known(self, prompt):
        text = BYTES.decode(prompt)[-self.sight :]
        return "".join(c if c.isdigit() else " " for c in text).split()[:1]

    def generate(self, prompts, sampling, *, row_ids, truncate="never"):
        return [f" {(self.known(prompt) or ['nothing'])[0]}." for prompt in prompts]

    def score(self, requests, *, progress=None):
        return [
            Score(
                -float(BYTES.decode(r.target).strip() not in self.known(r.context)),
                False,
                np.zeros(1),
            )
            for r in requests
        ]


def test_prompts_fill_the_length_and_place_the_needle():
    cases = needle.build_cases(TASK, BYTES, seed=0)
    assert len(cases) == 2 * 3 * 2
    longest = max(map(len, needle.FILLER))
    for case in cases:
        text = BYTES.decode(case.prompt)
        room = len(case.number) + 2
        assert case.length - longest - room <= len(case.prompt) <= case.length - room
        assert text.count(case.number) == 1
        assert len({case.number, *case.others}) == 4
        # The filler around the needle: sentence borders allow one sentence of deviation.
        before = text.index("The secret number")
        filler = len(text) - 2 * len("The secret number of Cairo is 1234. Remember it.")
        assert before == pytest.approx(case.depth * filler, abs=longest)


def test_cells_of_a_column_differ_by_depth_alone():
    cases = needle.build_cases(TASK, BYTES, seed=0)
    for length in TASK.lengths:
        group = [case for case in cases if case.length == length]
        assert len({case.number for case in group}) == TASK.samples
        assert len({len(case.prompt) for case in group}) <= 2 * TASK.samples
    assert needle.build_cases(TASK, BYTES, 0) == cases
    assert needle.build_cases(TASK, BYTES, 1) != cases


def test_a_perfect_reader_finds_every_needle_and_a_blind_one_none():
    perfect = needle.run(TASK, Reader(10**6), Reader(10**6), batch_size=5, seed=0)
    assert perfect["likelihood"]["accuracy"] == perfect["generation"]["accuracy"] == 1.0
    assert perfect["mean_rank"] == 1.0 and perfect["chance"] == 0.25
    blind = needle.run(TASK, Reader(1), Reader(1), batch_size=5, seed=0)
    # All numbers tie; a tie is no find.
    assert blind["likelihood"]["accuracy"] == blind["generation"]["accuracy"] == 0.0
    assert blind["mean_rank"] == 4.0


def test_short_sight_shows_in_the_grid():
    """A reader of the last 60 characters finds deep needles only: rows are depths."""
    cells = needle.run(TASK, Reader(60), Reader(60), batch_size=5, seed=0)
    assert cells["generation"]["cells"] == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    assert cells["likelihood"]["cells"] == cells["generation"]["cells"]


def test_answer_tokens_follow_a_word():
    assert BYTES.decode(needle.answer_tokens(BYTES, "1234")) == " 1234"


def test_sentencepiece_answer_tokens(shared_data):
    tokenizer = tokenizers.load(shared_data / "stories260K")
    ids = needle.answer_tokens(tokenizer, "57")
    assert tokenizer.decode([*tokenizer.encode("is"), *ids]) == "is 57"


def test_own_filler(tmp_path):
    path = tmp_path / "filler.txt"
    path.write_text("One cat. Two dogs! Three?")
    assert needle.filler_sentences(str(path)) == ["One cat. ", "Two dogs! ", "Three?"]
    path.write_text("no end")
    with pytest.raises(DataError, match="holds no sentence"):
        needle.filler_sentences(str(path))
    with pytest.raises(DataError, match="cannot read filler"):
        needle.filler_sentences(str(tmp_path / "absent.txt"))


def test_too_short_a_length_is_refused():
    with pytest.raises(DataError, match=r"take 7[0-9] tokens, more than the 1[0-9] that are left"):
        needle.build_cases(Needle(lengths=(20,)), BYTES, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lengths", ()),
        ("lengths", (5, 5)),
        ("depths", (1.5,)),
        ("depths", ()),
        ("digits", 1),
        ("alternatives", 0),
        ("samples", 0),
        ("needle", "no number here"),
    ],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Needle(**{field: value})


def test_real_model_ranks_near_chance(tiny):
    """An untrained model cannot know: its mean rank over many cases is that of guessing."""
    task = Needle(
        lengths=(100,), depths=(0.5,), samples=60, digits=3, alternatives=4, mode="likelihood"
    )
    result = needle.run(task, tiny, tiny.scorer(), batch_size=4, seed=0)
    # Rank is uniform on 1..5: mean 3, standard deviation of the mean 0.18.
    assert 2.3 < result["mean_rank"] < 3.7
    assert jax.tree.leaves(result["likelihood"]["cells"])[0] < 0.5
