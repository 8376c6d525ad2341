# SPDX-License-Identifier: Apache-2.0
"""Training data: sources, tokenisation, packing, and a stateless, exactly resumable pipeline.

`build(DataConfig(...), seed=..., batch_size=..., seq_len=...)` returns a `Dataset` whose
`batch(step)` depends on nothing but its arguments. Nothing here imports jax.
"""

from train.data.baselines import Baseline, bigram, unigram
from train.data.bpe import train_bpe
from train.data.config import (
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
)
from train.data.dataset import Dataset, build
from train.data.prefetch import Prefetcher

__all__ = [
    "Baseline",
    "Bytes",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Jsonl",
    "Parquet",
    "Prefetcher",
    "Problems",
    "Source",
    "Text",
    "TokenizerConfig",
    "TokenizerFiles",
    "Tokens",
    "TrainedBPE",
    "bigram",
    "build",
    "train_bpe",
    "unigram",
]
