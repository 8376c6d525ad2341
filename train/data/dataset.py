# SPDX-License-Identifier: Apache-2.0
"""The data pipeline: batch = f(seed, step), so that a run resumes exactly and at once.

Documents of weighted sources, packed into rows; see `Pipeline` for what every dataset is.
"""

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sqzjax.errors import DataError
from sqzjax.io.tokenizer import Tokenizer
from train.data import sources
from train.data.config import DataConfig
from train.data.order import Mixture, derive_key
from train.data.packing import (
    Batch,
    PackedRows,
    PaddedRows,
    Rows,
    empty_batch,
    fill_rest,
    fill_row,
    locate,
)
from train.data.pipeline import Share, TokenPipeline
from train.data.prepare import Part, prepare_part, prepare_tokenizer
from train.data.store import TokenStore

_log = logging.getLogger(__name__)


class Dataset(TokenPipeline):
    """Batches of packed documents; make one with `build`.

    `batch_size` counts rows over all processes; `batch` returns the rows of this process.
    """

    def __init__(
        self,
        config: DataConfig,
        parts: tuple[Part, ...],
        tokenizer: Tokenizer,
        *,
        seed: int,
        batch_size: int,
        seq_len: int,
        content: str = "",
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.config, self.parts, self.tokenizer = config, parts, tokenizer
        self.seed, self.batch_size, self.seq_len = seed, batch_size, seq_len
        self._content = content
        self._share = Share(batch_size, process_index, process_count)
        self._mixture = Mixture(tuple(part.weight for part in parts), seed)
        self._rows = [
            self._make_rows(part.train, derive_key(seed, "source", number), config.shuffle)
            for number, part in enumerate(parts)
        ]

    def _make_rows(self, store: TokenStore, seed: int, shuffle: bool) -> Rows:
        kind = PackedRows if self.config.packing == "packed" else PaddedRows
        return kind(store, self.seq_len, seed, shuffle)

    @property
    def num_tokens(self) -> int:
        """Training tokens of all sources, each counted once."""
        return sum(part.train.num_tokens for part in self.parts)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, the same whenever and wherever it is asked for.

        tokens, positions and segment_ids are int32 [B, T] (-1 marks padding in the last two),
        loss_mask is bool [B, T]: True where a token may be a target. B is this process's share of
        `batch_size`.
        """
        numbers = self._share.rows(step)
        batch = empty_batch(len(numbers), self.seq_len, self.pad_id)
        owners, inside = self._mixture.locate(numbers)
        for owner, rows in enumerate(self._rows):
            slots = np.flatnonzero(owners == owner)
            epochs, indices = locate(rows, inside[slots])
            for slot, epoch, index in zip(slots, epochs, indices, strict=True):
                self._fill(batch, int(slot), rows, int(epoch), int(index))
        return batch

    def _fill(self, batch: Batch, slot: int, rows: Rows, epoch: int, index: int) -> None:
        pieces = rows.pieces(epoch, index)
        fill_row(batch, slot, rows.store, pieces, self.config.document_mask)
        if self.config.pad_with_eos:
            fill_rest(batch, slot, check_eos(self.tokenizer))

    def eval_batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield the held-out documents once, in order; the last batch is filled with padding.

        Every process gets every row.
        """
        size = self.batch_size if batch_size is None else batch_size
        made = (self._make_rows(part.held_out, 0, False) for part in self.parts)
        todo = [(rows, index) for rows in made for index in range(rows.num_rows)]
        for begin in range(0, len(todo), size):
            batch = empty_batch(size, self.seq_len, self.pad_id)
            for slot, (rows, index) in enumerate(todo[begin : begin + size]):
                self._fill(batch, slot, rows, 0, index)
            yield batch

    @cached_property
    def eval_documents(self) -> tuple[str, ...]:
        """Held-out documents as text."""
        return tuple(text for part in self.parts for text in part.held_out_texts(self.tokenizer))

    @property
    def eval_text(self) -> str:
        """Held-out documents, joined by blank lines."""
        return "\n\n".join(self.eval_documents)

    @property
    def eval_tokens(self) -> Int[np.ndarray, " tokens"]:
        """Held-out tokens of all sources, documents one after another with their end tokens."""
        return np.concatenate([part.held_out.tokens for part in self.parts]).astype(np.int32)

    def train_tokens(self, max_tokens: int = 50_000_000) -> Int[np.ndarray, " tokens"]:
        """Return the first training tokens of all sources, for count-based baselines."""
        joined = np.concatenate([part.train.tokens[:max_tokens] for part in self.parts])
        return joined[:max_tokens].astype(np.int32)

    def check_targets(self) -> None:
        """Raise DataError for a source whose rows are all filled by prompts."""
        for part in self.parts:
            store, most = part.train, np.inf if self.config.packing == "packed" else self.seq_len
            if not np.any(np.minimum(store.lengths, most) > store.skips):
                raise DataError(
                    f"no document of the {part.kind} source has a training target within "
                    f"seq_len={self.seq_len}: the shortest prompt takes {store.skips.min()} "
                    "tokens; raise seq_len, or shorten the prompts"
                )

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Everything that determines the batches; JSON values."""
        config = self.config
        weights = self._mixture.weights
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "files": self._content,
            "tokenizer": self.tokenizer.fingerprint,
            "mixture": ", ".join(
                f"{part.kind} {weight:.6g}"
                for part, weight in zip(self.parts, weights, strict=True)
            ),
            "packing": f"{config.packing}, document_mask={config.document_mask}, "
            f"shuffle={config.shuffle}, add_bos={config.add_bos}, add_eos={config.add_eos}"
            + ", pad_with_eos"
            * config.pad_with_eos,
            "held_out": f"{config.eval_split} {config.eval_fraction:g}",
            "on_bad_record": config.on_bad_record,
        }

    @property
    def stats(self) -> dict[str, Any]:
        """Counts for logs and reports."""
        truncated = sum(r.truncated_tokens for r in self._rows if isinstance(r, PaddedRows))
        skipped: dict[str, int] = {}
        for part in self.parts:
            for reason, count in part.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + count
        return {
            "train_documents": sum(part.train.num_documents for part in self.parts),
            "train_tokens": self.num_tokens,
            "eval_documents": sum(part.held_out.num_documents for part in self.parts),
            "eval_tokens": sum(part.held_out.num_tokens for part in self.parts),
            "rows_per_epoch": tuple(rows.num_rows for rows in self._rows),
            "truncated_tokens": truncated,
            "skipped": skipped,
        }

    def epochs(self, step: int) -> tuple[float, ...]:
        """Return how many times each source has been read before `step`."""
        shares = (weight * step * self.batch_size for weight in self._mixture.weights)
        return tuple(share / rows.num_rows for share, rows in zip(shares, self._rows, strict=True))


def build(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    seq_len: int,
    tokenizer: Tokenizer | None = None,
    cache_dir: str | Path | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Dataset:
    """Read, tokenise and pack the sources of a configuration.

    `tokenizer` replaces the configured one. Tokens are kept in `cache_dir` for the next start;
    without it they live in a temporary folder as long as the dataset does.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len} must be >= 2 (a token and its successor)")
    Share(batch_size, process_index, process_count)  # checked before anything is read
    temporary = tempfile.mkdtemp(prefix="sqzjax-data-") if cache_dir is None else None
    cache = Path(cache_dir or temporary or ".")
    try:
        prints = tuple(sources.fingerprint(source) for source in config.sources)
        tokenizer = tokenizer or prepare_tokenizer(config, prints, cache)
        if config.pad_with_eos:
            check_eos(tokenizer)
        parts = tuple(
            prepare_part(config, source, print_, tokenizer, cache)
            for source, print_ in zip(config.sources, prints, strict=True)
        )
        _check_parts(config, parts)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    dataset = Dataset(
        config,
        parts,
        tokenizer,
        seed=seed,
        batch_size=batch_size,
        seq_len=seq_len,
        content="+".join(print_[:16] for print_ in prints),
        process_index=process_index,
        process_count=process_count,
    )
    if temporary is not None:
        weakref.finalize(dataset, shutil.rmtree, temporary, ignore_errors=True)
    _log.info("data: %s", dataset.stats)
    return dataset


def check_eos(tokenizer: Tokenizer) -> int:
    """Return the id that ends a document, or raise DataError."""
    if tokenizer.eos_id is None:
        raise DataError("pad_with_eos=true needs a tokenizer with an eos token; this one has none")
    return tokenizer.eos_id


def _check_parts(config: DataConfig, parts: tuple[Part, ...]) -> None:
    for part in parts:
        if not part.train.num_tokens:
            raise DataError(
                f"the {part.kind} source has no training document ({part.held_out.num_documents} "
                f"held out, skipped: {part.skipped}); give it more documents, or with one long "
                "text set eval_split: tail"
            )
    if config.eval_fraction and not any(part.held_out.num_tokens for part in parts):
        raise DataError(
            f"eval_fraction={config.eval_fraction} with eval_split={config.eval_split!r} holds out "
            "no document of these sources; raise it, set eval_split: tail, or eval_fraction: 0"
        )
