# SPDX-License-Identifier: Apache-2.0
"""Attention over packed caches split over devices equals that on one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from sqzjax.attention import quantized
from tests.pallas_kernels import packed
from tests.tolerances import SHARDED


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
