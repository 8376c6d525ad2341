# SPDX-License-Identifier: Apache-2.0
"""The built-in corpus, BPE training on it, and the count-based baselines."""

import email
import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sqzjax.errors import DataError
from sqzjax.io.tokenizer import load
from tests import tolerances
from train.data import bigram, corpus, train_bpe, unigram


@pytest.mark.slow
def test_corpus_is_enough_english():
    documents = corpus.documents()
    text = "\n".join(documents)
    assert len(text.encode()) >= 2_000_000
    assert len(documents) > 300
    assert text.split().count("the") > 10_000
    letters = text[::10]
    assert sum(c.isalpha() or c == " " for c in letters) / len(letters) > 0.8
    assert all(c == "\n" or c.isprintable() for c in set(text))
    assert not any("\n\n\n" in document for document in documents)


def test_corpus_pieces(tmp_path: Path):
    prose = "This sentence has enough plain words to be taken for prose."
    (tmp_path / "b.py").write_text(f'"""{prose}"""\n', encoding="utf-8")
    (tmp_path / "a.py").write_text(
        f"# A comment of one line is not taken although it reads well.\n"
        f'def f():\n    """{prose}\n    --------------------\n    and {prose}"""\n'
        "    # Two lines of a comment that explains something in words,\n"
        "    # which is worth reading.\n    x = 1\n    # x = 2\n    # y = 3\n"
        f'def g():\n    """Short."""\ndef h():\n    """{prose}"""\n',
        encoding="utf-8",
    )
    (tmp_path / "c.py").write_text("this is not Python (", encoding="utf-8")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "d.py").write_text(f'"""{prose} In a test."""', encoding="utf-8")
    first, *others = corpus.documents(tmp_path)
    assert first == (
        f"The module a\n\n{prose}\nand {prose}\n\n{prose}\n\n"
        "Two lines of a comment that explains something in words,\nwhich is worth reading.\n"
    )
    assert others == []
    before = corpus.fingerprint(tmp_path)
    (tmp_path / "b.py").write_text('"""Other."""', encoding="utf-8")
    assert corpus.fingerprint(tmp_path) != before


def test_bpe_is_deterministic_and_lossless(tmp_path: Path):
    texts = corpus.documents(Path(email.__file__).parent)[:6]
    first = train_bpe(texts, 500)
    assert first.fingerprint == train_bpe(iter(texts), 500).fingerprint
    assert first.vocab_size == 500
    assert (first.bos_id, first.eos_id, first.pad_id, first.mask_id) == (0, 1, 2, 3)
    text = "Привет, 12345 <|eos|>\x00 😀  \n\tdef f(): pass"
    ids = first.encode(text)
    assert first.decode(ids) == text
    assert min(ids) > 3, "special-token text in a document is not a special token"
    assert len(first.encode(texts[0])) < 0.7 * len(texts[0])
    first.save(tmp_path)
    assert load(tmp_path).fingerprint == first.fingerprint


def test_bpe_of_little_text(caplog: pytest.LogCaptureFixture):
    small = train_bpe(["aaaa aaaa"], 1000)
    assert 260 < small.vocab_size < 1000
    assert "fewer than vocab_size=1000" in caplog.text
    with pytest.raises(DataError, match="no text"):
        train_bpe([], 300)


def test_bpe_reads_no_more_than_asked():
    texts = ["abab" * 100, "cdcd" * 100]
    limited = train_bpe(texts, 262, max_characters=400)
    assert limited.fingerprint == train_bpe(texts[:1], 262).fingerprint


def brute_force(train: list[int], test: list[int], size: int, k: float) -> tuple[float, float]:
    """Sum the definitions with dictionaries, one token at a time."""

    def prior(w: int) -> float:
        return (train.count(w) + k) / (len(train) + k * size)

    pairs = list(pairwise(train))
    single = double = 0.0
    for place, w in enumerate(test):
        single -= math.log(prior(w))
        after = [b for a, b in pairs if place and a == test[place - 1]]
        kinds = len(set(after))
        mixed = prior(w)
        if after:
            mixed = (after.count(w) + kinds * prior(w)) / (len(after) + kinds)
        double -= math.log(mixed)
    return single / len(test), double / len(test)


@pytest.mark.parametrize("size", [5, 12, 40])
def test_baselines_equal_their_definitions(size: int):
    source = random.Random(size)
    train = [min(source.randrange(size), source.randrange(size)) for _ in range(120)]
    test = [source.randrange(size) for _ in range(60)]
    one = unigram(np.array(train), np.array(test), size, k=0.5)
    two = bigram(np.array(train, np.uint16), np.array(test, np.int32), size, k=0.5)
    single, double = brute_force(train, test, size, 0.5)
    assert one.nats_per_token == pytest.approx(single, rel=tolerances.FLOAT64_REL)
    assert two.nats_per_token == pytest.approx(double, rel=tolerances.FLOAT64_REL)
    assert two.perplexity == pytest.approx(math.exp(double), rel=tolerances.FLOAT64_REL)
    assert one.num_tokens == two.num_tokens == 60


def test_baselines_are_distributions():
    train = np.array([0, 1, 1, 2, 0, 1])
    for before in range(4):
        tests = [np.array([before, w]) for w in range(4)]
        last = np.array([False, True])
        scores = [bigram(train, test, 4, targets=last).nats_per_token for test in tests]
        total = sum(math.exp(-score) for score in scores)
        assert total == pytest.approx(1, rel=tolerances.FLOAT64_REL)


def test_baselines_with_a_large_vocabulary():
    tokens = np.random.default_rng(0).integers(0, 65_536, 200_000).astype(np.uint16)
    assert bigram(tokens[:-1000], tokens[-1000:], 65_536).perplexity > 10_000


@pytest.mark.parametrize(
    ("train", "test", "k", "message"),
    [([0], [1], 0.0, "k=0.0"), ([9], [1], 1.0, "token id 9"), ([0], [], 1.0, "no held-out token")],
)
def test_baselines_reject(train: list[int], test: list[int], k: float, message: str):
    with pytest.raises(ValueError, match=message):
        unigram(np.array(train), np.array(test, np.int64), 4, k=k)
