# SPDX-License-Identifier: Apache-2.0
"""Bad generation requests are refused by name, before any work, and harm nothing afterwards."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from sqzjax.decode import Generator, SamplingConfig, advance, generate, start
from sqzjax.errors import RequestError
from sqzjax.io import tokenizer
from tests.contracts.decoders import (
    EOS,
    VOCABULARY,
    plain_greedy,
    plain_logits,
    tiny_model,
    tiny_params,
)
from tests.tolerances import RAGGED

CAPACITY = 32
# Wrong types never get as far as our own check where the test run checks annotations.
REJECTED = (RequestError, TypeCheckError)


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_positions=CAPACITY)


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, tiny_params(model), capacity=CAPACITY, batch_size=2)


def _works(generator, model):
    out = generator.generate([[8, 9, 10]], SamplingConfig(max_new_tokens=4))
    assert out.row(0) == plain_greedy(model, generator.params, [8, 9, 10], 4)


BAD_PROMPTS = {
    "negative": ([[5, 6], [5, -1, 6]], "prompt 1: token id -1 at position 1"),
    "vocabulary": ([[5, VOCABULARY]], f"prompt 0: token id {VOCABULARY} at position 1"),
    "largest int32": ([[2**31 - 1]], "token id 2147483647 at position 0"),
    "beyond int64": ([[5, 2**70]], "at position 1 is not a token id"),
    "float": ([[5, 6.0]], "prompt 0: 6.0 at position 1 is not a token id"),
    "float array": ([np.array([5.0, 6.0])], "dtype float64"),
    "bool": ([[5, True]], "prompt 0: True at position 1"),
    "bool array": ([np.array([True, False])], "dtype bool"),
    "none": ([[5, None]], "None at position 1"),
    "nested": ([[5, [6, 7]]], r"\[6, 7\] at position 1"),
    "ragged array": ([np.zeros((2, 2), int)], "2 dimensions"),
    "scalar": ([5], "prompt 0 must be a flat sequence"),
    "empty prompt": ([[5], []], "prompt 1 is empty"),
    "empty array": ([np.zeros(0, int)], "prompt 0 is empty"),
    "no prompts": ([], "prompts is empty"),
    "text without tokenizer": (["hello"], "prompt 0 is text, which needs a tokenizer"),
    "too many": ([[5], [6], [7]], "3 prompts exceed batch_size=2"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(generator, model, name):
    prompts, message = BAD_PROMPTS[name]
    compiled = start._cache_size(), advance._cache_size()
    with pytest.raises(RequestError, match=message):
        generator.generate(prompts, SamplingConfig(max_new_tokens=4))
    assert (start._cache_size(), advance._cache_size()) == compiled
    _works(generator, model)


def test_a_lone_string_is_not_taken_for_a_list_of_prompts(generator):
    with pytest.raises(REJECTED):
        generator.generate("hello", SamplingConfig(max_new_tokens=4))


BAD_VALUES = [
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", -1),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("max_new_tokens", -1),
    ("seed", -1),
    ("seed", 2**32),
    ("num_return_sequences", 0),
    ("stop_token_ids", (-1,)),
    ("eos_token_id", -5),
    ("pad_token_id", -1),
    ("stop_strings", ("",)),
]
BAD_TYPES = [
    ("temperature", "hot"),
    ("temperature", True),
    ("top_k", 2.5),
    ("top_k", True),
    ("max_new_tokens", 3.0),
    ("max_new_tokens", None),
    ("stop_token_ids", 5),
    ("stop_token_ids", (1.5,)),
    ("stop_strings", "end"),
    ("stop_strings", (5,)),
    ("eos_token_id", (2, "x")),
    ("do_sample", "yes"),
    ("logprobs", 1),
    ("ignore_eos", None),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_sampling_values(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_TYPES)
def test_bad_sampling_types(name, value):
    with pytest.raises(REJECTED, match=name):
        SamplingConfig(**{name: value})


def test_contradicting_fields():
    with pytest.raises(RequestError, match="do_sample=True needs temperature > 0"):
        SamplingConfig(do_sample=True, temperature=0.0)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (SamplingConfig(stop_token_ids=(3, VOCABULARY)), f"has {VOCABULARY}, which must lie in"),
        (SamplingConfig(eos_token_id=2**31 - 1), "has 2147483647"),
        (SamplingConfig(pad_token_id=VOCABULARY), "pad_token_id has"),
        (SamplingConfig(stop_strings=("x",)), "need a tokenizer"),
        ([SamplingConfig()] * 3, "3 sampling configs for 1 prompts"),
    ],
)
def test_bad_sampling_for_this_model(generator, model, sampling, message):
    with pytest.raises(RequestError, match=message):
        generator.generate([[5]], sampling)
    _works(generator, model)


@pytest.mark.parametrize("fields", [{"row_ids": [1, 2]}, {"row_ids": [-1]}, {"steps_per_sync": 0}])
def test_bad_options(generator, fields):
    with pytest.raises(RequestError, match=next(iter(fields))):
        generator.generate([[5]], SamplingConfig(max_new_tokens=2), **fields)


@pytest.mark.parametrize("bad", [5, "bytes", object()])
def test_bad_tokenizers(model, bad):
    with pytest.raises(RequestError, match="has no method decode"):
        Generator(model, {}, tokenizer=bad)


def test_tokenizer_of_another_model_is_refused_at_its_first_id(model):
    with pytest.raises(RequestError, match=r"prompt 0: token id \d+ at position 0 must lie in"):
        generate(model, tiny_params(model), ["hello"], tokenizer=tokenizer.load("bytes"))


def test_lone_surrogates_are_refused(model):
    large = tiny_model(vocab_size=260)
    with pytest.raises(RequestError, match="prompt 0: the text has a lone surrogate"):
        generate(large, {}, ["\ud800"], tokenizer=tokenizer.load("bytes"))


@pytest.mark.parametrize("field", ["capacity", "batch_size", "prefill_chunk"])
def test_bad_generator_sizes(model, field):
    with pytest.raises(RequestError, match=f"{field}=0 must be >= 1"):
        Generator(model, {}, **{field: 0})


@pytest.mark.parametrize(("length", "new"), [(31, 1), (1, 31), (16, 16), (32, 0)])
def test_requests_that_just_fit(generator, model, length, new):
    prompt = [8 + i % 50 for i in range(length)]
    out = generator.generate([prompt], SamplingConfig(max_new_tokens=new, ignore_eos=True))
    assert out.row(0) == plain_greedy(model, generator.params, prompt, new, stop_ids=())
    assert out.finish_reason == ("length",)


@pytest.mark.parametrize(("length", "new"), [(32, 1), (33, 0), (31, 2), (320, 4), (1, 32)])
def test_requests_that_do_not_fit(generator, model, length, new):
    total = f"prompt 0 has {length} tokens and max_new_tokens={new}, together {length + new}; the "
    with pytest.raises(RequestError, match=total + "model's max_positions of 32 is exceeded"):
        generator.generate([[5] * length], SamplingConfig(max_new_tokens=new))
    _works(generator, model)


def test_capacity_is_named_where_it_binds(model):
    small = Generator(model, tiny_params(model), capacity=10)
    with pytest.raises(RequestError, match=r"the cache capacity of 10 is exceeded; shorten the"):
        small.generate([[5] * 8], SamplingConfig(max_new_tokens=4))


@pytest.mark.parametrize("length", [32, 320])
def test_truncation_keeps_the_newest_tokens(generator, length):
    prompt = [8 + i % 47 for i in range(length)]
    sampling = SamplingConfig(max_new_tokens=6)
    cut = generator.generate([prompt], sampling, truncate="left")
    np.testing.assert_array_equal(cut.tokens, generator.generate([prompt[-26:]], sampling).tokens)
    with pytest.raises(RequestError, match="lower max_new_tokens"):
        generator.generate([prompt], SamplingConfig(max_new_tokens=32), truncate="left")


def test_integer_arrays_of_any_kind_are_prompts(generator):
    expected = generator.generate([[8, 9], [10, 11]], SamplingConfig(max_new_tokens=4)).tokens
    for prompts in (
        np.array([[8, 9], [10, 11]], np.uint8),
        [np.array([8, 9]), jnp.array([10, 11])],
        ((8, 9), (np.int64(10), 11)),
    ):
        out = generator.generate(prompts, SamplingConfig(max_new_tokens=4))
        np.testing.assert_array_equal(out.tokens, expected)


# The second row switches every feature on, so that all requests share one program.
EVERYTHING = SamplingConfig(
    max_new_tokens=5, temperature=0.5, top_k=3, repetition_penalty=1.1, logprobs=True
)
values = {
    "max_new_tokens": st.integers(-1, 40),
    "temperature": st.sampled_from([0.0, 1e-30, 0.7, 1e30, -1.0, math.nan]),
    "top_k": st.sampled_from([0, 1, 7, 10**9, -1]),
    "top_p": st.sampled_from([1e-9, 0.5, 1.0, 0.0, 2.0]),
    "min_p": st.sampled_from([0.0, 0.5, 1.0]),
    "repetition_penalty": st.sampled_from([1e-3, 1.0, 1e3]),
    "stop_token_ids": st.lists(st.integers(0, VOCABULARY), max_size=4).map(tuple),
    "seed": st.integers(0, 2**32 - 1),
    "logprobs": st.booleans(),
}
tokens = st.integers(0, VOCABULARY - 1) | st.sampled_from([-1, VOCABULARY, 2**31 - 1, 1.5, True])
prompts = st.lists(st.integers(0, VOCABULARY - 1), max_size=34) | st.lists(tokens, max_size=8)


def _any_request(generator, prompt, fields):
    try:
        config = SamplingConfig(**fields)
        out = generator.generate([prompt, [9]], [config, EVERYTHING])
    except RequestError as error:
        assert str(error)
        return
    row = out.row(0)
    assert len(row) <= config.max_new_tokens and all(0 <= token < VOCABULARY for token in row)
    assert np.isfinite(out.logprobs).all() and (out.logprobs <= RAGGED).all()
    stops = {EOS, *config.stop_token_ids}
    assert not stops & set(row[:-1])
    assert (out.finish_reason[0] == "stop") == bool(row and row[-1] in stops)


@settings(max_examples=200, deadline=None)
@given(prompt=prompts, fields=st.fixed_dictionaries({}, optional=values))
def test_any_request_is_answered_or_refused(generator, prompt, fields):
    _any_request(generator, prompt, fields)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(prompt=prompts, fields=st.fixed_dictionaries({}, optional=values))
def test_any_of_many_requests_is_answered_or_refused(generator, prompt, fields):
    _any_request(generator, prompt, fields)


def test_logits_of_valid_requests_are_finite(model):
    rng = np.random.default_rng(0)
    for length in (1, 2, 31, 32):
        tokens = rng.integers(0, VOCABULARY, length)
        assert np.isfinite(plain_logits(model, tiny_params(model), tokens)).all()


@pytest.mark.parametrize("repeats", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_generations_back_to_back_compile_nothing(generator, repeats):
    rng = np.random.default_rng(1)
    generator.generate([[8] * 20, [9]], SamplingConfig(max_new_tokens=9))
    generator.generate([[8], [9]], SamplingConfig(max_new_tokens=9))
    compiled = start._cache_size(), advance._cache_size()
    for _ in range(repeats):
        lengths = rng.integers(1, 22, 2)
        rows = [rng.integers(8, VOCABULARY, n).tolist() for n in lengths]
        generator.generate(rows, SamplingConfig(max_new_tokens=int(rng.integers(0, 10))))
    assert (start._cache_size(), advance._cache_size()) == compiled
