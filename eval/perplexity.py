# SPDX-License-Identifier: Apache-2.0
"""Perplexity with every token scored exactly once.

A document is cut into windows: the first scores up to `context` tokens, each further one scores the
next `stride` tokens with as much earlier text as fits. Non-overlapping windows (`stride` =
`context`) cost one forward pass over the text; the usual sliding window costs context/stride times
that and gives lower figures, so both numbers belong into a result.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import Perplexity
from eval.scoring import LikelihoodScorer, Request
from sqzjax.errors import DataError, RequestError
from sqzjax.io.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Document:
    """Token ids, BOS included where there is one, and the text's size in bytes and words."""

    tokens: np.ndarray
    num_bytes: int
    num_words: int


def windows(tokens: Sequence[int] | np.ndarray, context: int, stride: int) -> list[Request]:
    """Cut a document into requests that score each token after the first once.

    No request feeds more than `context` tokens; the last window keeps its full context.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must lie in [1, context={context}]")
    requests, begin = [], 1
    while begin < len(tokens):
        end = min(begin + (context if begin == 1 else stride), len(tokens))
        start = max(0, end - 1 - context)
        requests.append(Request(tokens[start:begin], tokens[begin:end]))
        begin = end
    return requests


def measure(
    documents: Sequence[Document],
    scorer: LikelihoodScorer,
    *,
    context: int,
    stride: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Return summed and mean figures over documents, and the per-document sums.

    `nll` is nats per scored token; with an `estimate`, an upper bound of that. Bits per byte and
    word perplexity divide the same sum by the size of the text, which makes models with different
    tokenizers comparable.
    """
    pieces = [windows(document.tokens, context, stride) for document in documents]
    scores = iter(scorer.score([r for piece in pieces for r in piece], progress=progress))
    sums = [-sum(next(scores).logprob for _ in piece) for piece in pieces]
    counts = [sum(len(request.target) for request in piece) for piece in pieces]
    tokens = sum(counts)
    if not tokens:
        raise DataError("no token to score: every document is empty or a single token long")
    total = float(sum(sums))
    if not math.isfinite(total):
        raise RequestError("the model returned log-likelihoods that are not finite")
    num_bytes = sum(document.num_bytes for document in documents)
    words = sum(document.num_words for document in documents)
    return {
        "nll": total / tokens,
        "perplexity": _exp(total / tokens),
        "bits_per_byte": total / math.log(2) / num_bytes if num_bytes else None,
        "word_perplexity": _exp(total / words) if words else None,
        "summed_nll": total,
        "tokens": tokens,
        "bytes": num_bytes,
        "words": words,
        "documents": len(documents),
        "estimate": scorer.estimate,
        "document_nll": sums,
        "document_tokens": counts,
    }


def read_documents(task: Perplexity, tokenizer: Tokenizer, context: int) -> list[Document]:
    """Read and encode the documents of a text file."""
    bos = begins_with_bos(task, tokenizer)
    texts = split(Path(task.data), task.separator)
    if task.limit:
        texts = texts[: task.limit]
    encoded = tokenizer.encode_batch(texts)
    first = [tokenizer.bos_id] if bos else []
    documents = []
    for text, ids in zip(texts, encoded):
        tokens = np.asarray([*first, *ids], np.int32)
        if task.long_documents == "truncate" and len(tokens) > context:
            tokens = tokens[:context]
            text = tokenizer.decode(tokens[len(first) :])
        documents.append(_document(tokens, text))
    return documents


def begins_with_bos(task: Perplexity, tokenizer: Tokenizer) -> bool:
    """Tell whether documents begin with BOS under the task's rule."""
    if task.bos == "always" and tokenizer.bos_id is None:
        raise DataError("bos=always, but this tokenizer has no BOS token; use auto or never")
    return task.bos == "always" or (task.bos == "auto" and tokenizer.adds_bos)


def split(path: Path, separator: str) -> list[str]:
    """Return the documents of a text file; DataError if there is no text in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    pieces = [piece.strip() for piece in text.split(separator)] if separator else [text]
    pieces = [piece for piece in pieces if piece.strip()]
    if not pieces:
        raise DataError(f"{path} holds no text")
    return pieces


def held_out_documents(
    workdir: Path, tokenizer: Tokenizer, *, limit: int, truncate_to: int | None
) -> list[Document]:
    """Read the documents that a training run held out: `heldout.npz` with tokens and offsets.

    Document i is `tokens[offsets[i]:offsets[i + 1]]`, with the special tokens it was trained with.
    """
    path = workdir / "heldout.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, offsets = file["tokens"], file["offsets"]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is no held-out token file: {error}") from error
    good = tokens.ndim == offsets.ndim == 1 and len(offsets) and offsets[-1] == len(tokens)
    if not good or tokens.dtype.kind not in "iu" or (np.diff(offsets) < 0).any() or offsets[0]:
        raise DataError(
            f"{path} must hold flat integer `tokens` and rising `offsets` from 0 to their number"
        )
    pieces: Iterable[np.ndarray] = np.split(tokens, offsets[1:-1]) if len(offsets) > 1 else []
    pieces = [piece[:truncate_to] for piece in pieces if len(piece)]
    if limit:
        pieces = pieces[:limit]
    return [_document(piece.astype(np.int32), tokenizer.decode(piece)) for piece in pieces]


def _document(tokens: np.ndarray, text: str) -> Document:
    size = len(text.encode("utf-8", errors="replace"))
    return Document(tokens=tokens, num_bytes=size, num_words=len(text.split()))


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None  # beyond float64
