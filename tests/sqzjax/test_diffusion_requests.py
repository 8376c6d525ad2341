# SPDX-License-Identifier: Apache-2.0
"""What a diffusion decoder makes of a request: its draws, and what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pytest

from sqzjax.decode import Diffusion, Generator, Run, SamplingConfig, requests
from sqzjax.decode.adaptive import AdaptiveBlocks
from sqzjax.decode.commit import Ancestral, TopCount
from sqzjax.errors import RequestError
from sqzjax.kvcache import KIVI, Dense
from tests import tolerances
from tests.sqzjax.diffusion_reference import MASK, PROMPTS, decode, model_of, one, plain

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


DRAWING = [
    Ancestral(steps=4),
    pytest.param(TopCount(steps=5, score="random"), marks=pytest.mark.slow),
    TopCount(steps=5, schedule="dream", score="entropy", temperature=0.5, tempered=True),
]


@pytest.mark.parametrize("policy", DRAWING)
def test_drawn_positions_depend_on_the_seed_and_not_on_the_batch(policy):
    model, params = model_of("shifted")
    decoder = Diffusion(model=model, block_size=9, commit=policy)

    def tokens(prompts, seed):
        return Generator(model, params, decoder=decoder, batch_size=2).generate(
            prompts, replace(SAMPLED, seed=seed, temperature=0.0 if seed else 0.8)
        )

    both = tokens([PROMPT, list(range(1, 25))], 0)
    assert both.row(0) == tokens([PROMPT], 0).row(0)
    assert all(len(both.row(i)) == 9 and MASK not in both.row(i) for i in range(2))
    # Greedy tokens in another order are other tokens.
    assert len({tuple(tokens([PROMPT], seed).row(0)) for seed in range(1, 7)}) > 1


def test_scores_after_temperature_and_filters_are_those_of_what_is_drawn_from():
    """At top_k 1 every token is certain, so positions are filled from the left."""
    model, params = model_of("bidirectional")
    order = []
    for tempered in (False, True):
        decoder = Diffusion(model=model, block_size=9, commit=TopCount(tempered=tempered))
        limits = Generator(model, params, decoder=decoder).limits
        checked = requests.check([PROMPT], replace(SAMPLED, top_k=1), model.config, limits)
        run = Run(decoder, params, requests.pad(checked, model.config, limits))
        run.advance(3)
        canvas = np.asarray(run.state.canvas)[0, len(PROMPT) : len(PROMPT) + 9]
        order.append(np.flatnonzero(canvas != MASK).tolist())
    assert order[1] == [0, 1, 2] != order[0]


@pytest.mark.parametrize("family", ["bidirectional", "block_causal", "shifted"])
def test_logprobs_are_those_of_the_step_that_filled_the_token(family):
    """Against the definition, filling the surest position."""
    asked = SamplingConfig(max_new_tokens=10, ignore_eos=True, logprobs=True)
    out = decode(family, PROMPTS, sampling=asked)
    noted = []
    expected = plain(*model_of(family), PROMPTS, 10, one, noted)
    assert [out.row(i) for i in range(len(PROMPTS))] == expected
    np.testing.assert_allclose(out.logprobs, noted, atol=tolerances.CHUNKED["float32"])


def test_settings_without_effect_are_refused():
    with pytest.raises(RequestError, match="sampling 0: repetition_penalty"):
        generator_of().generate([PROMPT], SamplingConfig(max_new_tokens=4, repetition_penalty=1.5))
    model, _ = model_of("bidirectional")
    with pytest.raises(ValueError, match="eos_last has no effect"):
        Diffusion(model=model, commit=Ancestral(), eos_last=True)


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
