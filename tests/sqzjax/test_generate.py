# SPDX-License-Identifier: Apache-2.0
"""Generation end to end on a tiny model: samples, streams, text, stop strings, logprobs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.decode import (
    Autoregressive,
    Generator,
    SamplingConfig,
    generate,
    prefill,
    stream_generate,
)
from sqzjax.decode.text import RowText
from sqzjax.io import tokenizer
from sqzjax.kvcache import Dense
from sqzjax.models import DecoderLM, Execution, SpecialTokens, stack_layers
from tests.chi_square import p_value
from tests.contracts.decoders import plain_greedy, plain_logits, tiny_model, tiny_params
from tests.tolerances import CHUNKED, RAGGED, SAMPLING_P_VALUE

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(8, 61, n).tolist() for n in (3, 21, 1, 9)]
SAMPLED = SamplingConfig(max_new_tokens=8, temperature=1.0, ignore_eos=True)
FILTERED = replace(SAMPLED, logprobs=True, top_k=5, temperature=0.5)
PREFILL = jax.jit(prefill.prefill, static_argnums=0, static_argnames="chunk")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, tiny_params(model), capacity=64)


def test_samples_of_one_prompt_differ_and_are_reproducible(generator):
    sampling = replace(SAMPLED, num_return_sequences=2)
    out = generator.generate(PROMPTS, sampling)
    assert out.tokens.shape == (8, 8)
    assert len({tuple(out.row(row)) for row in range(8)}) == 8
    np.testing.assert_array_equal(generator.generate(PROMPTS, sampling).tokens, out.tokens)
    other = generator.generate(PROMPTS, replace(sampling, seed=1))
    assert not (other.tokens == out.tokens).all(axis=1).any()


def test_forked_greedy_samples_are_all_the_greedy_one(generator, model):
    greedy = SamplingConfig(max_new_tokens=8)
    single = [plain_greedy(model, generator.params, prompt, 8) for prompt in PROMPTS]
    counts = [2, 1, 3, 2]
    configs = [replace(greedy, num_return_sequences=n) for n in counts]
    out = generator.generate(PROMPTS, configs)
    source = np.repeat(np.arange(4), counts)
    assert [out.row(row) for row in range(8)] == [single[row] for row in source]


def test_the_first_sample_is_what_a_single_request_draws(generator):
    many = generator.generate(PROMPTS, replace(SAMPLED, num_return_sequences=2))
    one = generator.generate(PROMPTS, SAMPLED)
    np.testing.assert_array_equal(many.tokens[::2], one.tokens)


def test_row_ids_make_samples_independent_of_the_batch(generator):
    together = generator.generate(PROMPTS, SAMPLED)
    back = generator.generate(PROMPTS[::-1], SAMPLED, row_ids=[3, 2, 1, 0])
    np.testing.assert_array_equal(back.tokens[::-1], together.tokens)
    alone = generator.generate([PROMPTS[2]], SAMPLED, row_ids=[2])
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[2])
    mixed = [SAMPLED, SamplingConfig(max_new_tokens=8), SAMPLED, SAMPLED]
    np.testing.assert_array_equal(generator.generate(PROMPTS, mixed).tokens[2], together.tokens[2])


def test_sampled_first_tokens_follow_the_model(generator, model):
    prompt, draws = PROMPTS[0], 4000
    sampling = SamplingConfig(max_new_tokens=1, temperature=1.5, num_return_sequences=draws)
    out = generator.generate([prompt], sampling)
    logits = plain_logits(model, generator.params, prompt)[-1].astype(np.float64) / 1.5
    expected = np.exp(logits - logits.max())
    expected *= draws / expected.sum()
    counts = np.bincount(out.tokens[:, 0], minlength=len(expected))
    assert p_value(counts, expected) > SAMPLING_P_VALUE


def test_repetition_penalty_counts_prompt_and_output(generator, model):
    prompt, penalty = PROMPTS[1], 1.7
    sampling = SamplingConfig(max_new_tokens=10, repetition_penalty=penalty, ignore_eos=True)
    tokens = list(prompt)
    for _ in range(10):
        scores = plain_logits(model, generator.params, tokens)[-1].copy()
        seen = np.unique(tokens)
        low = scores[seen] < 0
        scores[seen] = np.where(low, scores[seen] * penalty, scores[seen] / penalty)
        tokens.append(int(np.argmax(scores)))
    out = generator.generate([PROMPTS[0], prompt], sampling)
    assert out.row(1) == tokens[len(prompt) :]
    assert out.row(1) != plain_greedy(model, generator.params, prompt, 10, stop_ids=())


def test_logprobs_are_those_of_the_raw_model(generator, model):
    out = generator.generate(PROMPTS, FILTERED)
    assert out.logprobs is not None and out.logprobs.dtype == np.float32
    for row, prompt in enumerate(PROMPTS):
        logits = plain_logits(model, generator.params, prompt + out.row(row))
        wide = logits[len(prompt) - 1 : -1].astype(np.float64)
        norm = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
        expected = wide[np.arange(8), out.row(row)] - norm
        np.testing.assert_allclose(
            out.logprobs[row], expected, rtol=CHUNKED["float32"], atol=CHUNKED["float32"]
        )
    assert generator.generate(PROMPTS, SAMPLED).logprobs is None


def test_padding_of_short_rows(generator):
    configs = [replace(FILTERED, max_new_tokens=n, pad_token_id=60) for n in range(4)]
    out = generator.generate(PROMPTS, configs)
    beyond = np.arange(3) >= np.arange(4)[:, None]
    assert out.tokens.shape == (4, 3) and (out.tokens[beyond] == 60).all()
    assert out.logprobs is not None and (out.logprobs[beyond] == 0).all()
    nothing = generator.generate(PROMPTS, replace(SAMPLED, max_new_tokens=0))
    assert nothing.tokens.shape == (4, 0) and nothing.finish_reason == ("length",) * 4


def test_padded_and_mask_ids_are_never_emitted():
    tokens = SpecialTokens(eos=(7,), mask=11)
    model = tiny_model(num_layers=1, embedding_size=64, tokens=tokens)
    hot = SamplingConfig(max_new_tokens=32, temperature=50.0, ignore_eos=True)
    prompts = PROMPTS * 8  # about 1,000 draws, close to uniform over 61 ids
    out = Generator(model, tiny_params(model)).generate(prompts, hot)
    assert set(np.unique(out.tokens)) == set(range(61)) - {11}
    asked = Autoregressive(model=model, allow_mask_token=True)
    out = Generator(model, tiny_params(model), decoder=asked).generate(prompts, hot)
    assert set(np.unique(out.tokens)) == set(range(61))


def test_cached_decoding_equals_full_recomputation_for_512_tokens():
    model = tiny_model(max_positions=512)
    params = tiny_params(model, scale=1.0)
    tokens = np.random.default_rng(2).integers(0, 61, (2, 512)).astype(np.int32)
    whole = np.asarray(jax.jit(lambda p, t: model.forward(p, t).logits)(params, tokens))
    caches = model.init_caches(Dense(), batch=2, capacity=512, max_new=64)
    lengths = np.array([100, 128], np.int32)
    logits, caches = PREFILL(model, params, caches, tokens[:, :128], lengths, chunk=64)
    np.testing.assert_allclose(logits, whole[[0, 1], [99, 127]], atol=RAGGED)

    @jax.jit
    def rest(params, caches):
        def step(caches, _):
            position = caches.length
            now = jnp.take_along_axis(jnp.asarray(tokens), position[:, None], axis=1)
            now = jnp.where(position[:, None] < 512, now, 0)
            position = jnp.where(position < 512, position, -1)
            out = model.forward(params, now, positions=position[:, None], caches=caches)
            return out.caches, out.logits[:, 0]

        return jax.lax.scan(step, caches, None, length=412)[1]

    steps = np.asarray(rest(params, caches))
    np.testing.assert_allclose(steps[:, 0], whole[0, 100:], atol=CHUNKED["float32"])
    np.testing.assert_allclose(steps[:384, 1], whole[1, 128:], atol=CHUNKED["float32"])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65])
def test_prefill_in_chunks_equals_one_pass(model, length):
    params = tiny_params(model, scale=1.0)
    tokens = np.random.default_rng(length).integers(0, 61, (2, 128))
    lengths = np.array([length, max(1, length // 2)], np.int32)
    whole = [plain_logits(model, params, row[:n], 128)[-1] for row, n in zip(tokens, lengths)]
    caches = model.init_caches(Dense(), batch=2, capacity=128, max_new=16)
    logits, caches = PREFILL(model, params, caches, tokens.astype(np.int32), lengths, chunk=16)
    np.testing.assert_allclose(logits, np.stack(whole), atol=RAGGED)
    np.testing.assert_array_equal(caches.length, lengths)


def test_stacked_and_unrolled_parameters_give_the_same(model):
    params = tiny_params(model)
    stacked = DecoderLM(model.config, Execution(scan_layers=True))
    out = generate(stacked, stack_layers(params), PROMPTS, SAMPLED, capacity=64)
    expected = generate(model, params, PROMPTS, SAMPLED, capacity=64)
    np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_prepared_parameters_have_the_compute_dtype(model):
    low = DecoderLM(model.config, Execution(dtype="bfloat16", scan_layers=False))
    generator = Generator(low, tiny_params(model))
    assert {leaf.dtype for leaf in jax.tree.leaves(generator.params)} == {jnp.dtype("bfloat16")}
    out = generator.generate(PROMPTS, replace(SAMPLED, logprobs=True))
    assert (out.lengths == 8).all() and np.isfinite(out.logprobs).all()


def test_models_that_are_not_causal_are_refused():
    with pytest.raises(ValueError, match="use a diffusion decoder"):
        Generator(tiny_model(mask="bidirectional"), {})


def test_statistics_add_up(generator):
    out = generator.generate(PROMPTS, SAMPLED)
    stats = out.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.rows, stats.steps) == (34, 32, 4, 7)
    # K and V, 2 layers, 4 rows of 2 heads x 64 slots x 8 floats, and an int32 length per row.
    assert stats.cache_bytes == 2 * (2 * 4 * 2 * 64 * 8 * 4 + 4 * 4)
    assert 0 < stats.prefill_seconds <= stats.ttft_seconds
    assert stats.tokens_per_second == pytest.approx(28 / stats.decode_seconds)
    assert stats.tokens_per_step == 4
    assert stats.tpot_seconds * 7 == pytest.approx(stats.decode_seconds)


# Text. The byte tokenizer splits every non-ASCII character over several tokens.


@pytest.fixture(scope="module")
def bytes_generator():
    model = tiny_model(vocab_size=262, tokens=SpecialTokens(eos=(257,)))
    return Generator(model, tiny_params(model), tokenizer=tokenizer.load("bytes"), capacity=64)


TEXTS = ["hello", "élan"]
LONG = SamplingConfig(max_new_tokens=40, temperature=1.0, num_return_sequences=3, seed=1)


def _collect(updates):
    tokens, text, reasons = {}, {}, {}
    for batch in updates:
        for update in batch:
            assert update.row not in reasons
            tokens.setdefault(update.row, []).extend(update.tokens)
            text[update.row] = text.get(update.row, "") + update.text
            if update.finish_reason:
                reasons[update.row] = update.finish_reason
    return tokens, text, reasons


@pytest.mark.parametrize("steps", [None, 7])
@pytest.mark.parametrize("stops", [(), ("q", "zz9")])
def test_streaming_equals_not_streaming(bytes_generator, steps, stops):
    sampling = replace(LONG, stop_strings=stops)
    whole = bytes_generator.generate(TEXTS, sampling)
    called = []
    callback = bytes_generator.generate(TEXTS, sampling, stream=called.append, steps_per_sync=steps)
    iterated = list(bytes_generator.stream(TEXTS, sampling, steps_per_sync=steps))
    for updates in (called, iterated):
        tokens, text, reasons = _collect(updates)
        for row in range(6):
            assert tokens[row] == whole.row(row) == callback.row(row)
            assert whole.text is not None and text[row] == whole.text[row]
            assert reasons[row] == whole.finish_reason[row]
    if steps is None:
        assert len(iterated[0]) == 6 and all(len(u.tokens) == 1 for u in iterated[0])


def test_stream_returns_the_output_at_its_end(bytes_generator):
    stream = bytes_generator.stream(TEXTS, LONG)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            out = end.value
            break
    np.testing.assert_array_equal(out.tokens, bytes_generator.generate(TEXTS, LONG).tokens)


def test_stream_generate_checks_at_the_call(bytes_generator):
    model = tiny_model()
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        stream_generate(model, tiny_params(model), [[]])
    sampling = replace(SAMPLED, seed=3)
    updates = list(stream_generate(model, tiny_params(model), [[8]], sampling, capacity=64))
    assert sum(len(update.tokens) for batch in updates for update in batch) == 8


def test_stop_strings_trim_tokens_and_text(bytes_generator):
    full = bytes_generator.generate(TEXTS, LONG)
    assert full.text is not None
    for row in (0, 3):
        text = full.text[row]
        stop = next(text[i : i + 2] for i in range(5, 30) if text[i : i + 2].isascii())
        out = bytes_generator.generate(TEXTS, replace(LONG, stop_strings=(stop,)))
        assert out.text is not None and out.finish_reason[row] == "stop"
        assert out.text[row] == text[: text.index(stop)]
        assert out.row(row) == full.row(row)[: out.lengths[row]]
        # The last token is the one that completed the stop string.
        kept = tokenizer.load("bytes").decode([t for t in out.row(row) if t < 260])
        assert kept.endswith(stop) and kept.count(stop) == 1


class _Words(tokenizer.ByteTokenizer):
    """A tokenizer whose tokens are the given strings."""

    def __init__(self, *words):
        self.words, self.vocab_size = words, len(words)

    def decode(self, ids, skip_special=True):
        return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize(
    ("words", "stops", "text", "length"),
    [
        (["ab", "c END", " x"], ["END"], "abc ", 2),
        (["a E", "N", "D b", "c"], ["END"], "a ", 3),
        (["a E", "N", "E b", "c"], ["END"], "a ENE bc", 4),
        (["E", "E", "N", "D"], ["END"], "E", 4),
        (["aa", "b"], ["aab", "ab"], "", 2),
        (["xEN", "D"], ["ND", "END"], "x", 2),
        (["a", "E", "N"], ["END"], "aEN", 3),
    ],
)
def test_stop_strings_across_token_boundaries(words, stops, text, length):
    for burst in (1, 2, 10):
        row = RowText(_Words(*words), [], stops, [])
        pieces = [
            row.push(list(range(len(words)))[i : i + burst]) for i in range(0, len(words), burst)
        ]
        assert "".join(pieces) + row.finish() == text
        assert row.length == length
        assert row.stopped == (text != "".join(words))
    # Nothing that belongs to a stop string is ever shown.
    row, shown = RowText(_Words(*words), [], stops, []), ""
    for index in range(len(words)):
        shown += row.push([index])
        assert text.startswith(shown)


def test_stop_ids_and_foreign_ids_leave_no_text():
    row = RowText(_Words("a", "b", "c"), [], [], [1])
    assert row.push([0, 1, 2, 99]) + row.finish() == "ac"
    assert row.length == 4
