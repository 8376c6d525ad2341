# SPDX-License-Identifier: Apache-2.0
"""Residual context diffusion: its definition, what it leaves alone, gradients, and a whole run."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import config as configs
from sqzjax.models import DecoderLM, Execution, SpecialTokens
from sqzjax.residual import ResidualSettings
from sqzjax.sharding import MeshConfig, make_mesh
from tests.contracts.decoders import tiny_model, tiny_params
from tests.tolerances import CHUNKED, GRADIENT_REL, LOSS_REL, PLANNED_BYTES
from tests.train import toy
from train.config import CheckpointConfig, LoRAConfig, TrainConfig
from train.model_source import Custom, Preset
from train.objectives import RCD, BlockDiffusion, MaskedDiffusion, Reference, diffusion, rcd
from train.objectives.base import row_uniform
from train.run import dry_plan, run
from train.state import Frozen

MASK, BLOCK, LENGTH, ROWS = 60, 4, 12, 3
TOKENS = SpecialTokens(eos=(7,), mask=MASK)
BLOCKS = {"mask": "block_causal", "block_size": BLOCK, "family": "sdar"}
WHOLE = {"mask": "bidirectional", "family": "llada"}
LAYOUTS = {
    "blocks": (BlockDiffusion(), BLOCKS | {"tie_embeddings": False}),
    "whole": (MaskedDiffusion(normalizer="sequence"), WHOLE),
    "shifted": (MaskedDiffusion(stratified=True), WHOLE | {"shift_logits": True}),
}
KEY = jax.random.key(3)

# Equal to the last bit only where the same sums are fused alike.
OPTIMIZED = True


def build(layout, **residual):
    """Objective, target, its parameters, and a narrower reference with other parameters.

    One layer is enough: what is tested happens before and after them.
    """
    diffusion, fields = LAYOUTS[layout]
    fields = {"tokens": TOKENS, "num_layers": 1, **fields}
    model = tiny_model(**fields)
    small = tiny_model(**(fields | {"hidden_size": 24}))
    source = Custom(config=small.config)
    settings = ResidualSettings(**residual)
    objective = RCD(reference=source, diffusion=diffusion, residual=settings)
    return objective, model, tiny_params(model), Reference(small, tiny_params(small, 1.3))


def batch_of(seed=0):
    """Rows with a prompt, and padding at the end of one."""
    tokens = np.random.default_rng(seed).integers(0, 50, (ROWS, LENGTH)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    positions[1, -4:] = -1
    learnt = (positions >= 0) & (np.arange(LENGTH) >= np.array([[3], [0], [0]]))
    arrays = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": np.where(positions < 0, -1, 0).astype(np.int32),
        "loss_mask": learnt,
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def value_and_grad(objective, model, params, batch, **extra):
    def loss(params):
        out = objective.loss(model, params, batch, KEY, train=True, **extra)
        return out.sum, out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return out, grads


def predicting(model, hidden):
    return jnp.roll(hidden, 1, axis=1) if model.config.shift_logits else hidden


def naive_loss(objective, model, params, batch, reference):
    """The definition with whole arrays of logits and probabilities."""
    noised = objective.diffusion.noised(model.config, batch, KEY)
    inputs = dict(noised.inputs)
    logits = predicting(reference.model, reference.model.forward(reference.params, **inputs).logits)
    p = jax.nn.softmax(logits[:, :LENGTH])
    alpha = -jnp.sum(p * jnp.log(p), axis=-1, keepdims=True) / np.log(p.shape[-1])
    p, alpha = jax.lax.stop_gradient((p, alpha))
    table, ids = params["embed"]["embedding"], inputs.pop("tokens")
    residual = (1 - alpha) * table[MASK] + alpha * (p @ table)
    noisy = jnp.where(noised.masked[..., None], residual, table[ids[:, :LENGTH]])
    inputs["embeds"] = jnp.concatenate([noisy, table[ids[:, LENGTH:]]], axis=1)
    logits = predicting(model, model.forward(params, **inputs).logits)[:, :LENGTH]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][..., None], -1)[..., 0]
    able = batch["loss_mask"]
    if model.config.shift_logits:
        able &= jnp.arange(LENGTH) > 0
    count = jnp.sum(able, axis=1, keepdims=True)
    weights = noised.masked / noised.chance
    if objective.diffusion.normalizer == "sequence":
        weights = weights / count
    return jnp.sum(weights * nll), jnp.sum(alpha[..., 0] * noised.masked)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_the_definition(layout):
    objective, model, params, reference = build(layout)
    batch = batch_of()
    out, grads = value_and_grad(objective, model, params, batch, reference=reference)
    naive = lambda params: naive_loss(objective, model, params, batch, reference)  # noqa: E731
    (total, alpha), wanted = jax.jit(jax.value_and_grad(naive, has_aux=True))(params)
    np.testing.assert_allclose(out.sum, total, rtol=10 * LOSS_REL)
    np.testing.assert_allclose(out.metrics["alpha"][0], alpha, rtol=10 * LOSS_REL)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=GRADIENT_REL, atol=2 * CHUNKED["float32"] * np.abs(b).max()
        ),
        grads,
        wanted,
    )
    # Rows of words that the batch lacks learn through the mixture alone.
    unseen = sorted(set(range(60)) - set(np.asarray(batch["tokens"]).ravel().tolist()))
    if not model.config.tie_embeddings:
        assert np.abs(grads["embed"]["embedding"][np.array(unseen)]).min(axis=1).max() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_weight_it_is_plain_diffusion_bit_for_bit(layout):
    objective, model, params, reference = build(layout, alpha_rule="fixed", alpha_scale=0.0)
    batch = batch_of()
    plain = value_and_grad(objective.diffusion, model, params, batch)
    got = value_and_grad(objective, model, params, batch, reference=reference)
    assert toy.same_bytes(plain, got)
    # A reference that is sure of everything weighs nothing either, by way of all of the code.
    objective = replace(objective, residual=ResidualSettings())
    scale = {"scale": reference.params["final_norm"]["scale"] * 1e6}
    sure = {**reference.params, "final_norm": scale}
    reference = Reference(reference.model, sure)
    out, grads = value_and_grad(objective, model, params, batch, reference=reference)
    assert float(out.metrics["alpha"][0]) == 0.0
    assert toy.same_bytes(plain[0].sum, out.sum)
    assert toy.same_bytes(plain[1]["embed"], grads["embed"])


class Spy:
    """A model that remembers what it was run on."""

    def __init__(self, model):
        self.model, self.config, self.calls = model, model.config, []

    def forward(self, params, tokens=None, **arguments):
        self.calls.append({"tokens": tokens, **arguments})
        return self.model.forward(params, tokens, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_masked_positions_of_the_noisy_text_change(layout):
    objective, model, params, reference = build(layout)
    batch = batch_of()
    target, small = Spy(model), Spy(reference.model)
    objective.loss(
        target, params, batch, KEY, train=True, reference=Reference(small, reference.params)
    )
    noised = objective.diffusion.noised(model.config, batch, KEY)
    seen, ours = small.calls[0], target.calls[0]
    np.testing.assert_array_equal(seen["tokens"], noised.inputs["tokens"])
    for name in ("positions", "segment_ids", "mask"):
        for call in (seen, ours):
            left, right = call.get(name), noised.inputs.get(name)
            assert left is right or np.array_equal(left, right)
    plain = np.asarray(params["embed"]["embedding"])[np.asarray(noised.inputs["tokens"])]
    changed = (np.asarray(ours["embeds"]) != plain).any(-1)
    np.testing.assert_array_equal(changed[:, :LENGTH], noised.masked)
    assert not changed[:, LENGTH:].any() and changed.any()
    assert changed.shape[1] == (2 * LENGTH if layout == "blocks" else LENGTH)


@pytest.mark.slow
def test_cold_rows_see_no_residual(monkeypatch):
    """A row is either that of the objective with residuals or that of the one without."""
    objective, model, params, reference = build("blocks")
    cold = replace(objective, cold_rows=0.5)
    seen = []
    import sqzjax.residual as module

    monkeypatch.setattr(
        module, "inject", lambda embeds, found, masked: seen.append(found) or embeds
    )
    for chosen in (objective, cold):
        chosen.loss(model, params, batch_of(), KEY, train=True, reference=reference)
    whole, part = (np.asarray(found.alpha).reshape(ROWS, LENGTH) for found in seen)
    kept = [np.array_equal(part[row], whole[row]) for row in range(ROWS)]
    empty = [not part[row].any() for row in range(ROWS)]
    assert all(k != e for k, e in zip(kept, empty)) and any(kept) and any(empty)
    with pytest.raises(ValueError, match=r"cold_rows=1\.0"):
        replace(objective, cold_rows=1.0)


def test_which_rows_are_cold_has_nothing_to_do_with_the_noise(monkeypatch):
    """Draws of one key are the same numbers: the cold rows would be those of masked openings."""
    objective, model, params, reference = build("whole")
    cold, keys = replace(objective, cold_rows=0.5), []

    def spy(batch, key, shape=()):
        keys.append(jax.random.key_data(key))
        return row_uniform(batch, key, shape)

    for module in (rcd, diffusion):
        monkeypatch.setattr(module, "row_uniform", spy)

    @jax.jit  # of which the loss, unread, is no part
    def keys_of(key):
        cold.loss(model, params, batch_of(), key, train=True, reference=reference)
        return jnp.stack(keys)

    drawn = {tuple(key) for key in keys_of(KEY).tolist()}
    assert len(drawn) == len(keys) == 3


def test_no_gradient_reaches_the_reference():
    objective, model, params, reference = build("blocks")
    batch = batch_of()

    def loss(frozen):
        out = objective.loss(
            model, params, batch, KEY, train=True, reference=Reference(reference.model, frozen)
        )
        return out.sum

    grads = jax.jit(jax.grad(loss))(reference.params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


def test_without_a_reference_the_model_is_its_own():
    """With an adapter, it is the model and its adapter; values and gradients, in one program."""
    objective, model, params, _ = build("blocks")
    alone, batch = replace(objective, reference=None), batch_of()
    alone.check(model.config, LENGTH)
    a, b = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).normal(size=(2, 32, 2)))
    lora = {"layers_0": {"attn": {"q": {"a": a, "b": b.T}}}}
    merged = jax.tree.map(lambda leaf: leaf, params)
    merged["layers_0"]["attn"]["q"]["kernel"] += a @ b.T

    def loss(chosen, params, reference):
        return chosen.loss(
            model, params, batch, KEY, train=True, lora=lora, reference=reference
        ).sum

    @jax.jit
    def both(params, *fixed):
        own = jax.value_and_grad(lambda x: loss(alone, x, None))(params)
        return [own] + [
            jax.value_and_grad(lambda x, y=y: loss(objective, x, Reference(model, y)))(params)
            for y in fixed
        ]

    own, expected, other = both(params, merged, params)
    np.testing.assert_allclose(own[0], expected[0], rtol=LOSS_REL)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    for got, wanted in zip(jax.tree.leaves(own[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(got, wanted, atol=GRADIENT_REL * scale)
    assert abs(float(own[0] - other[0])) > 1e-4 * abs(float(own[0])), "the adapter does not matter"


def test_nothing_to_learn_is_a_zero_weight_and_finite():
    objective, model, params, reference = build("whole")
    batch = batch_of()
    batch["loss_mask"] = jnp.zeros_like(batch["loss_mask"])
    got, grads = value_and_grad(objective, model, params, batch, reference=reference)
    assert float(got.weight) == 0 and float(got.sum) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vocab_size": 62}, "vocab_size=62 and the model 61"),
        ({"tokens": SpecialTokens(mask=59)}, "mask token 59 and the model 60"),
        ({"block_size": 8}, r"\('block_causal', 8\) and the model \('block_causal', 4\)"),
        ({"mask": "bidirectional"}, r"\(mask, block_size\)=\('bidirectional', 4\)"),
        ({"max_positions": 8}, "seq_len=12 exceeds the reference's max_positions=8"),
    ],
)
def test_references_of_another_kind_are_refused(change, match):
    objective, model, _, reference = build("blocks")
    other = replace(reference.model.config, **{"embedding_size": 0, **change})
    objective.check(model.config, LENGTH)
    with pytest.raises(ValueError, match=match):
        replace(objective, reference=Custom(config=other)).check(model.config, LENGTH)


def test_what_the_diffusion_objective_refuses_is_refused():
    objective, model, params, _ = build("blocks")
    with pytest.raises(ValueError, match="seq_len=10 must be a multiple of the model"):
        objective.check(model.config, 10)
    with pytest.raises(ValueError, match="needs a block-causal model"):
        objective.check(tiny_model(tokens=TOKENS, **WHOLE).config, LENGTH)
    with pytest.raises(ValueError, match="needs reference=Reference"):
        objective.loss(model, params, batch_of(), KEY, train=True)


def toy_models():
    config = replace(toy.MODEL, mask="block_causal", block_size=4, tokens=SpecialTokens(mask=259))
    return config, replace(config, num_layers=1)


@pytest.mark.slow
def test_steps_learn_and_a_mesh_changes_nothing():
    """Thirty steps on eight rows of four words; the first again on four devices."""
    config, small = toy_models()
    objective = RCD(reference=Custom(config=small))
    small = DecoderLM(small, toy.UNROLLED)
    step = toy.make_step(
        model=DecoderLM(config, toy.UNROLLED), objective=objective, reference=small
    )
    state, frozen = toy.start(step), Frozen(None, small.init_params(jax.random.key(9)))
    batch = toy.batch(rows=8, length=12)
    batch["tokens"] %= 4
    train = jax.jit(step.train)
    first, metrics = train(state, frozen, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
        split = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
        table = frozen.reference["embed"]["embedding"]
        spread = {**frozen.reference, "embed": {"embedding": jax.device_put(table, split)}}
        _, sharded = jax.jit(step.train)(state, Frozen(None, spread), jax.device_put(batch, place))
    for name in ("loss", "alpha", "accuracy"):
        np.testing.assert_allclose(metrics[name], sharded[name], rtol=10 * LOSS_REL)
    np.testing.assert_allclose(metrics["grad_norm"], sharded["grad_norm"], rtol=GRADIENT_REL)
    losses, state = [], first
    for _ in range(30):
        state, metrics = train(state, frozen, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert np.mean(losses[-5:]) < 0.6 * np.log(toy.VOCAB) < np.mean(losses[:2])


@pytest.mark.slow
def test_a_run_with_adapters_leaves_reference_and_base_alone(tmp_path):
    config, small = toy_models()
    settings = toy.run_config(
        toy.write_text(tmp_path),
        model=Custom(config=config),
        objective=RCD(reference=Custom(config=small)),
        execution=Execution(scan_layers=True),
        lora=LoRAConfig(rank=2),
        mesh=MeshConfig(data=2, fsdp=2),
        steps=4,
        checkpoint=CheckpointConfig(interval=0),
    )
    assert run(settings, workdir=tmp_path / "work") == 0
    lines = (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()
    assert lines and all("alpha" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "millions"), [("sdar_4b", 4411), ("sdar_8b", 8191), ("llada_8b", 8016)]
)
def test_published_settings_need_no_checkpoint(name, millions):
    path = Path(__file__).resolve().parents[2] / f"configs/train/rcd_{name}.yaml"
    config = configs.load(TrainConfig, path)
    assert isinstance(config.objective, RCD) and isinstance(config.reference, Preset)
    plan = dry_plan(config)
    assert round(plan.num_params / 1e6) == millions
    reference = config.reference.resolve().num_params
    whole = 4 * (plan.num_params + reference)
    np.testing.assert_allclose(plan.parameter_bytes * plan.devices, whole, rtol=PLANNED_BYTES)
