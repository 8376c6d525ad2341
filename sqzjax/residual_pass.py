# SPDX-License-Identifier: Apache-2.0
"""The pass over the vocabulary behind `sqzjax.residual`.

Tiles of columns are the inner loop and chunks of rows the outer one; the backward pass turns that
round, so that each tile of the embedding's gradient is written once. Nothing of rows times
vocabulary is formed beyond one tile of one chunk.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from sqzjax.numerics import MASK_VALUE, vocabulary_dot
from sqzjax.residual_config import ResidualSettings
from sqzjax.typing import Array

TILE_SCORES = 1 << 17
"""Scores of a tile, which a CPU's caches hold; few rows take more columns, for fewer launches."""
TILE_COLUMNS = 1024
"""Columns that a tile has at least."""
CHUNK = 1024
"""Rows that go through the vocabulary together; skipped rows are skipped in such chunks."""


@dataclass(frozen=True)
class Task:
    """Everything static: settings, where scores come from, which columns count, sizes, dtype."""

    settings: ResidualSettings
    layout: Literal["logits", "tied", "untied"]
    vocab: int
    dropped: int | None
    tile: int
    dtype: Any

    @property
    def top(self) -> int:
        """Tokens that are mixed; 0: all."""
        count = 1 if self.settings.alpha_rule == "top1" else self.settings.top_k
        return min(count, self.vocab)

    @property
    def scale(self) -> float:
        """Temperature of the mixture."""
        return self.settings.temperature if self.settings.temper_delta else 1.0


def make_task(settings, layout, mask_id, vocab_size, dtype, *, rows: int, tile: int = 0) -> Task:
    """Check the settings against the vocabulary; `tile` 0 is chosen for so many rows."""
    dropped = mask_id if settings.mask_column == "drop" else None
    if settings.mask_column == "drop" and mask_id is None:
        raise ValueError("mask_column='drop' needs the id of the mask token; mask_id is None")
    if dropped is not None and not 0 <= dropped < vocab_size:
        dropped = None  # the mask is a padded row, whose column never counts
    least = 2 if dropped is None else 3
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} must be >= {least} for a normalised entropy")
    tile = tile or max(TILE_COLUMNS, TILE_SCORES // min(max(rows, 1), CHUNK))
    return Task(settings, layout, vocab_size, dropped, min(tile, vocab_size), jnp.dtype(dtype))


class _Sums(NamedTuple):
    """Running values of rows: the largest score, sums relative to it, what is mixed."""

    peak: Array  # R
    total: Array  # R: of p at the mixture's temperature
    tempered: Array  # R: of p at the weight's temperature
    moment: Array  # R: of p log p there, up to the total
    mixed: Any  # R D: of p times embedding rows; or (scores, ids) R K of the largest; or None


class Rows(NamedTuple):
    """Finished rows; with their peak and total any tile's probabilities can be formed again."""

    peak: Array
    total: Array
    alpha: Array
    mixed: Any  # R D float32; or (probabilities, ids) R K; or None


def run(task: Task, rows: Array, head: Any, table: Array, wanted: Any) -> tuple[Array, Array]:
    """Return weights `[R]` and mixtures `[R, D]` of grouped rows `[G, N, _]`, flattened."""
    groups, length = rows.shape[:2]
    for name, array, axis in (("table", table, 0), ("head", head, task.layout != "tied")):
        if array is not None and array.shape[int(axis)] < task.vocab:
            raise ValueError(f"{name} has {array.shape[int(axis)]} tokens, fewer than {task.vocab}")
    count = jnp.int32(length)
    order = jnp.zeros((groups, length), jnp.int32)
    if wanted is not None:
        order = jnp.argsort(~wanted, axis=1, stable=True)
        count = jnp.max(jnp.sum(wanted, axis=1)).astype(jnp.int32)
        # Rows beside the wanted ones share their chunk; whatever they hold must not spread.
        rows = jnp.where(wanted[..., None], rows, jnp.zeros((), rows.dtype))
        rows = jnp.take_along_axis(rows, order[..., None], axis=1)
    rows, head = jax.lax.stop_gradient((rows, head))
    if task.top:
        fixed = _over_chunks(task, rows, head, None, count)
        probs, ids = fixed.mixed
        alpha, delta = fixed.alpha, _mix_top(task, probs, ids, table)
    else:
        alpha, delta = _exact(task, rows, head, count, table)
    if wanted is not None:
        back = jnp.argsort(order, axis=1)
        alpha = jnp.where(wanted, jnp.take_along_axis(alpha, back, axis=1), 0.0)
        delta = jnp.take_along_axis(delta, back[..., None], axis=1)
        delta = jnp.where(wanted[..., None], delta, jnp.zeros((), delta.dtype))
    return alpha.reshape(-1), delta.reshape(groups * length, -1)


def _mix_top(task: Task, probs: Array, ids: Array, table: Array) -> Array:
    """Return the mixture of the largest probabilities, the tail at the mean embedding."""
    if task.settings.alpha_rule == "top1":
        return jnp.take(table, ids[..., 0], axis=0)
    found = jnp.take(table, ids, axis=0).astype(jnp.float32)
    mixed = jnp.einsum("gnk,gnkd->gnd", probs, found)
    mean = jnp.mean(table[: task.vocab], axis=0, dtype=jnp.float32)
    tail = jnp.maximum(1.0 - jnp.sum(probs, axis=-1, keepdims=True), 0.0)
    return (mixed + tail * mean).astype(table.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exact(task, rows, head, count, table):
    fixed = _over_chunks(task, rows, head, table, count)
    return fixed.alpha, fixed.mixed.astype(table.dtype)


def _exact_forward(task, rows, head, count, table):
    fixed = _over_chunks(task, rows, head, table, count)
    saved = (rows, head, count, table, fixed.peak, fixed.total)
    return (fixed.alpha, fixed.mixed.astype(table.dtype)), saved


def _exact_backward(task, saved, cotangents):
    """Sum p times the cotangent over rows, tile by tile; the scores are formed again."""
    rows, head, count, table, peak, total = saved
    arrays = (rows, peak, total, cotangents[1])
    size, number = _chunk_size(rows.shape[1])

    def tile_step(grad, index):
        def add(chunk, part):
            x, peak, total, cotangent = _cut(arrays, chunk * size, size)
            _, scores, valid, _ = _scores(task, x, head, index)
            p = jnp.exp((scores - peak[:, None]) / task.scale) / total[:, None]
            p = jnp.where(valid, p, 0.0).astype(task.dtype)
            cotangent = cotangent.astype(task.dtype)
            return part + jnp.einsum("rv,rd->vd", p, cotangent, preferred_element_type=jnp.float32)

        part = jnp.zeros((task.tile, table.shape[1]), jnp.float32)
        if number == 1:
            part = add(0, part)
        else:
            part = jax.lax.fori_loop(0, (count + size - 1) // size, add, part)
        start = _start(task, index)
        # The last tile may overlap the one before it, where its probabilities are zero.
        part += jax.lax.dynamic_slice_in_dim(grad, start, task.tile)
        return jax.lax.dynamic_update_slice_in_dim(grad, part, start, axis=0), None

    grad = jnp.zeros(table.shape, jnp.float32)
    grad, _ = jax.lax.scan(tile_step, grad, jnp.arange(_tiles(task)))
    return None, None, None, grad.astype(table.dtype)


_exact.defvjp(_exact_forward, _exact_backward)


def _over_chunks(task: Task, rows: Array, head: Any, table: Any, count: Array) -> Rows:
    """Run the first `count` rows of every group, in chunks of rows; zeros beyond them."""
    groups, length = rows.shape[:2]
    size, number = _chunk_size(length)

    def finished(x):
        fixed = finish(task, x, head, table, task.settings.temperature)
        return jax.tree.map(lambda a: a.reshape(groups, -1, *a.shape[1:]), fixed)

    if number == 1:
        return finished(rows.reshape(groups * length, -1))

    def body(chunk, out):
        new = finished(_cut(rows, chunk * size, size))
        place = partial(jax.lax.dynamic_update_slice_in_dim, start_index=chunk * size, axis=1)
        return jax.tree.map(place, out, new)

    shapes = jax.eval_shape(finished, _cut(rows, 0, size))
    out = jax.tree.map(lambda a: jnp.zeros((groups, number * size, *a.shape[2:]), a.dtype), shapes)
    out = jax.lax.fori_loop(0, (count + size - 1) // size, body, out)
    return jax.tree.map(lambda a: a[:, :length], out)


def _chunk_size(length: int) -> tuple[int, int]:
    """Return rows per chunk and the number of chunks."""
    number = -(-length // CHUNK)
    return -(-length // number), number


def _cut(arrays: Any, start: Any, size: int) -> Any:
    """Return a chunk of axis 1 of grouped rows, flattened."""

    def cut(a):
        missing = -a.shape[1] % size
        if missing:  # at most one row per chunk
            a = jnp.pad(a, ((0, 0), (0, missing), *((0, 0),) * (a.ndim - 2)))
        part = jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)
        return part.reshape(-1, *a.shape[2:])

    return jax.tree.map(cut, arrays)


def finish(task: Task, x: Array, head: Any, table: Any, temperature: Any) -> Rows:
    """Return the finished rows of a chunk `[R, _]` after one pass over the vocabulary."""
    count = x.shape[0]
    zeros = jnp.zeros((count,), jnp.float32)
    mixed = None
    if table is not None:
        mixed = jnp.zeros((count, table.shape[1]), jnp.float32)
    elif task.top:
        shape = (count, task.top)
        mixed = (jnp.full(shape, MASK_VALUE, jnp.float32), jnp.zeros(shape, jnp.int32))
    sums = _Sums(jnp.full((count,), MASK_VALUE, jnp.float32), zeros, zeros, zeros, mixed)
    tiles = _tiles(task)

    def body(sums, index):
        return _add_tile(task, sums, x, head, table, temperature, index), None

    if tiles == 1:
        sums = body(sums, 0)[0]
    else:
        sums = jax.lax.scan(body, sums, jnp.arange(tiles))[0]
    mixed = sums.mixed
    if table is not None:
        mixed = mixed / sums.total[:, None]
    elif task.top:
        probs = jnp.exp((mixed[0] - sums.peak[:, None]) / task.scale) / sums.total[:, None]
        mixed = (probs, mixed[1])
    return Rows(sums.peak, sums.total, _alpha(task, sums), mixed)


def _add_tile(task: Task, sums: _Sums, x, head, table, temperature, index) -> _Sums:
    """Add one tile of the vocabulary to the running sums."""
    start, scores, valid, columns = _scores(task, x, head, index)
    masked = jnp.where(valid, scores, MASK_VALUE)
    peak = jnp.maximum(sums.peak, jnp.max(masked, axis=1))
    moved = sums.peak - peak
    delta_shift, alpha_shift = jnp.exp(moved / task.scale), jnp.exp(moved / temperature)
    depth = scores - peak[:, None]
    tempered_depth = depth / temperature
    p = jnp.where(valid, jnp.exp(depth / task.scale), 0.0)
    same = task.scale == temperature if isinstance(temperature, float) else False
    tempered = p if same else jnp.where(valid, jnp.exp(tempered_depth), 0.0)
    # The depth of a token of no probability may be infinite.
    moment = jnp.sum(jnp.where(tempered > 0, tempered * tempered_depth, 0.0), axis=1)
    earlier = alpha_shift * (sums.moment + moved / temperature * sums.tempered)
    mixed = sums.mixed
    if table is not None:
        part = jax.lax.dynamic_slice_in_dim(table, start, task.tile).astype(task.dtype)
        new = jnp.matmul(p.astype(task.dtype), part, preferred_element_type=jnp.float32)
        mixed = mixed * delta_shift[:, None] + new
    elif task.top:
        ids = jnp.broadcast_to(columns, masked.shape)
        values = jnp.concatenate([mixed[0], masked], axis=1)
        best, places = jax.lax.top_k(values, task.top)
        ids = jnp.concatenate([mixed[1], ids], axis=1)
        mixed = (best, jnp.take_along_axis(ids, places, axis=1))
    return _Sums(
        peak,
        sums.total * delta_shift + jnp.sum(p, axis=1),
        sums.tempered * alpha_shift + jnp.sum(tempered, axis=1),
        jnp.where(alpha_shift > 0, earlier, 0.0) + moment,
        mixed,
    )


def _tiles(task: Task) -> int:
    return -(-task.vocab // task.tile)


def _start(task: Task, index: Any) -> Any:
    return jnp.minimum(index * task.tile, task.vocab - task.tile)


def _scores(task: Task, x: Array, head: Any, index: Any) -> tuple[Any, Array, Array, Array]:
    """Return a tile's first column, its scores, which of its columns count, and their ids."""
    start = _start(task, index)
    if task.layout == "logits":
        scores = jax.lax.dynamic_slice_in_dim(x, start, task.tile, axis=1).astype(jnp.float32)
    elif task.layout == "tied":
        scores = vocabulary_dot(x, jax.lax.dynamic_slice_in_dim(head, start, task.tile))
    else:
        kernel = jax.lax.dynamic_slice_in_dim(head, start, task.tile, axis=1).astype(x.dtype)
        scores = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    columns = start + jnp.arange(task.tile)
    valid = columns >= index * task.tile
    if task.dropped is not None:
        valid &= columns != task.dropped
    return start, jnp.maximum(scores, MASK_VALUE), valid, columns.astype(jnp.int32)


def _alpha(task: Task, sums: _Sums) -> Array:
    """Return the weight of finished rows."""
    settings = task.settings
    kept = task.vocab - (task.dropped is not None)
    entropy = jnp.log(sums.tempered) - sums.moment / sums.tempered
    share, top = entropy / math.log(kept), 1.0 / sums.tempered
    rules = {
        "entropy": share,
        "top1": share,
        "one_minus_entropy": 1.0 - jnp.clip(share, 0.0, 1.0),
        "max_prob": top,
        "one_minus_max_prob": 1.0 - top,
        "fixed": jnp.ones_like(top),
    }
    return jnp.clip(settings.alpha_scale * rules[settings.alpha_rule], 0.0, 1.0)
