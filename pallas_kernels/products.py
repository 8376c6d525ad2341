# SPDX-License-Identifier: Apache-2.0
"""The two products of attention in the form that XLA runs fastest, chosen from shapes and types.

The matrix library of CPUs copies the larger operand to an order of its own: with few rows and many
keys that takes longer than the product.
"""

import jax.numpy as jnp
from jax import Array, lax

_FEW = 16
"""Rows that count as few."""
_MANY = 2048
"""Keys from which on several rows of 32 bits, or a single one of 16, take one loop."""
_MOST = 8192
"""Keys from which on a single row of 32 bits does."""


def score_keys(q: Array, k: Array) -> Array:
    """Return the float32 products `[B, K, R, S]` of queries `[B, K, R, H]`, keys `[B, K, S, H]`."""
    if _in_one_loop(q, k):
        # The barrier keeps what makes the keys out of the loop over rows.
        k = lax.optimization_barrier(k)
        products = k[:, :, None].astype(jnp.float32) * q[:, :, :, None].astype(jnp.float32)
        return jnp.sum(products, axis=-1)
    if 1 < q.shape[2] <= _FEW and k.shape[2] >= 2 * _MANY:
        # The right operand is the one copied: let it be the few rows.
        scores = jnp.einsum("bksh,bkrh->bksr", k, q, preferred_element_type=jnp.float32)
        return jnp.swapaxes(scores, -1, -2)
    if not _row_by_row(q, k):
        return jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32)
    rows = [
        jnp.einsum("bkh,bksh->bks", q[:, :, row], k, preferred_element_type=jnp.float32)
        for row in range(q.shape[2])
    ]
    return jnp.stack(rows, axis=2)


def weigh_values(weights: Array, v: Array) -> Array:
    """Return the float32 sums `[B, K, R, H]` of values `[B, K, S, H]` by `[B, K, R, S]`."""
    if weights.shape[2] == 1 and _in_one_loop(weights, v):
        weights = jnp.swapaxes(weights, -1, -2).astype(jnp.float32)
        return jnp.sum(weights * v.astype(jnp.float32), axis=2, keepdims=True)
    if not _row_by_row(weights, v):
        return jnp.einsum("bkrs,bksh->bkrh", weights, v, preferred_element_type=jnp.float32)
    rows = [
        jnp.einsum("bks,bksh->bkh", weights[:, :, row], v, preferred_element_type=jnp.float32)
        for row in range(weights.shape[2])
    ]
    return jnp.stack(rows, axis=2)


def _in_one_loop(rows: Array, keys: Array) -> bool:
    """Whether to multiply and add up in a loop of XLA's own rather than in a matrix product."""
    count, narrow = rows.shape[2], keys.dtype.itemsize < 4
    if count == 1:
        return keys.shape[2] >= (_MANY if narrow else _MOST)
    return count <= _FEW and keys.shape[2] >= _MANY and not narrow


def _row_by_row(rows: Array, keys: Array) -> bool:
    """Whether products with the keys of one head are faster row by row.

    XLA on CPU calls a matrix library once per batch row and head, but compiles matrix-vector
    products into one loop; while a head's keys stay in the first-level cache, reading them once
    per row costs less than the calls.
    """
    return 1 < rows.shape[2] <= 4 and keys.shape[2] * keys.shape[3] <= 8192
