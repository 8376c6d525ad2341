# SPDX-License-Identifier: Apache-2.0
"""Training data: sources, tokenisation, packing, and a stateless, exactly resumable pipeline.

`build(DataConfig(...), seed=..., batch_size=..., seq_len=...)` returns a `Dataset` whose
`batch(step)` depends on nothing but its arguments. Nothing here imports jax.
"""

from pathlib import Path

from train.data.baselines import Baseline, bigram, unigram
from train.data.bpe import train_bpe
from train.data.config import (
    AnyData,
    Bytes,
    Corpus,
    DataConfig,
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
from train.data.pipeline import Pipeline
from train.data.prefetch import Prefetcher
from train.data.trajectories import TrajectoryDataset

__all__ = [
    "AnyData",
    "Baseline",
    "Bytes",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Jsonl",
    "Parquet",
    "Pipeline",
    "Prefetcher",
    "Problems",
    "Source",
    "Text",
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
    config: AnyData, *, seed: int, batch_size: int, seq_len: int, cache_dir: str | Path
) -> Pipeline:
    """Return the dataset of a configuration of either kind."""
    if isinstance(config, TrajectoryData):
        return TrajectoryDataset(config, seed=seed, batch_size=batch_size, seq_len=seq_len)
    return build(config, seed=seed, batch_size=batch_size, seq_len=seq_len, cache_dir=cache_dir)
