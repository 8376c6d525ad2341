# SPDX-License-Identifier: Apache-2.0
"""Mustafar: the bitmap format, what is kept, bytes, and attention to the pruned cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.packing import pack
from sqzjax.decode import Generator, SamplingConfig
from sqzjax.kvcache import AttentionSpec, Dense, Mustafar
from sqzjax.kvcache.mustafar import compress, expand, kept_of
from tests.contracts.caches import CacheCase
from tests.contracts.decoders import tiny_model, tiny_params
from tests.contracts.layer import BATCH, Layer
from tests.tolerances import CHUNKED

seeds = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(width=st.sampled_from([1, 33, 80]), share=st.sampled_from([0.0, 0.1, 0.6, 1.0]), seed=seeds)
def test_a_bitmap_puts_every_value_back(width, share, seed):
    """Any mask, all zeros and all ones included: the values lie in the order of the channels."""
    bits = np.random.default_rng(seed).random(width) < share
    values = np.zeros(width, np.float32)
    values[: bits.sum()] = 1 + np.arange(bits.sum())
    words = pack(jnp.asarray(bits, jnp.uint32), 1)
    dense = np.zeros(bits.size, np.float32)
    dense[bits] = values[: bits.sum()]
    np.testing.assert_array_equal(expand(jnp.asarray(values), words, bits.size), dense)


@pytest.mark.parametrize("count", [1, 7, 40, 80])
def test_the_largest_magnitudes_stay(count):
    x = np.random.default_rng(0).normal(size=(3, 5, 80)).astype(np.float32)
    expected = np.zeros_like(x)
    order = np.argsort(-np.abs(x), axis=-1, kind="stable")[..., :count]
    np.put_along_axis(expected, order, np.take_along_axis(x, order, -1), -1)
    found = expand(**compress(jnp.asarray(x), count), width=80)
    np.testing.assert_array_equal(found, expected)


def test_of_equal_magnitudes_exactly_the_number_asked_for_stays():
    found = expand(**compress(jnp.ones((2, 64)), 10), width=64)
    np.testing.assert_array_equal(jnp.sum(found, axis=-1), [10, 10])


def test_value_magnitude_is_the_output_aware_rule():
    """One probability weighs a whole value, so it does not change the order of its channels."""
    rng = np.random.default_rng(1)
    v, p = rng.normal(size=(6, 32)), rng.random((6, 1))
    plain, aware = (compress(jnp.asarray(a, jnp.float32), 9)["bitmap"] for a in (v, p * v))
    np.testing.assert_array_equal(plain, aware)


def test_bytes_of_the_published_setting():
    shape = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 128, "model_dim": 1024}
    spec = AttentionSpec(**shape, capacity=65536, max_new=1, dtype="bfloat16")

    def held(policy):
        return policy.nbytes(jax.eval_shape(lambda: policy.init(spec, 1)))

    share = held(Mustafar(key_sparsity=0.7, value_sparsity=0.7)) / held(Dense())
    assert kept_of(128, 0.7) == 39
    assert share == pytest.approx((2 * 39 + 16) / 256, rel=5e-3)


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_attention_is_that_of_the_pruned_tokens(sparsity):
    policy = Mustafar(
        key_sparsity=sparsity, value_sparsity=sparsity, residual_length=5, group_size=4
    )
    layer = Layer(CacheCase("mustafar", policy), 40)
    state = layer.fill(policy.init(layer.spec, BATCH), 40, chunk=9)
    count = kept_of(8, sparsity)
    new = layer.new(np.arange(40))
    k, v = (np.array(jnp.moveaxis(x, 1, 2), np.float64) for x in (new.k, new.v))
    for x in (k, v):
        old = x[:, :, :32]  # 40 - 5, whole groups of four
        order = np.argsort(-np.abs(old), axis=-1, kind="stable")[..., count:]
        np.put_along_axis(old, order, 0, -1)
    query = layer.query(np.arange(39, 40))
    q = np.asarray(query.q, np.float64)
    scores = np.einsum("btngh,bnsh->bntgs", q.reshape(BATCH, 1, 2, 2, 8), k) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bntgs,bnsh->btngh", weights, v).reshape(q.shape)
    found = layer.attend(state, query).partial.out
    np.testing.assert_allclose(found, expected, atol=CHUNKED["float32"], rtol=CHUNKED["float32"])


@pytest.mark.slow
def test_generates_and_without_pruning_changes_nothing():
    model = tiny_model()
    params = tiny_params(model)
    prompts = [[5, 9, 2, 4, 4, 8], [11, 3]]
    sampling = SamplingConfig(max_new_tokens=24, temperature=0, ignore_eos=True)
    exact = Mustafar(key_sparsity=0.0, value_sparsity=0.0, residual_length=2, group_size=4)
    outs = [
        Generator(model, params, cache=cache).generate(prompts, sampling).tokens
        for cache in (Dense(), exact)
    ]
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"key_sparsity": 1.0}, "key_sparsity=1.0"), ({"value_sparsity": -0.1}, "value_sparsity")],
)
def test_bad_settings_are_refused(fields, name):
    with pytest.raises(ValueError, match=name):
        Mustafar(**fields)
