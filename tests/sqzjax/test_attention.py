# SPDX-License-Identifier: Apache-2.0
"""Attention, masks and merging against float64 loops over single keys."""

import math
from itertools import pairwise

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from sqzjax.attention import Mask, Partial, attend, merge
from sqzjax.numerics import MASK_VALUE
from tests.tolerances import KERNEL_ATOL, LSE_ATOL, MERGE


def _inputs(seed, batch, queries, keys, heads, kv_heads, width, dtype="float32"):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(batch, queries, heads, width)), dtype)
    k = jnp.asarray(rng.normal(size=(batch, kv_heads, keys, width)), dtype)
    v = jnp.asarray(rng.normal(size=(batch, kv_heads, keys, width)), dtype)
    return q, k, v


def _seen(mask, window, query, key):
    """The visibility rule for one pair, written as English would have it."""
    if query < 0 or key < 0 or (window is not None and abs(query - key) >= window):
        return False
    if mask.kind == "causal":
        return key <= query
    if mask.kind == "block_causal":
        return key // mask.block_size <= query // mask.block_size
    return True


def _reference(q, k, v, query_positions, key_positions, mask, window=None, softcap=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    group = q.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(*q.shape[:3]):
        keys = [
            s
            for s in range(k.shape[2])
            if _seen(mask, window, query_positions[b, t], key_positions[b, s])
        ]
        if keys:
            scores = k[b, n // group, keys] @ q[b, t, n] / math.sqrt(q.shape[-1])
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, n // group, keys] / weights.sum()
            lse[b, t, n] = scores.max() + np.log(weights.sum())
    return out, lse


def _check(part: Partial, out, lse, dtype="float32"):
    atol = KERNEL_ATOL[dtype]
    np.testing.assert_allclose(part.out, out, atol=atol, rtol=atol)
    seen = np.isfinite(lse)
    np.testing.assert_allclose(part.lse[seen], lse[seen], atol=LSE_ATOL[dtype], rtol=1e-6)
    assert np.all(np.asarray(part.lse)[~seen] == np.float32(MASK_VALUE))


@st.composite
def masks(draw):
    kind = draw(st.sampled_from(["causal", "bidirectional", "block_causal"]))
    return Mask(kind=kind, block_size=draw(st.integers(1, 5)) if kind == "block_causal" else 0)


@settings(max_examples=25, deadline=None)
@given(
    mask=masks(),
    window=st.one_of(st.none(), st.integers(1, 6)),
    softcap=st.one_of(st.none(), st.just(5.0)),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    queries=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_attend_equals_float64_reference(mask, window, softcap, heads, queries, seed):
    q, k, v = _inputs(seed, 2, queries, 9, *heads, 8)
    rng = np.random.default_rng(seed)
    query_positions = rng.integers(-1, 12, (2, queries)).astype(np.int32)
    key_positions = rng.integers(-1, 12, (2, 9)).astype(np.int32)
    part = attend(
        q,
        k,
        v,
        query_positions=jnp.asarray(query_positions),
        key_positions=jnp.asarray(key_positions),
        mask=mask,
        window=window,
        logit_softcap=softcap,
    )
    _check(part, *_reference(q, k, v, query_positions, key_positions, mask, window, softcap))


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(0, 12), max_size=4), seed=st.integers(0, 1000))
def test_merge_of_any_split_equals_the_whole(cuts, seed):
    q, k, v = _inputs(seed, 2, 3, 12, 4, 2, 8)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    query = jnp.broadcast_to(jnp.array([0, 5, 11]), (2, 3))

    def part(a, b):
        return attend(
            q,
            k[:, :, a:b],
            v[:, :, a:b],
            query_positions=query,
            key_positions=positions[:, a:b],
            mask=Mask(),
        )

    edges = [0, *sorted(cuts), 12]
    pieces = [part(a, b) for a, b in pairwise(edges) if b > a]
    merged, whole = merge(*pieces), part(0, 12)
    np.testing.assert_allclose(merged.out, whole.out, atol=MERGE)
    np.testing.assert_allclose(merged.lse, whole.lse, atol=MERGE, rtol=MERGE)


def test_merge_of_empty_parts_is_empty_and_needs_a_part():
    empty = Partial(jnp.zeros((1, 2, 3, 4)), jnp.full((1, 2, 3), MASK_VALUE))
    merged = merge(empty, empty)
    assert not np.any(merged.out) and np.all(merged.lse == MASK_VALUE)
    with pytest.raises(ValueError, match="at least one"):
        merge()


def test_positions_left_out_are_counted_and_one_sided_segments_restrict_nothing():
    q, k, v = _inputs(4, 2, 7, 7, 4, 2, 8)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    given = attend(q, k, v, query_positions=positions, key_positions=positions, mask=Mask())
    left = attend(
        q,
        k,
        v,
        query_positions=None,
        key_positions=None,
        mask=Mask(),
        query_segments=jnp.zeros((2, 7), jnp.int32),
    )
    np.testing.assert_array_equal(given.out, left.out)


def test_queries_are_rounded_to_the_dtype_of_the_keys():
    q, k, v = _inputs(5, 1, 4, 9, 4, 2, 8)
    k, v = k.astype("bfloat16"), v.astype("bfloat16")
    query, key = jnp.array([[5, 6, 7, 8]]), jnp.arange(9)[None]
    part = attend(q, k, v, query_positions=query, key_positions=key, mask=Mask())
    rounded = np.asarray(q.astype("bfloat16"), np.float64)
    reference = _reference(rounded, k, v, np.asarray(query), np.asarray(key), Mask())
    _check(part, *reference, "bfloat16")


@pytest.mark.parametrize("segmented", [False, True])
def test_tiles_equal_reference_and_keep_documents_apart(segmented):
    """Long enough for tiles of queries and keys, with a window and a cut last tile."""
    q, k, v = _inputs(3, 1, 300, 300, 4, 2, 8)
    positions = np.arange(300)[None]
    mask, window = Mask(kind="block_causal", block_size=7), 150
    segments = jnp.asarray(positions >= 90, jnp.int32) if segmented else None

    def run(k):
        return attend(
            q,
            k,
            v,
            query_positions=jnp.asarray(positions),
            key_positions=jnp.asarray(positions),
            mask=mask,
            window=window,
            query_segments=segments,
            key_segments=segments,
        )

    part = run(k)
    if not segmented:
        _check(part, *_reference(q, k, v, positions, positions, mask, window))
        return
    # Document 1 must not see document 0: moving a key of the first leaves the second alone.
    moved = run(k.at[:, :, 85].add(1.0))
    np.testing.assert_array_equal(moved.out[:, 90:], part.out[:, 90:])
    assert np.any(moved.out[:, :90] != part.out[:, :90])


def test_gradient_of_a_fully_masked_row_is_finite():
    q, k, v = _inputs(0, 1, 2, 3, 2, 2, 8)
    query_positions, key_positions = jnp.array([[-1, 2]]), jnp.array([[0, 1, 2]])

    def loss(q):
        part = attend(
            q, k, v, query_positions=query_positions, key_positions=key_positions, mask=Mask()
        )
        return jnp.sum(part.out**2)

    gradient = jax.grad(loss)(q)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, 0]) and np.any(gradient[:, 1])


@settings(max_examples=30, deadline=None)
@given(
    mask=masks(),
    window=st.one_of(st.none(), st.integers(1, 6)),
    query=st.lists(st.integers(-1, 20), min_size=1, max_size=6),
    key=st.lists(st.integers(-1, 20), min_size=1, max_size=6),
)
def test_visible_equals_the_rule_pair_by_pair(mask, window, query, key):
    seen = mask.visible(jnp.array([query]), jnp.array([key]), window)[0]
    expected = [[_seen(mask, window, i, j) for j in key] for i in query]
    np.testing.assert_array_equal(seen, expected)


def test_block_causal_without_a_block_is_refused():
    with pytest.raises(ValueError, match="block_size=0"):
        Mask(kind="block_causal")


def test_prefill_memory_is_linear():
    """Temporaries of a 4x longer prefill grow by about 4, not 16."""

    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        keys = jax.ShapeDtypeStruct((1, 4, length, 16), jnp.float32)
        positions = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def run(q, k, v, p):
            return attend(q, k, v, query_positions=p, key_positions=p, mask=Mask()).out

        compiled = jax.jit(run).lower(shape, keys, keys, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 5 * temporaries(4096)
