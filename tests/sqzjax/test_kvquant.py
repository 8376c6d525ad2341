# SPDX-License-Identifier: Apache-2.0
"""KVQuant by its definition: codes, slots, ranges, rotation when read, bytes, settings."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.qtensor import dequantize, levels, spread
from pallas_kernels.quantized_decode_attention import quantized_decode_attention
from sqzjax.attention import rope
from sqzjax.attention.rope_config import RopeConfig
from sqzjax.kvcache import AttentionSpec, Dense, KVQuant
from sqzjax.quant import Codebook, Uniform
from sqzjax.quant.codebook import row_range
from sqzjax.quant.kmeans import kmeans
from tests.contracts.caches import CacheCase
from tests.contracts.layer import BATCH, KV_HEADS, WIDTH, Layer
from tests.tolerances import CHUNKED, FLOAT64_REL, HALF_RESIDUAL, HALF_STEP

LENGTH = 32
restored, levels_of = jax.jit(dequantize), jax.jit(levels)
RNG = np.random.default_rng(0)


def _fitted(heads=KV_HEADS, width=WIDTH, bits=3, seed=0):
    rng = np.random.default_rng(seed)
    table = np.sort(rng.uniform(-1, 1, (2, 1, 2**bits))).astype(np.float32)
    scale = rng.uniform(1, 3, (heads, 1, width)).astype(np.float32)
    offset = rng.normal(size=(heads, 1, width)).astype(np.float32)
    return {"k": {"table": table[0], "scale": scale, "offset": offset}, "v": {"table": table[1]}}


def _layer(**settings):
    policy = KVQuant(**settings)
    return Layer(CacheCase("kvquant", policy, fitted=_fitted(bits=policy.bits)), LENGTH), policy


def _attended(policy, state, query):
    return np.asarray(jax.jit(lambda state: policy.attend(state, query).partial.out)(state))


def _empty(layer, policy):
    return jax.jit(lambda: policy.init(layer.spec, BATCH))()


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({"sinks": LENGTH}, CHUNKED["float32"]), ({"outliers": 1.0, "bits": 4}, HALF_RESIDUAL)],
)
def test_keeping_every_number_is_dense_attention(settings, tolerance):
    layer, policy = _layer(**settings)
    state = layer.fill(_empty(layer, policy), LENGTH)
    query = layer.query(np.arange(LENGTH - 4, LENGTH))
    out = _attended(policy, state, query)
    expected, _ = layer.reference(query, [LENGTH] * BATCH)
    np.testing.assert_allclose(out, expected, atol=tolerance)


def test_without_slots_it_is_not():
    layer, policy = _layer(outliers=0.0, sinks=0)
    state = layer.fill(_empty(layer, policy), LENGTH)
    query = layer.query(np.arange(LENGTH - 4, LENGTH))
    out = _attended(policy, state, query)
    expected, _ = layer.reference(query, [LENGTH] * BATCH)
    assert np.abs(out - expected).max() > 100 * CHUNKED["float32"]


def test_tokens_one_by_one_are_coded_as_a_prompt():
    layer, policy = _layer()
    empty = _empty(layer, policy)
    one, whole = layer.fill(empty, 16, chunk=1), layer.fill(empty, 16, chunk=16)
    jax.tree.map(np.testing.assert_array_equal, one, whole)


def test_sinks_answer_for_the_first_tokens():
    layer, policy = _layer(sinks=2)
    state = layer.fill(_empty(layer, policy), 2)
    query = layer.query(np.arange(1, 2))
    out = _attended(policy, state, query)
    expected, _ = layer.reference(query, [2] * BATCH)
    np.testing.assert_allclose(out, expected, atol=CHUNKED["float32"])


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_code_is_closer(axis, bits):
    quantizer = Codebook(bits=bits, axis=axis, outliers=0.05)
    fitted = _fitted(1, 32, bits)["k"]
    x = fitted["offset"] + 0.9 * fitted["scale"] * RNG.uniform(-1, 1, (1, 50, 32))
    x = x.astype(np.float32)
    tensor = jax.jit(quantizer.encode)(x, fitted)
    dense = replace(tensor, residual=None, place=None)
    scale, offset = (np.asarray(a, np.float32) for a in (tensor.scale, tensor.offset))
    u = (x - offset) / scale
    table = fitted["table"][0]
    chosen = np.abs(u - np.asarray(levels_of(dense)))
    slots = np.any(np.arange(32) == np.asarray(tensor.place)[..., None], axis=-2)
    best = np.abs(u[..., None] - table).min(-1)
    np.testing.assert_allclose(chosen, best, rtol=1e-5, atol=CHUNKED["float32"])
    widest = max(np.diff(table).max() / 2, table[0] + 1, 1 - table[-1])
    error = np.abs(np.asarray(restored(dense)) - x)
    assert np.all((error <= scale * widest * (1 + HALF_STEP)) | slots)


def test_ties_go_to_the_lower_code():
    table = jnp.array([[-1.0, 0.0, 0.5, 1.0]])
    fitted = {"table": table, "scale": jnp.ones((1, 1)), "offset": jnp.zeros((1, 1))}
    quantizer = Codebook(bits=2, axis="channel", outliers=0.0)
    x = np.array([[-0.5, 0.25, 0.75, 9.0, -9.0]], np.float32)
    tensor = jax.jit(quantizer.encode)(x, fitted)
    np.testing.assert_array_equal(levels_of(tensor), [[-1.0, 0.0, 0.5, 1.0, -1.0]])


_row_range = jax.jit(row_range, static_argnums=1)


@pytest.mark.parametrize("slots", [0, 1, 2, 5, 31, 32])
def test_value_ranges_leave_out_the_extremes(slots):
    """Against every split of the slots between the two ends, and for equal elements."""
    x = RNG.standard_t(2, (200, 32)).astype(np.float32)
    x[0], x[1, 5:] = 1.5, 0.25
    low, high, place = map(np.asarray, _row_range(x, slots))
    rows = np.sort(x, axis=1)
    rest = 32 if slots == 32 else 32 - slots
    widths = [rows[:, i + rest - 1] - rows[:, i] for i in range(32 - rest + 1)]
    np.testing.assert_array_equal((high - low)[:, 0], np.min(widths, axis=0))
    if slots:
        outside = (x < low) | (x > high)
        named = np.any(np.arange(32) == place[..., None], axis=1)
        assert place.shape[-1] == slots and not np.any(outside & ~named)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_slots_keep_to_their_budget(axis):
    quantizer = Codebook(bits=2, axis=axis, outliers=0.1)
    fitted = _fitted(1, 32, 2)["k"]
    x = RNG.standard_t(1.5, (1, 64, 32)).astype(np.float32)
    x[0, 3] = 7.0
    tensor = jax.jit(quantizer.encode)(x, fitted)
    assert tensor.residual.shape[-1] == quantizer.slots(32) == 3
    assert np.all(np.count_nonzero(jax.jit(spread)(tensor), axis=-1) <= 3)
    # What has a slot is right up to its float16 residual; equal elements are not counted twice.
    error = np.abs(np.asarray(restored(tensor)) - x)
    at = np.take_along_axis(error, np.asarray(tensor.place).astype(np.int32), axis=-1)
    most = np.abs(np.asarray(tensor.residual, np.float32)) * 2.0**-11 + np.abs(x).max() * 2.0**-22
    assert np.all(at <= most.max(-1, keepdims=True))
    empty = replace(tensor, residual=np.zeros_like(tensor.residual))
    bare = restored(replace(tensor, residual=None, place=None))
    np.testing.assert_array_equal(restored(empty), bare)
    assert np.all(np.isfinite(bare))


def test_key_slots_take_the_largest_scaled_numbers():
    quantizer = Codebook(bits=3, axis="channel", outliers=0.06)
    fitted = _fitted(1, 32)["k"]
    x = (5 * RNG.normal(size=(1, 40, 32))).astype(np.float32)
    tensor = jax.jit(quantizer.encode)(x, fitted)
    u = np.abs((x - fitted["offset"]) / fitted["scale"])
    expected = np.sort(np.argsort(-u, axis=-1)[..., :2])
    np.testing.assert_array_equal(np.sort(tensor.place), expected)


@pytest.mark.parametrize(("width", "dtype"), [(256, jnp.uint8), (512, jnp.uint16)])
def test_places_fit_their_type(width, dtype):
    x = np.zeros((2, width), np.float32)
    x[:, -1] = 9.0
    tensor = jax.jit(Codebook(outliers=1 / width).encode)(x)
    assert tensor.place.dtype == dtype and np.all(np.asarray(tensor.place) == width - 1)


@partial(jax.jit, static_argnums=0)
def _coded(policy, kept, fitted):
    return policy.complete(policy.encode(kept, fitted), fitted)


@cache
def _turning(width):
    rotary = rope.rotary(RopeConfig(theta=1e4), width)
    return jax.jit(partial(quantized_decode_attention, rotary=rotary))


@pytest.mark.parametrize("start", [0, 4096, 1_000_000 - 64])
def test_codes_are_read_at_any_position(start):
    """Positions `start ..` in a ring of 64 slots, whose keys were coded before rotation."""
    heads, width, slots = 2, 64, 64
    policy, fitted = KVQuant(bits=4), _fitted(heads, width, 4)
    kept = {n: RNG.normal(size=(1, heads, slots, width)).astype(np.float32) for n in "kv"}
    k, v = _coded(policy, kept, fitted)
    positions = start + np.arange(slots)  # start is a multiple of the slots
    q = RNG.normal(size=(1, 3, heads, width)).astype(np.float32)
    asked = start + np.array([40, 61, 63], np.int32)
    config = RopeConfig(theta=1e4)
    where = {
        "length": np.array([start + slots], np.int32),
        "starts": np.full((1, 3), start, np.int32),
        "limits": asked[None] + 1,
        "query_positions": asked[None],
    }
    out = np.asarray(_turning(width)(q, k, v, **where).out)
    inverse = rope.frequencies(config, width)[0].astype(np.float64)

    def turned(x, at):
        first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
        cos, sin = (f(at[:, None] * inverse) for f in (np.cos, np.sin))
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    keys, values = (np.asarray(restored(t), np.float64)[0] for t in (k, v))
    for head in range(heads):
        scores = turned(q[0, :, head], asked) @ turned(keys[head], positions).T / width**0.5
        scores[positions > asked[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights @ values[head] / weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(out[0, :, head], expected, atol=CHUNKED["float32"])
    # A rotation leaves the error of a coded key as large as it was.
    error = keys - np.asarray(kept["k"], np.float64)[0]
    size = np.linalg.norm(error, axis=-1)
    after = np.linalg.norm([turned(e, positions) for e in error], axis=-1)
    np.testing.assert_allclose(after, size, rtol=FLOAT64_REL)


@pytest.mark.parametrize(("bits", "factor"), [(4, 3.6), (3, 4.7), (2, 6.8)])
def test_bytes_of_a_cache(bits, factor):
    spec = AttentionSpec(
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        model_dim=1024,
        capacity=4096,
        max_new=8,
        dtype="bfloat16",
    )
    policy, dense = KVQuant(bits=bits), Dense()
    sizes = [p.nbytes(jax.eval_shape(lambda p=p: p.init(spec, 2))) for p in (policy, dense)]
    assert sizes[1] / sizes[0] >= factor
    per_number = 8 * sizes[0] / (2 * 2 * 4096 * 1024)
    assert per_number == pytest.approx(bits + 24 / 128 + 16 / 128, rel=2e-3)


def _keys(rng, tokens=1024, width=128):
    """Keys like those of models: heavy tails, some channels far from zero and 20 times as wide."""
    keys = rng.standard_t(4, (tokens, width))
    large = rng.choice(width, 4, replace=False)
    keys[:, large] *= 20
    keys[:, large] += 100 * rng.choice([-1, 1], 4)
    return keys.astype(np.float32)


def _fit(keys, bits, outliers):
    """Ranges and a codebook of keys, by the definitions."""
    low, high = np.quantile(keys, [outliers / 2, 1 - outliers / 2], axis=0)
    scale, offset = (high - low) / 2, (high + low) / 2
    u = (keys - offset) / scale
    weights = np.where(np.abs(u) <= 1, scale**2, 0.0)
    table = kmeans(u.reshape(-1), weights.reshape(-1), 2**bits)
    return {
        "table": np.asarray(table, np.float32)[None],
        "scale": np.asarray(scale, np.float32)[None],
        "offset": np.asarray(offset, np.float32)[None],
    }


@pytest.mark.parametrize("bits", [2, 3])
def test_each_step_of_the_method_helps(bits):
    """Errors of keys: per token > per channel > before rotation > codebook > with outliers."""
    rng = np.random.default_rng(1)
    keys = _keys(rng)

    @jax.jit
    def rotate(keys):
        cos, sin = rope.angles(RopeConfig(), 128, jnp.arange(1024)[None])
        return rope.rotate(keys[None, :, None], cos, sin)[0, :, 0]

    rotated = np.asarray(rotate(keys))
    channel = Uniform(bits=bits, axis="channel", group_size=1024)

    def error(quantizer, x, fitted=None):
        found = jax.jit(lambda x, fitted: dequantize(quantizer.encode(x, fitted)))(x, fitted)
        return float(np.mean((np.asarray(found) - x) ** 2))

    ladder = [
        error(Uniform(bits=bits, axis="token"), rotated),
        error(channel, rotated),
        error(channel, keys),
    ]
    for outliers in (0.0, 0.01):
        quantizer = Codebook(bits=bits, axis="channel", outliers=outliers)
        ladder.append(error(quantizer, keys, _fit(keys, bits, outliers)))
    assert ladder == sorted(ladder, reverse=True), ladder
    assert ladder[-1] < ladder[0] / 2


@pytest.mark.parametrize("settings", [{"bits": 5}, {"outliers": -0.1}, {"outliers": 2.0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        KVQuant(**settings)
