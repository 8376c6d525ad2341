# SPDX-License-Identifier: Apache-2.0
"""Block-wise diffusion decoding: caches against recomputation, rows against batches, policies."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.decode import Autoregressive, Diffusion, Generator, SamplingConfig
from sqzjax.decode import context as contexts
from sqzjax.decode import reuse as reuses
from sqzjax.decode.commit import (
    Threshold,
    TopCount,
)
from sqzjax.decode.context import Credit, Residual, Smoothing
from sqzjax.decode.denoiser import DiffusionState
from sqzjax.decode.diffusion import AdaptiveBlocks
from sqzjax.decode.reuse import Delayed, Dual, Exact, NoReuse, Periodic, Prefix
from sqzjax.models import SpecialTokens
from sqzjax.residual_config import ResidualSettings
from tests.contracts.decoders import VOCABULARY, tiny_model, tiny_params
from tests.tolerances import CHUNKED

MASK, EOS, BLOCK = 60, 7, 4
# XLA flushes subnormal numbers to zero, so they would tie.
chances = st.floats(0, 1, width=32, allow_subnormal=False)
PROMPTS = [[5, 9, 2], [11], [4, 4, 8, 30, 2, 17, 1], [3, 1, 4, 1]]


@cache
def model_of(family):
    fields = {
        "block_causal": {"mask": "block_causal", "block_size": BLOCK, "family": "sdar"},
        "bidirectional": {"mask": "bidirectional", "family": "llada"},
        "shifted": {"mask": "bidirectional", "shift_logits": True, "family": "dream"},
        "shifted_blocks": {"mask": "block_causal", "block_size": BLOCK, "shift_logits": True},
    }[family]
    model = tiny_model(**fields, tokens=SpecialTokens(eos=(EOS,), mask=MASK))
    return model, tiny_params(model)


def decode(family, prompts, count=10, sampling=None, row_ids=None, **options):
    model, params = model_of(family)
    decoder = Diffusion(model=model, block_size=BLOCK, **options)
    sampling = sampling or SamplingConfig(max_new_tokens=count, temperature=0, ignore_eos=True)
    return Generator(model, params, decoder=decoder).generate(prompts, sampling, row_ids=row_ids)


@cache
def forward_of(model):
    return jax.jit(
        lambda params, ids, positions: model.forward(params, ids, positions=positions).logits
    )


def plain(model, params, prompts, count, order):
    """Decode by the definition: a whole forward pass per committed position, without a cache.

    Rows are alone: they share passes, of which each sees its own positions.
    """
    aligned = model.config.mask == "block_causal"
    lengths = np.array([len(prompt) for prompt in prompts])
    ends = lengths + count
    totals = -(-ends // BLOCK) * BLOCK if aligned else ends
    ids = np.full((len(prompts), totals.max()), MASK, np.int32)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    positions = np.arange(ids.shape[1], dtype=np.int32)
    positions = np.where(positions < totals[:, None], positions, -1)
    starts = lengths // BLOCK * BLOCK if aligned else lengths.copy()
    while (starts < totals).any():
        chances = _chances(forward_of(model)(params, ids, positions), model.config)
        for row, chance in enumerate(chances):
            start, stop = starts[row], min(starts[row] + BLOCK, totals[row])
            sure = np.where(ids[row, start:stop] == MASK, chance[start:stop].max(-1), -1)
            for place in order(sure) if len(sure) else ():
                ids[row, start + place] = chance[start + place].argmax()
            starts[row] = start if (ids[row, start:stop] == MASK).any() else stop
    return [row[n:end].tolist() for row, n, end in zip(ids, lengths, ends)]


def _chances(logits, config):
    """Return the distribution at each position over the ids that may be put there, in float64."""
    logits = np.array(logits, np.float64)[..., : config.vocab_size]
    if config.shift_logits:
        logits = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
    logits[..., MASK] = -np.inf
    chance = np.exp(logits - logits.max(-1, keepdims=True))
    return chance / chance.sum(-1, keepdims=True)


def one(sure):
    return [int(sure.argmax())]


def above(level):
    return lambda sure: sorted({int(sure.argmax()), *np.flatnonzero(sure >= level)})


@pytest.mark.parametrize("family", ["block_causal", "bidirectional", "shifted", "shifted_blocks"])
@pytest.mark.parametrize("level", [2.0, 0.15])
def test_decoding_equals_its_definition(family, level):
    out = decode(family, PROMPTS, commit=Threshold(threshold=level))
    expected = plain(*model_of(family), PROMPTS, 10, one if level > 1 else above(level))
    np.testing.assert_array_equal(out.tokens, expected)


@pytest.mark.parametrize(
    ("family", "policy", "order"),
    [
        ("block_causal", TopCount(), one),
        ("block_causal", Threshold(threshold=0.15), above(0.15)),
        ("shifted_blocks", Threshold(threshold=0.15), above(0.15)),
    ],
)
def test_the_exact_cache_changes_no_token(family, policy, order):
    prompts = np.random.default_rng(0).integers(1, 50, (200, 9))
    prompts = [row[: 1 + i % 9].tolist() for i, row in enumerate(prompts)]
    cached = decode(family, prompts, reuse=Exact(), commit=policy)
    np.testing.assert_array_equal(cached.tokens, plain(*model_of(family), prompts, 10, order))


@pytest.mark.parametrize("family", ["bidirectional", "shifted"])
@pytest.mark.parametrize(
    "policy",
    [
        Prefix(refresh=1),
        Dual(look=64),
        Delayed(refresh=1),
        Periodic(prompt=1, response=8),
    ],
)
def test_recomputing_everything_changes_no_token(family, policy):
    fresh = decode(family, PROMPTS, reuse=policy)
    np.testing.assert_array_equal(fresh.tokens, plain(*model_of(family), PROMPTS, 10, one))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        Prefix(),
        Dual(),
        Dual(look=1, warmup=2),
        Delayed(refresh=0),
        Delayed(refresh=3),
        Periodic(prompt=50, response=1),
    ],
)
def test_with_one_layer_every_reuse_is_exact(policy, shift):
    """There a key depends on its own token alone, so what is frozen has not changed."""
    family = "dream" if shift else "llada"
    fields = {"mask": "bidirectional", "shift_logits": shift, "family": family, "num_layers": 1}
    model = tiny_model(**fields, tokens=SpecialTokens(eos=(EOS,), mask=MASK))
    params = tiny_params(model)
    sampling = SamplingConfig(max_new_tokens=14, temperature=0, ignore_eos=True)

    decoder = Diffusion(
        model=model, block_size=BLOCK, reuse=policy, commit=Threshold(threshold=0.2)
    )
    out = Generator(model, params, decoder=decoder).generate(PROMPTS, sampling)
    np.testing.assert_array_equal(out.tokens, plain(model, params, PROMPTS, 14, above(0.2)))


@pytest.mark.slow
def test_the_prefix_cache_is_closer_than_the_dual_cache():
    """Neither is exact; recomputing the suffix can only help on average."""
    prompts = np.random.default_rng(1).integers(1, 50, (24, 6)).tolist()
    plainly = decode("bidirectional", prompts, count=16).tokens
    agree = {
        policy.kind: np.mean(
            decode("bidirectional", prompts, count=16, reuse=policy).tokens == plainly
        )
        for policy in (Prefix(), Dual())
    }
    assert agree["prefix"] >= agree["dual"] > 0.3, agree


WARM = SamplingConfig(max_new_tokens=9, temperature=0.8, seed=3, ignore_eos=True)


@pytest.mark.parametrize(
    ("family", "policy", "sampling"),
    [
        # Greedy tokens of exact policies are compared with those of each row by itself above.
        ("block_causal", Exact(), WARM),
        ("bidirectional", NoReuse(), WARM),
        ("bidirectional", Dual(look=1), None),
        ("bidirectional", Dual(look=1), WARM),
        ("shifted", Delayed(refresh=4), None),
        ("bidirectional", Periodic(prompt=6, response=3), None),
    ],
)
def test_rows_do_not_depend_on_their_batch(family, policy, sampling):
    options = {"reuse": policy, "sampling": sampling, "commit": Threshold(threshold=0.2)}
    together = decode(family, PROMPTS, count=9, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(family, [prompt], count=9, row_ids=[row], **options)
        assert alone.row(0) == together.row(row)


def test_threshold_above_one_commits_one_a_step_and_zero_a_block_a_step():
    slow = decode("block_causal", [[5, 9, 2, 4]] * 4, count=8, commit=Threshold(threshold=2.0))
    fast = decode("block_causal", [[5, 9, 2, 4]], count=8, commit=Threshold(threshold=0.0))
    assert (slow.stats.steps, fast.stats.steps) == (8, 2)
    exact = decode("block_causal", [[5, 9, 2, 4]], count=8, commit=TopCount(steps=2), reuse=Exact())
    # Two denoising passes per block, the pass that writes the first one's keys, and the prefill.
    assert exact.stats.steps == 5
    assert exact.stats.extra["forwards"] == 6


def test_a_stop_id_ends_the_row_and_eos_last_puts_it_off():
    model, params = model_of("bidirectional")
    # A head that always prefers the stop id.
    params = jax.tree.map(lambda x: x, params)
    embedding = params["embed"]["embedding"]
    loud = {**params, "embed": {"embedding": embedding.at[EOS].set(3 * embedding.mean(0))}}
    sampling = SamplingConfig(max_new_tokens=8, temperature=0)
    for late in (False, True):
        decoder = Diffusion(
            model=model, block_size=BLOCK, commit=Threshold(threshold=0.15), eos_last=late
        )
        out = Generator(model, loud, decoder=decoder).generate(PROMPTS, sampling)
        for row, reason in enumerate(out.finish_reason):
            if EOS in out.row(row):
                assert out.row(row)[-1] == EOS and reason == "stop"
            assert MASK not in out.row(row)


def test_streaming_yields_finished_blocks():
    model, params = model_of("block_causal")
    decoder = Diffusion(model=model, block_size=BLOCK, reuse=Exact(), commit=TopCount(steps=2))
    generator = Generator(model, params, decoder=decoder)
    sampling = SamplingConfig(max_new_tokens=8, temperature=0, ignore_eos=True)
    sizes, tokens = [], []
    for updates in generator.stream([[5, 9, 2, 4]], sampling):
        sizes += [len(update.tokens) for update in updates if update.tokens]
        tokens += [token for update in updates for token in update.tokens]
    assert sizes == [BLOCK, BLOCK]
    assert tokens == generator.generate([[5, 9, 2, 4]], sampling).row(0)


@pytest.mark.parametrize(
    ("family", "options", "match"),
    [
        ("bidirectional", {"reuse": Exact()}, "needs a block-causal model"),
        ("block_causal", {"reuse": Dual()}, "take 'exact'"),
        ("block_causal", {"block_size": 8}, "must be the model's own, 4"),
        ("bidirectional", {"block_size": -1}, "block_size=-1"),
        ("block_causal", {"adaptive": AdaptiveBlocks(delimiters=(3,))}, "of their own size"),
        ("bidirectional", {"adaptive": AdaptiveBlocks(delimiters=(3,), most=8)}, "most=8"),
        ("bidirectional", {"context": Residual(init_from="reference")}, "needs one"),
    ],
)
def test_settings_that_cannot_work_are_refused(family, options, match):
    with pytest.raises(ValueError, match=match):
        Diffusion(model=model_of(family)[0], **options)


def test_a_context_without_weight_is_plain_decoding():
    """Zero weight: the mask's own embedding goes in, so every token is the same."""
    still = ResidualSettings(alpha_rule="fixed", alpha_scale=0.0)
    idle = (Residual(settings=still), Credit(strength=0.0), Smoothing(first=0.0, growth=0.0))
    exact = plain(*model_of("block_causal"), PROMPTS, 10, one)
    shifted = plain(*model_of("shifted"), PROMPTS, 10, one)
    for family, policy, plainly, some in (
        ("block_causal", Exact(), exact, idle),
        ("shifted", Dual(look=64), shifted, idle[:1]),
    ):
        for context in some:
            carried = decode(family, PROMPTS, reuse=policy, context=context)
            np.testing.assert_array_equal(carried.tokens, plainly)


@cache
def embedded_forward_of(model):
    return jax.jit(
        lambda params, embeds, positions: (
            model.forward(params, embeds=embeds, positions=positions).logits
        )
    )


def residual_decode(prompt, count, warmup):
    """Residual Context Diffusion by its definition, in float64 outside the model.

    `warmup`: a pass of its own, which fills nothing, opens a block.
    """
    model, params = model_of("block_causal")
    table = np.asarray(params["embed"]["embedding"], np.float64)
    total = -(-(len(prompt) + count) // BLOCK) * BLOCK
    ids = np.full(-(-max(len(p) + count for p in PROMPTS) // BLOCK) * BLOCK, MASK)
    ids[: len(prompt)] = prompt
    positions = np.where(np.arange(len(ids)) < total, np.arange(len(ids)), -1)[None]
    start = len(prompt) // BLOCK * BLOCK
    while start < total:
        here = slice(start, start + BLOCK)
        alpha, delta = np.zeros(BLOCK), np.zeros((BLOCK, table.shape[1]))
        opening = warmup
        while (ids[here] == MASK).any():
            embeds = table[ids]
            mixed = (1 - alpha[:, None]) * table[MASK] + alpha[:, None] * delta
            embeds[here] = np.where(ids[here, None] == MASK, mixed, embeds[here])
            given = embeds[None].astype(np.float32), positions.astype(np.int32)
            logits = np.array(embedded_forward_of(model)(params, *given)[0], np.float64)[here]
            chance = np.exp(logits - logits.max(-1, keepdims=True))
            chance /= chance.sum(-1, keepdims=True)
            delta = chance @ table
            alpha = -(chance * np.log(chance)).sum(-1) / np.log(chance.shape[-1])
            if not opening:
                allowed = np.where(np.arange(len(table)) == MASK, 0, chance)
                allowed /= allowed.sum(-1, keepdims=True)
                sure = np.where(ids[here] == MASK, allowed.max(-1), -1)
                place = int(sure.argmax())
                ids[start + place] = allowed[place].argmax()
            opening = False
        start += BLOCK
    return ids[len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize(
    ("policy", "context"),
    [
        (Exact(), Residual()),
        (NoReuse(), Residual()),
        (Exact(), Residual(init_from="self")),
    ],
)
def test_residual_decoding_equals_its_definition(policy, context):
    """Of each row by itself, so nothing leaks from one to another."""
    out = decode("block_causal", PROMPTS, reuse=policy, context=context)
    for row, prompt in enumerate(PROMPTS):
        assert out.row(row) == residual_decode(prompt, 10, context.init_from == "self"), row
    assert (out.tokens != plain(*model_of("block_causal"), PROMPTS, 10, one)).any()


@pytest.mark.slow
def test_credit_does_not_leak_between_rows():
    together = decode("block_causal", PROMPTS, reuse=Exact(), context=Credit())
    for row, prompt in enumerate(PROMPTS):
        alone = decode("block_causal", [prompt], reuse=Exact(), context=Credit())
        assert alone.row(0) == together.row(row)


@pytest.mark.slow
def test_a_pass_of_its_own_costs_one_step_per_block():
    count = {"zero": 8, "self": 10, "dirichlet": 8}
    for init_from, steps in count.items():
        context = Residual(init_from=init_from)
        out = decode("block_causal", [[5, 9, 2, 4]], count=8, context=context)
        assert out.stats.steps == steps, init_from


def test_a_reference_model_opens_each_block():
    """The model as its own reference: the first step sees what an extra pass would show."""
    model, params = model_of("block_causal")
    context = Residual(init_from="reference")
    decoder = Diffusion(model=model, context=context, reference=model, reuse=Exact())
    both = {"model": params, "reference": params}
    sampling = SamplingConfig(max_new_tokens=10, temperature=0, ignore_eos=True)
    out = Generator(model, both, decoder=decoder).generate(PROMPTS, sampling)
    own = decode("block_causal", PROMPTS, reuse=Exact(), context=Residual(init_from="self"))
    np.testing.assert_array_equal(out.tokens, own.tokens)


def test_credit_equals_its_definition():
    rng = np.random.default_rng(0)
    model, params = model_of("block_causal")
    credit = Credit(strength=0.7, fading=0.8, sharpness=0.2)
    state = credit.init(model, params, 2, BLOCK)
    adjust = jax.jit(credit.adjust)
    table = np.zeros((2, BLOCK, VOCABULARY))
    for _ in range(3):
        logits = rng.normal(size=(2, BLOCK, VOCABULARY)) * 3
        masked = rng.random((2, BLOCK)) < 0.6
        found, state = adjust(jnp.asarray(logits, jnp.float32), jnp.asarray(masked), state)
        chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        table *= 0.8
        for row, place in np.argwhere(masked):
            best = logits[row, place].argmax()
            table[row, place, best] += chance[row, place, best] ** 0.2
        np.testing.assert_allclose(
            found, logits + 0.7 * np.log1p(table), rtol=CHUNKED["float32"], atol=CHUNKED["float32"]
        )


def test_smoothing_equals_its_definition():
    model, params = model_of("block_causal")
    smoothing = Smoothing(first=0.15, growth=0.1, most=0.3, temperature=2.0)
    embedding = np.asarray(params["embed"]["embedding"], np.float64)
    logits = np.random.default_rng(0).normal(size=(3, BLOCK, VOCABULARY)) * 3
    step = np.array([0, 1, 5])
    given = jnp.asarray(logits, jnp.float32)
    update = jax.jit(smoothing.update, static_argnums=0)
    state = update(model, params, given, jnp.asarray(step), None)
    chance = np.exp(logits / 2.0)
    expected = chance / chance.sum(-1, keepdims=True) @ embedding
    weight = np.array([0.15, 0.25, 0.3])[:, None, None]
    mixed = (1 - weight) * embedding[MASK] + weight * expected
    found = smoothing.embed(params["embed"]["embedding"][MASK], state)
    np.testing.assert_allclose(found, mixed, rtol=CHUNKED["float32"], atol=CHUNKED["float32"])
    fresh = smoothing.init(model, params, 3, BLOCK)
    found = smoothing.embed(params["embed"]["embedding"][MASK], fresh)
    np.testing.assert_array_equal(found, jnp.broadcast_to(embedding[MASK], found.shape))


@partial(jax.jit, static_argnums=0)
def end_of_block(adaptive, chance, token, total, start, limit):
    state = object.__new__(DiffusionState)  # what else a state holds plays no part
    vars(state).update(total=total, start=start, output=SimpleNamespace(limits=limit))
    return adaptive.ends(token, chance, state, jnp.array([4]))


@settings(max_examples=60, deadline=None)
@given(
    token=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    chance=st.lists(chances, min_size=8, max_size=8),
    left=st.integers(1, 20),
    limit=st.integers(1, 40),
)
def test_the_end_of_an_adaptive_block_equals_its_definition(token, chance, left, limit):
    adaptive = AdaptiveBlocks(delimiters=(2, 3), threshold=0.3, share=0.25, most=8)
    given = (np.array(x) for x in ([token], [10 + left], [10], [limit]))
    end = end_of_block(adaptive, np.array([chance], np.float32), *given)
    window = min(max(int(0.25 * limit), 1), left, 8)
    sure = [(np.float32(chance[j]), -j) for j in range(window) if token[j] in (2, 3)]
    size = min(4, left)
    if sure and max(sure)[0] >= np.float32(0.3):
        size = 1 - max(sure)[1]
    assert int(end[0]) == 10 + size


def test_adaptive_blocks_end_at_sure_delimiters():
    every, prompt = tuple(range(61)), [5, 9, 2]
    model, params = model_of("bidirectional")
    commit = Threshold(threshold=0.15)
    sampling = SamplingConfig(max_new_tokens=16, temperature=0, ignore_eos=True)

    def blocks_of(**fields):
        adaptive = AdaptiveBlocks(delimiters=every, most=8, **fields)
        decoder = Diffusion(model=model, block_size=BLOCK, adaptive=adaptive, commit=commit)
        streamed = Generator(model, params, decoder=decoder).stream([prompt], sampling)
        return [update.tokens for updates in streamed for update in updates if update.tokens]

    # No delimiter is ever sure enough: blocks of the default size, as without adaptation.
    same = blocks_of(threshold=1.1)
    assert [len(block) for block in same] == [BLOCK] * 4
    whole = np.concatenate(same).tolist()
    assert [whole] == plain(model, params, [prompt], 16, above(0.15))
    # Every token is a delimiter: a block ends at the surest of the first share of the answer.
    found = [len(block) for block in blocks_of(threshold=0.0, share=0.5)]
    assert sum(found) == 16 and found != [BLOCK] * 4 and max(found) <= 8


@pytest.mark.slow
def test_delayed_reuse_never_reads_a_key_of_the_step_before():
    """With the delay a token's keys are computed once after it is filled; full passes agree."""
    prompts = np.random.default_rng(2).integers(1, 50, (16, 6)).tolist()
    plainly = decode("bidirectional", prompts, count=16).tokens
    agree = {
        refresh: np.mean(
            decode("bidirectional", prompts, count=16, reuse=Delayed(refresh=refresh)).tokens
            == plainly
        )
        for refresh in (1, 2, 0)
    }
    assert agree[1] == 1.0 and agree[1] >= agree[2] >= agree[0] > 0.3, agree


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("Prefix", {"refresh": -1}),
        ("Dual", {"look": -1}),
        ("Dual", {"warmup": 0}),
        ("Periodic", {"prompt": 0}),
    ],
)
def test_reuse_refuses_values_out_of_range(policy, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        getattr(reuses, policy)(**fields)


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("Smoothing", {"most": 1.5}),
        ("Smoothing", {"temperature": 0.0}),
        ("Credit", {"fading": 1.0}),
        ("Credit", {"strength": -1.0}),
    ],
)
def test_contexts_refuse_values_out_of_range(policy, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        getattr(contexts, policy)(**fields)


def test_a_causal_model_is_refused():
    with pytest.raises(ValueError, match="needs a model with a mask token"):
        Diffusion(model=tiny_model())
    with pytest.raises(ValueError, match="use a diffusion decoder"):
        Autoregressive(model=model_of("bidirectional")[0])
