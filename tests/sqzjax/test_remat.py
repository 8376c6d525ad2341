# SPDX-License-Identifier: Apache-2.0
"""What is kept for the backward pass, what is recomputed, and what is computed only once.

Recomputation saves memory in the unrolled layout, too, where the compiler could undo it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.test_util import check_grads

from sqzjax.models import DecoderLM, Execution, ModelConfig, SwinConfig, SwinEmulator
from sqzjax.numerics import rms_norm, swiglu
from sqzjax.sphere import Grid
from tests.tolerances import GRADIENT_REL


def emulator(remat):
    config = SwinConfig(
        grid=Grid(latitudes=16, longitudes=32, layout="no_south_pole"),
        in_channels=2,
        out_channels=2,
        embed_dim=16,
        depth=6,
        num_heads=1,
        patch_size=2,
        window=(4, 8),
    )
    model = SwinEmulator(config, Execution(scan_layers=False, remat=remat))
    fields = jax.ShapeDtypeStruct((8, 1, 2, *config.grid.shape), jnp.float32)
    return model, fields, lambda params, x: model.forward(params, x).sum()


def decoder(remat):
    config = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=64,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        max_positions=128,
    )
    model: Any = DecoderLM(config, Execution(scan_layers=False, remat=remat))
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    return model, tokens, lambda params, x: jnp.sum(model.forward(params, x).logits)


def compiled(make, remat) -> Any:
    model, inputs, loss = make(remat)
    return jax.jit(jax.grad(loss)).lower(model.abstract_params(), inputs).compile()


def temporary_bytes(make, remat):
    return compiled(make, remat).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("make", [emulator, decoder])
def test_unrolled_layers_are_recomputed(make):
    assert 2 * temporary_bytes(make, "full") < temporary_bytes(make, "none")


def test_rotation_angles_are_computed_once_for_all_layers_and_both_passes():
    text = compiled(decoder, "none").as_text()
    assert text.count(" cosine(") == text.count(" sine(") == 1


@pytest.mark.parametrize(
    ("function", "shapes"),
    [(lambda x, scale: rms_norm(x, scale, 1e-5), [(6, 8), (8,)]), (swiglu, [(6, 8), (6, 8)])],
)
def test_only_inputs_are_kept_and_gradients_are_those_of_differences(function, shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    inputs = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(function, *inputs)[1]) if leaf.ndim]
    assert sorted(leaf.shape for leaf in kept) == sorted(shapes)
    check_grads(function, inputs, order=1, modes=("fwd", "rev"), rtol=GRADIENT_REL, eps=1e-2)
