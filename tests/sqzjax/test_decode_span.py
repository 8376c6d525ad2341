# SPDX-License-Identifier: Apache-2.0
"""A mask as a range of positions, and decode attention on several devices."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.attention.mask import Mask

MASKS = [Mask(), Mask(kind="bidirectional"), Mask(kind="block_causal", block_size=4)]


@settings(max_examples=40, deadline=None)
@given(
    mask=st.sampled_from(MASKS),
    window=st.sampled_from([None, 1, 3, 2**31 - 1]),
    positions=st.lists(st.integers(-1, 30), min_size=1, max_size=4),
)
def test_the_range_of_a_mask_is_its_visibility(mask, window, positions):
    queries = jnp.array([positions], jnp.int32)
    keys = jnp.arange(40, dtype=jnp.int32)[None]
    starts, limits = mask.span(queries, window)
    inside = (keys[:, None] >= starts[..., None]) & (keys[:, None] < limits[..., None])
    np.testing.assert_array_equal(inside, mask.visible(queries, keys, window))


_MESH = """
import itertools
import jax, jax.numpy as jnp, numpy as np
from sqzjax.attention import decode, paged
from sqzjax.attention.mask import Mask
from sqzjax.sharding import make_mesh
from sqzjax.sharding_config import MeshConfig

keys = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(keys[0], (4, 2, 8, 16))
k, v = (jax.random.normal(key, (4, 2, 32, 16)) for key in keys[1:])
length = jnp.array([32, 3, 0, 9], jnp.int32)
rule = dict(length=length, query_positions=length[:, None] - 2 + jnp.arange(2), mask=Mask())
asking = jnp.ones((4, 2), bool)
pages = dict(pages=jnp.zeros((4, 2, 3), int) + jnp.arange(3), count=jnp.array(4 * [[1, 3]]))
pages |= dict(length=length, asking=asking, page_size=8)
calls = (
    lambda q, k, v: decode.attend(q, k, v, **rule),
    lambda q, k, v: paged.attend(q, k, v, **pages),
)
meshes = ((MeshConfig(data=2, fsdp=2, tensor=2), 8), (MeshConfig(data=8), 1))
for call, (config, split) in itertools.product(calls, meshes):
    expected = call(q, k, v)
    with jax.set_mesh(make_mesh(config)):
        text = jax.jit(call).lower(q, k, v).compile().as_text()
        got = jax.jit(call)(q, k, v)
        assert "all-gather" not in text or split == 1
        local = jax.make_jaxpr(call)(q, k, v)
        assert ("shard_map" in str(local)) == (split > 1), local
    np.testing.assert_allclose(got.out, expected.out, atol=1e-6)
    np.testing.assert_allclose(got.lse, expected.lse, atol=1e-6)
"""


@pytest.mark.parametrize("devices", [8])
def test_a_mesh_maps_the_kernel_over_sequences_and_heads(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    code = f'import os; os.environ["XLA_FLAGS"] = "{flags}"\n' + _MESH
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
