# SPDX-License-Identifier: Apache-2.0
"""Quest: pages, their bounds and their choice against definitions; decoding through a model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_decode_attention import xla
from sqzjax.attention import Mask
from sqzjax.decode import Autoregressive, Diffusion, Generator, SamplingConfig
from sqzjax.decode.reuse import Exact
from sqzjax.kvcache import Dense, LoSA, Quest, pages
from sqzjax.models import Execution, SpecialTokens
from tests.contracts.decoders import tiny_model, tiny_params
from tests.sqzjax.paged import (
    GROUP,
    HEADS,
    KV_HEADS,
    WIDTH,
    Row,
    attending,
    block_mask,
    empty,
    new_tokens,
    query_of,
    updated,
)
from tests.tolerances import CHUNKED

CAPACITY = 64
SMALL = Quest(budget=12, page_size=4)
TOLERANCE = CHUNKED["float32"]
SELECT = jax.jit(pages.select, static_argnames=("page_size", "budget"))


def filled(policy, lengths, seed=0, capacity=CAPACITY):
    """A state with random tokens, the rows of the reference, and the random numbers."""
    rng = np.random.default_rng(seed)
    width = capacity  # whatever the lengths, so that one program writes them
    shape = (len(lengths), width, KV_HEADS, WIDTH)
    k, v = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    positions = np.where(np.arange(width) < np.array(lengths)[:, None], np.arange(width), -1)
    state = updated(policy, empty(policy, capacity, len(lengths)), k, v, positions)
    rows = [Row(policy) for _ in lengths]
    for row, *tokens in zip(rows, positions, k, v):
        row.write(*tokens)
    return state, rows, rng


def expected_bounds(row, page_size):
    for first in range(0, len(row.k), page_size):
        keys = row.k[first : first + page_size]
        yield np.stack([keys.max(0), keys.min(0)], 1)


def assert_bounds(state, rows, page_size):
    bounds = np.asarray(state.bounds)
    for b, row in enumerate(rows):
        for page, expected in enumerate(expected_bounds(row, page_size)):
            np.testing.assert_array_equal(bounds[b, :, page], expected)


@pytest.mark.parametrize("policy", [SMALL, LoSA(budget=32), Quest(budget=1024, page_size=16)])
@pytest.mark.parametrize("mask", ["causal", "causal_draft"])
def test_causal_decoding_equals_its_definition(policy, mask):
    """Tokens one by one (or three at once, a draft) over pages chosen anew each time."""
    count = 3 if mask == "causal_draft" else 1
    lengths = np.array([3, 17, 45])
    state, rows, rng = filled(policy, lengths)
    if policy.kind == "losa":  # causal models leave it nothing to reuse
        rows = [replace(row, policy=Quest(budget=32)) for row in rows]

    @jax.jit
    def step(state, k, v, q, positions):
        state = policy.update(state, new_tokens(k, v, positions))
        return policy.attend(state, query_of(q, positions, Mask()))

    for _ in range(6):
        positions = lengths[:, None] + np.arange(count)
        positions[0] = positions[0] if rng.random() < 0.7 else -1
        k, v = (rng.normal(size=(3, count, KV_HEADS, WIDTH)) for _ in range(2))
        q = rng.normal(size=(3, count, HEADS, WIDTH))
        part, state, _ = step(state, k, v, q, positions)
        out = np.asarray(part.out)
        for b, row in enumerate(rows):
            row.write(positions[b], k[b].astype(np.float32), v[b].astype(np.float32))
            expected = row.step(positions[b], q[b])
            np.testing.assert_allclose(out[b], expected, atol=TOLERANCE, rtol=TOLERANCE)
        lengths += np.where(positions[:, 0] >= 0, count, 0)
    assert_bounds(state, rows, policy.page_size)
    for name in ("read", "held"):
        expected = [getattr(row, name) for row in rows]
        np.testing.assert_array_equal(getattr(state.counts, name), expected)


@pytest.mark.parametrize("new", [1, 5, 40])
def test_bounds_equal_a_recomputation(new):
    """After appending, overwriting (which must not leave old extremes behind) and truncating."""
    state, rows, rng = filled(SMALL, [7, 20, 13])
    for number in range(6):
        starts = [int(rng.integers(max(0, len(row.k) - new), len(row.k) + 1)) for row in rows]
        if number == 4:  # the bounds of the page that was cut are loose until it grows again
            starts = [len(row.k) for row in rows]
        positions = np.array(starts)[:, None] + np.arange(new)
        if number != 4:
            positions[number % 3, new // 2 :] = -1
        k, v = (rng.normal(size=(3, new, KV_HEADS, WIDTH)).astype(np.float32) for _ in range(2))
        inside = np.where(positions < CAPACITY, positions, -1)
        state = updated(SMALL, state, k, v, positions)
        for row, *tokens in zip(rows, inside, k, v):
            row.write(*tokens)
        assert_bounds(state, rows, SMALL.page_size)
        if number == 3:
            state = jax.jit(SMALL.truncate)(state, np.array([6, 9, 8], np.int32))
            for row, length in zip(rows, (6, 9, 8)):
                row.k, row.v = row.k[:length], row.v[:length]


def test_bounds_are_above_every_score():
    state, rows, rng = filled(SMALL, [64, 50])
    q = rng.normal(size=(2, 5, HEADS, WIDTH)).astype(np.float32)
    bounds = np.asarray(jax.jit(pages.upper_bounds)(state.bounds, q))
    for b, row in enumerate(rows):
        for t, kv in np.ndindex(5, KV_HEADS):
            scores = row.k[:, kv] @ q[b, t, kv * GROUP : (kv + 1) * GROUP].T
            for page in range(len(row.k) // 4):
                highest = scores[page * 4 : page * 4 + 4].max()
                assert bounds[b, kv, t, page] >= highest - TOLERANCE


def chosen(state, q, budget, prefix):
    asking = jnp.ones(q.shape[:2], bool)
    found = SELECT(state.bounds, q, asking, prefix, page_size=4, budget=budget)
    sets = {}
    for b, kv in np.ndindex(found.count.shape):
        listed = np.asarray(found.pages[b, kv, : found.count[b, kv]])
        assert np.all(np.diff(listed) > 0) and found.count[b, kv] <= found.pages.shape[2]
        sets[b, kv] = set(listed.tolist())
    return sets


@pytest.mark.slow
def test_more_budget_or_queries_never_choose_fewer_pages():
    state, rows, rng = filled(SMALL, [64, 50, 3])
    q = jnp.asarray(rng.normal(size=(3, 6, HEADS, WIDTH)), jnp.float32)
    prefix = jnp.array([60, 47, 0])
    last = None
    for queries, budget in ((1, 8), (2, 8), (2, 12), (6, 12), (6, 64)):
        found = chosen(state, q[:, :queries], budget, prefix)
        for (b, kv), union in found.items():
            exact = rows[b]
            exact.policy = replace(SMALL, budget=budget)
            queries64 = np.asarray(q[b, :queries], np.float64)
            assert union == set(exact.chosen_pages(queries64, int(prefix[b]), kv))
            assert last is None or last[b, kv] <= union
            assert union >= ({0, (int(prefix[b]) - 1) // 4} if prefix[b] else set())
        last = found


def test_padding_queries_choose_nothing():
    state, _, rng = filled(SMALL, [64, 64])
    q = jnp.asarray(rng.normal(size=(2, 3, HEADS, WIDTH)), jnp.float32)
    asking = jnp.array([[True, True, False], [False, False, False]])
    prefix, rule = jnp.array([64, 64]), {"page_size": 4, "budget": 12}
    found = SELECT(state.bounds, q, asking, prefix, **rule)
    without = SELECT(state.bounds, q[:, :2], asking[:, :2], prefix, **rule)
    np.testing.assert_array_equal(found.count, without.count)
    assert np.all(found.count[0] > 0) and not np.any(found.count[1])


def test_many_chosen_pages_are_read_in_several_gathers(monkeypatch):
    """The same pages, all at once and 8 tokens at a time."""
    policy = Quest(budget=32, page_size=4)
    state, _, rng = filled(policy, [60, 30])
    q = rng.normal(size=(2, 8, HEADS, WIDTH))
    positions = np.array([[56], [24]]) + np.arange(8)
    whole = attending(policy, block_mask(8))(state, q, positions).partial
    monkeypatch.setattr(xla, "CHUNK", 8)
    attending.cache_clear()
    parts = attending(policy, block_mask(8))(state, q, positions).partial
    attending.cache_clear()
    np.testing.assert_allclose(parts.out, whole.out, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(parts.lse, whole.lse, atol=TOLERANCE, rtol=TOLERANCE)


def greedy(model, cache, prompts):
    params = tiny_params(model)
    if model.config.mask == "block_causal":
        decoder = Diffusion(model=model, cache=cache, reuse=Exact())
    else:
        decoder = Autoregressive(model=model, cache=cache, prefill_chunk=32)
    sampling = SamplingConfig(max_new_tokens=16, temperature=0, ignore_eos=True)
    return Generator(model, params, decoder=decoder).generate(prompts, sampling).tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "block_causal"])
def test_a_full_budget_changes_no_token_and_a_small_one_does(kind):
    fields = {}
    if kind == "block_causal":
        fields = {"mask": kind, "block_size": 4, "tokens": SpecialTokens(eos=(7,), mask=60)}
    model = tiny_model(**fields)
    prompts = [[5, 9, 2] * 10, [11], [4, 4, 8, 30, 2, 17, 1] * 5]
    exact = greedy(model, Dense(), prompts)
    policy = Quest(budget=128, page_size=4, dense_layers=0)
    np.testing.assert_array_equal(greedy(model, policy, prompts), exact)
    assert greedy(model, replace(policy, budget=8), prompts).tolist() != exact.tolist()


def test_first_layers_stay_dense():
    model = tiny_model(num_layers=4)
    caches = model.init_caches(Quest(), batch=1, capacity=32, max_new=32)
    assert caches.policies == (Dense(), Dense(), Quest(), Quest())
    stacked = tiny_model(num_layers=4).copy(execution=Execution(scan_layers=True))
    with pytest.raises(ValueError, match="scan_layers=False"):
        stacked.init_caches(Quest(), batch=1, capacity=32, max_new=32)
    caches = stacked.init_caches(Quest(dense_layers=0), batch=1, capacity=32, max_new=32)
    assert caches.stacked and caches.length.tolist() == [0]
