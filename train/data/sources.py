# SPDX-License-Identifier: Apache-2.0
"""Documents from files: plain text, JSON lines, parquet, token ids, and the built-in corpus.

Every reader is a generator that holds one document (for parquet: one batch of rows) in memory. What
cannot be read goes through `BadRecords`, which stops or counts as configured.
"""

import gzip
import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from glob import glob
from itertools import cycle, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

from sqzjax import problems
from sqzjax.errors import DataError
from sqzjax.io.tokenizer import Tokenizer
from train.data import corpus
from train.data.config import Corpus, Jsonl, Parquet, Problems, Source, Text, Tokens

CHUNK_BYTES = 1 << 20

_log = logging.getLogger(__name__)


_NO_END = ("response_end", "")


class Document(NamedTuple):
    """A text, with the part before it that is no training target; or ready-made token ids.

    `special` tells that the prompt spells out special tokens; `end` follows the text and may, too.
    """

    text: str = ""
    prompt: str = ""
    tokens: np.ndarray | None = None
    special: bool = False
    end: str = ""

    @property
    def size(self) -> int:
        """Length in characters, or in tokens when there is no text."""
        return len(self.text) + len(self.prompt) if self.tokens is None else len(self.tokens)


class BadRecords:
    """Stop at the first unreadable record, or count them by reason and go on."""

    def __init__(self, policy: Literal["skip", "error"]):
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def add(self, reason: str, where: str) -> None:
        """Record one bad record; `where` names its file and line or byte."""
        if self.policy == "error":
            raise DataError(
                f"{where}: {reason}; repair the record, or set on_bad_record: skip to leave such "
                "records out and count them"
            )
        self.counts[reason] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{where}: {reason}")

    def report(self) -> None:
        """Log one warning about everything that was skipped."""
        if self.counts:
            total = sum(self.counts.values())
            _log.warning(
                "skipped %d bad records (%s), such as %s",
                total,
                dict(self.counts),
                "; ".join(self.examples),
            )


def read(source: Source, tokenizer: Tokenizer | None, bad: BadRecords) -> Iterator[Document]:
    """Yield the documents of a source in a fixed order; `tokenizer` supplies ids for `tokens`."""
    if isinstance(source, Corpus):
        yield from (Document(text) for text in corpus.documents())
        return
    if isinstance(source, Problems):
        yield from _problems(source)
        return
    for path in files(source):
        if path.stat().st_size == 0:
            bad.add("empty file", str(path))
            continue
        try:
            yield from _read_file(source, path, tokenizer, bad)
        except (OSError, EOFError, zlib.error) as error:
            bad.add(f"unreadable file: {error}", str(path))


def _read_file(
    source: Source, path: Path, tokenizer: Tokenizer | None, bad: BadRecords
) -> Iterator[Document]:
    match source:
        case Text():
            return _text(source, path, bad)
        case Jsonl():
            return _jsonl(source, path, bad)
        case Parquet():
            return _parquet(source, path, bad)
        case Tokens():
            return _tokens(source, path, tokenizer, bad)
        case _:
            raise TypeError(f"{source!r} has no files")


def files(source: Source) -> list[Path]:
    """Expand the paths and globs of a source, sorted, without repetition."""
    if isinstance(source, Corpus | Problems):
        return []
    found: set[Path] = set()
    for pattern in source.paths:
        matches = [Path(name) for name in glob(pattern, recursive=True)]
        matches = [path for path in matches if path.is_file()]
        if not matches:
            raise DataError(
                f"{source.kind} source: no file matches {pattern!r} from {Path.cwd()}; correct "
                "the path or the glob"
            )
        found.update(matches)
    return sorted(found)


def fingerprint(source: Source) -> str:
    """Return the sha256 of a source's content and settings; folders and weight do not matter."""
    settings = {k: v for k, v in asdict(source).items() if k not in ("paths", "weight")}
    # A switch that is off is as good as none: new ones leave the data of older runs their name.
    settings = {k: v for k, v in settings.items() if v is not False and (k, v) != _NO_END}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if isinstance(source, Corpus):
        digest.update(corpus.fingerprint().encode())
    if isinstance(source, Problems):
        digest.update(str(problems.VERSION).encode())
    for path in files(source):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _problems(source: Problems) -> Iterator[Document]:
    streams = [problems.stream(each, split="train", seed=source.seed) for each in source.problems]
    for stream in islice(cycle(streams), source.count):
        problem = next(stream)
        yield Document(problem.response, problem.prompt)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _text(source: Text, path: Path, bad: BadRecords) -> Iterator[Document]:
    with _open(path) as stream:
        offset = 0
        for piece in split_stream(stream, source.separator.encode()):
            text = _decode(piece, f"{path} at byte {offset}", bad)
            offset += len(piece) + len(source.separator.encode())
            if text is None:
                continue
            if source.separator:
                text = text.strip("\r\n")
            if text.strip():
                yield Document(text)
            elif not source.separator:
                bad.add("blank file", str(path))
            # A blank piece is what lies after the last separator, not a record.


def split_stream(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """Yield what lies between separators, reading in chunks; everything if there is none."""
    if not separator:
        yield stream.read()
        return
    buffer = bytearray()
    searched = 0
    while chunk := stream.read(CHUNK_BYTES):
        buffer += chunk
        while (found := buffer.find(separator, searched)) >= 0:
            yield bytes(buffer[:found])
            del buffer[: found + len(separator)]
            searched = 0
        searched = max(0, len(buffer) - len(separator) + 1)
    yield bytes(buffer)


def _decode(data: bytes, where: str, bad: BadRecords) -> str | None:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        bad.add(f"invalid UTF-8 ({error.reason} after {error.start} bytes)", where)
        return None


def _jsonl(source: Jsonl, path: Path, bad: BadRecords) -> Iterator[Document]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                record = _decode(line, f"{path}:{number}", bad)
                document = None if record is None else _json(source, record, path, number, bad)
                if document is not None:
                    yield document


def _json(source: Jsonl, line: str, path: Path, number: int, bad: BadRecords) -> Document | None:
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        bad.add(f"invalid JSON ({getattr(error, 'msg', 'nested too deeply')})", where)
        return None
    if source.text_key is not None:
        text = _field(record, source.text_key, where, bad)
        return None if text is None else Document(text)
    assert source.prompt_key is not None and source.response_key is not None
    prompt = _field(record, source.prompt_key, where, bad)
    response = None if prompt is None else _field(record, source.response_key, where, bad)
    if prompt is None or response is None:
        return None
    return Document(
        response,
        prompt + source.prompt_end,
        special=source.prompt_special,
        end=source.response_end,
    )


def _field(record: Any, key: str, where: str, bad: BadRecords) -> str | None:
    """Return a non-blank text field of a record, or report why there is none."""
    if not isinstance(record, dict) or key not in record:
        bad.add(f"no field {key!r}", where)
    elif not isinstance(value := record[key], str):
        bad.add(f"field {key!r} is not text", where)
    elif not value.strip():
        bad.add(f"field {key!r} is a zero-length document", where)
    elif not _is_unicode(value):
        bad.add(f"field {key!r} is not valid Unicode (a lone surrogate)", where)
    else:
        return value
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(source: Parquet, path: Path, bad: BadRecords) -> Iterator[Document]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("parquet sources need pyarrow; install the extra 'data'") from error
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            if source.text_key not in file.schema_arrow.names:
                raise DataError(
                    f"{path}: no column {source.text_key!r}; text_key must be one of "
                    f"{file.schema_arrow.names}"
                )
            for batch in file.iter_batches(batch_size=1024, columns=[source.text_key]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    record = {source.text_key: value}
                    text = _field(record, source.text_key, f"{path} row {number}", bad)
                    if text is not None:
                        yield Document(text)
    except arrow.ArrowException as error:
        bad.add(f"unreadable parquet file: {error}", str(path))


def _tokens(
    source: Tokens, path: Path, tokenizer: Tokenizer | None, bad: BadRecords
) -> Iterator[Document]:
    if tokenizer is None:
        raise DataError(
            "a tokens source has no text to train a tokenizer on; name the tokenizer that made it"
        )
    array = _open_tokens(source, path)
    eos = tokenizer.eos_id if source.eos_id is None else source.eos_id
    begin = 0
    for end in _document_ends(array, eos):
        document = array[begin:end]
        low, high = int(document.min()), int(document.max())
        if low < 0 or high >= tokenizer.vocab_size:
            where = f"{path}, tokens {begin} to {end}"
            bad.add(f"ids {low}..{high} outside [0, {tokenizer.vocab_size})", where)
        else:
            yield Document(tokens=document)
        begin = end


def _open_tokens(source: Tokens, path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            array = np.memmap(path, dtype=source.dtype, mode="r")
    except ValueError as error:
        raise DataError(f"{path} is no array of {source.dtype} token ids: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path} holds {array.dtype}{list(array.shape)}; token ids must be one-dimensional "
            "integers"
        )
    return array


def _document_ends(array: np.ndarray, eos: int | None) -> Iterator[int]:
    last = 0
    for begin in range(0, len(array) if eos is not None else 0, CHUNK_BYTES):
        for found in np.flatnonzero(array[begin : begin + CHUNK_BYTES] == eos):
            last = begin + int(found) + 1
            yield last
    if last < len(array):
        yield len(array)
