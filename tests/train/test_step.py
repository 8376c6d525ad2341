# SPDX-License-Identifier: Apache-2.0
"""The training step: exact sums, gradients, rejection, averages, one compilation."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.errors import ConfigError
from sqzjax.models import DecoderLM, Execution
from sqzjax.models.config import SpecialTokens
from tests.tolerances import ACCUMULATION_REL, CHUNKED, EMA_REL, LOSS_REL
from tests.train import toy
from train.ema import Average
from train.objectives import MaskedDiffusion
from train.optim import SGD
from train.step import Program, global_norm

run_norm = jax.jit(global_norm)
MASKED = DecoderLM(
    replace(toy.MODEL, mask="bidirectional", tokens=SpecialTokens(mask=259)), toy.UNROLLED
)


@cache
def plain():
    """The step that most tests take, and its program."""
    step = toy.make_step()
    return step, jax.jit(step.train)


def naive_loss(step, params, batch):
    """Mean loss; the targets are found by explicit loops over rows and positions."""
    logits = step.model.forward(
        params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    ).logits
    logs = jax.nn.log_softmax(logits)
    tokens, segments, mask = (np.asarray(batch[n]) for n in ("tokens", "segment_ids", "loss_mask"))
    chosen = [
        (row, at, tokens[row, at + 1])
        for row in range(tokens.shape[0])
        for at in range(tokens.shape[1] - 1)
        if mask[row, at + 1] and segments[row, at] == segments[row, at + 1] >= 0
    ]
    return -logs[tuple(np.array(chosen).T)].mean(), len(chosen)


def test_loss_and_update_equal_the_naive_ones():
    step = toy.make_step(optimizer=SGD(momentum=0.0).build(), clip_norm=None, execution=Execution())
    state, batch = toy.start(step), toy.batch()
    new, metrics = jax.jit(step.train)(state, None, batch)
    naive = jax.value_and_grad(lambda p: naive_loss(step, p, batch), has_aux=True)
    (loss, count), grads = jax.jit(naive)(state.trained)
    assert metrics["loss"][1] == count
    np.testing.assert_allclose(metrics["loss"][0] / count, loss, rtol=LOSS_REL)
    np.testing.assert_allclose(metrics["grad_norm"], run_norm(grads), rtol=LOSS_REL)
    wanted = jax.tree.map(lambda p, g: np.asarray(p) - 1e-2 * np.asarray(g), state.trained, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=CHUNKED["float32"]), new.trained, wanted
    )


def test_accumulation_is_exact():
    """Rows weigh by their targets, not by their microbatch (unequal here by the loss mask)."""
    (whole, train), parts = plain(), toy.make_step(accumulation=4)
    batch = toy.batch()
    mask = np.asarray(batch["loss_mask"]) & (np.arange(8)[:, None] % 4 > 0)
    batch["loss_mask"] = jnp.asarray(mask)
    state = toy.start(whole)
    _, left = train(state, None, batch)
    _, right = jax.jit(parts.train)(state, None, batch)
    assert left["loss"][1] == right["loss"][1]
    np.testing.assert_allclose(left["loss"][0], right["loss"][0], rtol=ACCUMULATION_REL)
    np.testing.assert_allclose(left["grad_norm"], right["grad_norm"], rtol=ACCUMULATION_REL)


def test_held_out_losses_take_the_memory_of_a_microbatch():
    """The same sums, and less memory than the whole batch at once."""
    batch, index = toy.batch(rows=64), jnp.int32(0)

    def evaluated(count):
        step = toy.make_step(accumulation=count, objective=MaskedDiffusion(), model=MASKED)
        params = toy.init_params(step.model)
        program = jax.jit(step.evaluate).lower(params, None, batch, index).compile()
        return program(params, None, batch, index), program.memory_analysis().temp_size_in_bytes

    (whole, much), (parts, little) = evaluated(1), evaluated(16)
    assert little < much / 4
    assert whole.weight == parts.weight
    np.testing.assert_allclose(whole.sum, parts.sum, rtol=ACCUMULATION_REL)


def test_clipping_bounds_the_update():
    clipped = toy.make_step(optimizer=SGD(momentum=0.0).build(), clip_norm=0.1)
    state, batch = toy.start(clipped), toy.batch()
    moved, metrics = jax.jit(clipped.train)(state, None, batch)
    difference = lambda a, b: (np.asarray(a) - np.asarray(b)) / np.float32(1e-2)  # noqa: E731
    change = jax.tree.map(difference, moved.trained, state.trained)
    assert metrics["grad_norm"] > 0.1, "nothing is clipped"
    np.testing.assert_allclose(run_norm(change), 0.1, rtol=1e3 * LOSS_REL)


def test_average_follows_its_formula():
    step = toy.make_step(average=Average(0.9))
    state, train = toy.start(step), jax.jit(step.train)
    wanted = jax.tree.map(lambda x: np.asarray(x, np.float64), state.trained)
    for seed in range(3):
        state, _ = train(state, None, toy.batch(seed))
        wanted = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * np.asarray(p), wanted, state.trained)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=EMA_REL, atol=EMA_REL),
        state.average,
        wanted,
    )


def test_same_seed_gives_identical_losses():
    step, train = plain()

    def losses():
        state = toy.start(step)
        found = []
        for index in range(100):
            state, metrics = train(state, None, toy.batch(index))
            found.append(np.asarray(metrics["loss"][0]).tobytes())
        return found

    assert losses() == losses()


def test_overfits_eight_rows():
    step, train = plain()
    state, batch = toy.start(step), toy.batch()
    for _ in range(150):
        state, metrics = train(state, None, batch)
    assert metrics["loss"][0] / metrics["loss"][1] < 0.05
    assert metrics["accuracy"][0] == metrics["accuracy"][1]


def test_bfloat16_compute_keeps_float32_parameters():
    step = toy.make_step(execution=replace(toy.UNROLLED, dtype="bfloat16"))
    state, batch = toy.start(step), toy.batch()
    new, metrics = jax.jit(step.train)(state, None, batch)
    exact = plain()[1](state, None, batch)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(new.trained)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(
        metrics["loss"][0] / metrics["loss"][1],
        exact["loss"][0] / exact["loss"][1],
        rtol=CHUNKED["bfloat16"],
    )


def test_compiles_once_and_refuses_other_shapes():
    """Reliability case 18."""
    compilations = []
    step = toy.make_step()
    state = toy.start(step)
    batches = [toy.batch(seed) for seed in range(4)]
    other = toy.batch(rows=4)
    program = Program(step.train, (state, None, batches[0]), donate=(0,))

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for batch in batches:
            state, metrics = program(state, None, batch)
        jax.block_until_ready(metrics)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []
    with pytest.raises(ConfigError, match="shapes changed after compilation"):
        program(state, None, other)
