# SPDX-License-Identifier: Apache-2.0
"""Count-based language models: the numbers a trained model has to beat.

Both are fitted on training tokens and scored on held-out tokens, with natural logarithms. A model
that has learned only token frequencies reaches the unigram's perplexity; one that looks a single
token back, the bigram's.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Baseline:
    """Cross-entropy of a count-based model on held-out tokens."""

    name: str
    nats_per_token: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the cross-entropy."""
        return math.exp(self.nats_per_token)


def unigram(
    train: Int[np.ndarray, " train"],
    test: Int[np.ndarray, " test"],
    vocab_size: int,
    *,
    k: float = 1.0,
    targets: Bool[np.ndarray, " test"] | None = None,
) -> Baseline:
    """Score p(w) = (c(w) + k) / (N + k V); `targets` selects the test tokens that count."""
    probabilities = _unigram(train, vocab_size, k)
    return _score("unigram", probabilities[test], targets)


def bigram(
    train: Int[np.ndarray, " train"],
    test: Int[np.ndarray, " test"],
    vocab_size: int,
    *,
    k: float = 1.0,
    targets: Bool[np.ndarray, " test"] | None = None,
) -> Baseline:
    """Score a bigram model interpolated with the add-k unigram by Witten and Bell's rule.

    p(w | u) = (c(u, w) + t(u) p(w)) / (c(u) + t(u)), where t(u) is the number of different
    successors of u seen in training: nothing is left to tune. The first test token and successors
    of an unseen token get the unigram's probability. Memory grows with the different pairs.
    """
    prior = _unigram(train, vocab_size, k)
    codes, counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    firsts = codes // vocab_size
    totals = np.bincount(firsts, weights=counts, minlength=vocab_size)
    kinds = np.bincount(firsts, minlength=vocab_size)
    previous, wanted = test[:-1], _pairs(test, vocab_size)
    places = np.minimum(np.searchsorted(codes, wanted), max(0, len(codes) - 1))
    known = codes[places] == wanted if len(codes) else np.zeros(len(wanted), np.bool_)
    seen = np.where(known, counts[places], 0) if len(codes) else np.zeros(len(wanted))
    weight = totals[previous] + kinds[previous]
    mixed = (seen + kinds[previous] * prior[test[1:]]) / np.maximum(weight, 1)
    following = np.where(weight > 0, mixed, prior[test[1:]])
    return _score("bigram", np.concatenate([prior[test[:1]], following]), targets)


def _unigram(train: np.ndarray, vocab_size: int, k: float) -> np.ndarray:
    if k <= 0:
        raise ValueError(f"k={k} must be > 0, or unseen tokens would have probability 0")
    counts = np.bincount(train, minlength=vocab_size)
    if len(counts) > vocab_size:
        raise ValueError(f"token id {len(counts) - 1} must be < vocab_size={vocab_size}")
    return (counts + k) / (counts.sum() + k * vocab_size)


def _pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Name each pair of neighbours by one integer."""
    wide = tokens.astype(np.int64)
    return wide[:-1] * vocab_size + wide[1:]


def _score(name: str, probabilities: np.ndarray, targets: np.ndarray | None) -> Baseline:
    chosen = probabilities if targets is None else probabilities[targets]
    if not len(chosen):
        raise ValueError("no held-out token to score; raise eval_fraction")
    return Baseline(name, float(-np.log(chosen).mean()), len(chosen))
