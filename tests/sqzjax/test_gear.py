# SPDX-License-Identifier: Apache-2.0
"""GEAR: factors and extremes against definitions, errors, attention, decoding by a model."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import config, kvcache
from sqzjax.decode import Autoregressive, Generator, SamplingConfig
from sqzjax.kvcache import GEAR, AttentionSpec, Dense
from sqzjax.kvcache.gear import extremes, extremes_of, factors, orthonormal, restore
from sqzjax.quant import dequantize
from tests.contracts.caches import CacheCase
from tests.contracts.decoders import tiny_model, tiny_params
from tests.contracts.layer import BATCH, HEADS, KV_HEADS, WIDTH, Layer
from tests.tolerances import CHUNKED, KERNEL_ATOL

SMALL = GEAR(group_size=8, rank=2, sparsity=0.25)
HALF = KERNEL_ATOL["float16"]


def arrays(seed=0, tokens=32, width=16, outliers=True):
    """Keys with a few large channels, as those of models, `[B, K, S, H]`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 2, tokens, width))
    if outliers:
        x[..., ::5] += 6 * rng.normal(size=(2, 2, 1, len(range(0, width, 5))))
        x[..., 3, 2] = 20.0
    return x.astype(np.float32)


@partial(jax.jit, static_argnums=0)
def round_trip(policy, x):
    kept = {"k": x, "v": x}
    return policy.decode(policy.encode(kept, None), kept)


@partial(jax.jit, static_argnums=0)
def backbone_alone(policy, x):
    return [dequantize(q.encode(x)) for q in policy.quantizers(x.shape[-1])]


def errors(policy, x):
    """Norms of the error of keys and values, `[2]`, and of the backbone alone."""
    found, base = round_trip(policy, x), backbone_alone(policy, x)
    full = np.array([np.linalg.norm(np.asarray(found[name]) - x) for name in "kv"])
    return full, np.array([np.linalg.norm(np.asarray(one) - x) for one in base])


@pytest.mark.parametrize("sparsity", [0.0, 0.25])
@pytest.mark.parametrize("backbone", ["kivi", "kcvt"])
def test_a_full_rank_is_exact(backbone, sparsity):
    policy = replace(SMALL, group_size=16, rank=16, sparsity=sparsity, backbone=backbone)
    x = arrays()
    found = round_trip(policy, x)
    for name in "kv":
        np.testing.assert_allclose(found[name], x, atol=20 * HALF, rtol=HALF)


@pytest.mark.slow
def test_errors_shrink_with_the_rank_and_with_passes():
    x = arrays()
    by_rank = [errors(replace(SMALL, rank=rank), x)[0] for rank in (1, 2, 4, 8)]
    assert np.all(np.diff(by_rank, axis=0) < 0)
    by_loop = [errors(replace(SMALL, loops=loops, sparsity=0.0), x)[0] for loops in (1, 2, 4)]
    assert np.all(np.diff(by_loop, axis=0) < 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.1])
@pytest.mark.parametrize("bits, backbone", [(2, "kivi"), (4, "kcvt")])
def test_the_error_is_never_above_that_of_the_backbone(bits, backbone, sparsity):
    policy = replace(SMALL, bits=bits, sparsity=sparsity, backbone=backbone)
    for seed in range(8):
        full, alone = errors(policy, arrays(seed))
        assert np.all(full < alone)


def test_extremes_help_where_there_are_some():
    x = arrays()
    with_extremes, _ = errors(replace(SMALL, sparsity=0.25), x)
    without, _ = errors(replace(SMALL, sparsity=0.0), x)
    assert np.all(with_extremes < without)


def test_a_planted_correction_of_rank_two_is_found():
    """Whole numbers, which two bits hold, plus less than half a step of rank two."""
    rng = np.random.default_rng(0)
    whole = rng.integers(1, 3, size=(2, 2, 32, 16)).astype(np.float64)
    whole[..., 0::8, :], whole[..., 1::8, :] = 0, 3  # the ends of every channel, left as they are
    u, v = rng.uniform(-0.45, 0.45, (2, 2, 32, 2)), rng.uniform(-0.5, 0.5, (2, 2, 2, 16))
    u[..., 0::8, :] = u[..., 1::8, :] = 0
    x = jnp.asarray(whole + u @ v, jnp.float32)
    policy = GEAR(group_size=8, rank=2, sparsity=0.0, loops=4)

    @jax.jit
    def run(x):
        coded = policy.encode({"k": x, "v": x}, None)["k"]
        return dequantize(coded.base), restore(coded, 8)

    base, found = run(x)
    np.testing.assert_allclose(base, whole, atol=HALF)
    np.testing.assert_allclose(found, x, atol=HALF)


def test_factors_are_the_best_of_their_rank():
    """Against the singular values, for a spectrum that falls."""
    rng = np.random.default_rng(1)
    u, _, v = np.linalg.svd(rng.normal(size=(3, 16, 12)), full_matrices=False)
    sizes = 2.0 ** -np.arange(12)
    x = (u * sizes) @ v
    a, b = map(np.asarray, jax.jit(factors, static_argnums=(1, 2))(x.astype(np.float32), 3, 8))
    np.testing.assert_allclose(
        np.swapaxes(a, -1, -2) @ a, np.tile(np.eye(3), (3, 1, 1)), atol=CHUNKED["float32"]
    )
    left = np.linalg.norm(x - a @ np.swapaxes(b, -1, -2), axis=(1, 2))
    np.testing.assert_allclose(left, np.linalg.norm(sizes[3:]), rtol=HALF)


def test_a_basis_of_dependent_columns_has_zeros():
    x = np.zeros((2, 8, 3), np.float32)
    x[..., 0], x[..., 1] = 2.0, -1.0
    x[..., 2] = np.arange(8)
    basis = np.asarray(jax.jit(orthonormal)(x))
    gram = np.swapaxes(basis, -1, -2) @ basis
    np.testing.assert_allclose(gram, np.tile(np.diag([1, 0, 1]), (2, 1, 1)), atol=HALF)
    assert not np.any(jax.jit(orthonormal)(np.zeros((2, 8, 3), np.float32)))


def test_a_constant_block_is_exact():
    """No residual: the power iteration has nothing to find and must not make up anything."""
    x = np.full((1, 1, 16, 8), 3.0, np.float32)
    found = round_trip(SMALL, x)
    np.testing.assert_array_equal(found["k"], x)
    np.testing.assert_array_equal(found["v"], x)


def test_extremes_are_those_of_the_vector_and_are_exact():
    x = arrays(tokens=16)
    codes = jax.jit(lambda x: SMALL.encode({"k": x, "v": x}, None))(x)
    found = jax.jit(SMALL.decode)(codes, {})
    assert extremes_of(8, 0.25) == 1 and extremes_of(16, 0.25) == 2
    assert extremes_of(64, 0.02) == 1 and extremes_of(1000, 0.02) == 10
    assert extremes_of(128, 0.0) == 0
    blocks = np.asarray(x).reshape(2, 2, 2, 8, 16)
    order = np.sort(np.argsort(blocks, axis=3)[:, :, :, [0, -1]], axis=3)
    place = np.sort(np.asarray(codes["k"].place).reshape(2, 2, 2, 16, 2), axis=-1)
    np.testing.assert_array_equal(place, order.swapaxes(3, 4))
    assert codes["v"].base.place.shape == (2, 2, 16, 4)
    again = np.asarray(found["k"]).reshape(blocks.shape)
    for kept, held in ((again, blocks),):
        kept, held = (np.take_along_axis(y, order, axis=3) for y in (kept, held))
        np.testing.assert_allclose(kept, held, rtol=HALF, atol=HALF)
    order = np.argsort(np.asarray(x), axis=-1)[..., [0, 1, -2, -1]]
    kept, held = (np.take_along_axis(np.asarray(y), order, axis=-1) for y in (found["v"], x))
    np.testing.assert_allclose(kept, held, rtol=HALF, atol=HALF)
    assert len(set(np.asarray(extremes(jnp.ones(8), 2)).tolist())) == 4


@pytest.mark.parametrize("capacity, sparsity", [(64, 0.0), (1200, 0.25)])
def test_attention_equals_that_over_restored_blocks(capacity, sparsity):
    """Several tiles where the capacity is large."""
    policy = GEAR(group_size=8, rank=2, sparsity=sparsity)
    case = CacheCase("gear", policy, capacity=capacity)
    total = capacity - 8
    layer = Layer(case, total)
    state = jax.jit(lambda: policy.init(layer.spec, BATCH))()
    update = jax.jit(policy.update)
    for start in range(0, total - 3, 120):
        state = update(state, layer.new(np.arange(start, min(start + 120, total - 3))))
    for token in range(total - 3, total):
        state = update(state, layer.new(np.full(1, token)))
    coded = int(state.coded[0])
    assert coded == total // 8 * 8
    query = layer.query(np.full(1, total - 1))
    out = np.asarray(jax.jit(lambda state: policy.attend(state, query).partial.out)(state))
    new = layer.new(np.arange(total))
    k, v = (np.moveaxis(np.array(x, np.float64), 2, 1) for x in (new.k, new.v))
    found = jax.tree.map(np.asarray, jax.jit(policy.decode)(state.body, {}))
    k[:, :, :coded], v[:, :, :coded] = found["k"][:, :, :coded], found["v"][:, :, :coded]
    q = np.asarray(query.q, np.float64)[:, 0]
    for b, head in np.ndindex(BATCH, HEADS):
        kv = head // (HEADS // KV_HEADS)
        weights = np.exp(k[b, kv] @ q[b, head] / math.sqrt(WIDTH))
        expected = weights @ v[b, kv] / weights.sum()
        np.testing.assert_allclose(out[b, 0, head], expected, atol=CHUNKED["float32"])


def test_bytes_are_those_of_the_sheet():
    """Of 16 bits: 2 bits, blocks of 64, rank 4 and one extreme on either side, H = 128."""
    spec = AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=128, model_dim=4, capacity=4096, max_new=64,
        dtype="bfloat16",
    )  # fmt: skip
    state = jax.eval_shape(lambda: GEAR().init(spec, 1))
    bits = {name: 8 * GEAR().nbytes(part) / (2 * 4096 * 128) for name, part in state.body.items()}
    assert bits == {"k": 2 + 0.5 + 0.5 + 1 + 0.75, "v": 2 + 0.5 + 0.5 + 1 + 0.375}
    light = jax.eval_shape(lambda: GEAR(sparsity=0.0).init(spec, 1))
    assert 8 * GEAR().nbytes(light.body) / (2 * 4096 * 128) == 8.0


def greedy(policy):
    model = tiny_model(num_layers=1)
    prompts = [[5, 9, 2] * 10, [11], [4, 4, 8, 30, 2, 17, 1] * 5]
    decoder = Autoregressive(model=model, cache=policy, prefill_chunk=64)
    sampling = SamplingConfig(max_new_tokens=16, temperature=0, ignore_eos=True)
    generator = Generator(model, tiny_params(model), decoder=decoder)
    return generator.generate(prompts, sampling).tokens.tolist()


@pytest.mark.slow
def test_a_full_rank_changes_no_token_and_two_bits_alone_do():
    exact = greedy(Dense())
    assert greedy(GEAR(group_size=8, rank=8)) == exact
    assert greedy(GEAR(group_size=8, rank=1, sparsity=0.0, bits=1)) != exact


def test_configurations():
    loaded = config.load(kvcache.CacheConfig, {"kind": "gear", "bits": 4, "backbone": "kcvt"})
    assert loaded == GEAR(bits=4, backbone="kcvt")
    spec = Layer(CacheCase("gear", GEAR()), 8).spec
    for policy, message in (
        (GEAR(rank=9), "at most 8"),
        (GEAR(sparsity=0.9, group_size=1, rank=1), "use less"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.init(spec, 1)
    for fields in ({"rank": 0}, {"loops": 0}, {"sparsity": 1.0}, {"bits": 5}, {"group_size": 0}):
        with pytest.raises(ValueError, match="must"):
            GEAR(**fields)
