# SPDX-License-Identifier: Apache-2.0
"""Losses straight from hidden states, without the logits of a whole batch in memory.

`cross_entropy` compares with target tokens, `kl_divergence` with another model's distributions.

The sequence is cut into chunks; each chunk's logits live only while its loss is computed. Under
differentiation the gradients are formed in the same pass (softmax minus target), so chunking costs
no second head product: three matrix products in all, as many as the naive loss.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sqzjax.sharding_config import AXES
from sqzjax.typing import Array, Float, Int

CHUNK_LOGITS = 1 << 21
"""Logits of one chunk (8 MB in float32): what a CPU's caches hold; 64 MB ran 1.5 times slower."""
CHUNK_ROWS = 512
"""Rows that a chunk has at least: each chunk adds its whole gradient to the table's."""


class CrossEntropy(NamedTuple):
    """Float32 scalars summed over tokens: weighted loss, weights, weighted correct predictions."""

    sum: Array
    weight: Array
    correct: Array


def cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "_ _"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    tied: bool,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> CrossEntropy:
    """Sum -log p(target) over tokens, each times its weight, from final-norm hidden states.

    `table` is the embedding `[V, D]` if `tied`, else the head kernel `[D, V]`. All V rows take part
    in the softmax, padded ones too. `z_loss` adds that multiple of the squared log-sum-exp (PaLM,
    arXiv 2204.02311). `chunk` is the tokens per row and chunk, 0 = chosen.
    Differentiable (reverse mode, once) in `hidden` and `table` through `sum`. A token of weight 0
    may have any target in range.
    """
    batch, length = targets.shape
    vocab = table.shape[0 if tied else 1]
    # Each chunk costs a reduction of the head's gradient over the mesh: few, sized per device.
    chunk = chunk or _chunk_length(-(-batch // batch_ways()), length, vocab)
    if length % chunk:
        raise ValueError(f"chunk={chunk} must divide the sequence length {length}; use 0 to derive")
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    total, correct = _loss(hidden, table, targets, weights, tied, z_loss, chunk)
    return CrossEntropy(total, jnp.sum(weights), jax.lax.stop_gradient(correct))


def kl_divergence(
    teacher_hidden: Float[Array, "B T _"],
    teacher_table: Float[Array, "_ _"],
    student_hidden: Float[Array, "B T D"],
    student_table: Float[Array, "_ _"],
    weights: Float[Array, "B T"],
    *,
    teacher_tied: bool,
    student_tied: bool,
    chunk: int = 0,
) -> Float[Array, ""]:
    """Sum KL(teacher || student) over tokens, each times its weight, from final-norm hidden states.

    Both distributions are float32 softmaxes over all V rows of their tables, which are laid out as
    in `cross_entropy` and must have as many rows. Differentiable (reverse mode, once) in
    `student_hidden` and `student_table`; the teacher is a constant. A token of weight 0 costs time
    but never counts, whatever it holds.
    """
    vocab = student_table.shape[0 if student_tied else 1]
    if (teacher_vocab := teacher_table.shape[0 if teacher_tied else 1]) != vocab:
        raise ValueError(
            f"the teacher's table has {teacher_vocab} rows of vocabulary and the student's {vocab};"
            " they must agree"
        )
    batch, length = weights.shape
    chunk = chunk or _chunk_length(-(-batch // batch_ways()), length, 2 * vocab)
    if length % chunk:
        raise ValueError(f"chunk={chunk} must divide the sequence length {length}; use 0 to derive")
    fixed = (teacher_hidden, teacher_table, weights.astype(jnp.float32))
    return _divergence(
        student_hidden,
        student_table,
        jax.lax.stop_gradient(fixed),
        (teacher_tied, student_tied, chunk),
    )


def head_table(params: dict, tied: bool) -> Array:
    """Return the table that `cross_entropy` takes: the embedding if tied, else the head kernel."""
    return params["embed"]["embedding"] if tied else params["head"]["kernel"]


def batch_ways() -> int:
    """Return over how many devices the mesh splits a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in AXES[:2] if axis in mesh.auto_axes)


def _chunk_length(batch: int, length: int, vocab: int) -> int:
    """Return the largest divisor of `length` that gives a chunk few enough rows."""
    rows = max(CHUNK_ROWS, CHUNK_LOGITS // vocab)
    return max(n for n in range(1, length + 1) if length % n == 0 and (n * batch <= rows or n == 1))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(hidden, table, targets, weights, tied, z_loss, chunk):
    def body(sums, block):
        x, ids, w = block
        _, parts = _chunk_loss(x, table, ids, w, tied, z_loss)
        return jax.tree.map(jnp.add, sums, parts), None

    zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    return _over_chunks(body, zero, (hidden, targets, weights), chunk)[0]


def _loss_forward(hidden, table, targets, weights, tied, z_loss, chunk):
    """Compute the loss together with its gradients."""
    accumulate = hidden.shape[1] > chunk

    def body(carry, block):
        sums, table_grad = carry
        x, ids, w = block
        scores, parts = _chunk_loss(x, table, ids, w, tied, z_loss)
        x_grad, new = _chunk_gradients(x, table, ids, w, scores, tied, z_loss)
        table_grad = table_grad + new if accumulate else new
        return (jax.tree.map(jnp.add, sums, parts), table_grad), x_grad

    zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    start = (zero, jnp.zeros(table.shape, jnp.float32))
    (sums, table_grad), x_grad = _over_chunks(body, start, (hidden, targets, weights), chunk)
    return sums, (x_grad, table_grad.astype(table.dtype))


def _loss_backward(tied, z_loss, chunk, saved, cotangents):
    scale = cotangents[0]
    x_grad, table_grad = (grad * scale.astype(grad.dtype) for grad in saved)
    return x_grad, table_grad, None, None


_loss.defvjp(_loss_forward, _loss_backward)


class _Scores(NamedTuple):
    logits: Array  # B C V
    lse: Array  # B C


def _chunk_loss(x, table, ids, w, tied, z_loss):
    """Return the scores of a chunk, and its summed loss and correct predictions."""
    logits = _logits(x, table, tied)
    top = jnp.max(logits, axis=-1)
    lse = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    target = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    losses = lse - target + z_loss * jnp.square(lse)
    # `where`, not a product: an overflowing token of weight 0 must not become NaN.
    losses = jnp.where(w > 0, losses * w, 0.0)
    # A target as large as the maximum is correct; argmax would cost another pass.
    return _Scores(logits, lse), (jnp.sum(losses), jnp.sum(w * (target >= top)))


def _chunk_gradients(x, table, ids, w, scores, tied, z_loss):
    """Return the gradients of a chunk's loss in `x` and, in float32, in `table`."""
    factor = w * (1.0 + 2.0 * z_loss * scores.lse)
    softmax = jnp.exp(scores.logits - scores.lse[..., None])
    columns = jax.lax.broadcasted_iota(ids.dtype, softmax.shape, 2)
    delta = softmax * factor[..., None] - jnp.where(columns == ids[..., None], w[..., None], 0.0)
    return _pull_back(jnp.where(w[..., None] > 0, delta, 0.0), x, table, tied)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _divergence(hidden, table, fixed, settings):
    teacher_hidden, teacher_table, weights = fixed
    *tied, chunk = settings

    def body(total, block):
        teacher, x, w = block
        return total + _chunk_divergence(teacher, teacher_table, x, table, w, tied)[0], None

    zero = jnp.zeros((), jnp.float32)
    return _over_chunks(body, zero, (teacher_hidden, hidden, weights), chunk)[0]


def _divergence_forward(hidden, table, fixed, settings):
    """Compute the divergence together with its gradients."""
    teacher_hidden, teacher_table, weights = fixed
    *tied, chunk = settings

    def body(carry, block):
        total, table_grad = carry
        teacher, x, w = block
        part, delta = _chunk_divergence(teacher, teacher_table, x, table, w, tied)
        x_grad, new = _pull_back(delta, x, table, tied[1])
        return (total + part, table_grad + new), x_grad

    start = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    inputs = (teacher_hidden, hidden, weights)
    (total, table_grad), x_grad = _over_chunks(body, start, inputs, chunk)
    return total, (x_grad, table_grad.astype(table.dtype))


def _divergence_backward(settings, saved, cotangent):
    del settings
    x_grad, table_grad = (grad * cotangent.astype(grad.dtype) for grad in saved)
    return x_grad, table_grad, None


_divergence.defvjp(_divergence_forward, _divergence_backward)


def _chunk_divergence(teacher, teacher_table, x, table, w, tied):
    """Return a chunk's summed divergence, and its gradient in the student's logits."""
    target = jax.nn.log_softmax(_logits(teacher, teacher_table, tied[0]), axis=-1)
    log_q = jax.nn.log_softmax(_logits(x, table, tied[1]), axis=-1)
    p = jnp.exp(target)
    each = jnp.sum(p * (target - log_q), axis=-1)
    total = jnp.sum(jnp.where(w > 0, each * w, 0.0))
    return total, jnp.where(w[..., None] > 0, (jnp.exp(log_q) - p) * w[..., None], 0.0)


def _logits(x, table, tied):
    """Return a chunk's float32 logits."""
    return jnp.einsum(
        "bcd,vd->bcv" if tied else "bcd,dv->bcv",
        x,
        table.astype(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _pull_back(delta, x, table, tied):
    """Return the gradients in `x` and, in float32, in `table` from that in the logits."""
    delta = delta.astype(x.dtype)
    x_grad = jnp.einsum(
        "bcv,vd->bcd" if tied else "bcv,dv->bcd",
        delta,
        table.astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    table_grad = jnp.einsum(
        "bcv,bcd->vd" if tied else "bcd,bcv->dv",
        *((delta, x) if tied else (x, delta)),
        preferred_element_type=jnp.float32,
    )
    return x_grad.astype(x.dtype), table_grad


def _over_chunks(body, carry, arrays, chunk):
    """Scan `body` over chunks of axis 1 (the batch axis stays whole: it may be sharded)."""
    batch, length = arrays[-1].shape
    if chunk == length:
        return body(carry, arrays)

    def cut(a):
        return jnp.moveaxis(a.reshape(batch, length // chunk, chunk, *a.shape[2:]), 1, 0)

    carry, out = jax.lax.scan(body, carry, jax.tree.map(cut, arrays))
    if out is None:
        return carry, None
    return carry, jnp.moveaxis(out, 0, 1).reshape(batch, length, *out.shape[3:])
