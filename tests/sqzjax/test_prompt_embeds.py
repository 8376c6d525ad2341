# SPDX-License-Identifier: Apache-2.0
"""Prompts that are embeddings: as good as ids where ids exist, and equal to plain forward passes.

Batches have one shape per decoder, so that tests share programs.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.decode import Autoregressive, Diffusion, Generator, SamplingConfig, advance, start
from sqzjax.decode import requests as checking
from sqzjax.decode.autoregressive import seen_tokens
from sqzjax.decode.commit import Threshold
from sqzjax.decode.context import Residual
from sqzjax.decode.embeds import EMBEDDED
from sqzjax.decode.reuse import Delayed, Dual, Exact, NoReuse, Periodic, Prefix
from sqzjax.errors import RequestError
from sqzjax.io import tokenizer
from sqzjax.models import SpecialTokens
from tests.contracts.decoders import VOCABULARY, tiny_model, tiny_params

WIDTH, MASK, BLOCK = 32, 60, 4
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(8, 50, n).tolist() for n in (3, 21, 1, 9)]
GREEDY = SamplingConfig(max_new_tokens=8, ignore_eos=True)
FAMILIES = {
    "causal": {},
    "shifted_blocks": {"mask": "block_causal", "block_size": BLOCK, "shift_logits": True},
    "bidirectional": {"mask": "bidirectional", "family": "llada"},
    "shifted": {"mask": "bidirectional", "shift_logits": True, "family": "dream"},
}


@cache
def model_of(family):
    tokens = SpecialTokens(eos=(7,), mask=None if family == "causal" else MASK)
    layers = 2 if family == "causal" else 1  # diffusion has many programs to compile
    model = tiny_model(**FAMILIES[family], tokens=tokens, num_layers=layers)
    return model, tiny_params(tiny_model(num_layers=layers))  # the mask has no parameters


@cache
def generator_of(family, **options):
    model, params = model_of(family)
    if family == "causal":
        return Generator(model, params, capacity=64, batch_size=4, **options)
    commit = Threshold(threshold=2.0)  # the surest position alone
    decoder = Diffusion(model=model, block_size=BLOCK, commit=commit, **options)
    return Generator(model, params, decoder=decoder, capacity=64, batch_size=4)


def table_of(family):
    return np.asarray(model_of(family)[1]["embed"]["embedding"])


def looked_up(family, prompts, rows=range(4)):
    """The prompts, those of `rows` as embeddings."""
    return [table_of(family)[p] if row in rows else p for row, p in enumerate(prompts)]


@cache
def soft(family):
    """A prompt of ids, and three of embeddings that no id has, about as large as those of ids."""
    deviation = table_of(family).std()
    rng = np.random.default_rng(1)
    return [PROMPTS[0]] + [rng.normal(size=(n, WIDTH)) * deviation for n in (17, 2, 6)]


@cache
def forward_of(family):
    model, params = model_of(family)
    run = jax.jit(
        lambda embeds, positions: model.forward(params, embeds=embeds, positions=positions)
    )

    def logits(embeds):
        padded = np.zeros((1, 40, WIDTH), np.float32)
        padded[0, : len(embeds)] = embeds
        positions = np.where(np.arange(40) < len(embeds), np.arange(40), -1)[None]
        out = run(jnp.asarray(padded), jnp.asarray(positions, jnp.int32)).logits
        return np.asarray(out[0, : len(embeds)], np.float64)

    return logits


def as_embeds(family, prompt):
    return table_of(family)[prompt] if isinstance(prompt, list) else np.asarray(prompt)


def plain_greedy(prompt, count, penalty=1.0, counted=()):
    """Greedy decoding by a whole forward pass per token."""
    embeds, tokens = as_embeds("causal", prompt), []
    for _ in range(count):
        scores = forward_of("causal")(embeds)[-1]
        seen = sorted({*counted, *tokens})
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        tokens.append(int(scores.argmax()))
        embeds = np.concatenate([embeds, table_of("causal")[tokens[-1:]]])
    return tokens


def plain_diffusion(family, prompt, count):
    """Decode by a whole forward pass per position, the surest of each block first."""
    aligned = FAMILIES[family]["mask"] == "block_causal"
    length = len(prompt)
    total = -(-(length + count) // BLOCK) * BLOCK if aligned else length + count
    mask = np.repeat(table_of(family)[MASK][None], total - length, axis=0)
    embeds = np.concatenate([as_embeds(family, prompt), mask])
    begin = length // BLOCK * BLOCK if aligned else length
    open_, tokens = np.arange(total) >= length, np.zeros(total, int)
    while begin < total:
        block = np.arange(begin, min(begin + BLOCK, total))
        while open_[block].any():
            logits = forward_of(family)(embeds)
            if FAMILIES[family].get("shift_logits"):
                logits = np.concatenate([logits[:1], logits[:-1]])
            logits[:, MASK] = -np.inf
            chance = np.exp(logits - logits.max(-1, keepdims=True))
            chance /= chance.sum(-1, keepdims=True)
            place = block[np.where(open_[block], chance[block].max(-1), -1).argmax()]
            tokens[place], open_[place] = chance[place].argmax(), False
            embeds[place] = table_of(family)[tokens[place]]
        begin += BLOCK
    return tokens[length : length + count].tolist()


# Autoregressive. A chunk of 8 tokens reads these prompts in four parts.


def test_embeddings_of_ids_are_as_good_as_the_ids():
    generator = generator_of("causal", prefill_chunk=8)
    ids = generator.generate(PROMPTS, GREEDY)
    for rows in (range(4), (1, 2)):
        out = generator.generate(looked_up("causal", PROMPTS, rows), GREEDY)
        np.testing.assert_array_equal(out.tokens, ids.tokens)
    assert out.stats.prompt_tokens == ids.stats.prompt_tokens == 34


def test_soft_prompts_equal_whole_forward_passes():
    generator = generator_of("causal", prefill_chunk=8)
    out = generator.generate(soft("causal"), GREEDY)
    for row, prompt in enumerate(soft("causal")):
        assert out.row(row) == plain_greedy(prompt, 8), row
    assert len({tuple(out.row(row)) for row in range(4)}) == 4


@pytest.mark.parametrize(
    ("family", "options"),
    [("causal", {"prefill_chunk": 8}), ("shifted_blocks", {"reuse": Exact()})],
)
def test_rows_do_not_depend_on_their_batch(family, options):
    generator, prompts = generator_of(family, **options), soft(family)
    together = generator.generate(prompts, GREEDY)
    back = generator.generate(prompts[::-1], GREEDY, row_ids=[3, 2, 1, 0])
    np.testing.assert_array_equal(back.tokens[::-1], together.tokens)
    compiled = advance._cache_size()
    for row in (1, 2):  # in four chunks, and, of another prompt bucket, in one
        alone = generator.generate([prompts[row]], GREEDY, row_ids=[row])
        assert alone.row(0) == together.row(row)
    assert advance._cache_size() == compiled


def test_penalties_count_ids_only_and_forks_start_alike():
    prompts = [PROMPTS[1], table_of("causal")[PROMPTS[1]], *soft("causal")[1:3]]
    sampling = SamplingConfig(
        max_new_tokens=8, repetition_penalty=1.7, num_return_sequences=2, ignore_eos=True
    )
    out = generator_of("causal", prefill_chunk=8).generate(prompts, sampling)
    for row, prompt in enumerate(prompts):
        expected = plain_greedy(prompt, 8, 1.7, PROMPTS[1] if row == 0 else ())
        assert out.row(2 * row) == out.row(2 * row + 1) == expected, row
    assert out.row(0) != out.row(2)
    tokens, lengths = jnp.array([[EMBEDDED] * 3, [5, 6, EMBEDDED]]), jnp.array([3, 3])
    seen = seen_tokens(tokens, lengths, VOCABULARY)
    assert np.argwhere(seen).tolist() == [[1, 5], [1, 6]]


def test_truncation_keeps_the_newest_embeddings():
    generator = generator_of("causal", prefill_chunk=8)
    long = np.random.default_rng(2).normal(size=(50, WIDTH)) * table_of("causal").std()
    sampling = SamplingConfig(max_new_tokens=32, ignore_eos=True)
    cut = generator.generate([long], sampling, truncate="left")
    assert cut.row(0) == generator.generate([long[-32:]], sampling).row(0)
    rule = "prompt 0 has 50 tokens and max_new_tokens=32, together 82; the cache capacity of 64"
    with pytest.raises(RequestError, match=rule):
        generator.generate([long], sampling)


def test_streams_and_text():
    model, params = model_of("causal")
    words = tokenizer.load("bytes")
    generator = Generator(
        model, params, capacity=64, batch_size=4, prefill_chunk=8, tokenizer=words
    )
    out, text, tokens = generator.generate(soft("causal"), GREEDY), {}, {}
    for updates in generator.stream(soft("causal"), GREEDY, steps_per_sync=3):
        for update in updates:
            text[update.row] = text.get(update.row, "") + update.text
            tokens[update.row] = [*tokens.get(update.row, []), *update.tokens]
    assert out.text is not None and out.text == tuple(text[row] for row in range(4))
    assert [out.row(row) for row in range(4)] == [tokens[row] for row in range(4)]
    assert out.text[1] == words.decode(out.row(1))


# Diffusion.

APPROXIMATE = [Prefix(), Dual(look=1), Delayed(refresh=3), Periodic(prompt=5, response=2)]


@pytest.mark.parametrize(
    ("family", "reuse"),
    [
        ("bidirectional", NoReuse()),
        ("shifted_blocks", Exact()),
        *[pytest.param("shifted", reuse, marks=pytest.mark.slow) for reuse in APPROXIMATE],
    ],
)
def test_diffusion_from_embeddings_of_ids(family, reuse):
    generator = generator_of(family, reuse=reuse)
    ids = generator.generate(PROMPTS, GREEDY)
    for rows in (range(4), (1, 2)):
        out = generator.generate(looked_up(family, PROMPTS, rows), GREEDY)
        np.testing.assert_array_equal(out.tokens, ids.tokens)
    assert MASK not in out.tokens and EMBEDDED not in out.tokens


@pytest.mark.parametrize("reuse", APPROXIMATE, ids=lambda reuse: reuse.kind)
def test_reuse_treats_embeddings_like_ids(reuse):
    """In one batch, rows of ids beside rows of their embeddings."""
    prompts = [prompt for prompt in PROMPTS[::3] for _ in range(2)]
    out = generator_of("shifted", reuse=reuse).generate(
        looked_up("shifted", prompts, (1, 3)), GREEDY
    )
    np.testing.assert_array_equal(out.tokens[1::2], out.tokens[::2])


@pytest.mark.parametrize(
    ("family", "reuse"), [("bidirectional", NoReuse()), ("shifted_blocks", Exact())]
)
def test_diffusion_from_soft_prompts_equals_whole_forward_passes(family, reuse):
    out = generator_of(family, reuse=reuse).generate(soft(family), GREEDY)
    for row, prompt in enumerate(soft(family)):
        assert out.row(row) == plain_diffusion(family, prompt, 8), row


def test_contexts_and_forks_of_embeddings():
    generator = generator_of("shifted_blocks", reuse=Exact(), context=Residual())
    sampling = SamplingConfig(
        max_new_tokens=8, temperature=0.8, num_return_sequences=2, ignore_eos=True
    )
    prompts = [prompt for prompt in PROMPTS[::3] for _ in range(2)]
    prompts = looked_up("shifted_blocks", prompts, (1, 3))
    tokens = generator.generate(prompts, sampling, row_ids=[0, 0, 1, 1]).tokens
    np.testing.assert_array_equal(tokens[[2, 3, 6, 7]], tokens[[0, 1, 4, 5]])
    assert (tokens[0] != tokens[1]).any()


# Requests.


def test_batches_of_ids_run_the_programs_they_ran():
    generator = generator_of("causal", prefill_chunk=8)
    generator.generate(PROMPTS, GREEDY)
    compiled = start._cache_size(), advance._cache_size()
    generator.generate(soft("causal"), GREEDY)
    after = start._cache_size(), advance._cache_size()
    # At most one program more, which reads embeddings; decoding goes on in the same one.
    assert after[0] <= compiled[0] + 1 and after[1] == compiled[1]
    generator.generate(PROMPTS, GREEDY)
    generator.generate(soft("causal")[::-1], GREEDY)
    assert (start._cache_size(), advance._cache_size()) == after


def _padded(prompts, dtype="float32"):
    model, _ = model_of("causal")
    limits = checking.Limits(128, None, 512, None, dtype)
    return checking.pad(checking.check(prompts, GREEDY, model.config, limits), model.config, limits)


def test_padded_requests():
    assert _padded(PROMPTS).embeds is None
    given = np.arange(3 * WIDTH, dtype=np.float32).reshape(3, WIDTH)
    for dtype in ("float32", "bfloat16", "float16"):
        for kind in (given, given.astype(np.float64), jnp.asarray(given, jnp.bfloat16)):
            padded = _padded([[5, 6], kind], dtype)
            np.testing.assert_array_equal(padded.tokens[1], [EMBEDDED] * 3 + [0] * 13)
            np.testing.assert_array_equal(padded.lengths, [2, 3])
            assert padded.embeds.dtype == jnp.dtype(dtype) and padded.embeds.shape == (2, 16, WIDTH)
            np.testing.assert_array_equal(padded.embeds[1, :3], given.astype(padded.embeds.dtype))
            assert not padded.embeds[0].any() and not padded.embeds[1, 3:].any()
    whole = _padded(np.stack([given, given + 1]))
    np.testing.assert_array_equal(whole.embeds[1, :3], given + 1)


def test_prompts_are_copied():
    given = np.ones((2, WIDTH), np.float32)
    generator = generator_of("causal", prefill_chunk=8)
    stream = generator.stream([given], GREEDY)
    given[:] = np.nan
    tokens = [token for updates in stream for update in updates for token in update.tokens]
    assert tokens == generator.generate([np.ones((2, WIDTH))], GREEDY).row(0)


def _with(value):
    prompt = np.zeros((3, WIDTH))
    prompt[2, 5] = value
    return prompt


BAD = {
    "width": ([[5], np.zeros((3, 31))], r"prompt 1 has embeddings of shape \(3, 31\).*\[T, 32\]"),
    "nan": ([_with(np.nan)], "prompt 0: the embedding at position 2 has nan in column 5"),
    "infinity": ([_with(-np.inf)], "position 2 has -inf in column 5.*must be finite in float32"),
    "too large": ([_with(1e39)], r"has 1e\+39 in column 5"),
    "empty": ([[5], np.zeros((0, WIDTH))], "prompt 1 is empty; give at least one row"),
    "no columns": ([np.zeros((3, 0))], r"shape \(3, 0\)"),
    "one dimension": ([np.zeros(WIDTH)], r"or a float array \[T, 32\].*dtype float64, 1 dim"),
    "three dimensions": ([np.zeros((1, 3, WIDTH))], "3 dimensions"),
    "integers": ([np.zeros((3, WIDTH), int)], "dtype int64, 2 dimensions"),
    "booleans": ([np.zeros((3, WIDTH), bool)], "dtype bool, 2 dimensions"),
    "complex": ([np.zeros((3, WIDTH), complex)], "dtype complex128"),
    "objects": ([np.zeros((3, WIDTH), object)], "dtype object"),
    "lists": ([[[0.5] * WIDTH]], "at position 0 is not a token id"),
    "not in a list": (np.zeros((3, WIDTH)), r"prompt 0 must be .*wrap a single prompt in \[\]"),
    "too many": ([np.zeros((3, WIDTH))] * 5, "5 prompts exceed batch_size=4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_embeddings_are_refused_before_any_work(name):
    prompts, message = BAD[name]
    compiled = start._cache_size(), advance._cache_size()
    with pytest.raises(RequestError, match=message):
        generator_of("causal", prefill_chunk=8).generate(prompts, GREEDY)
    assert (start._cache_size(), advance._cache_size()) == compiled


class IdsOnly(Autoregressive):
    """A decoder that was written before prompts could be embeddings."""

    embeds_dtype = None  # type: ignore[assignment]


def test_decoders_that_read_ids_only():
    model, params = model_of("causal")
    old = Generator(model, params, decoder=IdsOnly(model=model))
    with pytest.raises(RequestError, match="prompt 1 is embeddings, which this decoder does not"):
        old.generate([[5], np.zeros((3, WIDTH))], GREEDY)
    student, _ = model_of("shifted_blocks")
    small = tiny_model(**FAMILIES["shifted_blocks"], hidden_size=16, tokens=student.config.tokens)
    for reference, dtype in ((student, "float32"), (small, None)):
        context = Residual(init_from="reference")
        decoder = Diffusion(model=student, context=context, reference=reference)
        assert decoder.embeds_dtype == dtype
