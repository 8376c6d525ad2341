# SPDX-License-Identifier: Apache-2.0
"""Windowed perplexity against brute force, and published per-story sums of a real model."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import perplexity
from eval.config import Perplexity
from eval.scoring import Scorer
from sqzjax.errors import DataError
from sqzjax.io import tokenizer as tokenizers
from sqzjax.models import DecoderLM, Execution, ModelConfig
from tests import arrays, tolerances
from tests.parameters import drawn

CONFIG = ModelConfig(
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    max_positions=32,
)
BYTES = tokenizers.load("bytes")


@pytest.fixture(scope="module")
def scorer():
    model = DecoderLM(CONFIG, Execution(scan_layers=False))
    return Scorer(model=model, params=drawn(model, 1))


@partial(jax.jit, static_argnums=0)
def forward(model, params, ids):
    return model.forward(params, ids).logits


def document(tokens, text="") -> perplexity.Document:
    return perplexity.Document(
        tokens=np.asarray(tokens, np.int32), num_bytes=len(text), num_words=len(text.split())
    )


@given(length=st.integers(0, 70), context=st.integers(1, 20), data=st.data())
def test_windows_score_every_token_once(length, context, data):
    stride = data.draw(st.integers(1, context))
    tokens = np.arange(length)
    seen = []
    for index, request in enumerate(perplexity.windows(tokens, context, stride)):
        fed = len(request.context) + len(request.target) - 1
        assert fed <= context
        # Only a document shorter than the context sees less than a full window.
        assert fed == min(context, length - 1) or index == 0
        joined = [*request.context, *request.target]
        assert joined == list(range(joined[0], joined[0] + len(joined)))
        seen += list(request.target)
    assert seen == list(range(1, length))


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 4), (16, 1), (32, 20)])
def test_sum_equals_token_by_token_brute_force(scorer, context, stride):
    tokens = np.random.default_rng(0).integers(0, 256, 50)
    result = perplexity.measure([document(tokens)], scorer, context=context, stride=stride)
    total, begin = 0.0, 1
    while begin < len(tokens):
        end = min(begin + (context if begin == 1 else stride), len(tokens))
        for position in range(begin, end):
            seen = tokens[max(0, end - 1 - context) : position]
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(seen)] = seen
            logits = np.asarray(forward(scorer.model, scorer.params, padded), np.float64)
            logits = logits[0, len(seen) - 1]
            total -= logits[tokens[position]] - np.log(np.exp(logits).sum())
        begin = end
    assert result["summed_nll"] == pytest.approx(total, abs=tolerances.SUMMED_LOGPROB)
    assert result["tokens"] == 49
    assert result["perplexity"] == pytest.approx(math.exp(total / 49), rel=tolerances.RAGGED)


def test_more_context_is_used_by_a_smaller_stride(scorer):
    tokens = np.random.default_rng(1).integers(0, 256, 65)
    wide = perplexity.windows(tokens, 32, 32)
    dense = perplexity.windows(tokens, 32, 8)
    assert min(len(r.context) for r in dense[1:]) == 32 - 8 + 1
    assert min(len(r.context) for r in wide[1:]) == 1


def test_per_byte_and_per_word_figures_are_the_same_sum(scorer):
    text = "one two  three"
    result = perplexity.measure(
        [document(list(text.encode()), text)], scorer, context=32, stride=32
    )
    total = result["summed_nll"]
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / 14)
    assert result["word_perplexity"] == pytest.approx(math.exp(total / 3))


def test_documents_are_read_as_asked(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("  first story \n<|end|>\n<|end|>second", encoding="utf-8")
    task = Perplexity(data=str(path), separator="<|end|>", bos="always")
    documents = perplexity.read_documents(task, BYTES, 32)
    assert [BYTES.decode(d.tokens) for d in documents] == ["first story", "second"]
    assert all(d.tokens[0] == BYTES.bos_id for d in documents)
    assert [d.num_bytes for d in documents] == [11, 6]
    whole = perplexity.read_documents(Perplexity(data=str(path)), BYTES, 32)
    assert len(whole) == 1 and whole[0].tokens[0] == ord(" ")
    cut = Perplexity(
        data=str(path), separator="<|end|>", bos="always", long_documents="truncate", limit=1
    )
    (only,) = perplexity.read_documents(cut, BYTES, 5)
    assert BYTES.decode(only.tokens) == "firs" and only.num_bytes == 4


def test_held_out_documents_keep_their_borders(tmp_path):
    tokens = np.array([72, 105, 257, 72, 111, 257], np.int32)
    np.savez(tmp_path / "heldout.npz", tokens=tokens, offsets=np.array([0, 3, 3, 6]))
    documents = perplexity.held_out_documents(tmp_path, BYTES, limit=0, truncate_to=None)
    assert [d.tokens.tolist() for d in documents] == [[72, 105, 257], [72, 111, 257]]
    assert [d.num_bytes for d in documents] == [2, 2]


@pytest.mark.parametrize(
    "arrays",
    [
        {"tokens": np.arange(4)},
        {"tokens": np.arange(4), "offsets": np.array([0, 3])},
        {"tokens": np.arange(4), "offsets": np.array([0, 3, 2, 4])},
        {"tokens": np.arange(4.0), "offsets": np.array([0, 4])},
    ],
)
def test_damaged_held_out_file_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "heldout.npz", **arrays)
    with pytest.raises(DataError, match=r"heldout\.npz"):
        perplexity.held_out_documents(tmp_path, BYTES, limit=0, truncate_to=None)


def test_pickled_held_out_file_is_refused(tmp_path):
    np.savez(tmp_path / "heldout.npz", tokens=np.array([{}], object), offsets=np.array([0, 1]))
    with pytest.raises(DataError, match=r"heldout\.npz"):
        perplexity.held_out_documents(tmp_path, BYTES, limit=0, truncate_to=None)


def test_bad_inputs_are_named(tmp_path, scorer):
    with pytest.raises(DataError, match=r"cannot read .*absent\.txt"):
        perplexity.split(tmp_path / "absent.txt", "")
    (tmp_path / "empty.txt").write_text(" \n ")
    with pytest.raises(DataError, match="holds no text"):
        perplexity.split(tmp_path / "empty.txt", "")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        perplexity.split(tmp_path / "latin.txt", "")
    with pytest.raises(DataError, match="no token to score"):
        perplexity.measure([document([5])], scorer, context=8, stride=8)
    with pytest.raises(ValueError, match=r"stride=9 must lie in \[1, context=8\]"):
        perplexity.windows(np.arange(5), 8, 9)


@pytest.fixture(scope="module")
def stories(shared_data):
    hf = pytest.importorskip("sqzjax.io.hf")
    folder = shared_data / "stories260K"
    config, params = hf.load(folder, execution=Execution(scan_layers=False))
    model = DecoderLM(config, Execution(scan_layers=False))
    return folder, model, params


@pytest.mark.parametrize("cached", [False, True])
def test_stories_match_published_sums(stories, shared_data, cached):
    """Summed NLL and token count of each story equal those of Hugging Face transformers."""
    from sqzjax.kvcache import Dense

    folder, model, params = stories
    task = Perplexity(
        data=str(shared_data / "tinystories_sample.txt"),
        separator="<|endoftext|>",
        bos="always",
        long_documents="truncate",
    )
    documents = perplexity.read_documents(task, tokenizers.load(folder), 512)
    scorer = Scorer(model=model, params=params, cache=Dense() if cached else None)
    result = perplexity.measure(documents, scorer, context=512, stride=512)
    expected = arrays.load(folder / "expected.npz")
    assert result["document_tokens"] == expected["story_nll"][:, 1].tolist()
    np.testing.assert_allclose(
        result["document_nll"], expected["story_nll"][:, 0], atol=tolerances.STORY_NLL
    )
    assert result["perplexity"] == pytest.approx(
        float(expected["story_ppl"]), rel=tolerances.RAGGED
    )
