# SPDX-License-Identifier: Apache-2.0
"""Turn sources into token stores on disk, once: the second start finds them in the cache.

A cache entry is named by the sha256 of everything that determines its content, is written to a
temporary folder and renamed when complete, so that an interrupted build leaves nothing behind that
could be mistaken for data.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sqzjax.errors import DataError
from sqzjax.io import tokenizer as tokenizers
from sqzjax.io.tokenizer import Tokenizer
from train.data import sources
from train.data.bpe import train_bpe
from train.data.config import Bytes, DataConfig, Source, TokenizerFiles, TrainedBPE
from train.data.holdout import split
from train.data.sources import BadRecords, Document
from train.data.store import Encoder, StoreWriter, TokenStore

FORMAT = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One source, tokenised: what to train on, what is held out, and what was skipped."""

    kind: str
    weight: float
    train: TokenStore
    held_out: TokenStore
    texts_file: Path
    skipped: dict[str, int]

    def held_out_texts(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Yield the held-out documents as text; ready-made tokens are decoded."""
        with self.texts_file.open(encoding="utf-8") as stream:
            for index, line in enumerate(stream):
                text = json.loads(line)
                ids = self.held_out.document(index) if text is None else []
                yield tokenizer.decode(ids) if text is None else text


def prepare_tokenizer(config: DataConfig, prints: tuple[str, ...], cache: Path) -> Tokenizer:
    """Load or train the tokenizer of a configuration; `prints` are the sources' fingerprints."""
    settings = config.tokenizer
    match settings:
        case Bytes():
            return tokenizers.load("bytes")
        case TokenizerFiles():
            return tokenizers.load(settings.path)
        case TrainedBPE():
            key = _key("bpe", asdict(settings), prints, _split_settings(config))
            folder = _cached(cache / f"bpe-{key}", lambda new: _train(config, settings, new))
            return tokenizers.load(folder)


def prepare_part(
    config: DataConfig, source: Source, print_: str, tokenizer: Tokenizer, cache: Path
) -> Part:
    """Tokenise one source into the cache, or find it there."""
    shape = (config.add_bos, config.add_eos, tokenizer.fingerprint)
    key = _key("tokens", print_, _split_settings(config), shape)
    folder = cache / f"tokens-{key}"

    def build(new: Path) -> None:
        _tokenise(config, source, tokenizer, new)

    part = _open_part(_cached(folder, build), source, tokenizer)
    if part is None:
        _log.warning("%s is damaged; building it again", folder)
        shutil.rmtree(folder)
        part = _open_part(_cached(folder, build), source, tokenizer)
    if part is None:
        raise DataError(f"{folder} cannot be read back after writing; check the disk")
    return part


def _open_part(folder: Path, source: Source, tokenizer: Tokenizer) -> Part | None:
    """Open a cache entry; None when a file of it is missing or has the wrong size."""
    size = tokenizer.vocab_size
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return Part(
            kind=source.kind,
            weight=source.weight,
            train=TokenStore(folder, "train", size),
            held_out=TokenStore(folder, "held_out", size),
            texts_file=folder / "held_out.jsonl",
            skipped=meta["skipped"],
        )
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _tokenise(config: DataConfig, source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    started = time.perf_counter()
    encoder = Encoder(tokenizer, add_bos=config.add_bos, add_eos=config.add_eos)
    names = {False: "train", True: "held_out"}
    writers = {key: StoreWriter(folder, name, tokenizer.vocab_size) for key, name in names.items()}
    documents, bad = _documents(config, source, tokenizer)
    try:
        with (folder / "held_out.jsonl").open("w", encoding="utf-8") as texts:
            for held_out, document, pieces, skip in encoder.encode(documents):
                writers[held_out].add(pieces, skip)
                if held_out:
                    texts.write(json.dumps(_text(document)) + "\n")
    finally:
        for writer in writers.values():
            writer.close()
    counts = bad()
    (folder / "meta.json").write_text(json.dumps({"skipped": counts}), encoding="utf-8")
    seconds = time.perf_counter() - started
    _log.info("tokenised the %s source in %.1f s", source.kind, seconds)


def _text(document: Document) -> str | None:
    return document.prompt + document.text if document.tokens is None else None


def _documents(
    config: DataConfig, source: Source, tokenizer: Tokenizer | None
) -> tuple[Iterator[tuple[bool, Document]], Callable[[], dict[str, int]]]:
    """Return the split documents, and a function that reports what the last pass skipped."""
    passes: list[BadRecords] = []

    def read() -> Iterator[Document]:
        # The split may read twice; each pass meets the same bad records, so each counts anew.
        passes.append(BadRecords(config.on_bad_record))
        return sources.read(source, tokenizer, passes[-1])

    def report() -> dict[str, int]:
        passes[-1].report()
        return dict(passes[-1].counts)

    return split(read, config.eval_fraction, config.eval_split), report


def _train(config: DataConfig, settings: TrainedBPE, folder: Path) -> None:
    texts = (
        _text(document) or ""
        for source in config.sources
        for held_out, document in _documents(config, source, None)[0]
        if not held_out
    )
    tokenizer = train_bpe(
        texts,
        settings.vocab_size,
        min_frequency=settings.min_frequency,
        max_characters=settings.max_characters,
    )
    tokenizer.save(folder)


def _split_settings(config: DataConfig) -> tuple[Any, ...]:
    return config.eval_fraction, config.eval_split, config.on_bad_record


def _key(*parts: Any) -> str:
    return sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:24]


def _cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `build` if it does not exist; complete or absent at any moment."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        build(new)
        new.chmod(0o755)
        os.rename(new, folder)
    except OSError:
        # Another process may have finished the same entry first; its content is the same.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder
