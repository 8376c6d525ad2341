# SPDX-License-Identifier: Apache-2.0
"""What every cache of codes keeps to while it is lossy: which tokens are coded, when, and how."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.kvcache import KIVI, Quantized
from sqzjax.models import fit_cache
from sqzjax.quant import Float8, NormalFloat, Uniform
from tests.contracts.caches import CacheCase, parameters
from tests.contracts.decoders import tiny_model, tiny_params
from tests.contracts.layer import BATCH, HEADS, KV_HEADS, WIDTH, Layer, layer_of
from tests.tolerances import CHUNKED

CHANNEL = Uniform(bits=4, axis="channel", group_size=4)
TOKEN = Uniform(bits=3, axis="token")
TABLE = NormalFloat(bits=3, axis="channel", group_size=4)
CASES = (
    CacheCase("kivi", KIVI(bits=2, group_size=4, residual_length=8)),
    CacheCase("pre_rope", KIVI(bits=4, group_size=8, residual_length=3, rope="pre"), slow=True),
    CacheCase("at_once", Quantized(key=TOKEN, value=TOKEN)),
    CacheCase("sinks", Quantized(key=CHANNEL, value=TOKEN, residual_length=5, sinks=3)),
    CacheCase("sinks_at_once", Quantized(key=TOKEN, value=TOKEN, sinks=2, rope="pre")),
    CacheCase("static", Quantized(key=TABLE, value=Float8(), residual_length=5, sinks=3)),
    CacheCase("window", Quantized(key=CHANNEL, value=TOKEN, residual_length=2), window=9),
    CacheCase("window_pre", Quantized(key=TOKEN, value=TOKEN, rope="pre"), window=9, slow=True),
)
pytestmark = pytest.mark.parametrize("case", parameters(CASES))
LENGTH = 40


def _group(policy) -> int:
    return math.lcm(*(quantizer.token_group for quantizer in policy.quantizers))


def _coded(policy, length: int) -> int:
    """How many tokens of a sequence of this length are coded: whole groups beyond the residual."""
    return max(length - policy.residual_length, 0) // _group(policy) * _group(policy)


@partial(jax.jit, static_argnums=0)
def _restored(quantizer, x):
    return quantizer.decode(quantizer.encode(x))


def _held(layer: Layer, length: int):
    """Keys (rotated) and values of the first tokens as the cache should see them, float64."""
    policy, coded = layer.case.policy, _coded(layer.case.policy, length)
    new = layer.new(np.arange(layer.length))
    key, value = policy.quantizers
    k = new.k_pre if policy.rope == "pre" else new.k
    k, v = (jnp.moveaxis(a, 1, 2)[:, :, :length] for a in (k, new.v))
    exact = [np.asarray(a, np.float64) for a in (jnp.moveaxis(new.k, 1, 2)[:, :, :length], v)]
    if not coded:
        return exact
    k, v = (_restored(q, a[:, :, :coded]) for q, a in ((key, k), (value, v)))
    if policy.rope == "pre":
        k = jnp.moveaxis(
            layer.rotate(jnp.moveaxis(k, 2, 1), jnp.tile(jnp.arange(coded), (BATCH, 1))), 1, 2
        )
    for whole, part in zip(exact, (k, v)):
        whole[:, :, policy.sinks : coded] = np.asarray(part)[:, :, policy.sinks :]
    return exact


def _attention(layer: Layer, query, length: int, k, v):
    """Float64 attention of each query to the first `length` tokens, by definition."""
    q, positions = np.asarray(query.q, np.float64), np.asarray(query.positions)
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = np.arange(length) <= positions[b, t]
        if layer.case.window:
            seen &= positions[b, t] - np.arange(length) < layer.case.window
        if not seen.any():  # a query of another row, asked beyond this row's length
            continue
        head = n // (HEADS // KV_HEADS)
        scores = k[b, head, seen] @ q[b, t, n] / math.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, head, seen] / weights.sum()
    return out


@pytest.mark.parametrize("length", [3, 21, 40])
def test_attends_to_the_codes_the_window_and_the_sinks(case, length):
    layer = layer_of(case, LENGTH)
    state = layer.fill(case.policy.init(layer.spec, BATCH), length, chunk=5)
    np.testing.assert_array_equal(state.coded, [_coded(case.policy, length)] * BATCH)
    query = layer.query(np.arange(length - 2, length))
    found = layer.attend(state, query).partial.out
    expected = _attention(layer, query, length, *_held(layer, length))
    np.testing.assert_allclose(found, expected, atol=CHUNKED["float32"], rtol=CHUNKED["float32"])


@pytest.mark.parametrize("chunk", [1, 5])
def test_codes_do_not_depend_on_how_tokens_came(case, chunk):
    layer = layer_of(case, LENGTH)
    empty = case.policy.init(layer.spec, BATCH)
    pieces, whole = layer.fill(empty, 37, chunk=chunk), layer.fill(empty, 37, chunk=16)
    jax.tree.map(np.testing.assert_array_equal, pieces.body, whole.body)
    np.testing.assert_array_equal(pieces.coded, whole.coded)


def test_rollback_within_the_residual_is_exact_after_a_flush(case):
    layer = layer_of(case, LENGTH)
    empty = case.policy.init(layer.spec, BATCH)
    # Formats without groups forget and code anew; the others still hold what they coded.
    back = 30 if _group(case.policy) > 1 else 12
    end = min(back + max(case.policy.residual_length, 1), 36)
    state = layer.fill(empty, end, chunk=1)
    state = layer.truncate(state, [end - case.policy.residual_length] * BATCH)
    start = end - case.policy.residual_length
    again, fresh = layer.fill(state, 39, start=start), layer.fill(empty, 39)
    query = layer.query(np.arange(37, 39))
    outs = [layer.attend(s, query).partial.out for s in (again, fresh)]
    np.testing.assert_allclose(*outs, atol=CHUNKED["float32"], rtol=CHUNKED["float32"])
    np.testing.assert_array_equal(again.coded, fresh.coded)


def test_rollback_into_a_group_keeps_its_tokens_as_decoded(case):
    layer = layer_of(case, LENGTH)
    state = layer.fill(case.policy.init(layer.spec, BATCH), 40)
    length = _coded(case.policy, 40) - 1
    state = layer.truncate(state, [length] * BATCH)
    np.testing.assert_array_equal(state.length, [length] * BATCH)
    query = layer.query(np.arange(length - 1, length))
    k, v = (a[:, :, :length] for a in _held(layer, 40))
    expected = _attention(layer, query, length, k, v)
    found = layer.attend(state, query).partial.out
    np.testing.assert_allclose(found, expected, atol=CHUNKED["float32"], rtol=CHUNKED["float32"])


def test_prompts_attend_to_their_own_tokens_exactly(case):
    model = tiny_model()
    params = fit_cache(model, tiny_params(model), case.policy)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 20)))
    caches = model.init_caches(case.policy, batch=2, capacity=32, max_new=20)
    logits = jax.jit(lambda caches: model.forward(params, tokens, caches=caches).logits)
    through, expected = logits(caches), logits(None)
    np.testing.assert_allclose(through, expected, atol=CHUNKED["float32"], rtol=CHUNKED["float32"])


def test_rows_do_not_depend_on_their_batch(case):
    layer = layer_of(case, LENGTH)
    lengths = np.array([4, 33, 19])
    state = case.policy.init(layer.spec, BATCH)
    for start in range(0, 40, 5):
        tokens = np.arange(start, start + 5)
        positions = np.where(tokens[None] < lengths[:, None], tokens, -1)
        state = layer.update(state, layer.new(np.tile(tokens, (BATCH, 1)), positions))
    query = layer.query(lengths[:, None] - [2, 1])
    found = layer.attend(state, query).partial.out
    for row, length in enumerate(lengths):
        expected = _attention(layer, query, length, *_held(layer, length))[row]
        np.testing.assert_allclose(
            found[row], expected, atol=CHUNKED["float32"], rtol=CHUNKED["float32"]
        )


def test_a_bidirectional_model_is_refused(case):
    layer = layer_of(case, LENGTH)
    state = case.policy.init(layer.spec, BATCH)
    query = layer.query(np.arange(2))
    query = query._replace(mask=replace(query.mask, kind="bidirectional"))
    with pytest.raises(ValueError, match="bidirectional"):
        case.policy.attend(state, query)
