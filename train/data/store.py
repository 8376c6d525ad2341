# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents on disk: written in one streaming pass, read through memory maps.

A store is three files: `<name>.tokens.bin` (uint16 or uint32), `<name>.offsets.npy` (where each
document begins) and `<name>.skips.npy` (how many leading tokens are no training target).
"""

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from sqzjax.io.tokenizer import Tokenizer
from train.data.sources import Document

BATCH_CHARACTERS = 1 << 20
MAX_PIECE_CHARACTERS = 1 << 22


class TokenStore:
    """Token ids of documents, one after another, as read-only memory maps."""

    def __init__(self, folder: Path, name: str, vocab_size: int):
        self.offsets: np.ndarray = np.load(folder / f"{name}.offsets.npy", allow_pickle=False)
        self.skips: np.ndarray = np.load(folder / f"{name}.skips.npy", allow_pickle=False)
        file = folder / f"{name}.tokens.bin"
        size = file.stat().st_size // token_dtype(vocab_size).itemsize
        if size != self.offsets[-1] or len(self.skips) != len(self.offsets) - 1:
            raise ValueError(f"{file} holds {size} tokens, its index {self.offsets[-1]}")
        # An empty file cannot be mapped.
        self.tokens: np.ndarray = (
            np.memmap(file, dtype=token_dtype(vocab_size), mode="r")
            if size
            else np.zeros(0, token_dtype(vocab_size))
        )

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.skips)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, begin and end tokens included."""
        return len(self.tokens)

    @property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int) -> Int[np.ndarray, " tokens"]:
        """Return the token ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class StoreWriter:
    """Append documents to the files of a store."""

    def __init__(self, folder: Path, name: str, vocab_size: int):
        self._folder, self._name = folder, name
        self._dtype = token_dtype(vocab_size)
        self._stream = (folder / f"{name}.tokens.bin").open("wb")
        self._offsets, self._skips = array("q", [0]), array("q")

    def add(self, pieces: Iterable[list[int] | np.ndarray], skip: int) -> None:
        """Write one document given in pieces; its first `skip` tokens are no targets.

        A document without tokens is left out: a row cannot show it.
        """
        size = 0
        for piece in pieces:
            for begin in range(0, len(piece), MAX_PIECE_CHARACTERS):
                part = np.asarray(piece[begin : begin + MAX_PIECE_CHARACTERS])
                self._stream.write(part.astype(self._dtype).tobytes())
            size += len(piece)
        if not size:
            return
        self._offsets.append(self._offsets[-1] + size)
        self._skips.append(skip)

    def close(self) -> None:
        """Write the index; the store is complete after this."""
        self._stream.close()
        for kind, values in (("offsets", self._offsets), ("skips", self._skips)):
            np.save(self._folder / f"{self._name}.{kind}.npy", np.array(values, np.int64))


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Encoder:
    """Turn documents into token pieces, many at a time so that a tokenizer can use all cores."""

    def __init__(self, tokenizer: Tokenizer, *, add_bos: bool | None, add_eos: bool):
        self._tokenizer = tokenizer
        bos = add_bos if add_bos is not None else tokenizer.adds_bos
        # Asking the tokenizer to add them makes it explain what it lacks.
        self._begin = tokenizer.encode("", add_bos=True) if bos else []
        self._end = tokenizer.encode("", add_eos=True) if add_eos else []

    def encode(
        self, documents: Iterable[tuple[bool, Document]]
    ) -> Iterator[tuple[bool, Document, list[list[int] | np.ndarray], int]]:
        """Yield (held out, document, token pieces, tokens that are no targets)."""
        for group in _groups(documents):
            texts = [text for _, document in group for text in _texts(document)]
            encoded = iter(self._tokenizer.encode_batch(texts) if texts else [])
            for held_out, document in group:
                if document.tokens is not None:
                    yield held_out, document, [document.tokens], 0
                    continue
                ids = [next(encoded) for _ in _texts(document)]
                if document.special:
                    ids[0] = self._tokenizer.encode(document.prompt, parse_special=True)
                skip = len(self._begin) + (len(ids[0]) if document.prompt else 0)
                end = self._tokenizer.encode(document.end, parse_special=True)
                yield held_out, document, [self._begin, *ids, end, self._end], skip


def _texts(document: Document) -> list[str]:
    """Return what to encode: the prompt, whole, and the text in pieces of bounded size."""
    if document.tokens is not None:
        return []
    return [document.prompt] * bool(document.prompt) + cut(document.text, MAX_PIECE_CHARACTERS)


def cut(text: str, limit: int) -> list[str]:
    """Cut a text into pieces of at most `limit` characters, before white space if there is any.

    Ids of a document of hundreds of megabytes would otherwise fill memory as Python integers.
    """
    pieces = []
    begin = 0
    while len(text) - begin > limit:
        stop = begin + limit
        space = max(text.rfind(" ", begin + 1, stop), text.rfind("\n", begin + 1, stop))
        end = space if space > begin else stop
        pieces.append(text[begin:end])
        begin = end
    return [*pieces, text[begin:]]


def _groups(
    documents: Iterable[tuple[bool, Document]],
) -> Iterator[list[tuple[bool, Document]]]:
    group, size = [], 0
    for held_out, document in documents:
        group.append((held_out, document))
        size += document.size
        if size >= BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
