# SPDX-License-Identifier: Apache-2.0
"""Recorded teacher trajectories as training data: one per row, batch = f(seed, step).

Beside the columns of every batch there are
  prompt_length int32 []; rank int32 [T], the step that filled a position and -1 outside the
  response; reference int32 [T], the prompt with the reference response, continued by end tokens;
  hidden bfloat16 [Lg, D], what the teacher read the i-th token of the response from.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sqzjax.errors import DataError
from sqzjax.io import tokenizer as tokenizers
from train.data.config import TrajectoryData
from train.data.packing import Batch, empty_batch
from train.data.pipeline import Samples, Share, TokenPipeline
from train.data.trajectory_store import FOLDER, HIDDEN, TOKENIZER, TrajectoryStore

_log = logging.getLogger(__name__)


class TrajectoryDataset(Samples, TokenPipeline):
    """Rows of a store, shuffled anew in each epoch; prompts held out are the same in every run."""

    purpose = "trajectories"

    def __init__(
        self,
        config: TrajectoryData,
        *,
        seed: int,
        batch_size: int,
        seq_len: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.config, self.seed = config, seed
        self.batch_size, self.seq_len = batch_size, seq_len
        self._share = Share(batch_size, process_index, process_count)
        folder = Path(config.path)
        if (folder / FOLDER).is_dir():
            folder /= FOLDER
        self.store = TrajectoryStore(folder)
        self.tokenizer = tokenizers.load(folder / TOKENIZER)
        lengths = self.store.column("prompt_length")
        held_out = _held_out(self.store.column("prompt"), lengths, config.eval_fraction)
        self._train, self._held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self._check(int(lengths.max(initial=0)))
        _log.info("data: %s", self.stats)

    def _check(self, longest: int) -> None:
        if not len(self._train) or (self.config.eval_fraction and not len(self._held_out)):
            raise DataError(
                f"eval_fraction={self.config.eval_fraction} leaves {len(self._train)} of "
                f"{len(self.store)} trajectories to train on and holds out {len(self._held_out)}; "
                "change it, or record more"
            )
        need = longest + self.settings["length"]
        if self.seq_len < need:
            raise ValueError(
                f"seq_len={self.seq_len} is too short for the longest prompt of {longest} tokens "
                f"and {self.settings['length']} after it; use {need} or more"
            )
        if self.tokenizer.eos_id is None:
            raise DataError("trajectories need a tokenizer with an eos token; this one has none")

    @property
    def settings(self) -> Mapping[str, int]:
        """Numbers of the recording: length, block_size, hidden_size, mask_token, prompt_width."""
        return self.store.header.settings

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape of a row and dtype of everything in a batch."""
        row = (self.seq_len,)
        shape = (self.settings["length"], self.settings["hidden_size"])
        return {
            **super().columns,
            "prompt_length": ((), np.int32),
            "rank": (row, np.int32),
            "reference": (row, np.int32),
            "hidden": (shape, HIDDEN),
        }

    def _batch_of(self, rows: np.ndarray, size: int) -> Batch:
        batch = empty_batch(size, self.seq_len, self.pad_id)
        for name in self.columns.keys() - batch.keys():
            shape, dtype = self.columns[name]
            batch[name] = np.full((size, *shape), -1 if name == "rank" else 0, dtype)
        for slot, row in enumerate(rows):
            self._fill({name: array[slot] for name, array in batch.items()}, int(row))
            batch["prompt_length"][slot] = self.store.row(int(row))["prompt_length"]
        return batch

    def _fill(self, views: dict[str, np.ndarray], row: int) -> None:
        """Write a trajectory into a row of a batch."""
        found = self.store.row(row)
        begin, count = int(found["prompt_length"]), int((found["rank"] >= 0).sum())
        end = begin + count
        for name, source in (("tokens", found["tokens"]), ("reference", found["reference"])):
            views[name][:begin] = found["prompt"][:begin]
            views[name][begin:end] = source[:count]
        written = min(count, int(found["reference_length"]))
        views["reference"][begin + written : end] = self.tokenizer.eos_id
        views["positions"][:end] = np.arange(end)
        views["segment_ids"][:end] = 0
        views["loss_mask"][begin:end] = True
        views["rank"][begin:end] = found["rank"][:count]
        views["hidden"][...] = found["hidden"]

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Everything that determines the batches; JSON values."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "trajectories": self.store.header.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "order": f"shuffle={self.config.shuffle}",
            "held_out": f"{self.config.eval_fraction:g}",
        }

    @property
    def stats(self) -> dict[str, Any]:
        """Counts for logs and reports."""
        return {
            "train_trajectories": len(self._train),
            "eval_trajectories": len(self._held_out),
            **self.settings,
        }


def _held_out(prompts: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """Return which rows are held out, by prompt: all trajectories of one lie on one side."""
    chances = []
    for prompt, length in zip(prompts, lengths):
        digest = hashlib.blake2b(prompt[:length].astype("<i4").tobytes(), digest_size=8).digest()
        chances.append(int.from_bytes(digest, "little") / 2.0**64)
    return np.array(chances) < share
