# SPDX-License-Identifier: Apache-2.0
"""Attention over packed caches split over devices equals that on one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sqzjax import sharding
from sqzjax.attention import quantized
from sqzjax.kvcache import KIVI, Quantized, XQuant
from sqzjax.models import fit_cache
from sqzjax.sharding_config import MeshConfig
from tests.contracts.decoders import tiny_model, tiny_params
from tests.pallas_kernels import packed
from tests.tolerances import HALF_STEP, SHARDED


def test_splitting_sequences_and_heads_changes_nothing():
    keys = replace(packed.NUQ_KEYS, bits=2, exact=1)
    k, v = (form.make((2, 2, 64, 32), seed) for seed, form in enumerate((keys, packed.INT4)))
    q = jnp.asarray(np.random.default_rng(2).standard_normal((2, 1, 4, 32)), jnp.float32)
    length = jnp.asarray([64, 3], jnp.int32)
    arrays = (q, k, v, length, jnp.zeros((2, 1), jnp.int32), length[:, None])
    expected = jax.jit(quantized.attend_span)(*arrays)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        traced = jax.jit(lambda *x: quantized.attend_span(*x)).trace(*arrays)
        got = traced.lower().compile()(*arrays)
    assert "shard_map" in str(traced.jaxpr)
    np.testing.assert_allclose(got.out, expected.out, atol=SHARDED["float32"])
    np.testing.assert_allclose(got.lse, expected.lse, atol=SHARDED["float32"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        Quantized(sinks=2),
        KIVI(bits=8, group_size=8, residual_length=4),
        XQuant(bits=8, form="latent", group_size=8, residual_length=4, shards=2),
    ],
    ids=lambda policy: policy.kind,
)
def test_a_model_that_decodes_through_codes_on_a_mesh_equals_one_device(policy):
    model = tiny_model(vocab_size=64)
    params = fit_cache(model, tiny_params(model), policy)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 24)))

    def run(params, caches, tokens):
        out = model.forward(params, tokens[:, :20], caches=caches)
        positions = jnp.broadcast_to(jnp.arange(20, 24), (4, 4))
        return model.forward(params, tokens[:, 20:], positions=positions, caches=out.caches).logits

    caches = model.init_caches(policy, batch=4, capacity=32, max_new=20)
    expected = jax.jit(run)(params, caches, tokens)
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(params, mesh))
        held = sharding.cache_shardings(caches, mesh, model.config.num_kv_heads)
        found = jax.jit(run)(placed, jax.device_put(caches, held), tokens)
    # Sums in another order may move a number across the edge between two codes.
    np.testing.assert_allclose(found, expected, atol=HALF_STEP)
