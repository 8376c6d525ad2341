# SPDX-License-Identifier: Apache-2.0
"""Rules, and eight fake devices against one (reliability case 32)."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sqzjax import kvcache, sharding
from sqzjax.models import DecoderLM, Execution, ModelConfig
from sqzjax.sharding import MeshConfig
from tests.parameters import drawn
from tests.tolerances import SHARDED
from train import state
from train.objectives import LanguageModeling
from train.optim import SGD, Constant
from train.plan import lay_out
from train.step import Step

BATCH, LENGTH = 8, 16
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=-1),
}


def config(**changes) -> ModelConfig:
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_positions": 64,
    }
    return ModelConfig(**{**fields, **changes})


MODELS = {
    "grouped": DecoderLM(config(qkv_bias=True, out_bias=True)),
    "tied": DecoderLM(config(tie_embeddings=True, qk_norm=True, mlp_bias=True)),
    "unrolled": DecoderLM(config(), Execution(scan_layers=False)),
}


def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(5).integers(0, 64, (BATCH, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": np.zeros_like(tokens),
        "loss_mask": np.ones(tokens.shape, bool),
    }


def one_step(model, mesh_config):
    """Return loss, new parameters and logits; on one device without any sharding for None."""
    optimizer = SGD(momentum=0.0).build()
    step = Step(
        model=model,
        objective=LanguageModeling(),
        optimizer=optimizer,
        rate=lambda s: Constant(learning_rate=1.0).rate(s, 1),
    )
    params, data = drawn(model), batch()

    def run(params, data):
        logits = model.forward(params, data["tokens"]).logits
        new, metrics = step.train(state.create(params, optimizer, None), None, data)
        return metrics["loss"][0] / metrics["loss"][1], new.trained, logits

    if mesh_config is None:
        return jax.jit(run)(params, data)
    mesh = sharding.make_mesh(mesh_config)
    placed = sharding.shardings(params, mesh)
    with jax.set_mesh(mesh):
        out = (None, placed, None)
        params, data = jax.device_put((params, data), (placed, sharding.batch_sharding(mesh)))
        return jax.jit(run, out_shardings=out)(params, data)


@cache
def single(name):
    return one_step(MODELS[name], None)


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        *(("grouped", mesh) for mesh in MESHES),
        ("tied", "tensor"),
        ("tied", "mixed"),
        ("unrolled", "mixed"),
    ],
)
def test_train_step_equals_one_device(model, mesh):
    loss, params, logits = one_step(MODELS[model], MESHES[mesh])
    wanted_loss, wanted_params, wanted_logits = single(model)
    tolerance = SHARDED["float32"]
    np.testing.assert_allclose(loss, wanted_loss, atol=tolerance)
    np.testing.assert_allclose(logits, wanted_logits, atol=tolerance)
    for path, leaf in sharding.paths(params).items():
        wanted = sharding.paths(wanted_params)[path]
        np.testing.assert_allclose(leaf, wanted, atol=tolerance, err_msg=path)


@pytest.mark.parametrize(("model", "mesh"), [("grouped", "tensor"), ("unrolled", "mixed")])
def test_cached_decode_equals_one_device(model, mesh):
    decoder = MODELS[model]
    params, tokens = drawn(decoder), batch()["tokens"]
    whole = jax.jit(decoder.forward)(params, tokens).logits
    devices = sharding.make_mesh(MESHES[mesh])
    caches = decoder.init_caches(kvcache.Dense(), batch=BATCH, capacity=LENGTH, max_new=12)
    places = sharding.cache_shardings(caches, devices, decoder.config.num_kv_heads)
    with jax.set_mesh(devices):
        params = jax.device_put(params, sharding.shardings(params, devices))
        caches = jax.device_put(caches, places)

        @jax.jit
        def advance(params, caches, tokens):
            steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = caches.length[:, None] + steps
            out = decoder.forward(params, tokens, positions=positions, caches=caches)
            return out.logits, out.caches

        first, caches = advance(params, caches, tokens[:, :12])
        parts = [first]
        for index in range(12, LENGTH):
            logits, caches = advance(params, caches, tokens[:, index : index + 1])
            parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=SHARDED["float32"])


def test_parameters_are_split():
    """Each of eight devices holds an eighth of the matrices, norms are everywhere."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    params = MODELS["grouped"].abstract_params()
    placed = sharding.paths(sharding.shardings(params, mesh))
    for path, leaf in sharding.paths(params).items():
        part = np.prod(placed[path].shard_shape(leaf.shape)) / leaf.size
        wanted = {"kernel": 8, "embedding": 8, "scale": 1}.get(path.split("/")[-1])
        wanted = wanted or (1 if "/o/" in path else 4)
        assert part == 1 / wanted, path


def test_optimizer_state_lies_beside_its_parameters():
    from sqzjax.models import SIZES
    from train.config import LoRAConfig, TrainConfig
    from train.model_source import Preset
    from train.optim import Adafactor, Muon

    model = DecoderLM(SIZES["stories260k"])
    run = TrainConfig(
        model=Preset(name="stories260k"), mesh=MeshConfig(data=1, fsdp=2, tensor=4), ema=0.9
    )
    trained = lay_out(run, model).state
    specs = {path: leaf.sharding.spec for path, leaf in sharding.paths(trained.trained).items()}
    for name in ("0/mu", "0/nu"):
        moments = sharding.paths(trained.opt_state)
        assert {p: moments[f"{name}/{p}"].sharding.spec for p in specs} == specs
    averages = sharding.paths(trained.average)
    assert {path: leaf.sharding.spec for path, leaf in averages.items()} == specs

    from dataclasses import replace

    for optimizer in (Adafactor(), Muon()):
        factored = lay_out(replace(run, optimizer=optimizer), model).state
        shapes = {p: leaf.shape for p, leaf in sharding.paths(factored.trained).items()}
        for path, leaf in sharding.paths(factored.opt_state).items():
            owner = [p for p in shapes if path.endswith(p) and shapes[p] == leaf.shape]
            assert leaf.sharding.spec == (specs[owner[0]] if owner else PartitionSpec()), path

    adapters = lay_out(replace(run, lora=LoRAConfig(rank=2)), model).state
    placed = sharding.paths(adapters.trained)
    assert placed["layers/attn/q/b"].sharding.spec == PartitionSpec(None, None, "tensor")
    assert placed["layers/attn/o/a"].sharding.spec == PartitionSpec(None, "tensor", None)


def test_specs_name_trailing_dimensions():
    leaf = jax.ShapeDtypeStruct((2, 8, 16), jnp.float32)
    tree = {
        "layers": {"attn": {"q": {"kernel": leaf}}},
        "layers_0": {"mlp": {"down": {"kernel": leaf}}},
    }
    found = sharding.paths(sharding.specs(tree))
    assert found["layers/attn/q/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["layers_0/mlp/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    mine = (("attn/q", (None, "data")),)
    assert sharding.paths(sharding.specs(tree, mine))["layers/attn/q/kernel"] == PartitionSpec(
        None, None, "data"
    )


def test_rule_errors():
    params = MODELS["grouped"].abstract_params()
    mesh = sharding.make_mesh(MeshConfig(data=1, tensor=8))
    unknown = {"odd": {"thing": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with pytest.raises(ValueError, match=r"odd/thing \(4,\): no rule matches"):
        sharding.specs(unknown)
    with pytest.raises(ValueError, match="fewer dimensions"):
        sharding.specs(unknown, (("thing", ("data", "fsdp")),))
    with pytest.raises(ValueError, match="matches no parameter"):
        sharding.check_unused((("attn/w$", ("fsdp",)),), params)
    with pytest.raises(ValueError, match="hidden by the rules before it"):
        sharding.check_unused((("attn", ()), ("attn/q/kernel", ("fsdp",))), params)
    with pytest.raises(ValueError, match="twice"):
        sharding.specs(params, (("kernel", ("fsdp", "fsdp")),))
    with pytest.raises(ValueError, match="names mesh axis 'model'"):
        sharding.specs(params, (("kernel", ("model",)),))
    uneven = {"head": {"kernel": jax.ShapeDtypeStruct((32, 63), jnp.float32)}}
    with pytest.raises(
        ValueError, match=r"size 63 .* not a multiple of tensor=8; use size 56 or 64"
    ):
        sharding.shardings(uneven, mesh)


def test_mesh_and_batch_errors():
    with pytest.raises(ValueError, match="only one axis may be -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="fsdp=0 must be >= 1"):
        MeshConfig(fsdp=0)
    with pytest.raises(ValueError, match=r"multiple of 3 devices and 8 are present"):
        sharding.make_mesh(MeshConfig(data=-1, tensor=3))
    with pytest.raises(ValueError, match=r"multiple of 16 devices and 8 are present"):
        sharding.make_mesh(MeshConfig(data=4, tensor=4))
    assert sharding.make_mesh(MeshConfig(data=2)).size == 2
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2))
    sharding.check_batch(8, mesh, accumulation=2)
    with pytest.raises(ValueError, match=r"batch_size=6 must be a multiple of 4 .*; use 4 or 8"):
        sharding.check_batch(6, mesh)
