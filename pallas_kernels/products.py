# SPDX-License-Identifier: Apache-2.0
"""The two products of attention in the form that XLA runs fastest, chosen from shapes alone."""

import jax.numpy as jnp
from jax import Array, lax

_FEW, _MANY, _MOST = 16, 2048, 8192
"""Rows for which keys are multiplied and added up in one loop; from how many keys on, several rows
and a single one."""


def score_keys(q: Array, k: Array) -> Array:
    """Return the float32 products `[B, K, R, S]` of queries `[B, K, R, H]`, keys `[B, K, S, H]`."""
    rows, keys = q.shape[2:3] + k.shape[2:3]
    if rows <= _FEW and keys >= (_MANY if rows > 1 else _MOST):
        # The matrix library of CPUs would copy the keys to an order of its own. The barrier keeps
        # what makes the keys out of the loop over rows.
        k = lax.optimization_barrier(k)
        products = k[:, :, None].astype(jnp.float32) * q[:, :, :, None].astype(jnp.float32)
        return jnp.sum(products, axis=-1)
    if not _row_by_row(q, k):
        return jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32)
    rows = [
        jnp.einsum("bkh,bksh->bks", q[:, :, row], k, preferred_element_type=jnp.float32)
        for row in range(q.shape[2])
    ]
    return jnp.stack(rows, axis=2)


def weigh_values(weights: Array, v: Array) -> Array:
    """Return the float32 sums `[B, K, R, H]` of values `[B, K, S, H]` by `[B, K, R, S]`."""
    if not _row_by_row(weights, v):
        return jnp.einsum("bkrs,bksh->bkrh", weights, v, preferred_element_type=jnp.float32)
    rows = [
        jnp.einsum("bks,bksh->bkh", weights[:, :, row], v, preferred_element_type=jnp.float32)
        for row in range(weights.shape[2])
    ]
    return jnp.stack(rows, axis=2)


def _row_by_row(rows: Array, keys: Array) -> bool:
    """Whether products with the keys of one head are faster row by row.

    XLA on CPU calls a matrix library once per batch row and head, but compiles matrix-vector
    products into one loop; while a head's keys stay in the first-level cache, reading them once
    per row costs less than the calls.
    """
    return 1 < rows.shape[2] <= 4 and keys.shape[2] * keys.shape[3] <= 8192
