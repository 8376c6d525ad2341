# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM and ALISA against their definitions; what they share with others: test_evicting."""

import math
from dataclasses import replace

import numpy as np
import pytest

from sqzjax.attention.rope_config import RopeConfig
from sqzjax.kvcache import ALISA, StreamingLLM
from tests.contracts.layer import BATCH, HEADS, KV_HEADS, WIDTH
from tests.sqzjax.evicting_reference import (
    GROUP,
    chunked,
    close,
    layer_of,
    queries_of,
    rotated,
    stepping,
)
from tests.tolerances import INT8_OUTPUT

SMALL_STREAMING = StreamingLLM(budget=12, sinks=3)
SMALL_ALISA = ALISA(budget=12)


def streaming_reference(layer, policy, tokens, count):
    """Output of the last of `count` tokens, all held keys rotated to their slots; `[B, N, H]`."""
    window = policy.budget - policy.sinks
    places = list(range(min(policy.sinks, count)))
    places += range(max(policy.sinks, count - window), count)
    new = layer.new(np.asarray(tokens))
    q = np.asarray(layer.query(np.asarray(tokens)).q_pre, np.float64)
    out = np.zeros((BATCH, HEADS, WIDTH))
    slots = np.arange(len(places)) if policy.positions == "slots" else np.array(places)
    for b, head in np.ndindex(BATCH, HEADS):
        k = rotated(np.asarray(new.k_pre, np.float64)[b, places, head // GROUP], slots)
        turned = rotated(q[b, count - 1, head][None], slots[-1:])[0]
        weights = np.exp(k @ turned / math.sqrt(WIDTH))
        out[b, head] = weights @ np.asarray(new.v)[b, places, head // GROUP] / weights.sum()
    return out


@pytest.mark.parametrize("positions", ["slots", "text"])
@pytest.mark.parametrize("prompt", [1, 5, 40])
def test_streaming_equals_keys_rotated_to_their_slots(positions, prompt):
    assert RopeConfig().theta == 10000.0
    policy = replace(SMALL_STREAMING, positions=positions)
    layer = layer_of(policy)
    step, state = stepping(layer), policy.init(layer.spec, BATCH)
    for tokens in chunked(55, [prompt]):
        part, state, _ = step(state, tokens)
        if len(tokens) == 1 and tokens[0] % 4 == 0:
            expected = streaming_reference(layer, policy, np.arange(64), tokens[0] + 1)
            close(part.out[:, 0], expected)


@pytest.mark.parametrize("positions", ["slots", "text"])
def test_only_text_positions_tell_how_much_was_dropped(positions):
    """Two texts with the same first and newest tokens, 40 and 11 others between them."""
    policy = replace(SMALL_STREAMING, positions=positions)
    layer = layer_of(policy)
    step = stepping(layer)
    outs = []
    for middle in (np.arange(10, 50), np.arange(30, 41)):
        tokens = np.concatenate([np.arange(3), middle, np.arange(53, 62)])
        state = policy.init(layer.spec, BATCH)
        for place, token in enumerate(tokens):
            at = np.full((BATCH, 1), place)
            part, state, _ = step(state, np.full(1, token), at)
        outs.append(np.asarray(part.out))
    if positions == "slots":
        close(outs[0], outs[1])
    else:
        assert np.max(np.abs(outs[0] - outs[1])) > INT8_OUTPUT


def test_streaming_keeps_sinks_and_window_exactly():
    layer = layer_of(SMALL_STREAMING)
    _, state, _ = stepping(layer)(SMALL_STREAMING.init(layer.spec, BATCH), np.arange(40))
    new = layer.new(np.arange(64))
    k = np.moveaxis(np.asarray(new.k), 2, 1)
    np.testing.assert_array_equal(state.first[0], k[:, :, :3])
    window = np.arange(31, 40)
    np.testing.assert_array_equal(
        np.asarray(state.window[0])[:, :, (window - 3) % 16], k[:, :, window]
    )
    np.testing.assert_array_equal(state.dropped, [28] * BATCH)


def alisa_reference(layer, policy, chunks):
    """Yield, chunk by chunk, outputs `[B, T, N, H]` of ALISA by its definition."""
    local = int(policy.local * policy.budget)
    new = layer.new(np.arange(layer.length))
    k, v = (np.asarray(x, np.float64) for x in (new.k, new.v))
    queries, shrink = queries_of(layer), 1 - 1 / local
    sums = np.zeros((BATCH, KV_HEADS, layer.length))
    for tokens in chunks:
        out = np.zeros((BATCH, len(tokens), KV_HEADS, GROUP, WIDTH))
        for b, h in np.ndindex(BATCH, KV_HEADS):
            for place, token in enumerate(tokens):
                seen = np.arange(token + 1)
                if len(tokens) == 1 and len(seen) > policy.budget:
                    old = sorted(seen[:-local], key=lambda t: -sums[b, h, t])
                    seen = np.array(sorted([*old[: policy.budget - local], *seen[-local:]]))
                weights = np.exp(queries[b, h, token] @ k[b, seen, h].T / math.sqrt(WIDTH))
                weights /= weights.sum(-1, keepdims=True)
                out[b, place, h] = weights @ v[b, seen, h]
                sums[b, h] *= shrink
                sums[b, h, seen] += weights.sum(0)
        yield tokens, out.reshape(BATCH, len(tokens), HEADS, WIDTH), sums


@pytest.mark.parametrize("int8", [False, True])
def test_alisa_equals_its_definition(int8):
    """In INT8, tokens of nearly equal sums may trade places: then only most outputs are close."""
    policy = replace(SMALL_ALISA, int8=int8)
    layer = layer_of(policy)
    step, state = stepping(layer), policy.init(layer.spec, BATCH)
    far = []
    for tokens, out, sums in alisa_reference(layer, policy, chunked(56, [20, 5])):
        part, state, _ = step(state, tokens)
        if int8:
            far.append(np.abs(np.asarray(part.out) - out).max(axis=(1, 2, 3)) > INT8_OUTPUT)
        else:
            close(part.out, out)
            close(state.sums[..., :64], sums)
    assert not int8 or np.mean(far) < 0.1
    if int8:
        exact = replace(policy, int8=False)
        assert policy.nbytes(state) < 0.7 * exact.nbytes(exact.init(layer.spec, BATCH))


def test_alisa_forgets_nothing():
    """A token that was not read for long is read again once its sum is among the highest."""
    layer = layer_of(SMALL_ALISA)
    step, state = stepping(layer), SMALL_ALISA.init(layer.spec, BATCH)
    for tokens in chunked(40, [20]):
        _, state, _ = step(state, tokens)
    boosted = replace(state, sums=state.sums.at[:, :, 5].set(100.0))
    plain, _, _ = step(state, np.full(1, 40))
    _, after, _ = step(boosted, np.full(1, 40))
    shrunk = 100.0 * (1 - 1 / 6)
    assert np.all(np.asarray(after.sums[:, :, 5]) > shrunk)
    assert np.all(np.isfinite(plain.out))
