# SPDX-License-Identifier: Apache-2.0
"""Schedules against closed forms, optimizers against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sqzjax import sharding
from sqzjax.models import Execution
from tests.tolerances import CHUNKED, SCHEDULE_REL
from tests.train import toy
from train.optim import SGD, WSD, Adafactor, AdamW, Constant, Cosine, InverseSqrt, Lion, Muon

STEPS, WARM, PEAK = 100, 10, 0.02

CLOSED_FORMS = {
    Constant: lambda n: PEAK,
    Cosine: lambda n: (
        PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (n - WARM) / (STEPS - WARM))))
    ),
    WSD: lambda n: PEAK * (1 - math.sqrt(max(0, n - 80) / 20)),
    InverseSqrt: lambda n: PEAK * math.sqrt(WARM / n),
}


@pytest.mark.parametrize("kind", CLOSED_FORMS)
def test_schedule_equals_its_closed_form(kind):
    schedule = kind(learning_rate=PEAK, warmup_steps=WARM)
    rates = jax.jit(jax.vmap(lambda n: schedule.rate(n, STEPS)))(np.arange(STEPS + 1))
    wanted = [
        PEAK * (n + 1) / (WARM + 1) if n < WARM else CLOSED_FORMS[kind](n) for n in range(STEPS + 1)
    ]
    np.testing.assert_allclose(rates, wanted, rtol=SCHEDULE_REL, atol=SCHEDULE_REL * PEAK)
    assert rates[0] > 0 and rates.dtype == jnp.float32


def test_stable_part_does_not_depend_on_the_length():
    schedule = WSD(learning_rate=PEAK, warmup_steps=WARM)

    def rates(length):
        return jax.jit(jax.vmap(lambda n: schedule.rate(n, length)))(np.arange(80))

    np.testing.assert_array_equal(rates(100), rates(1000))


def tree():
    return toy.start(toy.make_step(execution=Execution())).trained


def normal_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), tree)


def test_decay_mask():
    params = tree()
    masked = sharding.paths(AdamW().mask(params))
    assert {path for path, yes in masked.items() if yes} == {
        path for path in masked if path.startswith("layers") and path.endswith("kernel")
    }
    everything = sharding.paths(AdamW(decay_embeddings=True).mask(params))
    spared = {path for path, yes in everything.items() if not yes}
    assert spared == {path for path in masked if path.endswith("scale")}


def test_adamw_equals_optax():
    """Our direction times the rate is optax's own AdamW update."""
    params = tree()
    config = AdamW(weight_decay=0.1)
    ours, theirs = (
        config.build(),
        optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=config.mask),
    )
    mine, other = jax.jit(ours.init)(params), jax.jit(theirs.init)(params)
    for seed in range(3):
        grads = normal_like(params, seed)
        direction, mine = jax.jit(ours.update)(grads, mine, params)
        update, other = jax.jit(theirs.update)(grads, other, params)
        jax.tree.map(
            lambda d, u: np.testing.assert_allclose(-0.01 * d, u, atol=CHUNKED["float32"]),
            direction,
            update,
        )


def test_first_moment_dtype():
    state = jax.eval_shape(AdamW(moment_dtype="bfloat16").build().init, tree())
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].nu)} == {jnp.dtype("float32")}


def test_muon_orthogonalises_each_layer():
    """Singular values of a kernel's update are nearly equal, layer by layer; norms go to Adam."""
    params = tree()
    muon = Muon(weight_decay=0.0).build()
    grads = normal_like(params, 1)
    direction, _ = jax.jit(muon.update)(grads, jax.jit(muon.init)(params), params)
    direction = jax.tree.map(np.asarray, direction)
    kernel = direction["layers"]["mlp"]["up"]["kernel"]
    values = np.linalg.svd(np.asarray(kernel), compute_uv=False)
    assert kernel.shape[0] == 2 and values.shape == (2, 16)
    assert (values.max(-1) / values.min(-1) < 2.5).all()
    before = np.linalg.svd(np.asarray(grads["layers"]["mlp"]["up"]["kernel"]), compute_uv=False)
    assert (before.max(-1) / before.min(-1) > 2.5).all()
    assert np.sum(kernel * grads["layers"]["mlp"]["up"]["kernel"]) > 0  # not ascending
    adam = np.abs(direction["final_norm"]["scale"])  # Adam's first step forgets the size
    np.testing.assert_allclose(adam, adam[0], atol=CHUNKED["float32"])


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [(AdamW(), 1e-2), (Lion(), 1e-3), (Adafactor(), 1e-1), (SGD(), 3e-1), (Muon(), 1e-2)],
)
def test_every_optimizer_learns(optimizer, rate):
    schedule = Constant(learning_rate=rate)
    step = toy.make_step(
        optimizer=optimizer.build(),
        rate=lambda n: schedule.rate(n, 1),
        execution=Execution(scan_layers=isinstance(optimizer, Muon)),
    )
    state, train, batch = toy.start(step), jax.jit(step.train, donate_argnums=0), toy.batch()
    losses = []
    for _ in range(30):
        state, metrics = train(state, None, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(b1=1.0), r"b1=1.0 must lie in \[0, 1\)"),
        (lambda: AdamW(weight_decay=-1.0), "weight_decay=-1.0 must be >= 0"),
        (lambda: Muon(ns_steps=0), "ns_steps=0 must be >= 1"),
        (lambda: Cosine(learning_rate=0.0), "learning_rate=0.0 must be a number > 0"),
        (lambda: Cosine(final_ratio=1.5), r"final_ratio=1.5 must lie in \[0, 1\]"),
        (lambda: WSD(warmup_steps=10).check(10), "warmup_steps=10 must be below steps=10"),
        (lambda: AdamW(eps=0.0), r"eps=0.0 must be > 0"),
        (lambda: Adafactor(clip=0.0), r"clip=0.0 must be > 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
