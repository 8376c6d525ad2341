# SPDX-License-Identifier: Apache-2.0
"""The digest by which a calibration knows its model: what changes it and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import sharding
from sqzjax.kvcache import XQuant
from sqzjax.models import DecoderLM, fingerprint, fit_cache, stack_layers
from sqzjax.models import fit as fitting
from sqzjax.sharding_config import MeshConfig
from tests.contracts.decoders import tiny_model
from tests.parameters import drawn

MODEL = tiny_model(qkv_bias=True, qk_norm=True, tie_embeddings=False, vocab_size=64)
PARAMS = drawn(MODEL, 1, scale=1.7)
PATHS = [
    jax.tree_util.keystr(keys, simple=True, separator="/")
    for keys, _ in jax.tree_util.tree_leaves_with_path(PARAMS)
]


def _with(path, change):
    """The parameters with one of them changed."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: (
            change(leaf) if jax.tree_util.keystr(keys, simple=True, separator="/") == path else leaf
        ),
        PARAMS,
    )


@pytest.mark.parametrize("path", PATHS)
def test_every_parameter_counts(path):
    other = _with(path, lambda leaf: leaf + 0.5)
    assert fingerprint(MODEL, other) != fingerprint(MODEL, PARAMS)


def test_every_part_of_a_kernel_counts():
    """Of each half of its rows, each quarter of its columns."""
    seen = {fingerprint(MODEL, PARAMS)}
    rows, columns = PARAMS["layers_1"]["mlp"]["up"]["kernel"].shape
    for i in range(2):
        for j in range(4):
            at = np.s_[
                i * rows // 2 : (i + 1) * rows // 2, j * columns // 4 : (j + 1) * columns // 4
            ]
            other = _with("layers_1/mlp/up/kernel", lambda leaf, at=at: leaf.at[at].add(1.0))
            seen.add(fingerprint(MODEL, other))
    assert len(seen) == 9


def test_layers_do_not_stand_for_each_other():
    swapped = {**PARAMS, "layers_0": PARAMS["layers_1"], "layers_1": PARAMS["layers_0"]}
    assert fingerprint(MODEL, swapped) != fingerprint(MODEL, PARAMS)


def test_neither_layout_nor_precision_nor_what_a_cache_adds_counts():
    expected = fingerprint(MODEL, PARAMS)
    stacked = stack_layers(PARAMS)
    assert fingerprint(MODEL, stacked) == expected
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    assert fingerprint(MODEL, low) == expected
    assert fingerprint(MODEL, jax.tree.map(np.asarray, PARAMS)) == expected
    policy = XQuant(bits=8, form="latent", group_size=8)
    assert fingerprint(MODEL, fit_cache(MODEL, PARAMS, policy)) == expected
    scanned = DecoderLM(MODEL.config)
    assert fingerprint(scanned, fit_cache(scanned, stacked, policy)) == expected


def test_parts_of_a_parameter_stay_where_they_are():
    """On a mesh the digest is the same, and no device is sent another's part."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    zero = _with("layers_0/attn/q/bias", lambda leaf: -0.0 * leaf)
    stacked = stack_layers(zero)
    with jax.set_mesh(mesh):
        placed = jax.device_put(stacked, sharding.shardings(stacked, mesh))
        assert fingerprint(MODEL, placed) == fingerprint(MODEL, zero)
        kernel = placed["layers"]["mlp"]["up"]["kernel"]
        assert len({shard.index for shard in kernel.addressable_shards}) == 4
        text = fitting._take.lower(kernel, True).compile().as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
