# SPDX-License-Identifier: Apache-2.0
"""Masked and block diffusion: training passes equal decoding, weights, and what is masked."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import kvcache
from sqzjax.attention import Mask
from sqzjax.kvcache import Dense
from sqzjax.models import SpecialTokens
from tests.contracts.decoders import tiny_model, tiny_params
from tests.tolerances import GOLDEN_HIDDEN, GOLDEN_LOGITS, LOSS_REL
from train.objectives import BlockDiffusion, MaskedDiffusion, diffusion
from train.objectives.diffusion import Noised, noisy_hidden

MASK, BLOCK, LENGTH = 60, 4, 12
TOKENS = SpecialTokens(eos=(7,), mask=MASK)


def blocky(**fields):
    return tiny_model(mask="block_causal", block_size=BLOCK, family="sdar", tokens=TOKENS, **fields)


def whole(**fields):
    return tiny_model(mask="bidirectional", family="llada", tokens=TOKENS, **fields)


@partial(jax.jit, static_argnums=(0, 1))
def loss_of(objective, model, params, batch, key):
    return objective.loss(model, params, batch, key, train=True)


def noised_by(objective, model, batch, key):
    """What the objective draws, in one program; the mask is no array."""
    fixed = {}

    @jax.jit
    def draw(batch):
        noised = objective.noised(model.config, batch, key)
        arrays = {n: x for n, x in noised.inputs.items() if isinstance(x, jax.Array)}
        fixed.update({n: x for n, x in noised.inputs.items() if n not in arrays})
        return noised._replace(inputs=arrays)

    noised = draw(batch)
    return noised._replace(inputs=noised.inputs | fixed)


def changed(batch, name, where, value):
    """The batch with other entries at some places."""
    array = np.array(batch[name])
    array[where] = value
    return {**batch, name: jnp.asarray(array)}


def batch_of(rows=3, length=LENGTH, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 50, (rows, length)).astype(np.int32)
    arrays = {
        "tokens": tokens,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.zeros((rows, length), np.int32),
        "loss_mask": np.ones((rows, length), bool),
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@partial(jax.jit, static_argnums=0)
def cached_logits(model, params, batch, noisy):
    """Logits of every block as decoding sees it: clean blocks cached, its own one noisy.

    Row i of a shifted model predicts token i + 1: its window begins one position earlier.
    """
    length, shift = noisy.shape[1], int(model.config.shift_logits)
    caches = model.init_caches(Dense(), batch=len(noisy), capacity=length, max_new=BLOCK + 1)
    seen = []
    for start in range(0, length, BLOCK):
        here = slice(max(start - shift, 0), start + BLOCK)
        past = kvcache.truncate(caches, jnp.full(len(noisy), here.start))
        fed = {"positions": batch["positions"][:, here], "caches": past}
        before = batch["positions"][:, here] < start  # the token before the block is final
        window = jnp.where(before, batch["tokens"][:, here], noisy[:, here])
        out = model.forward(params, window, **fed, update_cache=False).logits
        first = out[:, :1] if shift and not start else out[:, :0]  # nothing predicts token 0
        seen.append(jnp.concatenate([first, out[:, : out.shape[1] - shift]], axis=1))
        here = slice(start, start + BLOCK)
        fed = {"positions": batch["positions"][:, here], "caches": caches}
        caches = model.forward(params, batch["tokens"][:, here], **fed).caches
    return jnp.concatenate(seen, axis=1)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("complementary", [False, True])
def test_what_is_trained_is_what_decoding_sees(shift, complementary):
    model, batch = blocky(shift_logits=shift), batch_of()
    params = tiny_params(model)
    objective = BlockDiffusion(complementary=complementary)
    noised = noised_by(objective, model, batch, jax.random.key(3))
    trained = jax.jit(lambda p: model.head(p, noisy_hidden(model, p, noised, noised.inputs)))(
        params
    )
    doubled = {name: np.repeat(x, 1 + complementary, axis=0) for name, x in batch.items()}
    seen = cached_logits(model, params, doubled, np.asarray(noised.inputs["tokens"])[:, :LENGTH])
    trained, seen = np.asarray(trained), np.asarray(seen)
    np.testing.assert_allclose(trained[:, shift:], seen[:, shift:], atol=GOLDEN_LOGITS)
    # The test can tell one from the other: without the shift the rows are others.
    moved = np.roll(trained, 1, axis=1)
    assert np.max(np.abs(moved[:, shift:] - seen[:, shift:])) > 1


def test_packed_texts_open_their_own_blocks():
    """A text in the middle of a row is trained as it would be alone."""
    model = blocky(shift_logits=True)
    params, alone = tiny_params(model), batch_of(rows=1, length=8)
    other = batch_of(rows=1, length=5, seed=4)
    joined = {name: np.concatenate([other[name], alone[name]], axis=1) for name in alone}
    joined["segment_ids"][:, 5:] = 1
    masked = np.random.default_rng(2).random((1, 8)) < 0.6

    def trained(batch, masked):
        noisy = np.where(masked, MASK, batch["tokens"])
        double = lambda a, b: jnp.asarray(np.concatenate([a, b], axis=1))  # noqa: E731
        inputs = {"tokens": double(noisy, batch["tokens"])}
        inputs |= {name: double(batch[name], batch[name]) for name in ("positions", "segment_ids")}
        inputs["mask"] = Mask(kind="noisy_clean", block_size=BLOCK)
        noised = Noised(masked, np.ones(masked.shape), inputs)
        return jax.jit(lambda params: noisy_hidden(model, params, noised, inputs))(params)

    inside = trained(joined, np.concatenate([np.zeros((1, 5), bool), masked], axis=1))
    np.testing.assert_allclose(inside[:, 6:], trained(alone, masked)[:, 1:], atol=GOLDEN_HIDDEN)


def test_complementary_views_partition_the_maskable_tokens():
    model, batch = blocky(), changed(batch_of(rows=4), "loss_mask", np.s_[0, :3], False)
    batch = changed(batch, "segment_ids", np.s_[1, 6:], -1)
    able = np.asarray(batch["loss_mask"]) & (np.asarray(batch["segment_ids"]) >= 0)
    key = jax.random.key(1)
    single = noised_by(BlockDiffusion(), model, batch, key)
    pair = noised_by(BlockDiffusion(complementary=True), model, batch, key)
    first, second = np.asarray(pair.masked)[::2], np.asarray(pair.masked)[1::2]
    np.testing.assert_array_equal(first, single.masked)
    np.testing.assert_array_equal(first ^ second, able)
    assert not (first & second).any() and first.any() and second.any()
    noisy, clean = np.split(np.asarray(pair.inputs["tokens"]), 2, axis=1)
    for view, masked in enumerate((first, second)):
        np.testing.assert_array_equal(clean[view::2], batch["tokens"])
        expected = np.where(masked, MASK, batch["tokens"])
        np.testing.assert_array_equal(noisy[view::2], expected)
    for name in ("positions", "segment_ids"):
        halves = np.split(np.asarray(pair.inputs[name]), 2, axis=1)
        np.testing.assert_array_equal(halves[0][::2], batch[name])
        np.testing.assert_array_equal(halves[0], halves[1])
        np.testing.assert_array_equal(halves[0][::2], halves[0][1::2])


@pytest.mark.parametrize("normalizer", ["token", "sequence", "batch"])
def test_a_complementary_pair_weighs_every_token_once(normalizer):
    """The sum is the plain cross-entropy of each token, where its view masks it."""
    model = blocky(shift_logits=True, num_layers=1)
    params = tiny_params(model)
    batch = changed(batch_of(rows=3), "loss_mask", np.s_[0, :7], False)
    able = np.asarray(batch["loss_mask"]) & (np.arange(LENGTH) > 0)
    objective = BlockDiffusion(complementary=True, normalizer=normalizer)
    key = jax.random.key(5)
    got = loss_of(objective, model, params, batch, key)
    noised = noised_by(objective, model, batch, key)
    doubled = {name: np.repeat(x, 2, axis=0) for name, x in batch.items()}
    noisy = np.asarray(noised.inputs["tokens"])[:, :LENGTH]
    logits = np.asarray(cached_logits(model, params, doubled, noisy), np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    tokens, masked, expected = np.asarray(batch["tokens"]), np.asarray(noised.masked), 0.0
    for row, place in np.argwhere(able):
        view = 2 * row + int(not masked[2 * row, place])
        nll = lse[view, place] - logits[view, place, tokens[row, place]]
        expected += nll / (able[row].sum() if normalizer == "sequence" else 1)
    np.testing.assert_allclose(got.sum, expected, rtol=10 * LOSS_REL)
    assert float(got.weight) == (able.sum() if normalizer == "token" else 3)
    assert float(got.metrics["masked"][0] / got.metrics["masked"][1]) == 0.5


def test_noisy_logits_equal_cached_decoding():
    """Block k of the training pass is what decoding sees: clean blocks cached, block k noisy."""
    model = blocky()
    params, batch = tiny_params(model), batch_of()
    forward = jax.jit(model.forward, static_argnames="mask")
    rng = np.random.default_rng(1)
    noisy = np.where(rng.random(batch["tokens"].shape) < 0.5, MASK, batch["tokens"])
    twice = lambda a, b: np.concatenate([a, b], axis=1)  # noqa: E731
    positions = twice(batch["positions"], batch["positions"])
    mask = Mask(kind="noisy_clean", block_size=BLOCK)
    trained = forward(params, twice(noisy, batch["tokens"]), positions=positions, mask=mask).logits
    trained, clean = np.asarray(trained), forward(params, batch["tokens"]).logits
    np.testing.assert_allclose(trained[:, LENGTH:], clean, atol=GOLDEN_LOGITS)
    seen = cached_logits(model, params, batch, noisy)
    np.testing.assert_allclose(trained[:, :LENGTH], seen, atol=GOLDEN_LOGITS)


@pytest.mark.parametrize("objective", [MaskedDiffusion(), BlockDiffusion()])
def test_the_mean_over_draws_is_the_entropy_of_a_constant_model(objective):
    """A model whose logits are all equal has cross-entropy log V; the 1/p weights keep it."""
    model = (whole if isinstance(objective, MaskedDiffusion) else blocky)(
        tie_embeddings=False, num_layers=1
    )
    params = tiny_params(model)
    params = {**params, "head": {"kernel": jnp.zeros_like(params["head"]["kernel"])}}
    batch = batch_of(rows=8)
    loss = jax.jit(lambda key: objective.loss(model, params, batch, key, train=True))
    draws = [jax.tree.map(np.asarray, loss(jax.random.key(seed))) for seed in range(300)]
    assert {float(draw.weight) for draw in draws} == {8 * LENGTH}
    means = np.array([float(draw.sum / draw.weight) for draw in draws])
    spread = means.std() / np.sqrt(len(means))
    assert abs(means.mean() - np.log(model.config.embedding_size)) < 4 * spread
    shares = [float(d.metrics["masked"][0] / d.metrics["masked"][1]) for d in draws]
    assert abs(np.mean(shares) - 0.5) < 0.02


@partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch):
    places = {name: batch[name] for name in ("positions", "segment_ids")}
    return model.forward(params, batch["tokens"], **places).logits


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("normalizer", ["token", "sequence", "batch"])
def test_the_loss_equals_its_definition(shift, normalizer, monkeypatch):
    model = whole(shift_logits=shift, num_layers=1)
    params, batch = tiny_params(model), batch_of(rows=2, length=8)
    batch = changed(batch, "loss_mask", np.s_[0, :3], False)  # a prompt
    batch = changed(batch, "segment_ids", np.s_[1, 6:], -1)  # padding
    batch = changed(batch, "positions", np.s_[1, 6:], -1)
    objective = MaskedDiffusion(normalizer=normalizer)
    key = jax.random.key(5)
    got = loss_of(objective, model, params, batch, key)
    noise, draw = jax.random.split(key)
    level = [jax.random.uniform(jax.random.fold_in(noise, row)) for row in range(2)]
    chance = (1 - 1e-3) * np.asarray(level) + 1e-3
    drawn = [jax.random.uniform(jax.random.fold_in(draw, row), (8,)) for row in range(2)]
    hit = np.asarray(drawn) < chance[:, None]
    able = np.asarray(batch["loss_mask"]) & (np.asarray(batch["segment_ids"]) >= 0)
    if shift:
        able = able & (np.arange(8) > 0)
    noisy = np.where(hit & able, MASK, batch["tokens"])
    logits = np.asarray(
        logits_of(model, params, {**batch, "tokens": noisy}),
        np.float64,
    )
    losses = np.log(np.exp(logits).sum(-1))
    expected = 0.0
    for row, place in np.argwhere(hit & able):
        source = place - 1 if shift else place
        nll = losses[row, source] - logits[row, source, batch["tokens"][row, place]]
        count = able[row].sum() if normalizer == "sequence" else 1
        expected += nll / chance[row] / count
    np.testing.assert_allclose(got.sum, expected, rtol=10 * LOSS_REL)
    assert float(got.weight) == (able.sum() if normalizer == "token" else 2)


ONE = (whole(num_layers=1), blocky(num_layers=1))


def test_a_block_shares_its_noise_and_stratified_rows_spread_it(monkeypatch):
    batch, seen = batch_of(rows=64), []
    original = diffusion._corrupt

    def spy(config, batch, chance, key):
        seen.append(chance)
        return original(config, batch, chance, key)

    monkeypatch.setattr(diffusion, "_corrupt", spy)

    def chance(objective, model):
        def run(params):
            objective.loss(model, params, batch, jax.random.key(0), train=True)
            return seen.pop()  # the rest of the program is dropped

        return np.asarray(jax.jit(run)(tiny_params(model)))

    blocks = chance(BlockDiffusion(), ONE[1]).reshape(64, -1, BLOCK)
    assert np.all(blocks == blocks[..., :1])
    assert len(np.unique(blocks[..., 0])) == 64 * LENGTH // BLOCK
    rows = chance(BlockDiffusion(noise_per="sequence"), ONE[1])
    assert np.all(rows == rows[:, :1])
    levels = np.sort((chance(MaskedDiffusion(stratified=True), ONE[0])[:, 0] - 1e-3) / 0.999)
    gaps = 64 * np.append(np.diff(levels), 1 + levels[0] - levels[-1])  # on a circle
    assert gaps.min() > 0.5 and gaps.max() < 2


def test_texts_packed_into_a_row_have_noise_levels_of_their_own():
    """One level for each packed sample, as SDAR is fine-tuned."""
    batch, first = batch_of(), 5
    batch = changed(batch, "positions", np.s_[:, first:], np.arange(LENGTH - first))
    batch = changed(batch, "segment_ids", np.s_[:, first:], 1)
    batch = changed(batch, "positions", np.s_[:, -1], -1)
    batch = changed(batch, "segment_ids", np.s_[:, -1], -1)
    objective = BlockDiffusion(noise_per="sequence")
    noised = noised_by(objective, ONE[1], batch, jax.random.key(0))
    one, other = np.split(np.asarray(noised.chance)[:, :-1], [first], axis=1)
    assert np.all(one == one[:, :1]) and np.all(other == other[:, :1])
    assert np.all(one[:, 0] != other[:, 0])
    assert np.isfinite(noised.chance).all()


def test_nothing_to_learn_is_a_zero_weight_and_finite():
    batch = changed(batch_of(), "loss_mask", np.s_[:], False)
    for objective, model in ((MaskedDiffusion(), ONE[0]), (BlockDiffusion(), ONE[1])):
        got = loss_of(objective, model, tiny_params(model), batch, jax.random.key(0))
        assert float(got.weight) == 0 and float(got.sum) == 0


@pytest.mark.parametrize(
    ("objective", "model", "match"),
    [
        (MaskedDiffusion(), tiny_model(), "needs a mask token"),
        (MaskedDiffusion(), blocky(), "kind: block_diffusion"),
        (
            BlockDiffusion(),
            whole(),
            r"mask: block_causal \(kind: custom: model.config.mask\)",
        ),
        (BlockDiffusion(), tiny_model(), "needs a mask token"),
    ],
)
def test_models_that_cannot_be_trained_so_are_refused(objective, model, match):
    with pytest.raises(ValueError, match=match):
        objective.check(model.config, LENGTH)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="seq_len=18 must be a multiple of"):
        BlockDiffusion().check(blocky().config, 18)
    for kind in (MaskedDiffusion, BlockDiffusion):
        with pytest.raises(ValueError, match="min_noise=0"):
            dataclasses.replace(kind(), min_noise=0.0)
