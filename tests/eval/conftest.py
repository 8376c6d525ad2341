# SPDX-License-Identifier: Apache-2.0
"""A tiny random model with the byte tokenizer, saved the way users have theirs."""

from pathlib import Path

import pytest

from eval import models
from eval.config import ModelEntry
from sqzjax.io import hf
from sqzjax.io import tokenizer as tokenizers
from sqzjax.models import DecoderLM, Execution, ModelConfig, SpecialTokens
from tests.parameters import drawn

TINY = ModelConfig(
    vocab_size=260,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    max_positions=128,
    tokens=SpecialTokens(bos=256, eos=(257,), pad=258),
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Hugging Face folder of the tiny model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    files = tmp_path_factory.mktemp("tokenizer")
    tokenizers.load("bytes").save(files)
    params = drawn(DecoderLM(TINY, Execution()), 3)
    hf.save(folder, TINY, params, tokenizer_files=sorted(files.iterdir()))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> models.LoadedModel:
    """The tiny model, loaded."""
    return models.load(ModelEntry(path=str(tiny_folder)), batch_size=4)
