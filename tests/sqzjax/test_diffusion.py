# SPDX-License-Identifier: Apache-2.0
"""Block-wise diffusion decoding: caches against recomputation, rows against batches, policies."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.decode import Autoregressive, Diffusion, Generator, SamplingConfig
from sqzjax.decode import commit as policies
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
from sqzjax.models import SpecialTokens
from tests.contracts.decoders import tiny_model, tiny_params

MASK, EOS, BLOCK = 60, 7, 4
PROMPTS = [[5, 9, 2], [11], [4, 4, 8, 30, 2, 17, 1], [3, 1, 4, 1]]


@cache
def model_of(family):
    fields = {
        "block_causal": {"mask": "block_causal", "block_size": BLOCK, "family": "sdar"},
        "bidirectional": {"mask": "bidirectional", "family": "llada"},
        "shifted": {"mask": "bidirectional", "shift_logits": True, "family": "dream"},
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
    aligned = family == "block_causal"
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


@pytest.mark.parametrize("family", ["block_causal", "bidirectional", "shifted"])
@pytest.mark.parametrize("level", [2.0, 0.15])
def test_decoding_equals_its_definition(family, level):
    out = decode(family, PROMPTS, commit=Threshold(threshold=level))
    for row, prompt in enumerate(PROMPTS):
        order = one if level > 1 else above(level)
        assert out.row(row) == plain(family, prompt, 10, order), row


@pytest.mark.parametrize("policy", [TopCount(), TopCount(steps=2), Threshold(threshold=0.15)])
def test_the_exact_cache_changes_no_token(policy):
    prompts = np.random.default_rng(0).integers(1, 50, (40, 9))
    prompts = [row[: 1 + i % 9].tolist() for i, row in enumerate(prompts)]
    cached = decode("block_causal", prompts, cache_kind="exact", commit=policy)
    np.testing.assert_array_equal(
        cached.tokens, decode("block_causal", prompts, commit=policy).tokens
    )


@pytest.mark.parametrize("family", ["bidirectional", "shifted"])
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cache_refreshed_every_step_changes_no_token(family, kind):
    plainly = decode(family, PROMPTS)
    fresh = decode(family, PROMPTS, cache_kind=kind, refresh=1)
    np.testing.assert_array_equal(fresh.tokens, plainly.tokens)


def test_the_prefix_cache_is_closer_than_the_dual_cache():
    """Neither is exact; recomputing the suffix can only help on average."""
    prompts = np.random.default_rng(1).integers(1, 50, (24, 6)).tolist()
    plainly = decode("bidirectional", prompts, count=16).tokens
    agree = {
        kind: np.mean(decode("bidirectional", prompts, count=16, cache_kind=kind).tokens == plainly)
        for kind in ("prefix", "dual")
    }
    assert agree["prefix"] >= agree["dual"] > 0.3, agree


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("block_causal", "none"),
        ("block_causal", "exact"),
        ("bidirectional", "none"),
        ("bidirectional", "prefix"),
        ("bidirectional", "dual"),
        ("shifted", "dual"),
    ],
)
def test_rows_do_not_depend_on_their_batch(family, kind):
    warm = SamplingConfig(max_new_tokens=9, temperature=0.8, seed=3, ignore_eos=True)
    # Drawing tokens adds programs to compile, so only one exact and one approximate cache do it.
    for sampling in (None, warm) if kind in ("exact", "dual") and family != "shifted" else (None,):
        options = {"cache_kind": kind, "sampling": sampling, "commit": Threshold(threshold=0.2)}
        together = decode(family, PROMPTS, count=9, **options)
        for row, prompt in enumerate(PROMPTS):
            model, params = model_of(family)
            decoder = Diffusion(
                model=model, block_size=BLOCK, cache_kind=kind, commit=options["commit"]
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
    exact = decode(
        "block_causal", [[5, 9, 2, 4]], count=8, commit=TopCount(steps=2), cache_kind="exact"
    )
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
    decoder = Diffusion(model=model, cache_kind="exact", commit=TopCount(steps=2))
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
# XLA flushes subnormal numbers to zero, so they would tie.
chances = st.floats(0, 1, width=32, allow_subnormal=False)
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
        ("bidirectional", {"cache_kind": "exact"}, "needs a block-causal model"),
        ("block_causal", {"cache_kind": "dual"}, "take 'exact'"),
        ("block_causal", {"block_size": 8}, "must be the model's own, 4"),
        ("bidirectional", {"refresh": -1}, "refresh=-1"),
    ],
)
def test_settings_that_cannot_work_are_refused(family, options, match):
    with pytest.raises(ValueError, match=match):
        Diffusion(model=model_of(family)[0], **options)


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
