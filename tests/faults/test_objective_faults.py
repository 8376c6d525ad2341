# SPDX-License-Identifier: Apache-2.0
"""Diffusion objectives under the trainer's guard: repetition, accumulation, NaN, empty batches."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.models import SpecialTokens
from sqzjax.problems import Sorting
from tests.contracts.decoders import tiny_model, tiny_params
from tests.tolerances import ACCUMULATION_REL
from tests.train import toy
from train import data
from train.model_source import Custom
from train.objectives import CDLM, RCD, BlockDiffusion, MaskedDiffusion
from train.state import Frozen, create

MASK, BLOCK, ROWS, LENGTH = 60, 4, 8, 12
TOKENS = SpecialTokens(eos=(7,), mask=MASK)
SMALL = {"tokens": TOKENS, "num_layers": 1}  # what is tested happens around the model
BLOCKS = tiny_model(**SMALL, mask="block_causal", block_size=BLOCK, family="sdar")
WHOLE = tiny_model(**SMALL, mask="bidirectional", family="llada")
OBJECTIVES = {
    "masked_diffusion": (MaskedDiffusion(stratified=True), WHOLE),
    "block_diffusion": (BlockDiffusion(), BLOCKS),
    "complementary": (BlockDiffusion(complementary=True, noise_per="sequence"), BLOCKS),
    "rcd": (RCD(reference=Custom(config=BLOCKS.config)), BLOCKS),
    "cdlm": (CDLM(reference=Custom(config=WHOLE.config)), BLOCKS),
}
every = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.mark.parametrize("name", ["masked_diffusion", "block_diffusion", "rcd"])
def test_a_mask_token_that_texts_contain_is_refused(name):
    """Its places in a text would look masked, and never be learned."""
    objective, model = OBJECTIVES[name]
    source = data.Problems(problems=(Sorting(length=4, alphabet="abcd"),), count=8)
    settings = data.DataConfig(sources=(source,), eval_fraction=0)
    documents = data.build(settings, seed=0, batch_size=1, seq_len=8)
    objective.check_data(documents, model.config)
    letter = replace(model.config, vocab_size=260, embedding_size=0, tokens=SpecialTokens(mask=97))
    with pytest.raises(ValueError, match="mask token 97 occurs in the problems source"):
        objective.check_data(documents, letter)


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    response = positions >= BLOCK
    rank = np.full((ROWS, LENGTH), -1, np.int32)
    for row in range(ROWS):
        for start in range(BLOCK, LENGTH, BLOCK):
            rank[row, start : start + BLOCK] = start - BLOCK + rng.permutation(BLOCK)
    arrays = {
        "tokens": rng.integers(0, 50, (ROWS, LENGTH)).astype(np.int32),
        "positions": positions,
        "segment_ids": np.zeros((ROWS, LENGTH), np.int32),
        "loss_mask": response,
        "reference": rng.integers(0, 50, (ROWS, LENGTH)).astype(np.int32),
        "prompt_length": np.full(ROWS, BLOCK, np.int32),
        "rank": rank,
        "hidden": rng.normal(size=(ROWS, LENGTH - BLOCK, 32)).astype(np.float32),
    }
    return {key: jnp.asarray(array) for key, array in arrays.items()}


@cache
def training(name, accumulation=1):
    """The compiled step of an objective, a first state, and its frozen reference."""
    objective, model = OBJECTIVES[name]
    step = toy.make_step(model=model, objective=objective, accumulation=accumulation)
    frozen = Frozen()
    if getattr(objective, "reference", None) is not None:
        reference = WHOLE if name == "cdlm" else BLOCKS
        step = replace(step, reference=reference)
        frozen = Frozen(reference=tiny_params(reference, 1.3))
    return jax.jit(step.train), create(tiny_params(model), step.optimizer, None), frozen


def losses(name, steps, accumulation=1):
    train, state, frozen = training(name, accumulation)
    found = []
    for seed in range(steps):
        state, metrics = train(state, frozen, batch_of(seed))
        found.append(np.float32(metrics["loss"][0]) / np.float32(metrics["loss"][1]))
    return np.array(found)


@every
def test_the_same_seed_gives_the_same_bytes(name):
    """Reliability case 11."""
    first = losses(name, 20)
    assert first.tobytes() == losses(name, 20).tobytes() and np.isfinite(first).all()


@every
def test_accumulation_changes_no_loss(name):
    """Reliability case 11: a row's noise is its own, whatever microbatch it is in."""
    np.testing.assert_allclose(losses(name, 1, 4), losses(name, 1), rtol=ACCUMULATION_REL)


@every
def test_a_parameter_that_is_not_finite_rejects_the_step(name):
    """Reliability case 15."""
    train, state, frozen = training(name)
    scale = state.trained["final_norm"]["scale"].at[0].set(jnp.nan)
    broken = replace(state, trained={**state.trained, "final_norm": {"scale": scale}})
    after, _ = train(broken, frozen, batch_of())
    assert int(after.rejected) == 1
    assert toy.same_bytes((after.trained, after.opt_state), (broken.trained, broken.opt_state))


@every
@pytest.mark.parametrize("empty", ["no target", "padding"])
def test_batches_without_targets_change_nothing(name, empty):
    """Reliability case 16."""
    train, state, frozen = training(name)
    batch = batch_of()
    batch["loss_mask"] = jnp.zeros_like(batch["loss_mask"])
    batch["rank"] = jnp.full_like(batch["rank"], -1)
    if empty == "padding":
        batch["positions"] = jnp.full_like(batch["positions"], -1)
        batch["segment_ids"] = jnp.full_like(batch["segment_ids"], -1)
    after, metrics = train(state, frozen, batch)
    assert metrics["loss"] == (0.0, 0.0)
    assert int(after.rejected) == 0
    assert toy.same_bytes((after.trained, after.opt_state), (state.trained, state.opt_state))


@pytest.mark.parametrize("name", ["masked_diffusion", "block_diffusion", "rcd", "cdlm"])
@pytest.mark.parametrize("level", [0.0, 1.0 - 2.0**-24])
def test_extreme_noise_gives_finite_losses(name, level, monkeypatch):
    """Reliability case 16: nothing masked but by chance, and everything masked."""
    objective, model = OBJECTIVES[name]
    module = "train.objectives." + ("cdlm" if name == "cdlm" else "diffusion")
    monkeypatch.setattr(
        f"{module}.row_uniform",
        lambda batch, key, shape=(): jnp.full((ROWS, *shape), level, jnp.float32),
    )
    if name == "masked_diffusion":
        objective = MaskedDiffusion()
    _, state, frozen = training(name)
    extra = {}
    if frozen.reference is not None:
        from train.objectives import Reference

        extra["reference"] = Reference(WHOLE if name == "cdlm" else BLOCKS, frozen.reference)

    def loss(params, batch):
        return objective.loss(model, params, batch, jax.random.key(0), train=True, **extra)

    out = jax.jit(loss)(state.trained, batch_of())
    assert np.isfinite(out.sum) and np.isfinite(out.weight)
