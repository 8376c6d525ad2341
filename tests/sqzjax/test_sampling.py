# SPDX-License-Identifier: Apache-2.0
"""Sampling against brute force (filters), chi-square (draws) and its own promises (seeds, rows)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sqzjax.decode.sampling import (
    SamplingConfig,
    choose,
    distribution,
    draw,
    first_argmax,
    logprobs_of,
    sampler,
    uniforms,
)
from tests.chi_square import p_value
from tests.tolerances import PROBABILITY, SAMPLING_P_VALUE

DRAWS = 20_000
jitted_distribution, jitted_choose = jax.jit(distribution), jax.jit(choose)


def _sampler(*configs: SamplingConfig):
    return sampler(configs, [(row, 0) for row in range(len(configs))])


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _reference(logits, config: SamplingConfig, seen=()) -> np.ndarray:
    """Hugging Face's processors one after the other, in float64, ties at an edge all kept."""
    scores = np.array(logits, np.float64)
    for token in set(seen):
        penalty = config.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    temperature = config.effective_temperature
    if temperature == 0:
        return np.eye(len(scores))[np.argmax(scores)]
    weights = np.exp((scores - scores.max()) / temperature)
    if config.top_k:
        weights[weights < np.sort(weights)[-min(config.top_k, len(weights))]] = 0
    if config.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order]) / weights.sum()
        edge = weights[order[np.searchsorted(mass, config.top_p)]]
        weights[weights < edge] = 0
    weights[weights < config.min_p * weights.max()] = 0
    return weights / weights.sum()


CHOICES = {
    "temperature": [0.0, 0.3, 1.0, 2.5],
    "top_k": [0, 1, 2, 5, 12, 13, 10_000],
    "top_p": [0.05, 0.37, 0.61, 0.93, 1.0],
    "min_p": [0.0, 0.03, 0.4, 1.0],
    "repetition_penalty": [0.7071, 1.0, 1.2346],
}
row_fields = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in CHOICES.items()})


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(row_fields, min_size=4, max_size=4),
    logits=arrays(np.float32, (4, 13), elements=st.integers(-40, 40), unique=True),
    seen=arrays(bool, (4, 13)),
)
def test_distribution_equals_brute_force(rows, logits, seen):
    # Integers over 7 and odd penalties: no ties, and no sum that meets top_p by accident.
    logits = logits / np.float32(7)
    configs = [SamplingConfig(**fields) for fields in rows]
    actual = np.asarray(jitted_distribution(logits, _sampler(*configs), seen=seen))
    for row, config in enumerate(configs):
        expected = _reference(logits[row], config, np.flatnonzero(seen[row]))
        np.testing.assert_allclose(actual[row], expected, atol=PROBABILITY)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=0.6, top_k=5),
        SamplingConfig(temperature=1.3, top_p=0.8),
        SamplingConfig(do_sample=True, min_p=0.2, repetition_penalty=1.5),
    ],
    ids=["plain", "top_k", "top_p", "min_p"],
)
@pytest.mark.parametrize("vocabulary", [11, 700])
def test_draws_follow_the_distribution(config, vocabulary):
    logits, seen = _normal(6, 1, vocabulary) * 2, np.arange(vocabulary)[None] % 3 == 0
    one = jax.tree.map(jnp.asarray, _sampler(config))

    @jax.jit
    @jax.vmap
    def drawn(position):
        return choose(jnp.asarray(logits), one, position[None], seen=jnp.asarray(seen))[0]

    counts = np.bincount(drawn(np.arange(DRAWS, dtype=np.int32)), minlength=vocabulary)
    expected = np.asarray(jitted_distribution(logits, one, seen=seen), np.float64)[0]
    assert not counts[expected == 0].any()
    assert p_value(counts, expected * DRAWS) > SAMPLING_P_VALUE


def test_draw_resolves_the_tail_of_a_large_vocabulary():
    """Weights of 1e-9 at the end of 100,000 must be drawn as often as they should be."""
    weights = np.full((1, 100_000), 1e-9, np.float32)
    weights[0, 0] = 1e-9 * 100_000
    numbers = np.random.default_rng(0).random((DRAWS, 2), np.float32)
    drawn = jax.jit(jax.vmap(lambda n: draw(jnp.asarray(weights), n[None])[0]))(numbers)
    counts, _ = np.histogram(drawn, bins=[0, 1, 25_001, 50_001, 75_001, 100_000])
    expected = np.array([1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8]) * DRAWS
    assert p_value(counts, expected) > SAMPLING_P_VALUE


def test_draw_never_takes_weight_zero_at_the_edges():
    weights = np.zeros((2, 600), np.float32)
    weights[0, 300], weights[1, 599] = 1e-30, 1.0
    for number in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        numbers = np.full((2, 2), number, np.float32)
        np.testing.assert_array_equal(jax.jit(draw)(weights, numbers), [300, 599])


def test_first_argmax_takes_the_lowest_of_equals():
    x = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-np.inf] * 3], np.float32)
    np.testing.assert_array_equal(jax.jit(first_argmax)(x), [1, 0, 0])


def test_greedy_rows_in_a_sampling_batch_are_greedy():
    logits = _normal(0, 64, 50)
    rows = [SamplingConfig(temperature=1.0 if row % 2 else 0.0) for row in range(64)]
    chosen = np.asarray(jitted_choose(logits, _sampler(*rows), np.zeros(64, np.int32)))
    best = np.argmax(logits, axis=1)
    np.testing.assert_array_equal(chosen[::2], best[::2])
    assert np.any(chosen[1::2] != best[1::2])


@pytest.mark.parametrize("temperature", [1e-45, 1e-7, 1e38, 1e300])
def test_extreme_temperatures(temperature):
    logits = np.linspace(-1e4, 1e4, 40, dtype=np.float32)[None].repeat(200, 0)
    rows = [SamplingConfig(temperature=temperature)] * 200
    chosen = np.asarray(jitted_choose(logits, _sampler(*rows), np.arange(200, dtype=np.int32)))
    if temperature < 1:
        assert (chosen == 39).all()
    else:
        assert len(set(chosen.tolist())) > 30  # close to uniform


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [-jnp.inf, jnp.nan])
def test_hopeless_logits_still_give_an_allowed_token(temperature, value):
    config = SamplingConfig(temperature=temperature, top_k=3, top_p=0.5, min_p=0.1)
    allowed, logits = np.arange(20) < 12, np.full((50, 20), value, np.float32)
    positions = np.arange(50, dtype=np.int32)
    chosen = jitted_choose(logits, _sampler(*[config] * 50), positions, allowed=allowed)
    assert allowed[np.asarray(chosen)].all()


def test_top_k_beyond_the_vocabulary_and_ids_not_allowed():
    config = SamplingConfig(temperature=5.0, top_k=10**6)
    allowed = np.arange(20) % 2 == 0
    logits = np.where(allowed, 0.0, 100.0)[None].repeat(500, 0).astype(np.float32)
    positions = np.arange(500, dtype=np.int32)
    chosen = jitted_choose(logits, _sampler(*[config] * 500), positions, allowed=allowed)
    assert set(np.asarray(chosen).tolist()) == set(range(0, 20, 2))


def test_noise_depends_on_seed_row_sample_and_position_only():
    keys = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.uint32)

    def drawn(keys, position):
        return np.asarray(jax.jit(uniforms)(keys, np.full(4, position, np.int32)))

    numbers = drawn(keys, 0)
    assert len(np.unique(numbers)) == 8
    np.testing.assert_array_equal(drawn(keys[::-1], 0)[::-1], numbers)
    assert not np.any(drawn(keys, 1) == numbers)


def test_logprobs_are_of_the_raw_model_over_the_real_vocabulary():
    logits = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    tokens = np.array([2, 0, 7], np.int32)
    allowed = np.arange(10) < 8
    wide = logits[:, :8].astype(np.float64)
    expected = wide[np.arange(3), tokens] - np.log(np.exp(wide).sum(1))
    actual = jax.jit(logprobs_of)(logits, tokens, allowed)
    np.testing.assert_allclose(actual, expected, atol=PROBABILITY)


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 0.7, "do_sample": False}, 0.0),
        ({"temperature": 0}, 0.0),
    ],
)
def test_effective_temperature(fields, temperature):
    assert SamplingConfig(**fields).effective_temperature == temperature


def test_stop_ids_come_from_model_request_or_both():
    assert SamplingConfig().stop_ids((2,)) == (2,)
    assert SamplingConfig(eos_token_id=5).stop_ids((2,)) == (5,)
    assert SamplingConfig(eos_token_id=(5, 6), stop_token_ids=(7, 5)).stop_ids((2,)) == (5, 6, 7)
    assert SamplingConfig(ignore_eos=True, stop_token_ids=(7,)).stop_ids((2,)) == (7,)


@pytest.mark.parametrize("top_p", [1e-38, 1e-39, 1e-45])
def test_the_smallest_nucleus_keeps_the_best_token(top_p):
    logits = jnp.zeros((1, 61), jnp.float32).at[0, 17].set(9.0)
    settings = sampler([SamplingConfig(temperature=1.0, top_p=top_p)], [(0, 0)])
    settings = jax.tree.map(jnp.asarray, settings)
    assert int(choose(logits, settings, jnp.array([3]))[0]) == 17
