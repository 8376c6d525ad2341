# SPDX-License-Identifier: Apache-2.0
"""Writing tokens into the slots of a buffer, in place, and cutting some out."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common import current_target
from sqzjax.typing import Array

_UNROLLED_ROWS = {"cpu": 16, "tpu": 16, "gpu": 1}
"""Rows of a batch written one by one, which the CPU prefers to a scatter; a GPU would launch a
kernel for each."""


def write(buffer: Array, new: Array, slots: Array, valid: Array) -> Array:
    """Write `new` `[B, T, A, ...]` into `buffer` `[B, A, S, ...]` at `slots` `[B, T]`.

    Tokens not `valid` `[B, T]` are dropped.
    """
    batch, length = slots.shape
    new = new.astype(buffer.dtype)
    if length == 1 and batch <= _unrolled_rows():
        tokens = jnp.swapaxes(new, 1, 2)
        for row in range(batch):
            buffer = _write_run(buffer, tokens, slots, valid, row)
        # Without the barrier XLA repeats the write inside attention, which copies the whole cache.
        return jax.lax.optimization_barrier(buffer)
    slots = jnp.where(valid, slots, buffer.shape[2])
    rows = jnp.arange(batch)[:, None]
    return buffer.at[rows, :, slots].set(new, mode="drop")


def _unrolled_rows() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
        return 1  # slices of a batch that is split over devices would gather it
    return _UNROLLED_ROWS.get(current_target().platform, 16)


def cut(buffer: Array, first: Array, size: int) -> Array:
    """Return `size` slots of each row of `[B, A, S, ...]`, beginning at `first` `[B]`.

    Rows are sliced one by one where a write would be: for a gather of slices XLA copies the whole
    buffer to another order on TPU.
    """
    batch, rest = buffer.shape[0], buffer.shape[3:]
    if batch > 4 * _unrolled_rows():
        one = partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=1)
        return jax.vmap(one)(buffer, first)
    shape, zeros = (1, buffer.shape[1], size, *rest), (0,) * len(rest)
    rows = (
        jax.lax.dynamic_slice(buffer, (row, 0, first[row], *zeros), shape) for row in range(batch)
    )
    return jnp.concatenate(list(rows))


def write_runs(buffer: Array, new: Array, runs: Array, valid: Array) -> Array:
    """Write runs of slots `new` `[B, A, n * size, ...]` into `buffer` `[B, A, S, ...]`.

    The i-th of a row goes to the slots from `runs[i] * size` on, `runs` and `valid` `[B, n]`.
    """
    batch, number = runs.shape
    size = new.shape[2] // number
    if number == 1 and batch <= _unrolled_rows():
        new = new.astype(buffer.dtype)
        for row in range(batch):
            buffer = _write_run(buffer, new, runs * size, valid, row)
        return jax.lax.optimization_barrier(buffer)
    if size == 1:
        return write(buffer, jnp.moveaxis(new, 2, 1), runs, valid)
    # For many runs, whose reshaped buffer XLA may copy: a prompt's, not a step's.
    new = new.reshape(*new.shape[:2], number, size, *new.shape[3:])
    grouped = buffer.reshape(*buffer.shape[:2], -1, size, *buffer.shape[3:])
    return write(grouped, jnp.moveaxis(new, 2, 1), runs, valid).reshape(buffer.shape)


def _write_run(buffer, new, slots, valid, row):
    """One run of one row: XLA updates a donated buffer in place, a scatter would loop over it."""
    start = (row, 0, slots[row, 0], *(0 for _ in buffer.shape[3:]))
    old = jax.lax.dynamic_slice(buffer, start, (1, *new.shape[1:]))
    kept = jnp.where(valid[row, 0], new[row : row + 1], old)
    return jax.lax.dynamic_update_slice(buffer, kept, start)
