# SPDX-License-Identifier: Apache-2.0
"""The decoder's invariants that need no reference checkpoint."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import kvcache
from sqzjax.attention import merge
from sqzjax.kvcache import Attended, Dense
from sqzjax.models import SIZES, DecoderLM, Execution, ModelConfig, stack_layers, unstack_layers
from tests.contracts.caches import CacheCase
from tests.contracts.layer import BATCH, Layer
from tests.parameters import drawn
from tests.tolerances import CHUNKED, MERGE

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    embedding_size=64,
)
VARIANTS = {
    "plain": {},
    "biases_tied": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "tie_embeddings": True},
    "qk_norm_head_dim": {"qk_norm": True, "head_dim": 16},
    "window": {"sliding_window": 5},
    "mixed_windows": {"sliding_window": 5, "window_layers": (False, True, True)},
    "bidirectional": {"mask": "bidirectional"},
    "block_causal": {"mask": "block_causal", "block_size": 4},
}
ATOL = CHUNKED["float32"]


def _model(scan=True, **fields):
    execution = Execution(scan_layers=scan, **fields.pop("execution", {}))
    return DecoderLM(replace(CONFIG, **fields), execution)


def _params(model, seed=0):
    """Random parameters in the model's layout, biases and norms moved off their defaults."""
    stacked = DecoderLM(model.config, replace(model.execution, scan_layers=True))
    params = _initial(replace(stacked.config, **PLAIN_MASK))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * rng.normal(size=leaf.shape).astype(np.float32), params
    )
    return params if model.execution.scan_layers else unstack_layers(params)


PLAIN_MASK = {"mask": "causal", "block_size": 0, "sliding_window": None, "window_layers": ()}


@cache
def _initial(config):
    """Parameters, the same whatever the mask, as numpy arrays."""
    model = DecoderLM(config, Execution(scan_layers=True))
    return jax.tree.map(np.asarray, drawn(model))


@cache
def _call(model, static):
    return jax.jit(lambda p, t, a: model.forward(p, t, **dict(static), **a))


def _forward(model, params, tokens=None, **arguments):
    """`model.forward`, compiled once as a whole instead of operator by operator."""
    static = {k: v for k, v in arguments.items() if isinstance(v, (str, bool))}
    arrays = {k: v for k, v in arguments.items() if k not in static}
    return _call(model, tuple(static.items()))(params, tokens, arrays)


def _tokens(batch=2, length=12, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (batch, length)).astype(np.int32)


def _positions(start, end, batch=2):
    return np.broadcast_to(np.arange(start, end, dtype=np.int32), (batch, end - start))


def _steps(model, params, tokens, sizes, policy=Dense(), capacity=16):
    """Logits of `tokens` fed through a cache in chunks of the given sizes."""
    caches = model.init_caches(policy, batch=len(tokens), capacity=capacity, max_new=max(sizes))
    pieces, start = [], 0
    for size in sizes:
        positions = _positions(start, start + size, len(tokens))
        logits, _, caches = _forward(
            model, params, tokens[:, start : start + size], caches=caches, positions=positions
        )
        pieces.append(logits)
        start += size
    return np.concatenate(pieces, axis=1), caches


@pytest.mark.parametrize("variant", VARIANTS)
def test_stacked_and_unrolled_layouts_agree(variant):
    stacked, unrolled = _model(**VARIANTS[variant]), _model(False, **VARIANTS[variant])
    params = _params(stacked)
    out = _forward(stacked, params, _tokens(), return_hidden="all")
    other = _forward(unrolled, unstack_layers(params), _tokens(), return_hidden="all")
    np.testing.assert_allclose(out.logits, other.logits, atol=ATOL)
    np.testing.assert_allclose(out.hidden, other.hidden, atol=ATOL)
    again = stack_layers(unstack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    shapes = jax.tree.map(lambda leaf: leaf.shape, unrolled.abstract_params())
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, unstack_layers(params))


@pytest.mark.parametrize("variant", ["plain", "window", "mixed_windows", "block_causal"])
@pytest.mark.parametrize("scan", [False, True])
def test_chunked_prefill_equals_whole(variant, scan):
    model = _model(scan, **VARIANTS[variant])
    params = _params(model)
    tokens = _tokens()
    sizes = (4, 4, 4) if variant == "block_causal" else (5, 1, 5, 1)
    logits, caches = _steps(model, params, tokens, sizes)
    np.testing.assert_allclose(logits, _forward(model, params, tokens).logits, atol=ATOL)
    np.testing.assert_array_equal(caches.length, [12, 12])


def test_window_cache_is_a_ring():
    model = _model(False, sliding_window=5)
    params = _params(model)
    tokens = _tokens(length=60)
    logits, caches = _steps(model, params, tokens, (4,) * 15, capacity=64)
    assert caches.states[0].k.shape[2] == 5 + 4
    np.testing.assert_allclose(logits, _forward(model, params, tokens).logits, atol=ATOL)


def test_cached_decode_equals_recompute_for_512_tokens():
    model = _model(False)
    params = jax.tree.map(jnp.asarray, _params(model))
    tokens = _tokens(1, 512)
    caches = model.init_caches(Dense(), batch=1, capacity=512, max_new=1)

    def step(caches, token_and_position):
        token, position = token_and_position
        out = model.forward(
            params, token[None, None], positions=position[None, None], caches=caches
        )
        return out.caches, out.logits[0, 0]

    _, logits = jax.lax.scan(step, caches, (tokens[0], np.arange(512, dtype=np.int32)))
    whole = _forward(model, params, tokens).logits
    np.testing.assert_allclose(logits, np.asarray(whole)[0], atol=ATOL)


@pytest.mark.parametrize("scan", [False, True])
def test_read_only_cache_equals_append(scan):
    """`update_cache=False` merges the cached prefix with the new block and stores nothing."""
    model = _model(scan, mask="block_causal", block_size=4)
    params = _params(model)
    tokens = _tokens(length=12)
    _, caches = _steps(model, params, tokens[:, :8], (4, 4))
    out = _forward(
        model, params, tokens[:, 8:], caches=caches, positions=_positions(8, 12), update_cache=False
    )
    whole = np.asarray(_forward(model, params, tokens).logits)[:, 8:]
    np.testing.assert_allclose(out.logits, whole, atol=ATOL)
    jax.tree.map(np.testing.assert_array_equal, caches, out.caches)


def test_truncate_reorder_and_nbytes_of_whole_caches():
    for scan in (False, True):
        model = _model(scan)
        params = _params(model)
        tokens = _tokens(length=10)
        logits, caches = _steps(model, params, tokens, (5, 5))
        assert kvcache.nbytes(caches) == 3 * 2 * (2 * 2 * 16 * 8 * 4) + 3 * 2 * 4
        caches = jax.jit(kvcache.truncate)(caches, np.array([5, 5], np.int32))
        caches = jax.jit(kvcache.reorder)(caches, np.array([1, 0], np.int32))
        again = _forward(
            model, params, tokens[::-1, 5:], caches=caches, positions=_positions(5, 10)
        )
        np.testing.assert_allclose(again.logits, logits[::-1, 5:], atol=ATOL)


def test_packed_documents_equal_documents_alone():
    model = _model()
    params = _params(model)
    tokens = _tokens(1, 12)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, -1, -1]], np.int32)
    segments = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1]], np.int32)
    packed = _forward(model, params, tokens, positions=positions, segment_ids=segments).logits
    for start, end in ((0, 5), (5, 10)):
        alone = _forward(model, params, tokens[:, start:end]).logits
        np.testing.assert_allclose(np.asarray(packed)[:, start:end], alone, atol=ATOL)


def test_embeddings_may_replace_ids():
    model = _model()
    params = _params(model)
    embeds = np.asarray(params["embed"]["embedding"])[_tokens()]
    np.testing.assert_array_equal(
        _forward(model, params, embeds=embeds).logits, _forward(model, params, _tokens()).logits
    )
    for both in ({}, {"tokens": _tokens(), "embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            _forward(model, params, **both)


def test_chosen_rows_and_head():
    for tied in (False, True):
        model = _model(tie_embeddings=tied)
        params = _params(model)
        out = _forward(model, params, _tokens(), return_hidden="last")
        rows = _forward(model, params, _tokens(), logits=np.array([3, 11], np.int32)).logits
        rows, logits = np.asarray(rows), np.asarray(out.logits)
        np.testing.assert_allclose(rows[0, 0], logits[0, 3], atol=ATOL)
        np.testing.assert_allclose(rows[1, 0], logits[1, 11], atol=ATOL)
        np.testing.assert_allclose(jax.jit(model.head)(params, out.hidden), logits, atol=ATOL)
        assert out.logits.shape == (2, 12, 64) and out.logits.dtype == jnp.float32
    assert _forward(model, params, _tokens(), logits="none").logits is None


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_memory_not_gradients(remat, scan):
    plain, saved = _model(scan), _model(scan, execution={"remat": remat})
    params = _params(plain)

    def loss(model):
        return lambda p: jnp.mean(jnp.square(model.forward(p, jnp.asarray(_tokens())).logits))

    expected, actual = (jax.jit(jax.grad(loss(m)))(params) for m in (plain, saved))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), actual, expected)


def test_bfloat16_compute_keeps_float32_logits_close():
    model, half = _model(), _model(execution={"dtype": "bfloat16"})
    params = _params(model)
    expected, out = _forward(model, params, _tokens()), _forward(half, params, _tokens())
    assert out.logits.dtype == jnp.float32
    scale = np.abs(expected.logits).max()
    error = np.abs(np.asarray(out.logits) - np.asarray(expected.logits)).max()
    assert 0 < error < CHUNKED["bfloat16"] * 2 * scale


def test_lora_leaves_equal_merged_weights():
    for scan in (False, True):
        model = _model(scan)
        params = _params(model)
        layers = ("layers",) if scan else ("layers_0", "layers_1", "layers_2")
        lora, merged = {}, jax.tree.map(lambda x: x, params)
        for index, layer in enumerate(layers):
            kernel = np.asarray(params[layer]["attn"]["q"]["kernel"])
            rng = np.random.default_rng(index)
            a = 0.1 * rng.normal(size=(*kernel.shape[:-1], 2)).astype(np.float32)
            b = 0.1 * rng.normal(size=(*kernel.shape[:-2], 2, kernel.shape[-1]))
            b = b.astype(np.float32)
            lora[layer] = {"attn": {"q": {"a": a, "b": b}}}
            merged[layer]["attn"]["q"]["kernel"] = kernel + a @ b
        adapted = np.asarray(_forward(model, params, _tokens(), lora=lora).logits)
        np.testing.assert_allclose(adapted, _forward(model, merged, _tokens()).logits, atol=ATOL)
        plain = np.asarray(_forward(model, params, _tokens()).logits)
        assert np.abs(adapted - plain).max() > ATOL


class CountingCache(Dense):
    """Hands a layer counter upwards and reports it in place of nothing else."""

    def init_carry(self, state):
        return jnp.zeros((), jnp.int32)

    def attend(self, state, query):
        part, state, _ = super().attend(state, query)
        shifted = part._replace(out=part.out + query.carry.astype(jnp.float32))
        return Attended(shifted, state, query.carry + 1)


def test_a_policy_may_carry_a_value_from_layer_to_layer():
    for scan in (False, True):
        model = _model(scan)
        params = _params(model)
        outs = []
        for policy in (Dense(), CountingCache()):
            caches = model.init_caches(policy, batch=2, capacity=12, max_new=12)
            given = {"caches": caches, "positions": _positions(0, 12), "return_hidden": "all"}
            outs.append(np.asarray(_forward(model, params, _tokens(), **given).hidden))
        # Layer 0 receives 0 and is untouched; later layers receive 1 and 2 and are not.
        np.testing.assert_allclose(outs[0][1], outs[1][1], atol=ATOL)
        assert np.abs(outs[0][2] - outs[1][2]).max() > ATOL


class LayerwiseCache(Dense):
    def layer_policy(self, index, num_layers):
        return Dense(dtype="bfloat16" if index else None)


def test_policies_may_differ_between_unrolled_layers_only():
    caches = _model(False).init_caches(LayerwiseCache(), batch=1, capacity=4, max_new=4)
    assert [str(state.k.dtype) for state in caches.states] == ["float32", "bfloat16", "bfloat16"]
    with pytest.raises(ValueError, match="scan_layers=False"):
        _model(True).init_caches(LayerwiseCache(), batch=1, capacity=4, max_new=4)


def test_a_shared_prefix_is_one_more_segment():
    """A prefix cache and a suffix cache, addressed from its own zero, merge into the whole."""
    layer = Layer(CacheCase("dense", Dense()), 20)
    policy = layer.case.policy
    whole = layer.fill(policy.init(layer.spec, BATCH), 20)
    prefix = layer.fill(policy.init(layer.spec, BATCH), 8)
    new = layer.new(np.arange(8, 20))
    suffix = layer.update(policy.init(layer.spec, BATCH), new._replace(positions=new.positions - 8))
    query = layer.query(np.array([13, 19]))
    shifted = query._replace(positions=query.positions - 8)
    merged = jax.jit(merge)(
        layer.attend(prefix, query).partial, layer.attend(suffix, shifted).partial
    )
    expected = layer.attend(whole, query).partial
    np.testing.assert_allclose(merged.out, expected.out, atol=MERGE)
    np.testing.assert_allclose(merged.lse, expected.lse, atol=MERGE, rtol=MERGE)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, p: m.init_caches(Dense(), batch=0, capacity=4, max_new=1), "batch=0"),
        (
            lambda m, p: _forward(
                m,
                p,
                _tokens(),
                segment_ids=jnp.zeros((2, 12), jnp.int32),
                caches=m.init_caches(Dense(), batch=2, capacity=12, max_new=12),
            ),
            "segment_ids",
        ),
        (lambda m, p: kvcache.check_room(np.array([3, 9]), 4, 12), "capacity >= 13"),
    ],
)
def test_bad_calls_are_refused(call, message):
    model = _model()
    with pytest.raises(ValueError, match=message):
        call(model, _params(model))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"hidden_size": 30, "head_dim": 0}, "hidden_size=30 must be a multiple of num_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"embedding_size": 60}, "embedding_size=60"),
        ({"mask": "block_causal"}, "block_size=0"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"window_layers": (True,)}, "window_layers has 1"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_kv_heads": -1}, "num_kv_heads=-1"),
    ],
)
def test_bad_architectures_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)


# Parameter counts as published with the checkpoints (tied heads once, padding included).
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "mistral_7b_v0.1": 7_241_732_096,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_0.6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "llada_8b": 8_015_581_184,
    "sdar_8b": 16_381_470_720 // 2,
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_their_published_size(name):
    config = SIZES[name]
    abstract = DecoderLM(config, Execution()).abstract_params()
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert config.num_params == count
    assert count == PUBLISHED.get(name, count)
