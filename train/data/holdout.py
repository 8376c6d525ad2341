# SPDX-License-Identifier: Apache-2.0
"""The held-out part of each source, the same in every run."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

from train.data.sources import Document


def split(
    documents: Callable[[], Iterable[Document]], fraction: float, how: str
) -> Iterator[tuple[bool, Document]]:
    """Yield (held out, document). `how` is "hash" (by content) or "tail" (the end of the source).

    "tail" reads the source twice: the first time for its size.
    """
    if fraction == 0:
        yield from ((False, document) for document in documents())
    elif how == "hash":
        yield from ((_chance(document) < fraction, document) for document in documents())
    else:
        yield from _tail(documents, fraction)


def _chance(document: Document) -> float:
    """Map content to [0, 1): equal documents land on the same side."""
    tokens = document.tokens
    data = document.prompt + "\0" + document.text if tokens is None else ""
    raw = data.encode() if tokens is None else tokens.astype("<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") / 2.0**64


def _tail(
    documents: Callable[[], Iterable[Document]], fraction: float
) -> Iterator[tuple[bool, Document]]:
    total = sum(document.size for document in documents())
    boundary = int(total * (1 - fraction))
    begin = 0
    held_out = False
    for document in documents():
        end = begin + document.size
        if begin < boundary and end == total and not document.prompt and not held_out:
            # One long last text, such as a book: cut it, or nothing would be held out.
            yield from zip((False, True), _cut(document, boundary - begin), strict=True)
            return
        held_out = begin >= boundary
        yield held_out, document
        begin = end


def _cut(document: Document, position: int) -> tuple[Document, Document]:
    if document.tokens is not None:
        head, tail = document.tokens[:position], document.tokens[position:]
        return Document(tokens=head), Document(tokens=tail)
    text = document.text
    line = text.rfind("\n", 0, position) + 1
    position = line or text.rfind(" ", 0, position) + 1 or position
    return Document(text[:position]), Document(text[position:])
