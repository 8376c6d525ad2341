# SPDX-License-Identifier: Apache-2.0
"""Consecutive states of an archive as training data: batch = f(seed, step).

Columns of a batch:
  fields float32 [S, C, H, W], the states of a sample, normalised; constants float32 [K, H, W];
  weight float32 [], 1, and 0 in rows that only fill the last evaluation batch.
Samples are shuffled anew in each epoch. The first start reads states of the training period, as
many as `statistics_states`, for their mean and deviation, which are kept in
`<cache_dir>/statistics.json`; a branch takes over those of its run.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from sqzjax.errors import DataError
from sqzjax.fields import periods
from sqzjax.fields.archive import Archive, open_archive
from sqzjax.fields.states import States
from sqzjax.fields.statistics import Statistics, statistics_for
from sqzjax.sphere.grid import Grid
from train.data.fields_config import FieldData
from train.data.pipeline import Samples, Share

_log = logging.getLogger(__name__)
STATISTICS = "statistics.json"

Batch = dict[str, np.ndarray]


class FieldDataset(Samples):
    """Samples of `window` states; `batch_size` counts them over all processes.

    `parent_dir` is the `cache_dir` of the run that this one branches from.
    """

    purpose = "fields"
    branch_may_change = ("window",)

    def __init__(
        self,
        config: FieldData,
        *,
        seed: int,
        batch_size: int,
        window: int,
        cache_dir: str | Path | None = None,
        parent_dir: str | Path | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if window < 1:
            raise ValueError(f"window={window} must be >= 1")
        self._share = Share(batch_size, process_index, process_count)
        self.config, self.seed = config, seed
        self.batch_size, self.window = batch_size, window
        self.archive = _open(config)
        self._train = self.samples(config.train)
        self._held_out = _evenly(self.samples(config.valid), config.eval_samples)
        self._check()
        if cache_dir is not None and parent_dir is not None:
            _take_over(Path(parent_dir) / STATISTICS, Path(cache_dir) / STATISTICS)
        self.statistics = _statistics(config, self.archive, cache_dir)
        self.states = States(
            self.archive,
            self.statistics,
            in_memory_bytes=config.in_memory_bytes,
            times=np.concatenate([self._train.ravel(), self._held_out.ravel()]),
        )
        self._constants = self.archive.constants(config.constants)
        _log.info("data: %s", self.stats)

    @property
    def grid(self) -> Grid:
        """Where rows and columns lie."""
        return self.archive.grid

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels that are predicted."""
        return self.archive.channels

    @property
    def constant_names(self) -> tuple[str, ...]:
        """Names of the constant inputs."""
        return self.config.constants

    def samples(self, split: tuple[periods.Period, ...]) -> np.ndarray:
        """Return the time indices of every sample of a split, int64 `[samples, window]`."""
        return periods.samples(
            self.archive.times, split, step_hours=self.config.step_hours, length=self.window
        )

    def _check(self) -> None:
        config = self.config
        periods.check_apart(
            self.archive.times, train=config.train, valid=config.valid, test=config.test
        )
        for name, found in (("train", self._train), ("valid", self._held_out)):
            if not len(found) and (name == "train" or config.eval_samples):
                times = self.archive.times
                raise DataError(
                    f"{name}: no {self.window} states {config.step_hours} h apart in "
                    f"{', '.join(map(str, getattr(config, name)))}; the archive has {len(times)} "
                    f"times from {times[0]} to {times[-1]}; change {name} or step_hours"
                )

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape of a row and dtype of everything in a batch."""
        shape = (self.window, len(self.channels), *self.grid.shape)
        return {
            "fields": (shape, np.float32),
            "constants": (self._constants.shape, np.float32),
            "weight": ((), np.float32),
        }

    def _batch_of(self, rows: np.ndarray, size: int) -> Batch:
        batch = {
            name: np.zeros((size, *shape), dtype) for name, (shape, dtype) in self.columns.items()
        }
        batch["fields"][: len(rows)] = self.states.read(rows.ravel()).reshape(
            len(rows), *self.columns["fields"][0]
        )
        batch["constants"][:] = self._constants
        batch["weight"][: len(rows)] = 1.0
        return batch

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Everything that determines the batches; JSON values."""
        config = self.config
        constants = hashlib.sha256(self._constants.astype("<f4").tobytes()).hexdigest()
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "window": self.window,
            "archive": self.archive.fingerprint,
            "statistics": self.statistics.digest,
            "channels": ", ".join(self.channels),
            "constants": f"{', '.join(config.constants)} {constants}",
            "step_hours": config.step_hours,
            "train": ", ".join(map(str, config.train)),
            "order": f"shuffle={config.shuffle}",
        }

    @property
    def stats(self) -> dict[str, Any]:
        """Counts for logs and reports."""
        return {
            "train_samples": len(self._train),
            "eval_samples": len(self._held_out),
            "states": len(self.archive.times),
            "channels": len(self.channels),
            "grid": "x".join(map(str, self.grid.shape)),
            "in_memory": self.states.in_memory,
        }


def _open(config: FieldData) -> Archive:
    return open_archive(
        config.path,
        channels=config.channels,
        drop_south_pole=config.drop_south_pole,
        missing="keep" if config.missing == "fill" else "error",
        storage_options=config.storage_options,
    )


def _statistics(config: FieldData, archive: Archive, cache_dir: str | Path | None) -> Statistics:
    if config.statistics is not None:
        return Statistics.load(config.statistics).select(archive.channels)
    times = periods.indices(archive.times, config.train)
    path = None if cache_dir is None else Path(cache_dir) / STATISTICS
    chosen = _evenly(times, config.statistics_states)
    return statistics_for(archive, chosen, path=path)


def _take_over(stored: Path, path: Path) -> None:
    """Copy statistics that are there and not here; those of other data are replaced later."""
    if stored.exists() and not path.exists():
        Statistics.load(stored).save(path)


def _evenly(rows: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the rows, evenly spaced, the first and last among them."""
    if count >= len(rows):
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
