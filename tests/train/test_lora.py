# SPDX-License-Identifier: Apache-2.0
"""Adapters: merged equals applied, nothing else is trained, files round-trip."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import sharding
from sqzjax.models import DecoderLM, Execution
from tests.tolerances import CHUNKED
from tests.train import toy
from train import lora, state
from train.config import LoRAConfig
from train.state import Frozen


@partial(jax.jit, static_argnums=0)
def trained_adapter(config, params):
    """Return an adapter whose `b` is no longer zero."""
    adapter = lora.init(config, params, jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), adapter)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("targets", [LoRAConfig().targets, "mlp|attn/v"])
def test_merged_equals_applied(scan, targets):
    config = LoRAConfig(rank=3, alpha=5.0, targets=targets)
    model = DecoderLM(toy.MODEL, Execution(scan_layers=scan))
    params = toy.init_params(model)
    adapter = trained_adapter(config, params)
    tokens = toy.batch()["tokens"]

    @jax.jit
    def logits(params, adapter):
        applied = model.forward(params, tokens, lora=lora.scaled(config, adapter)).logits
        merged = model.forward(lora.merge(config, params, adapter), tokens).logits
        return applied, merged, model.forward(params, tokens).logits

    applied, merged, plain = map(np.asarray, logits(params, adapter))
    np.testing.assert_allclose(merged, applied, atol=CHUNKED["float32"])
    assert np.abs(applied - plain).max() > 0.01


def test_starts_as_the_base_model_and_trains_only_the_adapter():
    config = LoRAConfig(rank=2)
    step = toy.make_step(lora=config)
    params = toy.init_params(step.model)
    adapter = jax.jit(partial(lora.init, config))(params, jax.random.key(1))
    tokens = toy.batch()["tokens"]
    forward = jax.jit(
        lambda params, **adapted: step.model.forward(params, tokens, **adapted).logits
    )
    start = forward(params, lora=lora.scaled(config, adapter))
    np.testing.assert_array_equal(start, forward(params))

    frozen = jax.tree.map(jnp.copy, params)
    train = jax.jit(step.train, donate_argnums=0)
    now = state.create(adapter, step.optimizer, None)
    shapes = {leaf.shape for leaf in jax.tree.leaves(now.opt_state[0].mu)}
    assert shapes == {leaf.shape for leaf in jax.tree.leaves(adapter)}
    first = None
    for _ in range(20):
        now, metrics = train(now, Frozen(base=frozen), toy.batch())
        first = first or float(metrics["loss"][0] / metrics["loss"][1])
    assert metrics["loss"][0] / metrics["loss"][1] < first - 0.05
    assert toy.same_bytes(frozen, params)


def test_targets_choose_layers():
    params = toy.make_step(execution=Execution()).model.abstract_params()
    found = jax.eval_shape(partial(lora.init, LoRAConfig(rank=2)), params, jax.random.key(0))
    names = {path.rsplit("/", 1)[0] for path in sharding.paths(found)}
    assert names == {f"layers/attn/{name}" for name in "qkvo"}
    assert found["layers"]["attn"]["k"]["a"].shape == (2, 16, 2)
    assert found["layers"]["attn"]["k"]["b"].shape == (2, 2, 8)
    with pytest.raises(ValueError, match="'attn/w' matches no linear layer"):
        lora.init(LoRAConfig(targets="attn/w"), params, jax.random.key(0))
    with pytest.raises(ValueError, match="is no regex"):
        LoRAConfig(targets="(")


def test_file_round_trip(tmp_path):
    config = LoRAConfig(rank=2, alpha=3.0, targets="attn/q")
    adapter = trained_adapter(config, toy.start(toy.make_step()).trained)
    lora.save(tmp_path / "adapter.safetensors", config, adapter)
    read_config, read = lora.load(tmp_path / "adapter.safetensors")
    assert read_config == config
    assert sharding.paths(read).keys() == sharding.paths(adapter).keys()
    assert toy.same_bytes(read, adapter)
