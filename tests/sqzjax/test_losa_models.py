# SPDX-License-Identifier: Apache-2.0
"""LoSA in whole models: tokens, the keys of finished blocks, and what is counted."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import kvcache
from sqzjax.decode import Diffusion, Generator, SamplingConfig, requests
from sqzjax.decode.base import Run
from sqzjax.decode.commit import Threshold, TopCount
from sqzjax.decode.reuse import Exact
from sqzjax.kvcache import Dense, LoSA
from sqzjax.models import Execution, SpecialTokens, stack_layers
from tests.contracts.decoders import tiny_model, tiny_params
from tests.sqzjax.paged import KV_HEADS
from tests.tolerances import CHUNKED

TOLERANCE = CHUNKED["float32"]
MASK, EOS, WIDE = 60, 7, 4
PROMPTS = [[5, 9, 2], [11], [4, 4, 8, 30, 2, 17, 1], [3, 1, 4, 1] * 7]
FULL = LoSA(budget=128, page_size=4, dense_layers=0, active_tokens=WIDE, block_size=WIDE)


@cache
def block_model():
    tokens = SpecialTokens(eos=(EOS,), mask=MASK)
    model = tiny_model(mask="block_causal", block_size=WIDE, family="sdar", tokens=tokens)
    return model, tiny_params(model)


def decode(cache, prompts, commit=TopCount(), count=18, **options):
    model, params = block_model()
    decoder = Diffusion(model=model, reuse=Exact(), cache=cache, commit=commit)
    sampling = SamplingConfig(max_new_tokens=count, temperature=0, ignore_eos=True)
    return Generator(model, params, decoder=decoder).generate(prompts, sampling, **options)


@pytest.mark.parametrize(("commit", "layers"), [(TopCount(), 0), (Threshold(threshold=0.15), 1)])
def test_a_full_budget_changes_no_token(commit, layers):
    exact = decode(Dense(), PROMPTS, commit)
    sparse = decode(replace(FULL, dense_layers=layers), PROMPTS, commit)
    np.testing.assert_array_equal(exact.tokens, sparse.tokens)


@pytest.mark.slow
def test_small_budgets_decode_rows_as_if_alone():
    policy = replace(FULL, budget=8, active_tokens=1)
    together = decode(policy, PROMPTS)
    for row in (1, 3):
        assert decode(policy, [PROMPTS[row]], row_ids=[row]).row(0) == together.row(row)
    # The budget matters here: were it ignored, the tokens would be those of the dense cache.
    assert together.tokens.tolist() != decode(Dense(), PROMPTS).tokens.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_counts_of_all_layers_are_reported(scan):
    model, params = block_model()
    if scan:
        model = model.copy(execution=Execution(scan_layers=True))
        params = stack_layers(params)
    policy = replace(FULL, budget=8, active_tokens=2)
    ids = jnp.asarray(np.random.default_rng(0).integers(1, 50, (2, 40)))
    caches = model.init_caches(policy, batch=2, capacity=64, max_new=64)
    forward = jax.jit(
        lambda caches, ids, at: model.forward(params, ids, positions=at, caches=caches).caches
    )
    prompt = jnp.broadcast_to(jnp.arange(40), (2, 40))
    caches = forward(caches, ids, prompt)
    assert set(kvcache.report(caches).values()) == {0}
    block = jnp.broadcast_to(jnp.arange(40, 44), (2, 4))
    for number in range(3):
        caches = forward(caches, ids[:, number : number + 4], block)
    report = kvcache.report(caches)
    steps = 2 * 2 * KV_HEADS  # layers, rows, kv heads
    assert report["pages_dense"] == steps * 10 and report["pages_held"] == 2 * steps * 10
    # Two pages, the first and the newest, are all that a budget of eight tokens holds.
    assert report["pages_read"] == 2 * steps * 2
    assert kvcache.report(model.init_caches(Dense(), batch=1, capacity=8, max_new=8)) == {}


def _decoded(cache):
    """The state of a whole decoding, as the decoder leaves it."""
    model, params = block_model()
    generator = Generator(model, params, decoder=Diffusion(model=model, reuse=Exact(), cache=cache))
    sampling = SamplingConfig(max_new_tokens=18, temperature=0, ignore_eos=True)
    checked = requests.check(PROMPTS, sampling, generator.config, generator.limits)
    padded = requests.pad(checked, generator.config, generator.limits)
    run = Run(generator.decoder, generator.params, padded)
    run.advance()
    return run.state


def test_a_finished_block_keeps_the_keys_of_a_dense_pass():
    """However few pages its denoising steps have read: the pass that stays begins anew."""
    model, params = block_model()
    state = _decoded(replace(FULL, budget=8, active_tokens=1))
    width = state.canvas.shape[1]
    positions = jnp.broadcast_to(jnp.arange(width), state.canvas.shape)
    finished = np.asarray(positions < state.start[:, None])
    assert (finished.sum(axis=1) > [len(prompt) for prompt in PROMPTS]).all()

    @jax.jit
    def dense(ids):
        caches = model.init_caches(Dense(), batch=len(PROMPTS), capacity=width, max_new=width)
        return model.forward(params, ids, positions=positions, caches=caches).caches

    expected = dense(state.canvas).states
    for layer, (found, whole) in enumerate(zip(state.caches.states, expected)):
        for name in ("k", "v"):
            held, wanted = (
                np.moveaxis(np.asarray(getattr(tokens, name))[:, :, :width], 2, 1)[finished]
                for tokens in (found.tokens, whole)
            )
            np.testing.assert_allclose(
                held, wanted, atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"{layer} {name}"
            )
