# SPDX-License-Identifier: Apache-2.0
"""Attention, masks and merging against float64 loops over single keys."""

import math
from functools import partial
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
    q = rng.normal(size=(batch, queries, heads, width))
    k = rng.normal(size=(batch, kv_heads, keys, width))
    v = rng.normal(size=(batch, kv_heads, keys, width))
    return tuple(x.astype(dtype) for x in (q, k, v))


@partial(jax.jit, static_argnames=("mask", "window", "softcap"))
def _attend(q, k, v, query_positions, key_positions, mask=Mask(), window=None, softcap=None):
    return attend(
        q,
        k,
        v,
        query_positions=query_positions,
        key_positions=key_positions,
        mask=mask,
        window=window,
        logit_softcap=softcap,
    )


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
    np.testing.assert_allclose(
        np.asarray(part.lse)[seen], lse[seen], atol=LSE_ATOL[dtype], rtol=1e-6
    )
    assert np.all(np.asarray(part.lse)[~seen] == np.float32(MASK_VALUE))


# Few, since each is compiled.
BLOCKS, WINDOWS = st.sampled_from([1, 4]), st.sampled_from([None, 1, 4])


@st.composite
def masks(draw):
    kind = draw(st.sampled_from(["causal", "bidirectional", "block_causal"]))
    return Mask(kind=kind, block_size=draw(BLOCKS) if kind == "block_causal" else 0)


@settings(max_examples=25, deadline=None)
@given(
    mask=masks(),
    window=WINDOWS,
    softcap=st.one_of(st.none(), st.just(5.0)),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    queries=st.sampled_from([1, 5]),
    seed=st.integers(0, 1000),
)
def test_attend_equals_float64_reference(mask, window, softcap, heads, queries, seed):
    q, k, v = _inputs(seed, 2, queries, 9, *heads, 8)
    rng = np.random.default_rng(seed)
    query_positions = rng.integers(-1, 12, (2, queries)).astype(np.int32)
    key_positions = rng.integers(-1, 12, (2, 9)).astype(np.int32)
    part = _attend(q, k, v, query_positions, key_positions, mask, window, softcap)
    _check(part, *_reference(q, k, v, query_positions, key_positions, mask, window, softcap))


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(0, 12), max_size=4), seed=st.integers(0, 1000))
def test_merge_of_any_split_equals_the_whole(cuts, seed):
    q, k, v = _inputs(seed, 2, 3, 12, 4, 2, 8)
    positions = np.arange(12)
    query = np.broadcast_to(np.array([0, 5, 11], np.int32), (2, 3))

    def part(a, b):
        """Over some of the keys; the others have no position, so that a program serves all."""
        here = np.where((positions >= a) & (positions < b), positions, -1)
        return _attend(q, k, v, query, np.broadcast_to(here, (2, 12)).astype(np.int32))

    edges = [0, *sorted(cuts), 12]
    pieces = [part(a, b) for a, b in pairwise(edges) if b > a]
    merged, whole = jax.jit(merge)(*pieces), part(0, 12)
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
    positions = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
    given = _attend(q, k, v, positions, positions)
    segments = {"query_segments": jnp.zeros((2, 7), jnp.int32)}
    unplaced = {"query_positions": None, "key_positions": None, "mask": Mask()}
    left = jax.jit(lambda q, k, v: attend(q, k, v, **unplaced, **segments))(q, k, v)
    np.testing.assert_array_equal(given.out, left.out)


def test_queries_are_rounded_to_the_dtype_of_the_keys():
    q, k, v = _inputs(5, 1, 4, 9, 4, 2, 8)
    k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    query, key = np.array([[5, 6, 7, 8]], np.int32), np.arange(9, dtype=np.int32)[None]
    part = _attend(q, k, v, query, key)
    rounded = q.astype(jnp.bfloat16).astype(np.float64)
    reference = _reference(rounded, k, v, query, key, Mask())
    _check(part, *reference, "bfloat16")


@pytest.mark.parametrize("segmented", [False, True])
def test_tiles_equal_reference_and_keep_documents_apart(segmented):
    """Long enough for tiles of queries and keys, with a window and a cut last tile."""
    q, k, v = _inputs(3, 1, 300, 300, 4, 2, 8)
    positions = np.arange(300)[None]
    mask, window = Mask(kind="block_causal", block_size=7), 150
    segments = (positions >= 90).astype(np.int32) if segmented else None

    @jax.jit
    def run(k):
        at, apart = jnp.asarray(positions, jnp.int32), segments
        apart = None if apart is None else jnp.asarray(apart)
        given = {"query_positions": at, "key_positions": at, "mask": mask, "window": window}
        return attend(
            jnp.asarray(q), k, jnp.asarray(v), **given, query_segments=apart, key_segments=apart
        )

    part = run(k)
    if not segmented:
        _check(part, *_reference(q, k, v, positions, positions, mask, window))
        return
    # Document 1 must not see document 0: moving a key of the first leaves the second alone.
    other = k.copy()  # a program that still runs may be reading the first array
    other[:, :, 85] += 1.0
    moved, out = np.asarray(run(other).out), np.asarray(part.out)
    np.testing.assert_array_equal(moved[:, 90:], out[:, 90:])
    assert np.any(moved[:, :90] != out[:, :90])


def test_gradient_of_a_fully_masked_row_is_finite():
    q, k, v = _inputs(0, 1, 2, 3, 2, 2, 8)
    query_positions, key_positions = np.array([[-1, 2]]), np.array([[0, 1, 2]])

    def loss(q):
        return jnp.sum(_attend(q, k, v, query_positions, key_positions).out ** 2)

    gradient = np.asarray(jax.jit(jax.grad(loss))(q))
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, 0]) and np.any(gradient[:, 1])


@settings(max_examples=30, deadline=None)
@given(
    mask=masks(),
    window=WINDOWS,
    query=st.lists(st.integers(-1, 20), min_size=6, max_size=6),
    key=st.lists(st.integers(-1, 20), min_size=4, max_size=4),
)
def test_visible_equals_the_rule_pair_by_pair(mask, window, query, key):
    visible = jax.jit(Mask.visible, static_argnums=(0, 3))
    seen = np.asarray(visible(mask, np.array([query]), np.array([key]), window))[0]
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
