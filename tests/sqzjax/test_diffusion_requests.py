# SPDX-License-Identifier: Apache-2.0
"""What a diffusion decoder makes of a request: its draws, and what it refuses."""

import math

import pytest

from sqzjax.decode import Diffusion, Generator, SamplingConfig
from sqzjax.decode.adaptive import AdaptiveBlocks
from sqzjax.decode.commit import TopCount
from sqzjax.errors import RequestError
from sqzjax.kvcache import KIVI, Dense
from tests.sqzjax.diffusion_reference import MASK, model_of

SAMPLED = SamplingConfig(max_new_tokens=9, temperature=0.8, seed=3, ignore_eos=True)
PROMPT = [5, 9, 2]


def generator_of(**settings):
    model, params = model_of("bidirectional")
    return Generator(model, params, decoder=Diffusion(model=model, block_size=4), **settings)


def test_samples_depend_on_neither_batch_nor_capacity():
    alone = generator_of().generate([PROMPT], SAMPLED).row(0)
    longer = list(range(1, 25))
    assert generator_of().generate([PROMPT, longer], SAMPLED).row(0) == alone
    assert generator_of(capacity=60).generate([PROMPT], SAMPLED).row(0) == alone


def test_dreams_schedule_ends_in_as_many_passes_as_it_says():
    """Also where early steps fill nothing: 9 positions in 7 steps of one window."""
    model, params = model_of("shifted")
    policy = TopCount(steps=7, schedule="dream", score="entropy")
    decoder = Diffusion(model=model, block_size=9, commit=policy)
    config = SamplingConfig(max_new_tokens=9, ignore_eos=True)
    out = Generator(model, params, decoder=decoder).generate([PROMPT, [7]], config)
    assert out.stats.extra["forwards"] == 7
    assert all(len(out.row(i)) == 9 and MASK not in out.row(i) for i in range(2))


@pytest.mark.parametrize("asked", [{"logprobs": True}, {"repetition_penalty": 1.5}])
def test_settings_without_effect_are_refused(asked):
    with pytest.raises(RequestError, match=f"sampling 0: {next(iter(asked))}"):
        generator_of().generate([PROMPT], SamplingConfig(max_new_tokens=4, **asked))


def test_a_cache_other_than_the_decoders_is_refused():
    assert generator_of(cache=Dense()).decoder.cache == Dense()
    with pytest.raises(RequestError, match="set it in the decoder"):
        generator_of(cache=KIVI())


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="threshold=nan"):
        AdaptiveBlocks(delimiters=(3,), threshold=math.nan)


@pytest.mark.parametrize("token", [-5, 10**6, MASK])
def test_delimiters_that_cannot_be_predicted_are_refused(token):
    model, _ = model_of("bidirectional")
    with pytest.raises(ValueError, match=f"delimiters has {token}"):
        Diffusion(model=model, adaptive=AdaptiveBlocks(delimiters=(token,)))
