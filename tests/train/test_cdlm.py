# SPDX-License-Identifier: Apache-2.0
"""CDLM: the drawn states, the three losses against float64, and a run from teacher to student."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.decode import Diffusion, Generator, SamplingConfig
from sqzjax.decode.reuse import Exact, NoReuse
from sqzjax.errors import ConfigError
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.kvcache import Dense
from sqzjax.models import ModelConfig, SpecialTokens
from sqzjax.problems import Sorting
from sqzjax.sharding import MeshConfig
from tests.contracts.decoders import tiny_model, tiny_params
from tests.tolerances import CHUNKED, GOLDEN_LOGITS, LOSS_REL
from tests.train import toy
from train import data
from train.collect import run as record
from train.collect_config import CollectConfig
from train.config import EvalConfig, LoRAConfig, TrainConfig
from train.model_source import Adjust, Custom, Pretrained
from train.objectives import CDLM, MaskedDiffusion, Reference
from train.objectives import cdlm as module
from train.optim import Constant
from train.run import run
from train.session import Session

MASK, BLOCK, LENGTH, WIDTH = 60, 4, 8, 14
TOKENS = SpecialTokens(eos=(7,), mask=MASK)
PROMPTS = (6, 4)  # the first block of row 0 begins with the prompt's tail
COUNTS = (6, 8)  # so that responses end with a block


draw_state = jax.jit(module.draw_state, static_argnums=(0, 3))
split = jax.jit(module.split, static_argnums=2)
hidden_of = jax.jit(module._forward, static_argnums=0)


def student(**fields):
    fields = {"mask": "block_causal", "block_size": BLOCK, "family": "sdar", **fields}
    return tiny_model(tokens=TOKENS, **fields)


def batch_of(seed=0, hidden_size=32):
    rng = np.random.default_rng(seed)
    rows = len(PROMPTS)
    rank = np.full((rows, WIDTH), -1, np.int32)
    for row, (begin, count) in enumerate(zip(PROMPTS, COUNTS)):
        done = 0
        while done < count:
            size = BLOCK - (begin + done) % BLOCK
            rank[row, begin + done : begin + done + size] = done + rng.permutation(size)
            done += size
    return {
        "tokens": jnp.asarray(rng.integers(0, 50, (rows, WIDTH)), jnp.int32),
        "reference": jnp.asarray(rng.integers(0, 50, (rows, WIDTH)), jnp.int32),
        "positions": jnp.tile(jnp.arange(WIDTH, dtype=jnp.int32), (rows, 1)),
        "prompt_length": jnp.asarray(PROMPTS, jnp.int32),
        "rank": jnp.asarray(rank),
        "hidden": jnp.asarray(rng.normal(size=(rows, LENGTH, hidden_size)), jnp.float32),
    }


def draw(model, batch, least=1e-3):
    """Return a key whose states lack part of a block and whole blocks, and those states."""
    for seed in range(100):
        key = jax.random.key(seed)
        now = jax.tree.map(np.asarray, draw_state(model.config, batch, key, least))
        if now.later.any() and now.masked.any() and 1 < now.filled[0].sum() < BLOCK:
            return key, now
    raise AssertionError("no such key")


def test_states_are_those_of_the_equations():
    """U is what the block lacks: all of it at its start, one position before its end; S later."""
    rank = np.asarray(batch_of()["rank"])
    for step in range(max(COUNTS)):
        block, filled, later = map(np.asarray, split(rank, np.full(2, step), BLOCK))
        for row, count in enumerate(COUNTS):
            if step >= count:
                continue
            place = {int(r): i for i, r in enumerate(rank[row]) if r >= 0}
            assert block[row] == place[step] // BLOCK
            ends = (int(block[row]) + 1) * BLOCK
            lacking = [i for r, i in place.items() if r >= step and i < ends]
            assert sorted(lacking) == np.flatnonzero(filled[row]).tolist()
            assert np.flatnonzero(later[row]).tolist() == sorted(
                i for i in place.values() if i >= ends
            )
            closes = ends - PROMPTS[row]  # the step at which the block is full
            assert filled[row].sum() == closes - step
            opens = max(0, closes - BLOCK)
            if step == opens:
                assert filled[row].sum() == min(BLOCK, closes)
            if step == closes - 1:
                assert filled[row].sum() == 1


def definition(objective, model, params, batch, teacher, now):
    """The loss of Algorithm 2 in float64, row by row."""
    shift, batch = int(model.config.shift_logits), jax.tree.map(np.asarray, batch)
    mask = np.asarray
    states = [
        np.where(now.filled | now.later, MASK, batch["tokens"]),
        np.where(now.later, MASK, batch["tokens"]),
        np.where(now.masked, MASK, batch["reference"]),
    ]

    def log_softmax(z):
        z = np.asarray(z, np.float64)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    forward = jax.jit(lambda tokens: model.forward(params, tokens).logits)
    logits = [log_softmax(forward(tokens)) for tokens in states]
    parts = np.zeros(3)
    for row, begin in enumerate(PROMPTS):
        for i in np.flatnonzero(mask(now.filled[row])):
            target = log_softmax(batch["hidden"][row, i - begin] @ teacher)
            kl = (np.exp(target) * (target - logits[0][row, i - shift])).sum()
            parts[0] += kl / now.filled[row].sum()
        for i in np.flatnonzero(mask(now.later[row])):
            target = logits[1][row, i - shift]
            kl = (np.exp(target) * (target - logits[0][row, i - shift])).sum()
            parts[1] += kl / now.later[row].sum()
        for i in np.flatnonzero(mask(now.masked[row])):
            nll = -logits[2][row, i - shift, batch["reference"][row, i]]
            parts[2] += nll / float(now.noise[row]) / now.response[row].sum()
    return parts


@pytest.mark.parametrize("shift", [False, True])
def test_the_loss_equals_its_definition(shift):
    model = student(shift_logits=shift)
    params, batch = tiny_params(model), batch_of()
    kernel = np.random.default_rng(4).normal(size=(32, 61))
    frozen = student(tie_embeddings=False)
    teacher = Reference(frozen, {"head": {"kernel": jnp.asarray(kernel.astype(np.float32))}})
    objective = CDLM(consistency=0.5, mask_prediction=0.1)
    key, now = draw(model, batch)
    got = jax.jit(
        lambda key: objective.loss(model, params, batch, key, train=True, reference=teacher)
    )(key)
    parts = definition(objective, model, params, batch, kernel, now)
    for name, part in zip(("distillation", "consistency", "mask_prediction"), parts):
        np.testing.assert_allclose(got.metrics[name][0], part, rtol=100 * LOSS_REL)
    np.testing.assert_allclose(got.sum, parts @ [1.0, 0.5, 0.1], rtol=100 * LOSS_REL)
    assert float(got.weight) == 2


def test_parts_that_weigh_nothing_cost_no_pass(monkeypatch):
    model, batch = student(), batch_of()
    params, passes = tiny_params(model), []
    forward = module._forward
    monkeypatch.setattr(module, "_forward", lambda *a: passes.append(1) or forward(*a))
    reference = Reference(model, params)
    for weights, expected in [((1, 0, 0), 1), ((0, 1, 0), 2), ((0, 0, 1), 1), ((1, 1, 1), 3)]:
        passes.clear()
        names = ("distillation", "consistency", "mask_prediction")
        loss = partial(CDLM(**dict(zip(names, map(float, weights)))).loss, model, train=True)
        out = jax.eval_shape(partial(loss, reference=reference), params, batch, jax.random.key(0))
        assert len(passes) == expected
        assert set(out.metrics) == {n for n, w in zip(names, weights) if w}


def test_no_gradient_passes_the_completion():
    """The gradient of the consistency loss is that with the completion's states given as data."""
    model, batch = student(), batch_of()
    params, (key, now) = tiny_params(model), draw(model, batch)
    objective = CDLM(distillation=0.0, consistency=1.0, mask_prediction=0.0)
    full = jnp.asarray(np.where(now.later, MASK, batch["tokens"]))
    clean = hidden_of(model, params, None, batch, full)
    state = jnp.asarray(np.where(now.filled | now.later, MASK, batch["tokens"]))

    def given(params):
        hidden = module._forward(model, params, None, batch, state)
        return module._agree(model, params, batch, now, hidden, clean)

    whole = lambda p: objective.loss(model, p, batch, key, train=True).sum  # noqa: E731
    found, expected = (jax.jit(jax.grad(loss))(params) for loss in (whole, given))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=CHUNKED["float32"])
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(found)) > 0


def test_a_student_that_equals_the_teacher_has_no_distillation_loss():
    model, batch = student(), batch_of()
    params, (key, now) = tiny_params(model), draw(model, batch)
    state = np.where(now.filled | now.later, MASK, batch["tokens"])
    hidden = hidden_of(model, params, None, batch, state)
    objective = CDLM(consistency=0.0, mask_prediction=0.0)

    @jax.jit
    def loss(params, batch, hidden):
        batch = {**batch, "hidden": module._take(hidden, module._response(batch))}
        reference = Reference(model, params)
        return objective.loss(model, params, batch, key, train=True, reference=reference).sum

    assert abs(float(loss(params, batch, hidden))) < CHUNKED["float32"]


@pytest.mark.parametrize("shift", [False, True])
def test_training_sees_what_cached_decoding_sees(shift):
    """Whole rows under the mask against blocks with a cache, each over its partly filled state."""
    model, batch = student(shift_logits=shift), batch_of()
    params = tiny_params(model)

    @jax.jit
    def both(params, batch):
        whole = model.forward(params, batch["tokens"][:, :12]).logits
        caches = model.init_caches(Dense(), batch=2, capacity=12, max_new=BLOCK)
        parts = []
        for start in range(0, 12, BLOCK):
            here = slice(start, start + BLOCK)
            fed = {"positions": batch["positions"][:, here], "caches": caches}
            out = model.forward(params, batch["tokens"][:, here], **fed)
            caches = out.caches
            parts.append(out.logits)
        return whole, jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(*both(params, batch), atol=GOLDEN_LOGITS)


TOY = ModelConfig(
    family="llada",
    vocab_size=260,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    max_positions=64,
    mask="bidirectional",
    tokens=SpecialTokens(eos=(257,), pad=258, mask=259),
)
DOCUMENTS = data.DataConfig(
    sources=(data.Problems(problems=(Sorting(length=4, alphabet="abcd"),), count=24),),
    packing="padded",
    pad_with_eos=True,
    eval_fraction=0.0,
)


def teacher_run(**changes):
    base = TrainConfig(
        model=Custom(config=TOY),
        data=DOCUMENTS,
        objective=MaskedDiffusion(),
        execution=toy.UNROLLED,
        mesh=MeshConfig(data=1),
        batch_size=8,
        seq_len=16,
        steps=6,
        schedule=Constant(learning_rate=3e-3),
    )
    return replace(base, **changes)


def recording(**changes):
    base = CollectConfig(
        model=Custom(config=TOY),
        execution=toy.UNROLLED,
        data=DOCUMENTS,
        length=8,
        block_size=4,
        max_prompt=8,
        batch_size=8,
        shard_size=16,
        mesh=MeshConfig(data=1),
    )
    return replace(base, **changes)


@pytest.mark.slow
def test_from_teacher_to_student(tmp_path):
    """Train a teacher, record it, train a student, decode it with the exact cache and without."""
    assert run(teacher_run(export=True), workdir=tmp_path / "teacher") == 0
    teacher = Pretrained(path=str(tmp_path / "teacher/export"))
    assert record(recording(model=teacher), workdir=tmp_path / "collect") == 0
    path = str(tmp_path / "collect")
    config = teacher_run(
        model=replace(teacher, adjust=Adjust(mask="block_causal", block_size=4)),
        data=data.TrajectoryData(path=path, eval_fraction=0.2),
        objective=CDLM(),
        lora=LoRAConfig(rank=4, alpha=8.0, targets="."),
        eval=EvalConfig(interval=3, batches=1),
    )
    assert run(config, workdir=tmp_path / "student") == 0
    session = Session(config, tmp_path / "student")
    with Checkpointer(tmp_path / "student/checkpoints") as checkpoints:
        state, meta = session.restore(checkpoints, None)
    assert meta["step"] == 6 and float(jnp.abs(jax.tree.leaves(state.trained)[1]).max()) > 0
    params = session.export_params(state, session.frozen_params())
    sampling = SamplingConfig(max_new_tokens=8, ignore_eos=True)
    prompts = ["dcba>", "ab>"]
    outs = [
        Generator(
            session.model,
            params,
            tokenizer=session.dataset.tokenizer,
            decoder=Diffusion(model=session.model, reuse=reuse),
        ).generate(prompts, sampling)
        for reuse in (Exact(), NoReuse())
    ]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)


def test_configurations_that_cannot_work_are_refused(tmp_path):
    block = Custom(config=replace(TOY, mask="block_causal", block_size=4))
    path = data.TrajectoryData(path=str(tmp_path))
    good = teacher_run(model=block, data=path, objective=CDLM(), lora=LoRAConfig())
    good.resolve_model()
    for changes, message in [
        ({"data": DOCUMENTS}, "needs data.kind: trajectories, not 'documents'"),
        ({"lora": None}, "distillation needs the teacher's head"),
        ({"model": Custom(config=TOY)}, "trains a block-causal student"),
        ({"objective": CDLM(reference=Custom(config=replace(TOY, embedding_size=264)))}, "264"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(good, **changes).resolve_model()
    with pytest.raises(ValueError, match="one of them > 0"):
        CDLM(distillation=0.0, consistency=0.0, mask_prediction=0.0)
    with pytest.raises(ConfigError, match="a recording has no steps"):
        record(recording(), workdir=tmp_path, resume="3")
