# SPDX-License-Identifier: Apache-2.0
"""Training data: sources, tokenisation, packing, and a stateless, exactly resumable pipeline.

`build(DataConfig(...), seed=..., batch_size=..., seq_len=...)` returns a `Dataset` whose
`batch(step)` depends on nothing but its arguments. Nothing here imports jax.
"""

from pathlib import Path
from typing import Any

from train.data.baselines import Baseline, bigram, unigram
from train.data.bpe import train_bpe
from train.data.config import (
    AnyData,
    Bytes,
    Corpus,
    DataConfig,
    FieldData,
    Jsonl,
    Parquet,
    Problems,
    Source,
    Text,
    TokenizerConfig,
    TokenizerFiles,
    Tokens,
    TrainedBPE,
    TrajectoryData,
)
from train.data.dataset import Dataset, build
from train.data.pipeline import Pipeline, TokenPipeline
from train.data.prefetch import Prefetcher
from train.data.trajectories import TrajectoryDataset

__all__ = [
    "AnyData",
    "Baseline",
    "Bytes",
    "Corpus",
    "DataConfig",
    "Dataset",
    "FieldData",
    "Jsonl",
    "Parquet",
    "Pipeline",
    "Prefetcher",
    "Problems",
    "Source",
    "Text",
    "TokenPipeline",
    "TokenizerConfig",
    "TokenizerFiles",
    "Tokens",
    "TrainedBPE",
    "TrajectoryData",
    "TrajectoryDataset",
    "bigram",
    "build",
    "open_data",
    "train_bpe",
    "unigram",
]


def open_data(
    config: AnyData,
    *,
    seed: int,
    batch_size: int,
    row_length: int,
    cache_dir: str | Path,
    parent_dir: str | Path | None = None,
) -> Any:
    """Return the dataset of a configuration of any kind, a `Pipeline`.

    `row_length` counts the tokens of a row, or the consecutive states of a sample of fields.
    `parent_dir` is the `cache_dir` of the run that this one branches from.
    """
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    if isinstance(config, FieldData):
        from train.data.fields import FieldDataset

        places = {"cache_dir": cache_dir, "parent_dir": parent_dir}
        return FieldDataset(config, **common, window=row_length, **places)
    if isinstance(config, TrajectoryData):
        return TrajectoryDataset(config, **common, seq_len=row_length)
    dataset = build(config, **common, seq_len=row_length, cache_dir=cache_dir)
    dataset.check_targets()
    return dataset
