# SPDX-License-Identifier: Apache-2.0
"""Attention and its gradients in float64, by formulas; random inputs and the comparison."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import MASK_VALUE
from tests.tolerances import CHUNKED, GRADIENT_REL, KERNEL_ATOL, LSE_ATOL


def arrays(seed, batch, queries, keys, kv_heads, group, width, dtype="float32"):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, queries, kv_heads * group, width))
    k, v = rng.standard_normal((2, batch, kv_heads, keys, width))
    return tuple(jnp.asarray(np.asarray(x, jnp.dtype(dtype))) for x in (q, k, v))


def sees(mask, query, key):
    """The rule for one pair of positions, written as English would have it."""
    if query < 0 or key < 0:
        return False
    if mask.window is not None and abs(query - key) >= mask.window:
        return False
    if mask.kind == "bidirectional":
        return True
    if mask.kind == "causal":
        return key <= query
    own, other = query // mask.block_size, key // mask.block_size
    return {
        "block_causal": other <= own,
        "earlier_blocks": other < own,
        "same_block": other == own,
    }[mask.kind]


def seen_pairs(mask, shape, query_positions, key_positions, query_segments, key_segments):
    """Return the mask `[B, T, S]` pair by pair."""
    batch, length, slots = shape
    queries = np.arange(length)[None].repeat(batch, 0)
    keys = np.arange(slots)[None].repeat(batch, 0)
    queries = queries if query_positions is None else query_positions
    keys = keys if key_positions is None else key_positions
    seen = np.zeros(shape, bool)
    for b, t, s in np.ndindex(*shape):
        seen[b, t, s] = sees(mask, queries[b, t], keys[b, s])
        if query_segments is not None:
            own = query_segments[b, t]
            seen[b, t, s] &= own >= 0 and own == key_segments[b, s]
    return seen


def weights_of(out_shape, lse_shape):
    """Return by what the loss, whose gradients are compared, weighs the two results."""
    weigh = np.random.default_rng(9).standard_normal
    return weigh(out_shape), weigh(lse_shape)


def value_and_gradients(fn, q, k, v):
    """Return (out, lse, dq, dk, dv), compiled."""
    return jax.jit(partial(gradients, fn))(q, k, v)


def gradients(fn, q, k, v):
    """Return (out, lse, dq, dk, dv); the loss weighs out and, where finite, lse."""

    def loss(q, k, v):
        out, lse = fn(q, k, v)
        of_out, of_lse = weights_of(out.shape, lse.shape)
        used = jnp.where(lse > MASK_VALUE / 2, lse, 0.0)
        return jnp.sum(out * of_out) + jnp.sum(used * of_lse), (out, lse)

    (_, parts), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return (*parts, *grads)


def expected(q, k, v, seen, scale, softcap=None, *, use_lse=True):
    """Return what `gradients` should of attention with a boolean mask `[B, T, S]`.

    Without `use_lse` the loss takes the log-sum-exp for a constant.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads = k.shape[:2]
    k, v = (np.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("btnh,bnsh->btns", q, k) * scale
    slope = scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
        slope = scale * (1 - (scores / softcap) ** 2)
    seen = np.broadcast_to(seen[:, :, None], scores.shape)
    some = seen.any(axis=-1, keepdims=True)
    largest = np.max(scores, axis=-1, keepdims=True, where=seen, initial=-1e30)
    exponentials = np.exp(np.where(seen, scores - largest, -np.inf))
    total = np.where(some, exponentials.sum(axis=-1, keepdims=True), 1.0)
    shares = exponentials / total
    out = np.einsum("btns,bnsh->btnh", shares, v)
    lse = np.where(some, largest + np.log(total), MASK_VALUE)[..., 0]

    d_out, d_lse = weights_of(out.shape, lse.shape)
    d_shares = np.einsum("btnh,bnsh->btns", d_out, v)
    mean = np.sum(shares * d_shares, axis=-1, keepdims=True)
    d_products = slope * shares * (d_shares - mean + use_lse * d_lse[..., None])
    d_q = np.einsum("btns,bnsh->btnh", d_products, k)
    d_k = np.einsum("btns,btnh->bnsh", d_products, q)
    d_v = np.einsum("btns,btnh->bnsh", shares, d_out)
    # Heads of a group share their keys and values.
    return [out, lse, d_q, *(x.reshape(*heads, -1, *x.shape[2:]).sum(axis=2) for x in (d_k, d_v))]


def compare(got, wanted, dtype="float32"):
    np.testing.assert_allclose(got[0], wanted[0], atol=KERNEL_ATOL[dtype])
    empty = wanted[1] < MASK_VALUE / 2
    assert np.all(np.asarray(got[1])[empty] == np.float32(MASK_VALUE))
    assert not np.any(np.asarray(got[0])[empty])
    np.testing.assert_allclose(np.asarray(got[1])[~empty], wanted[1][~empty], atol=LSE_ATOL[dtype])
    for actual, gradient in zip(got[2:], wanted[2:]):
        np.testing.assert_allclose(actual, gradient, atol=CHUNKED[dtype], rtol=GRADIENT_REL)
