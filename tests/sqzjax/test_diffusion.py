# SPDX-License-Identifier: Apache-2.0
"""Block-wise diffusion decoding: caches against recomputation, rows against batches, policies."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.decode import Autoregressive, Diffusion, Generator, SamplingConfig
from sqzjax.decode import reuse as reuses
from sqzjax.decode.adaptive import AdaptiveBlocks
from sqzjax.decode.commit import (
    Threshold,
    TopCount,
)
from sqzjax.decode.context import Residual
from sqzjax.decode.denoiser import DiffusionState
from sqzjax.decode.reuse import Delayed, Dual, Exact, NoReuse, Periodic, Prefix
from sqzjax.models import SpecialTokens
from tests.contracts.decoders import tiny_model, tiny_params
from tests.sqzjax.diffusion_reference import (
    BLOCK,
    EOS,
    MASK,
    PROMPTS,
    above,
    decode,
    model_of,
    one,
    plain,
)


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
        ("shifted", Periodic(prompt=6, response=3, share=0.3), None),
    ],
)
def test_rows_do_not_depend_on_their_batch(family, policy, sampling):
    options = {"reuse": policy, "sampling": sampling, "commit": Threshold(threshold=0.2)}
    options |= {"count": 9, "batch_size": 4}  # one program; other rows are padding
    together = decode(family, PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(family, [prompt], row_ids=[row], **options)
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


# XLA flushes subnormal numbers to zero, so they would tie.
chances = st.floats(0, 1, width=32, allow_subnormal=False)


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
    every, prompt = tuple(range(MASK)), [5, 9, 2]
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
        ("Periodic", {"share": 1.0}),
    ],
)
def test_reuse_refuses_values_out_of_range(policy, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        getattr(reuses, policy)(**fields)


def test_a_causal_model_is_refused():
    with pytest.raises(ValueError, match="needs a model with a mask token"):
        Diffusion(model=tiny_model())
    with pytest.raises(ValueError, match="use a diffusion decoder"):
        Autoregressive(model=model_of("bidirectional")[0])
