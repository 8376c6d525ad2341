# SPDX-License-Identifier: Apache-2.0
"""Caches of chosen tokens against their definitions, their invariants, decoding through a model."""

from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest

from pallas_kernels.common import round_up
from sqzjax import config, kvcache
from sqzjax.attention import Mask
from sqzjax.decode import Autoregressive, Generator, SamplingConfig
from sqzjax.kvcache import ALISA, H2O, Dense, Scissorhands, StreamingLLM, columns
from sqzjax.models import stack_layers
from tests.contracts.decoders import tiny_model, tiny_params
from tests.contracts.layer import BATCH, KV_HEADS, WIDTH, Layer
from tests.sqzjax.evicting_reference import (
    GROUP,
    CountOfUnimportant,
    SumOfProbabilities,
    attending,
    chunked,
    close,
    heads_of,
    kind,
    layer_of,
    queries_of,
    stepping,
)

SLOTS = 12
SMALL_H2O = H2O(budget=SLOTS, recent=0.25)
SMALL_SCISSORHANDS = Scissorhands(budget=SLOTS, recent=2, drop=0.34, history=32)
SMALL_STREAMING = StreamingLLM(budget=SLOTS, sinks=3)
SMALL_ALISA = ALISA(budget=SLOTS)
EVICTING = (SMALL_H2O, SMALL_SCISSORHANDS)
BOUNDED = (*EVICTING, SMALL_STREAMING)
ALL = (*BOUNDED, SMALL_ALISA)


def kept(state, row, head):
    positions = np.asarray(state.positions)[row, head]
    return set(positions[positions >= 0].tolist())


def method_of(policy):
    if policy.kind == "h2o":
        return SumOfProbabilities(policy.newest(SLOTS))
    return CountOfUnimportant(policy.recent, int(policy.drop * SLOTS), policy.history)


@pytest.mark.parametrize("policy", EVICTING, ids=kind)
@pytest.mark.parametrize("sizes", [[40], [5, 20, 1, 1, 1, 5]], ids=str)
def test_evicting_equals_a_simulation_of_every_head(policy, sizes):
    """Prompts below and beyond the budget, in chunks, then tokens one by one, many evictions."""
    layer = layer_of(policy)
    heads, queries = heads_of(layer, method_of(policy), SLOTS), queries_of(layer)
    step, state = stepping(layer), policy.init(layer.spec, BATCH)
    for tokens in chunked(64, sizes):
        part, state, _ = step(state, tokens)
        out = np.asarray(part.out).reshape(BATCH, len(tokens), KV_HEADS, GROUP, WIDTH)
        for b, h in np.ndindex(BATCH, KV_HEADS):
            expected = heads[b][h].step(tokens.tolist(), queries[b, h, tokens])
            close(out[b, :, h], expected)
            assert kept(state, b, h) == set(heads[b][h].held), (b, h, tokens)
    sets = {frozenset(kept(state, b, h)) for b, h in np.ndindex(BATCH, KV_HEADS)}
    assert len(sets) > 1  # every head keeps its own


@pytest.mark.parametrize("policy", EVICTING, ids=kind)
def test_dropped_tokens_never_return_and_the_newest_stay(policy):
    layer = layer_of(policy)
    step, state = stepping(layer), policy.init(layer.spec, BATCH)
    before = None
    for tokens in chunked(64, [40]):
        _, state, _ = step(state, tokens)
        for b, h in np.ndindex(BATCH, KV_HEADS):
            now = kept(state, b, h)
            assert len(now) <= SLOTS
            assert set(range(tokens[-1] + 1 - policy.newest(SLOTS), tokens[-1] + 1)) <= now
            assert before is None or now - before[b, h] <= set(tokens.tolist())
        before = {(b, h): kept(state, b, h) for b, h in np.ndindex(BATCH, KV_HEADS)}


def test_heads_are_independent():
    """Other keys in one kv head change what that head keeps, and nothing else."""
    layer = layer_of(SMALL_H2O)
    other = Layer(layer.case, layer.length)
    other.wk = other.wk.at[:, WIDTH:].set(-other.wk[:, WIDTH:])
    states = []
    for one in (layer, other):
        step, state = stepping(one), SMALL_H2O.init(one.spec, BATCH)
        for tokens in chunked(64, [40]):
            _, state, _ = step(state, tokens)
        states.append(state)
    for row in range(BATCH):
        assert kept(states[0], row, 0) == kept(states[1], row, 0)
        assert kept(states[0], row, 1) != kept(states[1], row, 1)


@pytest.mark.parametrize("policy", ALL, ids=kind)
def test_a_prompt_beyond_the_budget_is_attended_to_exactly(policy):
    layer = layer_of(policy)
    part, _, _ = stepping(layer)(policy.init(layer.spec, BATCH), np.arange(40))
    out, lse = layer.reference(layer.query(np.arange(40)), [40] * BATCH)
    close(part.out, out)
    close(part.lse, lse)


@pytest.mark.parametrize("policy", ALL, ids=kind)
def test_padding_and_idle_rows_change_nothing(policy):
    """A ragged prompt beside longer ones, and rows that pause, equal each row alone."""
    layer = layer_of(policy)
    lengths = np.array([5, 30, 17])
    step, state = stepping(layer), policy.init(layer.spec, BATCH)
    tokens = np.broadcast_to(np.arange(40), (BATCH, 40))
    prompt = np.where(tokens < lengths[:, None], tokens, -1)
    _, state, _ = step(state, tokens, prompt)
    rows = np.eye(BATCH, dtype=bool)[..., None]
    alone = [step(policy.init(layer.spec, BATCH), tokens, np.where(r, prompt, -1))[1] for r in rows]
    for number in range(8):
        going = np.array([True, number % 2 == 0, number % 3 > 0])
        tokens = np.where(going, lengths, 0)[:, None]
        positions = np.where(going[:, None], tokens, -1)
        part, state, _ = step(state, tokens, positions)
        for row in np.flatnonzero(going):
            own, alone[row], _ = step(alone[row], tokens, np.where(rows[row], positions, -1))
            close(np.asarray(part.out)[row], np.asarray(own.out)[row])
        lengths += going


@pytest.mark.parametrize("policy", [*EVICTING, SMALL_ALISA], ids=kind)
def test_probabilities_in_tiles_equal_those_at_once(policy, monkeypatch):
    layer = layer_of(policy)

    def memory(layer):
        step, state = stepping(layer), policy.init(layer.spec, BATCH)
        for tokens in chunked(45, [5, 40]):
            _, state, _ = step(state, tokens)
        return getattr(state, "memory", getattr(state, "sums", None)), state

    whole, state = memory(layer)
    monkeypatch.setattr(columns, "SLOTS", 5)
    monkeypatch.setattr(columns, "QUERIES", 7)
    tiles, again = memory(Layer(layer.case, layer.length))
    jax.tree.map(close, tiles, whole)
    if hasattr(state, "positions"):
        np.testing.assert_array_equal(again.positions, state.positions)


@pytest.mark.parametrize("policy", EVICTING, ids=kind)
def test_a_step_of_many_queries_equals_single_ones(policy):
    """Reading what is held, without writing, judges tokens alike however queries are batched."""
    layer = layer_of(policy)
    attend = attending(layer)
    _, state, _ = stepping(layer)(policy.init(layer.spec, BATCH), np.arange(40))
    tokens = np.arange(40)
    part, many, _ = attend(state, tokens)
    outs = []
    for token in tokens:
        one, state, _ = attend(state, np.full(1, token))
        outs.append(one.out)
    close(part.out, np.concatenate(outs, axis=1))
    jax.tree.map(close, many.memory, state.memory)


def test_queries_of_tokens_that_are_not_held_do_not_count():
    """As when a diffusion model denoises a block and stores nothing."""
    for policy in (*EVICTING, SMALL_ALISA):
        layer = layer_of(policy)
        tokens = np.broadcast_to(np.arange(40), (BATCH, 40))
        prompt = np.where(tokens < 20, tokens, -1)
        _, state, _ = stepping(layer)(policy.init(layer.spec, BATCH), tokens, prompt)
        for tokens in (np.arange(20, 21), np.arange(20, 60)):
            part, after, _ = attending(layer)(state, tokens)
            assert np.any(np.asarray(part.out))
            jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("policy", BOUNDED, ids=kind)
def test_bytes_do_not_depend_on_the_capacity_and_ratios_do(policy):
    def size(policy, capacity):
        spec = layer_of(policy, capacity=capacity).spec
        return policy.nbytes(jax.eval_shape(lambda: policy.init(spec, BATCH)))

    assert size(policy, 64) == size(policy, 4096)
    ratio = replace(policy, budget=0.5)
    assert size(ratio, 64) == size(replace(policy, budget=32), 4096)
    # A ring of the newest is rounded up to 8 slots.
    slots = SLOTS if policy in EVICTING else policy.sinks + round_up(SLOTS - policy.sinks, 8)
    tokens = 2 * BATCH * KV_HEADS * slots * WIDTH * 4
    scores = BATCH * KV_HEADS * SLOTS * 8 if policy in EVICTING else 0
    assert size(policy, 64) == tokens + scores + BATCH * 4 * (2 if scores == 0 else 1)


@pytest.mark.parametrize("policy", BOUNDED, ids=kind)
def test_rollback_is_exact_while_nothing_was_evicted_and_forgets_afterwards(policy):
    layer = layer_of(policy)
    step, attend = stepping(layer), attending(layer)
    _, short, _ = step(policy.init(layer.spec, BATCH), np.arange(5))
    _, longer, _ = step(short, np.arange(5, 10))
    truncate = jax.jit(policy.truncate)
    again = truncate(longer, np.full(BATCH, 5, np.int32))
    token = np.full(1, 5)
    close(attend(again, token).partial.out, attend(short, token).partial.out)
    _, full, _ = step(longer, np.arange(10, 50))
    cut = truncate(full, np.full(BATCH, 30, np.int32))
    np.testing.assert_array_equal(policy.lengths(cut), [30] * BATCH)
    part, after, _ = step(cut, np.full(1, 30))
    assert np.all(np.isfinite(part.out))
    if policy in EVICTING:
        for b, h in np.ndindex(BATCH, KV_HEADS):
            assert kept(after, b, h) <= kept(full, b, h) - set(range(30, 50)) | {30}


@cache
def greedy(policy):
    """Tokens that a small model emits after prompts of 30, 1 and 35 tokens."""
    model = tiny_model(num_layers=1)
    prompts = [[5, 9, 2] * 10, [11], [4, 4, 8, 30, 2, 17, 1] * 5]
    decoder = Autoregressive(model=model, cache=policy, prefill_chunk=64)
    sampling = SamplingConfig(max_new_tokens=16, temperature=0, ignore_eos=True)
    generator = Generator(model, tiny_params(model), decoder=decoder)
    return generator.generate(prompts, sampling).tokens.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ALL, ids=kind)
def test_a_full_budget_changes_no_token_and_a_small_one_does(policy):
    if policy == SMALL_H2O:  # the contract has the others
        assert greedy(replace(policy, budget=1.0)) == greedy(Dense())
    assert greedy(policy) != greedy(Dense())


@pytest.mark.slow
def test_a_stack_of_layers_equals_single_ones():
    policy, model = SMALL_H2O, tiny_model()
    params = tiny_params(model)
    stacked = model.copy(execution=replace(model.execution, scan_layers=True))
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 60)
    logits = []
    for one, weights in ((model, params), (stacked, stack_layers(params))):
        step = jax.jit(partial(one.forward, weights))
        caches = one.init_caches(policy, batch=2, capacity=32, max_new=24)
        for start, end in ((0, 20), (20, 21)):
            at = np.arange(start, end)[None].repeat(2, 0)
            out = step(tokens[:, start:end], positions=at, caches=caches)
            caches = out.caches
        logits.append(out.logits)
    close(logits[0], logits[1])


def test_configurations():
    load = config.load
    assert load(kvcache.CacheConfig, {"kind": "h2o", "budget": 0.1}) == H2O(budget=0.1)
    assert load(kvcache.CacheConfig, {"kind": "scissorhands"}) == Scissorhands()
    assert load(kvcache.CacheConfig, {"kind": "alisa", "int8": True}) == ALISA(int8=True)
    loaded = load(kvcache.CacheConfig, {"kind": "streaming_llm", "budget": 1024})
    assert loaded == StreamingLLM(budget=1024)


@pytest.mark.parametrize(
    "policy, message",
    [
        (Scissorhands(budget=0.01), "of capacity=.* never leave"),
        (StreamingLLM(budget=0.01), "of capacity=.* no window"),
    ],
    ids=str,
)
def test_shares_too_small_for_a_context_are_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        policy.init(layer_of(policy).spec, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: H2O(recent=1.0),
        lambda: Scissorhands(history=33),
        lambda: Scissorhands(drop=0.0),
        lambda: Scissorhands(recent=0),
        lambda: StreamingLLM(sinks=-1),
        lambda: ALISA(local=0.0),
    ],
)
def test_settings_that_cannot_be_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize("policy", ALL, ids=kind)
def test_models_that_cannot_be_served_are_refused(policy):
    layer = layer_of(policy)
    with pytest.raises(ValueError, match="sliding-window"):
        policy.init(replace(layer.spec, window=8), 1)

    def attend():
        query = layer.query(np.arange(4))._replace(mask=Mask(kind="bidirectional"))
        return policy.attend(policy.init(layer.spec, BATCH), query)

    with pytest.raises(ValueError, match="bidirectional"):
        jax.eval_shape(attend)
