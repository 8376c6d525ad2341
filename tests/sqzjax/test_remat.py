# SPDX-License-Identifier: Apache-2.0
"""Recomputation saves memory in the unrolled layout, too, where the compiler could undo it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sqzjax.models import DecoderLM, Execution, ModelConfig, SwinConfig, SwinEmulator
from sqzjax.sphere import Grid


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


def temporary_bytes(make, remat):
    model, inputs, loss = make(remat)
    program: Any = jax.jit(jax.grad(loss)).lower(model.abstract_params(), inputs).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("make", [emulator, decoder])
def test_unrolled_layers_are_recomputed(make):
    assert 2 * temporary_bytes(make, "full") < temporary_bytes(make, "none")
