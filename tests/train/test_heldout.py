# SPDX-License-Identifier: Apache-2.0
"""The held-out tokens and baselines that a run leaves for its evaluation."""

import json
import math

import numpy as np

from tests import arrays
from train import data
from train.data import DataConfig, Text
from train.heldout import write_held_out


def _dataset(tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    config = DataConfig(
        sources=(Text(paths=(str(tmp_path / "text.txt"),), separator="|"),), eval_fraction=0.3
    )
    return data.build(config, seed=0, batch_size=1, seq_len=8, cache_dir=tmp_path / "cache")


def test_files_hold_documents_and_baselines(tmp_path):
    dataset = _dataset(tmp_path, "|".join(f"document number {i} of some" for i in range(40)))
    write_held_out(dataset, tmp_path)
    saved = arrays.load(tmp_path / "heldout.npz")
    documents = np.split(saved["tokens"], saved["offsets"][1:-1])
    decoded = [dataset.tokenizer.decode(document) for document in documents]
    assert tuple(decoded) == dataset.eval_documents
    figures = json.loads((tmp_path / "baselines.json").read_text())
    # Add-one unigram by hand, the first token of every document left out.
    counts = np.bincount(dataset.train_tokens(), minlength=dataset.vocab_size) + 1.0
    inner = np.concatenate([document[1:] for document in documents])
    expected = -np.log(counts[inner] / counts.sum()).mean()
    assert math.isclose(figures["unigram"]["nll"], expected, rel_tol=1e-9)
    assert figures["bigram"]["nll"] < figures["unigram"]["nll"]


def test_files_follow_the_data(tmp_path):
    write_held_out(_dataset(tmp_path, "|".join(f"one text {i}" for i in range(40))), tmp_path)
    first = (tmp_path / "heldout.npz").stat()
    write_held_out(_dataset(tmp_path, "|".join(f"one text {i}" for i in range(40))), tmp_path)
    assert (tmp_path / "heldout.npz").stat() == first
    write_held_out(_dataset(tmp_path, "|".join(f"other text {i}" for i in range(40))), tmp_path)
    assert (tmp_path / "heldout.npz").stat() != first
    assert not list(tmp_path.glob(".*.npz*"))
