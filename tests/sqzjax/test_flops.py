# SPDX-License-Identifier: Apache-2.0
"""The analytical operation and byte counts against XLA, jaxprs and real arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sqzjax.analysis import Precision, Workload, decode_bytes, footprint, operators, training_flops
from sqzjax.analysis.jaxpr import count_flops
from sqzjax.kvcache import Dense, nbytes
from sqzjax.models import DecoderLM, Execution, ModelConfig
from tests import tolerances

TINY = ModelConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=352,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
)
VARIANTS = {
    "gqa": TINY,
    "tied": dataclasses.replace(TINY, tie_embeddings=True, embedding_size=104),
    "mha_wide": dataclasses.replace(
        TINY,
        hidden_size=256,
        intermediate_size=512,
        num_heads=8,
        num_kv_heads=8,
        head_dim=32,
    ),
    "biased_qk_norm": dataclasses.replace(
        TINY, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, head_dim=32
    ),
}


def matrix_flops(model, workload):
    return sum(op.flops * op.count for op in operators(model, Precision.uniform(32), workload))


def compiled_flops(fn, *args):
    cost: Any = jax.jit(fn).lower(*args).compile().cost_analysis()
    return cost["flops"]


def decoder(model):
    lm = DecoderLM(model, Execution(scan_layers=False))
    return lm, lm.abstract_params()


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_flops_match_xla(name):
    model, batch, length = VARIANTS[name], 2, 48
    lm, params = decoder(model)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def forward(params, tokens):
        return lm.forward(params, tokens).logits

    work = Workload(phase="prefill", batch=batch, context=length, logit_rows=length)
    expected = matrix_flops(model, work)
    assert count_flops(forward, params, tokens) == expected
    assert compiled_flops(forward, params, tokens) == pytest.approx(
        expected, rel=tolerances.FLOPS_REL
    )


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_decode_flops_and_bytes_match_xla_and_arrays(name, queries):
    model, batch, capacity = VARIANTS[name], 2, 64
    lm, params = decoder(model)
    caches = jax.eval_shape(
        lambda: lm.init_caches(Dense(), batch=batch, capacity=capacity, max_new=queries)
    )
    tokens = jax.ShapeDtypeStruct((batch, queries), jnp.int32)

    def step(params, tokens, positions, caches):
        out = lm.forward(params, tokens, positions=positions, caches=caches)
        return out.logits, out.caches

    args = (params, tokens, tokens, caches)
    # The dense cache computes every slot of its capacity, so that is the context compared.
    work = Workload(phase="decode", batch=batch, query_tokens=queries, context=capacity)
    expected = matrix_flops(model, work)
    assert count_flops(step, *args) == expected
    assert compiled_flops(step, *args) == pytest.approx(expected, rel=tolerances.FLOPS_REL)

    size = footprint(model, Precision.uniform(32), work)
    assert size.weights == sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert size.weights == 4 * model.num_params
    arrays = lm.init_caches(Dense(), batch=batch, capacity=capacity, max_new=queries)
    stored = sum(x.nbytes for state in arrays.states for x in (state.k, state.v))
    assert size.kv == stored
    bookkeeping = sum(state.length.nbytes for state in arrays.states)
    assert nbytes(arrays) - stored <= bookkeeping


def test_window_limits_cache_and_traffic():
    model = dataclasses.replace(TINY, sliding_window=8, window_layers=(True, False, True))
    lm, _ = decoder(model)
    caches = lm.init_caches(Dense(), batch=2, capacity=64, max_new=1)
    stored = sum(x.nbytes for state in caches.states for x in (state.k, state.v))
    work = Workload(phase="decode", batch=2, context=64)
    assert footprint(model, Precision.uniform(32), work).kv == stored
    read = {op.count: op.kv_read for op in operators(model, Precision(), work) if op.kv_read}
    per_key = 2 * 2 * 2 * model.num_kv_heads * model.head_dim
    assert read == {2: 8 * per_key, 1: 64 * per_key}


def test_decode_bytes_are_parameters_and_cache():
    model = VARIANTS["biased_qk_norm"]
    table = model.embedding_size * model.hidden_size
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 3
    got = decode_bytes(model, Precision.uniform(32), batch=3, context=40)
    assert got == 4 * (model.num_params - table) + 4 * kv * 40 + 4 * kv


def test_training_flops_match_gradient_jaxpr():
    """The backward pass costs twice the forward pass (the first layer's input needs none)."""
    lm, params = decoder(TINY)
    batch, length = 2, 32
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def loss(params, tokens):
        return jnp.sum(lm.forward(params, tokens).logits)  # type: ignore[arg-type]

    counted = count_flops(jax.grad(loss), params, tokens)
    assert counted == pytest.approx(training_flops(TINY, batch, length), rel=tolerances.FLOPS_REL)


def test_jaxpr_counts_scans_conditionals_and_convolutions():
    x = jnp.zeros((8, 8))

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0]

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def looped(x):
        return jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x)

    product = 2 * 8**3
    assert count_flops(scanned, x) == 5 * product
    assert count_flops(branched, x) == 2 * product
    assert count_flops(jax.checkpoint(scanned), x) == 5 * product
    assert count_flops(looped, x, while_trips=3) == 3 * product
    with pytest.raises(ValueError, match="while_trips"):
        count_flops(looped, x)

    image, kernel = (
        jnp.zeros((2, 6, 9, 9)),
        jnp.zeros((4, 3, 3, 3)),
    )  # two groups of 3 inputs
    got = count_flops(
        lambda a, b: jax.lax.conv_general_dilated(a, b, (1, 1), "VALID", feature_group_count=2),
        image,
        kernel,
    )
    assert got == 2 * (2 * 4 * 7 * 7) * 3 * 3 * 3
