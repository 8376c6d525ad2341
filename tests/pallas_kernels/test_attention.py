# SPDX-License-Identifier: Apache-2.0
"""`attention`: every mask against a float64 definition, in value and gradient, tiled or not."""

from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import (
    AttentionMask,
    api,
    attention,
    merge,
    noisy_clean_attention,
)
from pallas_kernels.attention import xla as xla_path
from pallas_kernels.attention.shapes import SHAPES
from pallas_kernels.common import MASK_VALUE
from tests.pallas_kernels.attention_reference import (
    arrays,
    compare,
    expected,
    gradients,
    seen_pairs,
    value_and_gradients,
)
from tests.tolerances import KERNEL_ATOL, MERGE

WHOLE = xla_path.Config(128, 128, 1 << 30)
TILES = xla_path.Config(16, 8, 0)
MASKS = [
    AttentionMask(),
    AttentionMask("bidirectional"),
    AttentionMask("block_causal", 4),
    AttentionMask("earlier_blocks", 5),
    AttentionMask("same_block", 4),
    AttentionMask(window=1),
    AttentionMask(window=6),
    AttentionMask("bidirectional", window=5),
    AttentionMask("block_causal", 4, window=7),
]


def rows(seed, batch, length, low, high):
    return np.random.default_rng(seed).integers(low, high, (batch, length)).astype(np.int32)


run_merge = jax.jit(merge)


def sizes(config):
    return mock.patch.object(api, "default_config", lambda *_: config)


def check(q, k, v, mask, config, softcap=None, scale=0.3, **where):
    shape = (q.shape[0], q.shape[1], k.shape[2])
    known: dict[str, Any] = {"query_positions": None, "key_positions": None}
    known |= {"query_segments": None, "key_segments": None} | where
    fn = partial(attention, mask=mask, scale=scale, softcap=softcap, **known)
    with sizes(config):
        got = value_and_gradients(fn, q, k, v)
    compare(got, expected(q, k, v, seen_pairs(mask, shape, **known), scale, softcap))


@pytest.mark.parametrize("config", [WHOLE, TILES], ids=["whole", "tiles"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_every_mask_equals_the_definition_in_value_and_gradient(mask, config, packed):
    q, k, v = arrays(0, 2, 37, 37, 2, 2, 8)
    where: dict[str, Any] = {}
    if packed:
        segments = np.repeat([[0, 1, 2, -1], [4, 4, 7, -1]], [12, 9, 11, 5], axis=1)
        starts = np.array([0] * 12 + [12] * 9 + [21] * 11 + [32] * 5)
        positions = np.where(segments >= 0, np.arange(37) - starts, -1).astype(np.int32)
        segments = segments.astype(np.int32)
        where = {"query_positions": positions, "key_positions": positions}
        where |= {"query_segments": segments, "key_segments": segments}
    check(q, k, v, mask, config, **where)


FORMS = [
    (AttentionMask("block_causal", 4, window=7), None, WHOLE),
    (AttentionMask("bidirectional", window=5), 1.5, TILES),
    (AttentionMask("same_block", 4), None, TILES),
    (AttentionMask(), 1.5, TILES),
]


@pytest.mark.parametrize(("mask", "softcap", "config"), FORMS, ids=str)
def test_any_positions_equal_the_definition(mask, softcap, config):
    """Shuffled and repeated positions, padding anywhere: nothing depends on storage order."""
    known = ("query_positions", "key_positions", "query_segments", "key_segments")

    def fn(q, k, v, *where):
        options: dict[str, Any] = dict(zip(known, where))
        return attention(q, k, v, mask=mask, softcap=softcap, scale=0.3, **options)

    run = jax.jit(lambda q, k, v, *where: gradients(lambda *x: fn(*x, *where), q, k, v))

    @settings(max_examples=12, deadline=None)
    @given(seed=st.integers(0, 10**6))
    def compare_for(seed):
        q, k, v = arrays(seed, 2, 21, 35, 2, 3, 8)
        where = [rows(seed + i, 2, n, -3, 30) for i, n in ((0, 21), (1, 35))]
        where += [rows(seed + i, 2, n, -1, 2) for i, n in ((2, 21), (3, 35))]
        seen = seen_pairs(mask, (2, 21, 35), *where)
        compare(run(q, k, v, *where), expected(q, k, v, seen, 0.3, softcap))

    with sizes(config):
        compare_for()


@pytest.mark.parametrize("config", [WHOLE, TILES], ids=["whole", "tiles"])
def test_a_traced_window_equals_a_static_one(config):
    q, k, v = arrays(1, 1, 30, 30, 1, 2, 8)
    positions = np.arange(30, dtype=np.int32)[None]
    where: dict[str, Any] = {"query_positions": positions, "key_positions": positions}

    @jax.jit
    def traced(window):
        return attention(q, k, v, mask=AttentionMask(window=window), **where)

    with sizes(config):
        for window in (1, 9, 2**31 - 1):
            static = jax.jit(partial(attention, mask=AttentionMask(window=window)))(q, k, v)
            np.testing.assert_array_equal(traced(jnp.int32(window)).out, static.out)


@pytest.mark.parametrize("config", [WHOLE, TILES], ids=["whole", "tiles"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_accumulates_in_float32(dtype, config):
    q, k, v = arrays(2, 2, 40, 40, 2, 2, 16, dtype)
    seen = seen_pairs(AttentionMask(), (2, 40, 40), None, None, None, None)
    with sizes(config):
        got = value_and_gradients(attention, q, k, v)
    assert [x.dtype for x in got] == ["float32"] * 2 + [dtype] * 3
    compare(got[:2], expected(q, k, v, seen, 0.25)[:2], dtype)


@pytest.mark.parametrize("config", [WHOLE, TILES], ids=["whole", "tiles"])
@pytest.mark.parametrize("mask", [MASKS[0], MASKS[4], MASKS[7]], ids=str)
def test_any_split_of_the_keys_merges_into_the_whole(config, mask):
    q, k, v = arrays(3, 2, 40, 40, 2, 2, 8)
    positions = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40))
    part = jax.jit(
        lambda keys: attention(q, k, v, mask=mask, query_positions=positions, key_positions=keys)
    )

    with sizes(config):
        whole = part(positions)
        for cuts in ([1], [20], [39], [8, 16], [3, 4, 31]):
            edges = pairwise([0, *cuts, 40])
            inside = [(positions >= a) & (positions < b) for a, b in edges]
            merged = run_merge(*(part(np.where(held, positions, -1)) for held in inside))
            np.testing.assert_allclose(merged.out, whole.out, atol=MERGE)
            np.testing.assert_allclose(merged.lse, whole.lse, atol=MERGE, rtol=MERGE)


def test_merging_differentiates_as_the_whole():
    """Needs the cotangent of the log-sum-exp; without it the gradients are far off."""
    q, k, v = arrays(4, 1, 24, 24, 1, 2, 8)

    def split(q, k, v):
        mask = AttentionMask("earlier_blocks", 8)
        earlier = attention(q, k, v, mask=mask)
        return merge(earlier, attention(q, k, v, mask=AttentionMask("same_block", 8)))

    seen = seen_pairs(AttentionMask("block_causal", 8), (1, 24, 24), None, None, None, None)
    with sizes(TILES):
        compare(value_and_gradients(split, q, k, v), expected(q, k, v, seen, 8**-0.5))


def test_empty_rows_merge_to_empty_rows_with_zero_gradients():
    q, k, v = arrays(5, 1, 8, 8, 1, 1, 8)
    positions = np.full((1, 8), -1, np.int32)

    def empty(q, k, v):
        part = attention(q, k, v, query_positions=positions, key_positions=positions)
        return merge(part, part)

    for config in (WHOLE, TILES):
        with sizes(config):
            out, lse, *grads = value_and_gradients(empty, q, k, v)
        assert not np.any(out) and np.all(lse == np.float32(MASK_VALUE))
        assert all(not np.any(grad) for grad in grads)


def noisy_clean_seen(length, block_size, positions, segments):
    """The mask of BD3-LM over [noisy | clean], pair by pair."""
    seen = np.zeros((len(positions), 2 * length, 2 * length), bool)
    for b, i, j in np.ndindex(*seen.shape):
        t, s = i % length, j % length
        if segments[b, t] < 0 or segments[b, t] != segments[b, s]:
            continue
        own, other = positions[b, t] // block_size, positions[b, s] // block_size
        noisy_query, noisy_key = i < length, j < length
        if noisy_query:
            seen[b, i, j] = own == other if noisy_key else other < own
        else:
            seen[b, i, j] = not noisy_key and other <= own
    return seen


@pytest.mark.parametrize("config", [WHOLE, TILES], ids=["whole", "tiles"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_noisy_clean_attention_equals_its_mask(config, packed):
    q, k, v = arrays(6, 2, 42, 42, 2, 2, 8)
    segments = np.zeros((2, 21), np.int32)
    positions = np.broadcast_to(np.arange(21, dtype=np.int32), (2, 21))
    where: dict[str, Any] = {}
    if packed:
        segments = np.repeat([[0, 1, -1], [3, 3, -1]], [10, 8, 3], axis=1).astype(np.int32)
        starts = np.array([[0] * 10 + [10] * 11, [0] * 21])
        positions = np.where(segments >= 0, np.arange(21) - starts, -1).astype(np.int32)
        where = {"positions": positions, "segments": segments}
    with sizes(config):
        fn = partial(noisy_clean_attention, block_size=4, **where)
        got = value_and_gradients(fn, q, k, v)
    seen = noisy_clean_seen(21, 4, positions, segments)
    compare(got, expected(q, k, v, seen, 8**-0.5))


@pytest.mark.parametrize("config", [WHOLE, TILES], ids=["whole", "tiles"])
def test_vmap_over_layers(config):
    q, k, v = (jnp.stack([x, 2 * x]) for x in arrays(7, 2, 20, 20, 2, 2, 8))
    with sizes(config):
        got = jax.jit(jax.vmap(attention))(q, k, v)
        alone = [jax.jit(attention)(q[i], k[i], v[i]) for i in range(2)]
    for i in range(2):
        np.testing.assert_allclose(got.out[i], alone[i].out, atol=KERNEL_ATOL["float32"])


@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask(window=20)], ids=str)
def test_tiles_that_no_query_sees_are_never_read(mask):
    """NaN in the keys that a block of queries cannot see leaves it alone, in both directions."""
    q, k, v = arrays(8, 1, 64, 64, 1, 2, 8)
    first = 32 if mask.window else 0

    def run(q, k, v):
        return attention(q, k, v, mask=mask, query_positions=positions, key_positions=keys).out

    positions, keys = np.arange(32, 64, dtype=np.int32)[None], np.arange(64, dtype=np.int32)[None]
    positions -= 32 - first  # queries 0..31 without a window, 32..63 with it
    dirty = np.s_[:, :, :8] if mask.window else np.s_[:, :, 32:]
    spoilt = np.array(k)
    spoilt[dirty] = np.nan

    @jax.jit
    def with_gradients(q, k, v):
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(out)

    with sizes(TILES):
        clean = with_gradients(q[:, :32], k, v)
        dirtied = with_gradients(q[:, :32], spoilt, v)
    assert np.all(np.isfinite(clean[0]))
    jax.tree.map(np.testing.assert_array_equal, clean, dirtied)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask("bidirectional")], ids=str)
def test_memory_is_linear_in_the_length(mask, backward):
    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 8, 32), jnp.float32)
        k = jax.ShapeDtypeStruct((1, 2, length, 32), jnp.float32)

        def fn(q, k, v):
            return jnp.sum(attention(q, k, v, mask=mask).out)

        fn = jax.grad(fn, (0, 1, 2)) if backward else fn
        compiled = jax.jit(fn).lower(q, k, k).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries(32768) < 4.5 * temporaries(8192)
    # 8 heads of 32768 x 32768 scores would be 34 GB; the arrays themselves have some MB.
    assert temporaries(32768) < 10 * 32768 * 8 * 32 * 4


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_trace(name):
    shape = SHAPES[name]
    q = jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, shape.H), shape.dtype)
    k = jax.ShapeDtypeStruct((shape.B, shape.K, shape.S, shape.H), shape.dtype)
    out, lse = jax.eval_shape(partial(attention, mask=shape.mask), q, k, k)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": (2, 4, 3, 8)}, "multiple of K=2"),
        ({"q": (2, 4, 4, 4)}, "H=4"),
        ({"q": (2, 4, 8)}, "4 axes"),
        ({"q": (2, 0, 4, 8)}, "empty axis"),
        ({"v": (2, 2, 15, 8)}, "must equal k.shape"),
        ({"dtype": "int32"}, "float32, bfloat16, float16"),
        ({"query_positions": np.zeros((2, 5), int)}, "query_positions.shape"),
        ({"key_positions": np.zeros((1, 16), int)}, "key_positions.shape"),
        ({"query_segments": np.zeros((2, 4), int)}, "for queries and keys, or for neither"),
        ({"key_segments": np.zeros((2, 4), int)}, "key_segments.shape"),
        ({"query_positions": np.zeros((2, 4))}, "query_positions='float64' must be an array of"),
        ({"softcap": 0.0}, "softcap=0.0 must be > 0"),
        ({"backend": "triton"}, "backend='triton' is unknown .* auto, cudnn, splash, xla"),
        ({"backend": "cudnn"}, "cudnn: needs a GPU, not a cpu; use backend='auto'"),
        ({"backend": "splash"}, "splash: needs a TPU, not a cpu"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, match):
    change = dict(change)
    dtype = change.pop("dtype", "float32")
    shapes = {"q": (2, 4, 4, 8), "k": (2, 2, 16, 8), "v": (2, 2, 16, 8)}
    given = [jnp.ones(change.pop(name, shape), dtype) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=match):
        attention(*given, **change)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kind": "prefix"}, "kind='prefix' must be one of causal"),
        ({"kind": "block_causal"}, "block_size=0 must be >= 1"),
        ({"window": 0}, "window=0 must be >= 1"),
        ({"window": np.int64(0)}, r"window=.*0.* must be >= 1"),
    ],
)
def test_bad_masks_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        AttentionMask(**arguments)


def test_noisy_clean_attention_needs_two_copies():
    q, k, v = arrays(0, 1, 7, 7, 1, 1, 8)
    with pytest.raises(ValueError, match="even number"):
        noisy_clean_attention(q, k, v, block_size=4)
    with pytest.raises(ValueError, match=r"q\.shape"):
        noisy_clean_attention(q[:, :6], k, v, block_size=4)
