# SPDX-License-Identifier: Apache-2.0
"""Residuals of predictions against plain float64 formulas, their gradient, memory, calibration."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import residual, residual_pass
from sqzjax.residual import ResidualSettings, calibrate, from_hidden, from_logits, inject
from tests.tolerances import CALIBRATED_REL, CHUNKED, KERNEL_ATOL, RESIDUAL, TOP_K_REL

ROWS, VOCAB, PADDED, WIDTH, MASK = 7, 61, 70, 8, 5


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@partial(jax.jit, static_argnames=("settings", "mask_id", "vocab_size", "tile"))
def of_logits(logits, table, settings, *, mask_id=MASK, vocab_size=VOCAB, tile=16):
    names = {"mask_id": mask_id, "vocab_size": vocab_size, "tile": tile}
    return from_logits(logits, table, settings, **names)


LOGITS, TABLE = 4 * normal(0, ROWS, PADDED), normal(1, PADDED - 3, WIDTH)


def softmax64(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def naive(logits, table, settings):
    """Weights, mixtures and the mixture's probabilities in float64, from whole arrays."""
    z, table = np.asarray(logits, np.float64)[:, :VOCAB], np.asarray(table, np.float64)[:VOCAB]
    kept = VOCAB
    if settings.mask_column == "drop":
        z, kept = z.copy(), VOCAB - 1
        z[:, MASK] = -np.inf
    soft = softmax64(z / settings.temperature)
    p = soft if settings.temper_delta else softmax64(z)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = -np.where(soft > 0, soft * np.log(soft), 0.0).sum(-1) / np.log(kept)
    weight = {
        "entropy": share,
        "top1": share,
        "one_minus_entropy": 1 - share,
        "max_prob": soft.max(-1),
        "one_minus_max_prob": 1 - soft.max(-1),
        "fixed": np.ones_like(share),
    }[settings.alpha_rule]
    if settings.alpha_rule == "top1":
        p = np.eye(VOCAB)[z.argmax(-1)]
    return np.clip(settings.alpha_scale * weight, 0, 1), p @ table, p


SETTINGS = [
    ResidualSettings(),
    ResidualSettings(temperature=2.0),
    ResidualSettings(temperature=0.5, temper_delta=True, mask_column="drop"),
    ResidualSettings(alpha_rule="one_minus_entropy", alpha_scale=0.5, mask_column="drop"),
    ResidualSettings(alpha_rule="max_prob", temperature=1.3),
    ResidualSettings(alpha_rule="one_minus_max_prob", alpha_scale=3.0),
    ResidualSettings(alpha_rule="fixed", alpha_scale=0.3),
    ResidualSettings(alpha_rule="top1"),
]


def check(got, wanted):
    np.testing.assert_allclose(got.alpha, wanted[0], atol=RESIDUAL)
    np.testing.assert_allclose(got.delta, wanted[1], atol=RESIDUAL)
    assert got.alpha.dtype == jnp.float32


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.alpha_rule}-{s.temperature}")
@pytest.mark.parametrize("tile", [7, 16])
def test_equals_float64(settings, tile):
    """Tiles that do not divide the vocabulary."""
    check_logits(settings, tile)


@pytest.mark.parametrize("tile", [0, 1])
def test_one_tile_and_tiles_of_one_column(tile):
    check_logits(SETTINGS[2], tile)


def check_logits(settings, tile):
    got = of_logits(LOGITS, TABLE, settings, tile=tile)
    check(got, naive(LOGITS, TABLE, settings))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=["plain", "soft", "drop"])
def test_from_hidden_equals_from_logits_of_the_head(settings, tied):
    hidden, head = normal(2, ROWS, 12), normal(3, PADDED, 12)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    head = head if tied else head.T
    names = {"tied": tied, "mask_id": MASK, "vocab_size": VOCAB, "tile": 16}
    got = jax.jit(lambda *arrays: from_hidden(*arrays, settings, **names))(hidden, head, TABLE)
    check(got, naive(logits, TABLE, settings))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("top_k", [0, VOCAB])
def test_only_wanted_rows_count(groups, top_k, monkeypatch):
    """Several chunks of rows, the last one ragged; unwanted rows hold no numbers at all."""
    monkeypatch.setattr(residual_pass, "CHUNK", 3)
    settings = ResidualSettings(top_k=top_k)
    hidden, head = normal(2, 20, 12), normal(3, VOCAB, 12)
    rows = np.random.default_rng(0).random(20) < 0.4
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    alpha, delta, p = naive(logits, TABLE, settings)
    broken = jnp.asarray(np.where(rows[:, None], hidden, np.float32(np.nan)))
    head = jnp.asarray(head)
    cotangent = normal(4, 20, WIDTH)

    def mixed(table):
        names = {"tied": True, "mask_id": MASK, "vocab_size": VOCAB, "tile": 16}
        got = from_hidden(
            broken, head, table, settings, rows=jnp.asarray(rows), groups=groups, **names
        )
        return jnp.sum(got.delta * cotangent), got

    (_, got), grad = jax.jit(jax.value_and_grad(mixed, has_aux=True))(TABLE)
    check(got, (alpha * rows, delta * rows[:, None]))
    wanted = (p * rows[:, None]).T @ np.asarray(cotangent, np.float64)
    grad = np.asarray(grad)
    np.testing.assert_allclose(grad[:VOCAB], wanted, atol=CHUNKED["float32"])
    assert not grad[VOCAB:].any()


@pytest.mark.parametrize(("wanted", "chunks"), [(0, 0), (1, 1), (4, 2), (12, 4)])
def test_work_grows_with_the_wanted_rows(wanted, chunks, monkeypatch):
    monkeypatch.setattr(residual_pass, "CHUNK", 3)
    seen = []
    original = residual_pass.finish

    def counted(*args):
        jax.debug.callback(lambda: seen.append(1))
        return original(*args)

    monkeypatch.setattr(residual_pass, "finish", counted)
    names = {"tied": True, "mask_id": None, "vocab_size": VOCAB}
    arrays = normal(2, 12, 4), normal(3, VOCAB, 4), TABLE
    got = jax.jit(
        lambda hidden, head, table, rows: from_hidden(
            hidden, head, table, ResidualSettings(), rows=rows, **names
        )
    )(*arrays, np.arange(12) < wanted)
    jax.block_until_ready(got.alpha)
    jax.effects_barrier()
    assert len(seen) == chunks


def test_one_hot_has_no_weight_and_uniform_all_of_it():
    """Exactly: decoding must not mix anything into sure positions."""
    settings = ResidualSettings()
    sure = np.full((2, PADDED), -1e4, np.float32)
    sure[0, 3], sure[1, VOCAB - 1] = 1e4, 0.0
    got = of_logits(sure, TABLE, settings)
    assert not np.asarray(got.alpha).any()
    np.testing.assert_array_equal(got.delta, TABLE[[3, VOCAB - 1]])
    # What stands in the padded columns is of no importance.
    even = np.zeros((2, PADDED), np.float32)
    even[:, VOCAB:] = 50.0
    for column, kept in (("keep", np.arange(VOCAB)), ("drop", np.delete(np.arange(VOCAB), MASK))):
        settings = ResidualSettings(mask_column=column)
        got = of_logits(even, TABLE, settings)
        np.testing.assert_allclose(got.alpha, 1.0, rtol=RESIDUAL)
        mean = np.asarray(TABLE, np.float64)[kept].mean(0)
        np.testing.assert_allclose(np.asarray(got.delta)[0], mean, atol=RESIDUAL)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_extreme_logits_stay_finite(temperature):
    banned = LOGITS.copy()
    banned[:, :20], banned[1], banned[2, 20:] = -np.inf, 3e38, -3e38
    settings = ResidualSettings(temperature=temperature)
    alpha, delta = map(np.asarray, of_logits(banned, TABLE, settings))
    assert np.isfinite(delta).all() and ((alpha >= 0) & (alpha <= 1)).all()
    expected = softmax64(np.asarray(LOGITS, np.float64)[0, 20:VOCAB])
    mixed = expected @ np.asarray(TABLE, np.float64)[20:VOCAB]
    np.testing.assert_allclose(delta[0], mixed, atol=RESIDUAL)


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=["plain", "soft", "drop"])
def test_the_gradient_reaches_the_table_alone(settings):
    """Against jax.grad of the plain formula in float64, by another cotangent in every entry."""
    cotangent, keep = normal(4, ROWS, WIDTH), settings.mask_column == "keep"

    def fused(logits, table):
        got = from_logits(logits, table, settings, mask_id=MASK, vocab_size=VOCAB, tile=16)
        return jnp.sum(got.delta * cotangent) + jnp.sum(got.alpha)

    rows, grad = jax.jit(jax.grad(fused, (0, 1)))(LOGITS, TABLE)
    assert not rows.any()
    arrays = [np.asarray(a, np.float64) for a in (LOGITS, TABLE, cotangent)]
    with jax.enable_x64(True):
        logits, table, wide = map(jnp.asarray, arrays)
        scale = settings.temperature if settings.temper_delta else 1.0
        z = logits[:, :VOCAB] / scale
        z = z if keep else z.at[:, MASK].set(-jnp.inf)
        mixed = jax.grad(lambda t: jnp.sum((jax.nn.softmax(z) @ t[:VOCAB]) * wide))
        wanted = jax.jit(mixed)(table)
        assert wanted.dtype == jnp.float64
    np.testing.assert_allclose(grad, wanted, atol=CHUNKED["float32"])


def test_top_k_approaches_the_exact_mixture():
    exact = jax.tree.map(np.asarray, of_logits(LOGITS, TABLE, ResidualSettings(), tile=0))
    errors = []
    for count in (1, 16, VOCAB):
        settings = ResidualSettings(top_k=count)
        got = jax.tree.map(np.asarray, of_logits(LOGITS, TABLE, settings))
        np.testing.assert_allclose(got.alpha, exact.alpha, atol=RESIDUAL)
        probs, table = softmax64(np.asarray(LOGITS, np.float64)[:, :VOCAB]), np.asarray(TABLE)
        low = np.argsort(-probs, axis=-1)[:, count:]
        tail = np.take_along_axis(probs, low, axis=1).sum(1, keepdims=True)
        np.put_along_axis(probs, low, 0.0, axis=1)
        wanted = probs @ table[:VOCAB] + tail * table[:VOCAB].mean(0)
        np.testing.assert_allclose(got.delta, wanted, atol=RESIDUAL)
        errors.append(np.linalg.norm(got.delta - exact.delta) / np.linalg.norm(exact.delta))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < RESIDUAL and errors[0] > TOP_K_REL > errors[1]


def test_bfloat16_tables_keep_float32_statistics():
    table = TABLE.astype(jnp.bfloat16)
    got = of_logits(LOGITS, table, ResidualSettings())
    alpha, delta, _ = naive(LOGITS, table.astype(np.float32), ResidualSettings())
    assert got.delta.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.alpha, alpha, atol=RESIDUAL)
    np.testing.assert_allclose(
        np.asarray(got.delta, np.float32),
        delta,
        rtol=KERNEL_ATOL["bfloat16"],
        atol=CHUNKED["bfloat16"],
    )


def test_injection_changes_masked_positions_alone():
    embeds, masked = normal(5, 2, 4, WIDTH), np.arange(8).reshape(2, 4) % 3 == 0
    alpha, delta = np.random.default_rng(6).random(8, np.float32), normal(7, 8, WIDTH)
    injected = jax.jit(inject)
    got = np.asarray(injected(embeds, residual.Residual(alpha, delta), masked))
    np.testing.assert_array_equal(got[~masked], embeds[~masked])
    share, mixture = alpha.reshape(2, 4, 1), delta.reshape(2, 4, WIDTH)
    wanted = (1 - share) * embeds + share * mixture
    np.testing.assert_allclose(got[masked], wanted[masked], atol=RESIDUAL)
    nothing = residual.Residual(np.zeros(8, np.float32), delta)
    np.testing.assert_array_equal(injected(embeds, nothing, masked), embeds)


@pytest.mark.parametrize("source", ["logits", "hidden"])
def test_no_array_as_large_as_all_probabilities(source):
    """Compiled: temporaries far below the plain formula's, which holds rows times vocabulary."""
    rows, vocab, width = 64, 8192, 32
    x = jnp.zeros((rows, vocab if source == "logits" else width))
    args = (x, jnp.zeros((width, vocab)), jnp.zeros((vocab, width)), jnp.zeros((rows, width)))
    names = {"mask_id": None, "vocab_size": vocab, "tile": 512}

    def fused(x, head, table):
        if source == "logits":
            return from_logits(x, table, ResidualSettings(), **names)
        return from_hidden(x, head, table, ResidualSettings(), tied=False, **names)

    def plain(x, head, table):
        p = jax.nn.softmax(x if source == "logits" else x @ head)
        return -jnp.sum(p * jnp.log(p), axis=-1), jax.lax.stop_gradient(p) @ table

    def temporary(f):
        def pair(x, head, table):
            return tuple(f(x, head, table))

        def gradient(x, head, table, cotangent):
            return jax.grad(lambda table: jnp.sum(f(x, head, table)[1] * cotangent))(table)

        return [
            jax.jit(g).lower(*args[:n]).compile().memory_analysis().temp_size_in_bytes
            for g, n in ((pair, 3), (gradient, 4))
        ]

    whole = 4 * rows * vocab
    for ours, theirs in zip(temporary(fused), temporary(plain), strict=True):
        assert ours < whole / 4 and theirs >= whole


def test_calibration_finds_the_temperature():
    """Logits 2.5 and 1.5 times too large need temperatures 2.5 and 1.5; between them, between."""
    sets = [jnp.asarray(3 * normal(8, 40, VOCAB)), jnp.asarray(3 * normal(9, 10, VOCAB))]
    names = {"mask_id": MASK, "vocab_size": VOCAB}
    for rule, factor in (("entropy", 2.5), ("max_prob", 0.4)):
        settings = ResidualSettings(alpha_rule=rule)
        got = calibrate([factor * z for z in sets], sets, settings, **names)
        np.testing.assert_allclose(got, factor, rtol=CALIBRATED_REL)
    got = calibrate([2.5 * sets[0], 1.5 * sets[1]], sets, ResidualSettings(), **names)
    assert 1.5 < got < 2.5
    reached = [
        np.mean([naive(z, TABLE, ResidualSettings(temperature=t))[0].mean() for z in group])
        for group, t in ((sets, 1.0), ([2.5 * sets[0], 1.5 * sets[1]], got))
    ]
    np.testing.assert_allclose(*reached, rtol=CALIBRATED_REL)


def test_calibration_refuses_what_it_cannot_do():
    logits = jnp.asarray(LOGITS)
    names = {"mask_id": MASK, "vocab_size": VOCAB}
    with pytest.raises(ValueError, match="alpha_rule='fixed' does not depend on a temperature"):
        calibrate([logits], [logits], ResidualSettings(alpha_rule="fixed"), **names)
    with pytest.raises(ValueError, match="0 arrays of inference logits and 1"):
        calibrate([], [logits], ResidualSettings(), **names)
    with pytest.raises(ValueError, match=r"is not reached at temperatures from 0\.1 to 10"):
        calibrate([100 * logits], [0 * logits], ResidualSettings(), **names)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"alpha_scale": -1.0}, "alpha_scale=-1.0 must be >= 0"),
        ({"alpha_rule": "fixed", "alpha_scale": 1.5}, "alpha_scale=1.5 is the weight itself"),
        ({"top_k": -1}, "top_k=-1 must be >= 0"),
        ({"top_k": 4, "alpha_rule": "top1"}, "top_k=4 has no meaning"),
    ],
)
def test_bad_settings_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(ResidualSettings(), **change)


def test_bad_tables_are_refused():
    drop, logits, table = ResidualSettings(mask_column="drop"), *map(jnp.asarray, (LOGITS, TABLE))
    with pytest.raises(ValueError, match="mask_column='drop' needs the id of the mask token"):
        from_logits(logits, table, drop, mask_id=None, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="table has 67 tokens, fewer than 69"):
        from_logits(logits, table, drop, mask_id=MASK, vocab_size=69)
    with pytest.raises(ValueError, match="vocab_size=1 must be >= 2"):
        from_logits(logits, table, ResidualSettings(), mask_id=None, vocab_size=1)
