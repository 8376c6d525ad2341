# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding against Hugging Face's own tokens, and a real small model telling stories."""

import json
import re

import numpy as np
import pytest

from sqzjax.decode import Generator, SamplingConfig
from sqzjax.io import hf, tokenizer
from sqzjax.models import DecoderLM, Execution
from tests import arrays
from tests.conftest import golden_root
from tests.tolerances import RAGGED

CHECKPOINTS = ("llama", "llama_mha_tied", "llama3_rope", "mistral_window", "qwen2", "qwen3")
UNROLLED = Execution(scan_layers=False)
ENGLISH_WORDS = 0.9
STARTS = ["Once upon a time", "The little dog", "Lily went to the", "One day, a boy"]


def _load(folder, execution=UNROLLED):
    config, params = hf.load(folder, execution=execution)
    return DecoderLM(config, execution), params


def _golden(name: str):
    folder = golden_root() / name
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: reference checkpoints are not part of the project")
    return folder, arrays.load(folder / "expected.npz")


def _exactly(count: int) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=count, ignore_eos=True)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_equal_the_reference(name):
    folder, expected = _golden(name)
    tokens = expected["greedy_tokens"]
    out = Generator(*_load(folder)).generate(expected["greedy_prompt"], _exactly(tokens.shape[1]))
    np.testing.assert_array_equal(out.tokens, tokens)


def test_greedy_tokens_in_a_ragged_batch_prefilled_in_chunks():
    """A ring cache (window 16), chunks of 5 tokens, neighbours of other lengths."""
    folder, expected = _golden("mistral_window")
    prompt, tokens = expected["greedy_prompt"][0], expected["greedy_tokens"]
    batch = [prompt[:3], prompt, np.tile(prompt, 2)]
    out = Generator(*_load(folder), prefill_chunk=5).generate(batch, _exactly(tokens.shape[1]))
    np.testing.assert_array_equal(out.row(1), tokens[0])


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "stories260K"


def test_stories_greedy_tokens_equal_the_reference(stories):
    expected = arrays.load(stories / "expected.npz")
    prompt, whole = expected["prompt_ids"], expected["greedy_tokens"]
    out = Generator(*_load(stories)).generate(prompt, SamplingConfig(max_new_tokens=200))
    np.testing.assert_array_equal(out.tokens, whole[:, prompt.shape[1] :])


def test_ragged_stories_equal_each_alone(stories):
    # Rows that are missing are padding, so that one program serves all batches.
    words = tokenizer.load(stories)
    generator = Generator(*_load(stories), tokenizer=words, batch_size=8, capacity=128)
    sampling = SamplingConfig(max_new_tokens=60, logprobs=True)
    texts = [start + " and a cat" * n for n, start in enumerate(STARTS * 2)]
    together = generator.generate(texts, sampling)
    assert together.text is not None and together.logprobs is not None
    for row in (0, 5, 7):
        alone = generator.generate([texts[row]], sampling)
        assert alone.text is not None and alone.logprobs is not None
        assert alone.row(0) == together.row(row)
        assert alone.text[0] == together.text[row]
        same = together.logprobs[row, : alone.lengths[0]]
        np.testing.assert_allclose(alone.logprobs[0], same, atol=RAGGED)


def _share_of_known_words(text: str, vocabulary: set[str]) -> float:
    words = re.findall(r"[a-z]+", text.lower())[:-1]
    return sum(word in vocabulary for word in words) / len(words)


@pytest.mark.slow
def test_bfloat16_stories_read_as_english(stories, shared_data):
    sample = (shared_data / "tinystories_sample.txt").read_text()
    vocabulary = set(re.findall(r"[a-z]+", sample.lower()))
    vocabulary |= set(
        re.findall(r"[a-z]+", (shared_data / "wikitext2-test.txt").read_text().lower())
    )
    low = _load(stories, Execution(scan_layers=False, dtype="bfloat16"))
    generator = Generator(*low, tokenizer=tokenizer.load(stories))
    out = generator.generate(STARTS, SamplingConfig(max_new_tokens=120))
    assert out.text is not None
    assert _share_of_known_words(" ".join(out.text), vocabulary) > ENGLISH_WORDS
    hot = SamplingConfig(max_new_tokens=120, temperature=5.0)
    nonsense = generator.generate(STARTS, hot)
    assert nonsense.text is not None
    assert _share_of_known_words(" ".join(nonsense.text), vocabulary) < ENGLISH_WORDS


def test_model_eos_comes_from_the_checkpoint(stories):
    config = json.loads((stories / "config.json").read_text())
    model, _ = _load(stories)
    assert model.config.tokens.eos == (config["eos_token_id"],)
