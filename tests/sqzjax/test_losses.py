# SPDX-License-Identifier: Apache-2.0
"""Chunked cross-entropy against the textbook loss in float64, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sqzjax import losses
from tests.tolerances import CHUNKED, GRADIENT_REL, LOSS_REL

B, T, D, V = 3, 12, 8, 17


def example(tied: bool, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 4)
    hidden = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    table = jax.random.normal(keys[1], (V, D) if tied else (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jax.random.uniform(keys[3], (B, T)) * (jnp.arange(T) % 3 > 0)
    return hidden, table, targets, weights


def reference(hidden, table, targets, weights, tied, z_loss):
    """Float64 on the host: weighted sum of -log softmax, weight, weighted hits, all gradients."""
    x, w = np.asarray(hidden, np.float64).reshape(-1, D), np.asarray(weights, np.float64).ravel()
    matrix = np.asarray(table, np.float64).T if tied else np.asarray(table, np.float64)
    ids = np.asarray(targets).ravel()
    logits = x @ matrix
    lse = np.log(np.exp(logits).sum(-1))
    chosen = logits[np.arange(len(ids)), ids]
    total = (w * (lse - chosen + z_loss * lse**2)).sum()
    delta = np.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None]
    delta[np.arange(len(ids)), ids] -= 1
    delta *= w[:, None]
    x_grad, grad = (delta @ matrix.T).reshape(B, T, D), x.T @ delta
    hits = (w * (logits.argmax(-1) == ids)).sum()
    return total, w.sum(), hits, x_grad, grad.T if tied else grad


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [0, 1, 4, 12])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_float64(tied, chunk, z_loss):
    hidden, table, targets, weights = example(tied)

    def loss(hidden, table):
        out = losses.cross_entropy(
            hidden, table, targets, weights, tied=tied, z_loss=z_loss, chunk=chunk
        )
        return out.sum, out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, table)
    total, weight, hits, *wanted = reference(hidden, table, targets, weights, tied, z_loss)
    np.testing.assert_allclose(out.sum, total, rtol=LOSS_REL)
    np.testing.assert_allclose(out.weight, weight, rtol=LOSS_REL)
    np.testing.assert_allclose(out.correct, hits, rtol=LOSS_REL)
    for grad, expected in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(grad, expected, atol=CHUNKED["float32"])


def test_finite_differences():
    hidden, table, targets, weights = example(False)

    def loss(hidden, table):
        hidden, table = jnp.asarray(hidden), jnp.asarray(table)
        out = losses.cross_entropy(hidden, table, targets, weights, tied=False, chunk=4)
        return 0.5 * out.sum  # a cotangent other than 1

    check_grads(loss, (hidden, table), order=1, modes=["rev"], rtol=GRADIENT_REL, eps=1e-2)


def test_bfloat16_accumulates_in_float32():
    hidden, table, targets, weights = example(True, jnp.bfloat16)
    table = table.astype(jnp.bfloat16).astype(jnp.float32)
    out = losses.cross_entropy(hidden, table, targets, weights, tied=True)
    total, *_ = reference(hidden, table, targets, weights, True, 0.0)
    assert out.sum.dtype == jnp.float32
    np.testing.assert_allclose(out.sum, total, rtol=LOSS_REL)


def test_tokens_without_weight_do_not_matter():
    hidden, table, targets, weights = example(False)
    broken = jnp.where((weights == 0)[..., None], jnp.inf, hidden)
    moved = jnp.where(weights == 0, 0, targets)

    def run(hidden, targets):
        def loss(table):
            return losses.cross_entropy(hidden, table, targets, weights, tied=False).sum

        return jax.value_and_grad(loss)(table)

    assert run(hidden, targets)[0] == run(hidden, moved)[0]
    assert jnp.isfinite(run(broken, targets)[0])


def test_zero_weight_gives_zero():
    hidden, table, targets, weights = example(False)
    loss = lambda h: losses.cross_entropy(h, table, targets, 0 * weights, tied=False).sum  # noqa: E731
    value, grad = jax.value_and_grad(loss)(hidden)
    assert value == 0 and not grad.any()


def test_no_array_as_large_as_all_logits():
    """The largest intermediate of the chunked loss is a chunk's logits."""
    batch, length, width, vocab, chunk = 2, 64, 16, 128, 8
    args = (
        jnp.zeros((batch, length, width)),
        jnp.zeros((width, vocab)),
        jnp.zeros((batch, length), jnp.int32),
        jnp.ones((batch, length)),
    )
    loss = lambda h, w, t, g: losses.cross_entropy(h, w, t, g, tied=False, chunk=chunk).sum  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*args))
    assert f"{batch},{chunk},{vocab}" in text
    assert f"{batch},{length},{vocab}" not in text


def test_chunk_must_divide():
    with pytest.raises(ValueError, match="chunk=5 must divide the sequence length 12"):
        losses.cross_entropy(*example(False), tied=False, chunk=5)


def divergence_example(tied: tuple[bool, bool]):
    keys = jax.random.split(jax.random.key(2), 5)
    shapes = [(V, D + 2) if tied[0] else (D + 2, V), (V, D) if tied[1] else (D, V)]
    teacher, student = (jax.random.normal(keys[i], (B, T, D + 2 - 2 * i)) for i in range(2))
    tables = [jax.random.normal(keys[2 + i], shapes[i]) for i in range(2)]
    weights = jax.random.uniform(keys[4], (B, T)) * (jnp.arange(T) % 3 > 0)
    return teacher, tables[0], student, tables[1], weights


def reference_divergence(teacher, teacher_table, student, table, weights, tied):
    """Float64 on the host: weighted sum of KL, gradients in the student's hidden and table."""
    arrays = [np.asarray(a, np.float64) for a in (teacher, teacher_table, student, table, weights)]
    teacher, teacher_table, student, table, weights = arrays
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)  # noqa: E731
    matrix = table.T if tied[1] else table
    p = softmax(teacher @ (teacher_table.T if tied[0] else teacher_table))
    q = softmax(student @ matrix)
    delta = (q - p) * weights[..., None]
    grad = np.einsum("btd,btv->dv", student, delta)
    total = (weights * (p * np.log(p / q)).sum(-1)).sum()
    return total, delta @ matrix.T, grad.T if tied[1] else grad


@pytest.mark.parametrize("chunk", [0, 1, 4])
@pytest.mark.parametrize("tied", [(False, False), (True, False), (False, True)])
def test_divergence_equals_float64(tied, chunk):
    teacher, teacher_table, student, table, weights = divergence_example(tied)

    def loss(student, table):
        return losses.kl_divergence(
            teacher,
            teacher_table,
            student,
            table,
            weights,
            teacher_tied=tied[0],
            student_tied=tied[1],
            chunk=chunk,
        )

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(student, table)
    total, *wanted = reference_divergence(teacher, teacher_table, student, table, weights, tied)
    np.testing.assert_allclose(value, total, rtol=LOSS_REL)
    np.testing.assert_allclose(loss(student, table), total, rtol=LOSS_REL)
    for grad, expected in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(grad, expected, atol=CHUNKED["float32"])


UNTIED = {"teacher_tied": False, "student_tied": False}


def test_divergence_has_no_gradient_in_the_teacher_and_none_of_itself():
    teacher, teacher_table, student, table, weights = divergence_example((False, False))

    def loss(teacher, teacher_table):
        return losses.kl_divergence(teacher, teacher_table, student, table, weights, **UNTIED)

    assert not any(grad.any() for grad in jax.grad(loss, (0, 1))(teacher, teacher_table))
    itself = losses.kl_divergence(student, table, student, table, weights, **UNTIED)
    assert abs(float(itself)) < LOSS_REL


def test_divergence_ignores_tokens_without_weight_and_checks_its_arguments():
    teacher, teacher_table, student, table, weights = divergence_example((False, False))
    broken = jnp.where((weights == 0)[..., None], jnp.inf, student)

    def loss(student, table):
        return losses.kl_divergence(teacher, teacher_table, student, table, weights, **UNTIED)

    assert loss(student, table) == loss(broken, table)
    assert jnp.isfinite(jax.grad(loss)(broken, table)).all()
    with pytest.raises(ValueError, match="17 rows of vocabulary and the student's 16"):
        loss(student, table[:, :16])
    with pytest.raises(ValueError, match="chunk=5 must divide the sequence length 12"):
        losses.kl_divergence(*divergence_example((False, False)), **UNTIED, chunk=5)


def test_divergence_holds_a_chunk_of_logits():
    batch, length, width, vocab, chunk = 2, 64, 16, 128, 8
    hidden, table = jnp.zeros((batch, length, width)), jnp.zeros((width, vocab))
    weights = jnp.ones((batch, length))

    def loss(student, student_table):
        return losses.kl_divergence(
            hidden, table, student, student_table, weights, **UNTIED, chunk=chunk
        )

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, table))
    assert f"{batch},{chunk},{vocab}" in text
    assert f"{batch},{length},{vocab}" not in text
