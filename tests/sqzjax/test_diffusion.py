# SPDX-License-Identifier: Apache-2.0
"""Block-wise diffusion decoding: caches against recomputation, rows against batches, policies."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.decode import Autoregressive, Diffusion, Generator, SamplingConfig
from sqzjax.decode import commit as policies
from sqzjax.decode import context as contexts
from sqzjax.decode import reuse as reuses
from sqzjax.decode.commit import (
    Candidates,
    EntropyBounded,
    Factor,
    Hierarchical,
    LocalLeap,
    Threshold,
    TopCount,
    ranks,
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


def decode(family, prompts, count=10, sampling=None, **options):
    model, params = model_of(family)
    decoder = Diffusion(model=model, block_size=BLOCK, **options)
    sampling = sampling or SamplingConfig(max_new_tokens=count, temperature=0, ignore_eos=True)
    return Generator(model, params, decoder=decoder).generate(prompts, sampling)


def plain(family, prompt, count, order):
    """Decode one prompt by the definition: a whole forward pass per committed position."""
    model, params = model_of(family)
    aligned = model.config.mask == "block_causal"
    end = len(prompt) + count
    total = -(-end // BLOCK) * BLOCK if aligned else end
    ids = np.array(prompt + [MASK] * (total - len(prompt)), np.int32)
    start = len(prompt) // BLOCK * BLOCK if aligned else len(prompt)
    forward = jax.jit(lambda ids: model.forward(params, ids).logits)
    while start < total:
        stop = min(start + BLOCK, total)
        while (ids[start:stop] == MASK).any():
            logits = np.array(forward(ids[None])[0], np.float64)[:, : model.config.vocab_size]
            if model.config.shift_logits:
                logits = np.concatenate([logits[:1], logits[:-1]])
            logits[:, MASK] = -np.inf
            chance = np.exp(logits - logits.max(-1, keepdims=True))
            chance /= chance.sum(-1, keepdims=True)
            sure = np.where(ids[start:stop] == MASK, chance[start:stop].max(-1), -1)
            for place in order(sure):
                ids[start + place] = chance[start + place].argmax()
        start = stop
    return ids[len(prompt) : end].tolist()


def one(sure):
    return [int(sure.argmax())]


def above(level):
    return lambda sure: sorted({int(sure.argmax()), *np.flatnonzero(sure >= level)})


@pytest.mark.parametrize("family", ["block_causal", "bidirectional", "shifted", "shifted_blocks"])
@pytest.mark.parametrize("level", [2.0, 0.15])
def test_decoding_equals_its_definition(family, level):
    out = decode(family, PROMPTS, commit=Threshold(threshold=level))
    for row, prompt in enumerate(PROMPTS):
        order = one if level > 1 else above(level)
        assert out.row(row) == plain(family, prompt, 10, order), row


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("block_causal", TopCount()),
        ("block_causal", TopCount(steps=2)),
        ("block_causal", Threshold(threshold=0.15)),
        ("shifted_blocks", Threshold(threshold=0.15)),
    ],
)
def test_the_exact_cache_changes_no_token(family, policy):
    prompts = np.random.default_rng(0).integers(1, 50, (200, 9))
    prompts = [row[: 1 + i % 9].tolist() for i, row in enumerate(prompts)]
    cached = decode(family, prompts, reuse=Exact(), commit=policy)
    np.testing.assert_array_equal(cached.tokens, decode(family, prompts, commit=policy).tokens)


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
    plainly = decode(family, PROMPTS)
    fresh = decode(family, PROMPTS, reuse=policy)
    np.testing.assert_array_equal(fresh.tokens, plainly.tokens)


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

    def run(reuse):
        decoder = Diffusion(
            model=model, block_size=BLOCK, reuse=reuse, commit=Threshold(threshold=0.2)
        )
        return Generator(model, params, decoder=decoder).generate(PROMPTS, sampling)

    np.testing.assert_array_equal(run(policy).tokens, run(NoReuse()).tokens)


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


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("block_causal", NoReuse()),
        ("block_causal", Exact()),
        ("shifted_blocks", Exact()),
        ("bidirectional", NoReuse()),
        ("bidirectional", Dual(look=1)),
        ("shifted", Delayed(refresh=4)),
        ("bidirectional", Periodic(prompt=6, response=3)),
    ],
)
def test_rows_do_not_depend_on_their_batch(family, policy):
    warm = SamplingConfig(max_new_tokens=9, temperature=0.8, seed=3, ignore_eos=True)
    # Drawing tokens adds programs to compile, so only one exact and one approximate cache do it.
    drawn = isinstance(policy, Exact | Dual) and not family.startswith("shifted")
    for sampling in (None, warm) if drawn else (None,):
        options = {"reuse": policy, "sampling": sampling, "commit": Threshold(threshold=0.2)}
        together = decode(family, PROMPTS, count=9, **options)
        for row, prompt in enumerate(PROMPTS):
            model, params = model_of(family)
            decoder = Diffusion(
                model=model, block_size=BLOCK, reuse=policy, commit=options["commit"]
            )
            config = sampling or SamplingConfig(max_new_tokens=9, temperature=0, ignore_eos=True)
            alone = Generator(model, params, decoder=decoder).generate(
                [prompt], config, row_ids=[row]
            )
            assert alone.row(0) == together.row(row)


def test_threshold_above_one_commits_one_a_step_and_zero_a_block_a_step():
    slow = decode("block_causal", [[5, 9, 2, 4]], count=8, commit=Threshold(threshold=1.1))
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
        decoder = Diffusion(model=model, block_size=BLOCK, eos_last=late)
        out = Generator(model, loud, decoder=decoder).generate([[5, 9, 2]], sampling)
        if EOS in out.row(0):
            assert out.row(0)[-1] == EOS and out.finish_reason == ("stop",)
        assert MASK not in out.row(0)


def test_streaming_yields_finished_blocks():
    model, params = model_of("block_causal")
    decoder = Diffusion(model=model, reuse=Exact(), commit=TopCount(steps=2))
    generator = Generator(model, params, decoder=decoder)
    sampling = SamplingConfig(max_new_tokens=8, temperature=0, ignore_eos=True)
    sizes, tokens = [], []
    for updates in generator.stream([[5, 9, 2, 4]], sampling):
        sizes += [len(update.tokens) for update in updates if update.tokens]
        tokens += [token for update in updates for token in update.tokens]
    assert sizes == [BLOCK, BLOCK]
    assert tokens == generator.generate([[5, 9, 2, 4]], sampling).row(0)


def candidates(confidence, masked, step=0, entropy=None):
    confidence = jnp.asarray(confidence, jnp.float32)
    masked = jnp.asarray(masked, bool)
    entropy = 1 - confidence if entropy is None else jnp.asarray(entropy, jnp.float32)
    rows = len(confidence)
    return Candidates(
        confidence,
        confidence,
        entropy,
        masked,
        jnp.full(rows, step, jnp.int32),
        jnp.sum(masked, 1).astype(jnp.int32),
    )


EVERY = [
    TopCount(),
    TopCount(steps=3),
    Threshold(threshold=0.6),
    Threshold(threshold=0.6, decay=0.1),
    Threshold(threshold=0.9, steps=4),
    Factor(factor=1.0),
    LocalLeap(threshold=0.8, relaxed=0.5, radius=2),
    EntropyBounded(bound=0.5),
    Hierarchical(threshold=0.9, low=0.3),
]
blocks = st.lists(st.tuples(chances, st.booleans()), min_size=8, max_size=8)


@settings(max_examples=60, deadline=None)
@given(block=blocks, policy=st.sampled_from(EVERY), step=st.integers(0, 5))
def test_every_policy_fills_masks_only_and_at_least_one(block, policy, step):
    sure, masked = [x for x, _ in block], [m for _, m in block]
    chosen = np.asarray(policy.commit(candidates([sure], [masked], step)))[0]
    assert not np.any(chosen & ~np.array(masked))
    assert chosen.any() == any(masked)
    assert any(masked) <= bool(chosen[np.argmax(np.where(masked, sure, -1))])


@settings(max_examples=60, deadline=None)
@given(block=blocks)
def test_policies_equal_their_definitions(block):
    sure = np.array([x for x, _ in block], np.float32)
    masked = np.array([m for _, m in block])
    given_block = candidates([sure], [masked])

    def marks(policy):
        return set(np.flatnonzero(np.asarray(policy.commit(given_block))[0]).tolist())

    order = [i for i in np.argsort(-sure, kind="stable") if masked[i]]
    place = np.asarray(ranks(given_block.score, given_block.masked))[0]
    assert [int(place[i]) for i in order] == list(range(len(order)))
    best = set(order[:1])
    assert marks(TopCount(steps=3)) == set(order[: -(-len(order) // 3)])
    assert marks(Threshold(threshold=0.6)) == best | {i for i in order if sure[i] >= 0.6}
    most = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - sure[order[n - 1]]) <= 1]
    assert marks(Factor(factor=1.0)) == best | set(order[: max(most, default=0)])
    anchors = [i for i in order if sure[i] >= 0.8]
    near = {i for i in order if any(abs(i - a) <= 2 for a in anchors)}
    relaxed = {i for i in order if sure[i] >= (0.5 if i in near else 0.8)}
    assert marks(LocalLeap(threshold=0.8, relaxed=0.5, radius=2)) == best | relaxed
    assert marks(LocalLeap(threshold=0.8, relaxed=0.5, radius=0)) == marks(Threshold(threshold=0.8))
    assert marks(Threshold(threshold=0.8)) <= marks(LocalLeap(threshold=0.8, relaxed=0.5))
    runs = np.split(np.arange(8), np.flatnonzero(np.diff(masked)) + 1)
    tops = {int(r[np.argmax(sure[r])]) for r in runs if masked[r[0]]}
    expected = best | {i for i in tops if sure[i] > 0.3} | {i for i in order if sure[i] > 0.9}
    assert marks(Hierarchical(threshold=0.9, low=0.3)) == expected


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
    for family, policy, some in (
        ("block_causal", Exact(), idle),
        ("shifted", Dual(), idle[:1]),
    ):
        plainly = decode(family, PROMPTS, reuse=policy).tokens
        for context in some:
            carried = decode(family, PROMPTS, reuse=policy, context=context)
            np.testing.assert_array_equal(carried.tokens, plainly)


def residual_decode(prompt, count, weight):
    """Residual Context Diffusion by its definition, in float64 outside the model."""
    model, params = model_of("block_causal")
    table = np.asarray(params["embed"]["embedding"], np.float64)
    forward = jax.jit(lambda embeds: model.forward(params, embeds=embeds).logits)
    total = -(-(len(prompt) + count) // BLOCK) * BLOCK
    ids = np.array(prompt + [MASK] * (total - len(prompt)))
    start = len(prompt) // BLOCK * BLOCK
    while start < total:
        alpha, delta = np.zeros(BLOCK), np.zeros((BLOCK, table.shape[1]))
        while (ids[start : start + BLOCK] == MASK).any():
            embeds = table[ids]
            for i in range(BLOCK):
                if ids[start + i] == MASK:
                    embeds[start + i] = (1 - alpha[i]) * table[MASK] + alpha[i] * delta[i]
            logits = np.array(forward(jnp.asarray(embeds[None], jnp.float32))[0], np.float64)
            logits = logits[start : start + BLOCK]
            chance = np.exp(logits - logits.max(-1, keepdims=True))
            chance /= chance.sum(-1, keepdims=True)
            delta = chance @ table
            alpha = weight(chance)
            allowed = np.where(np.arange(len(table)) == MASK, 0, chance)
            sure = np.where(ids[start : start + BLOCK] == MASK, allowed.max(-1), -1)
            place = int(sure.argmax())
            ids[start + place] = allowed[place].argmax()
        start += BLOCK
    return ids[len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("policy", [Exact(), NoReuse()])
def test_residual_decoding_equals_its_definition(policy):
    def entropy(chance):
        return -(chance * np.log(chance)).sum(-1) / np.log(chance.shape[-1])

    out = decode("block_causal", PROMPTS, reuse=policy, context=Residual())
    for row, prompt in enumerate(PROMPTS):
        assert out.row(row) == residual_decode(prompt, 10, entropy), row
    plain_tokens = decode("block_causal", PROMPTS, reuse=policy).tokens
    assert (out.tokens != plain_tokens).any()


@pytest.mark.parametrize("context", [Residual(), Residual(init_from="self"), Credit()])
def test_contexts_do_not_leak_between_rows(context):
    together = decode("block_causal", PROMPTS, reuse=Exact(), context=context)
    for row, prompt in enumerate(PROMPTS):
        alone = decode("block_causal", [prompt], reuse=Exact(), context=context)
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
    table = np.zeros((2, BLOCK, VOCABULARY))
    for _ in range(3):
        logits = rng.normal(size=(2, BLOCK, VOCABULARY)) * 3
        masked = rng.random((2, BLOCK)) < 0.6
        found, state = credit.adjust(jnp.asarray(logits, jnp.float32), jnp.asarray(masked), state)
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
    state = smoothing.update(model, params, given, jnp.asarray(step), None)
    chance = np.exp(logits / 2.0)
    expected = chance / chance.sum(-1, keepdims=True) @ embedding
    weight = np.array([0.15, 0.25, 0.3])[:, None, None]
    mixed = (1 - weight) * embedding[MASK] + weight * expected
    found = smoothing.embed(params["embed"]["embedding"][MASK], state)
    np.testing.assert_allclose(found, mixed, rtol=CHUNKED["float32"], atol=CHUNKED["float32"])
    fresh = smoothing.init(model, params, 3, BLOCK)
    found = smoothing.embed(params["embed"]["embedding"][MASK], fresh)
    np.testing.assert_array_equal(found, jnp.broadcast_to(embedding[MASK], found.shape))


@settings(max_examples=60, deadline=None)
@given(
    token=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    chance=st.lists(chances, min_size=8, max_size=8),
    left=st.integers(1, 20),
    limit=st.integers(1, 40),
)
def test_the_end_of_an_adaptive_block_equals_its_definition(token, chance, left, limit):
    adaptive = AdaptiveBlocks(delimiters=(2, 3), threshold=0.3, share=0.25, most=8)
    state = object.__new__(DiffusionState)  # what else a state holds plays no part
    vars(state).update(total=jnp.array([10 + left]), start=jnp.array([10]))
    vars(state).update(output=SimpleNamespace(limits=jnp.array([limit])))
    given_chance = jnp.asarray([chance], jnp.float32)
    end = adaptive.ends(jnp.asarray([token]), given_chance, state, jnp.array([4]))
    window = min(max(int(0.25 * limit), 1), left, 8)
    sure = [(np.float32(chance[j]), -j) for j in range(window) if token[j] in (2, 3)]
    size = min(4, left)
    if sure and max(sure)[0] >= np.float32(0.3):
        size = 1 - max(sure)[1]
    assert int(end[0]) == 10 + size


def test_adaptive_blocks_end_at_sure_delimiters():
    every = tuple(range(61))
    prompt = [[5, 9, 2]]

    def sizes(**fields):
        adaptive = AdaptiveBlocks(most=8, **fields)
        model, params = model_of("bidirectional")
        decoder = Diffusion(
            model=model, block_size=BLOCK, adaptive=adaptive, commit=Threshold(threshold=0.0)
        )
        sampling = SamplingConfig(max_new_tokens=16, temperature=0, ignore_eos=True)
        streamed = Generator(model, params, decoder=decoder).stream(prompt, sampling)
        return [len(update.tokens) for updates in streamed for update in updates if update.tokens]

    # No delimiter is ever sure enough: blocks of the default size, as without adaptation.
    assert sizes(delimiters=every, threshold=1.1) == [BLOCK] * 4
    # Every token is a delimiter: a block ends at the surest of the first share of the answer.
    found = sizes(delimiters=every, threshold=0.0, share=0.5)
    assert sum(found) == 16 and found != [BLOCK] * 4 and max(found) <= 8
    plain_blocks = decode("bidirectional", prompt, count=16, commit=Threshold(threshold=0.15))
    same = decode(
        "bidirectional",
        prompt,
        count=16,
        commit=Threshold(threshold=0.15),
        adaptive=AdaptiveBlocks(delimiters=every, threshold=1.1, most=8),
    )
    np.testing.assert_array_equal(plain_blocks.tokens, same.tokens)


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


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("TopCount", {"steps": -1}),
        ("Threshold", {"threshold": -0.1}),
        ("Factor", {"factor": -1.0}),
        ("LocalLeap", {"relaxed": 0.95}),
        ("EntropyBounded", {"bound": -1.0}),
        ("Hierarchical", {"low": 1.0}),
    ],
)
def test_policies_refuse_values_out_of_range(policy, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        getattr(policies, policy)(**fields)
