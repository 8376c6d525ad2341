# SPDX-License-Identifier: Apache-2.0
"""`decode_attention`: the XLA path against the definition, and what every backend shares."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import products
from pallas_kernels.common import MASK_VALUE
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention import xla as xla_path
from tests.pallas_kernels import reference
from tests.tolerances import KERNEL_ATOL, LSE_ATOL, MERGE

run = jax.jit(
    decode_attention, static_argnames=("sinks", "scale", "softcap", "ring", "window", "backend")
)


def arrays(seed, batch, rows, kv_heads, group, slots, width, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, rows, kv_heads * group, width)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, kv_heads, slots, width)).astype(np.float32)
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def compare(got, expected, dtype="float32"):
    np.testing.assert_allclose(got.out, expected[0], atol=KERNEL_ATOL[dtype])
    np.testing.assert_allclose(got.lse, expected[1], atol=LSE_ATOL[dtype])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_of_positions_equals_the_definition(data):
    draw = data.draw
    rows, group, slots = draw(st.sampled_from([1, 5])), draw(st.sampled_from([1, 6])), 19
    length = np.array(draw(st.lists(st.integers(0, 3 * slots), min_size=2, max_size=2)), np.int32)
    bounds = st.lists(st.integers(-2, 3 * slots + 4), min_size=2 * rows, max_size=2 * rows)
    starts, limits = (np.array(draw(bounds), np.int32).reshape(2, rows) for _ in "ab")
    sinks, softcap = draw(st.sampled_from([0, 2])), draw(st.sampled_from([None, 1.5]))
    q, k, v = arrays(draw(st.integers(0, 99)), 2, rows, 2, group, slots, 8)
    fixed = {"sinks": sinks, "softcap": softcap, "scale": 0.3}
    got = run(q, k, v, length=length, starts=starts, limits=limits, ring=True, **fixed)
    compare(got, reference.decode_attention(q, k, v, length, starts, limits, **fixed))


@pytest.mark.parametrize("length", [0, 1, 6, 11, 16])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_defaults_are_causal_over_the_last_tokens(length, window):
    q, k, v = arrays(0, 1, 4, 2, 2, 16, 8)
    positions = length - 4 + np.arange(4)
    limits = np.maximum(positions + 1, 0)[None]
    starts = np.zeros_like(limits) if window is None else limits - window
    got = run(q, k, v, length=np.array([length], np.int32), window=window)
    scale = 1 / np.sqrt(8)
    compare(got, reference.decode_attention(q, k, v, [length], starts, limits, scale=scale))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("sinks", [0, 1])
def test_a_draft_tree_sees_the_context_and_its_branch(window, sinks):
    q, k, v = arrays(1, 3, 5, 2, 2, 12, 8)
    length = np.array([3, 9, 17], np.int32)  # shorter than the tree, inside, wrapped
    tree = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [0] * 5])
    tails = np.stack([tree, np.tri(5), tree]).astype(bool)
    positions = length[:, None] - 5 + np.arange(5)
    starts = np.maximum(0 * positions if window is None else positions + 1 - window, 0)
    got = run(
        q, k, v, length=length, tail_mask=tails, window=window, sinks=sinks, ring=True, scale=0.3
    )
    limits = np.maximum(length - 5, 0)[:, None].repeat(5, 1)
    expected = reference.decode_attention(
        q, k, v, length, starts, limits, scale=0.3, sinks=sinks, tail=tails
    )
    compare(got, expected)


def test_long_caches_are_read_in_blocks_inside_the_span(monkeypatch):
    monkeypatch.setattr(xla_path, "BLOCK", 16)
    q, k, v = arrays(2, 3, 3, 2, 2, 155, 8)
    length = np.array([0, 40, 75], np.int32)
    limits = np.maximum(length[:, None] - 3 + np.arange(3) + 1, 0)
    call = functools.partial(jax.jit(decode_attention, static_argnames="window"), q, length=length)
    for window in (None, 20):
        starts = np.zeros_like(limits) if window is None else np.maximum(limits - window, 0)
        # Blocks outside every row's range must not even be read.
        dirty = [np.array(x) for x in (k, v)]
        for x in dirty:
            x[:, :, : int(starts[1:].min()) // 16 * 16] = np.nan
        expected = reference.decode_attention(q, k, v, length, starts, limits, scale=8**-0.5)
        compare(call(k=dirty[0], v=dirty[1], window=window), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_accumulates_in_float32(dtype):
    q, k, v = arrays(3, 2, 2, 2, 4, 33, 16, dtype)
    length = np.array([33, 5], np.int32)
    limits = length[:, None] - 2 + np.arange(2) + 1
    got = run(q, k, v, length=length)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    compare(
        got,
        reference.decode_attention(q, k, v, length, 0 * limits, limits, scale=0.25),
        dtype,
    )


@pytest.mark.parametrize("length", [[32, 21], [9, 3]])
def test_long_caches_are_read_whole_or_in_part(monkeypatch, length):
    monkeypatch.setattr(xla_path, "BLOCK", 8)
    monkeypatch.setattr(products, "_MANY", 16)
    q, k, v = arrays(9, 2, 2, 2, 3, 32, 8)
    limits = np.array(length)[:, None] - 2 + np.arange(2) + 1
    got = jax.jit(decode_attention)(q, k, v, length=np.array(length, np.int32))
    compare(got, reference.decode_attention(q, k, v, length, 0 * limits, limits, scale=8**-0.5))


@pytest.mark.parametrize("cut", [1, 7, 15])
def test_any_split_of_the_context_merges_into_the_whole(cut):
    q, k, v = arrays(4, 2, 2, 2, 2, 16, 8)
    length = np.array([16, 9], np.int32)
    whole = run(q, k, v, length=length)
    limits = length[:, None] - 2 + np.arange(2) + 1
    early = run(q, k, v, length=length, limits=np.minimum(limits, cut))
    late = run(q, k, v, length=length, limits=limits, starts=np.full_like(limits, cut))
    lse = np.logaddexp(np.asarray(early.lse, np.float64), late.lse)
    out = sum(part.out * np.exp(part.lse - lse)[..., None] for part in (early, late))
    np.testing.assert_allclose(out, whole.out, atol=MERGE)
    np.testing.assert_allclose(lse, whole.lse, atol=MERGE)


def test_empty_rows_are_zero_and_finite():
    q, k, v = arrays(5, 2, 2, 1, 2, 16, 8)
    got = run(q, k, v, length=np.array([0, 1], np.int32))
    assert not np.any(got.out[0]) and np.all(got.lse[0] == np.float32(MASK_VALUE))
    assert not np.any(got.out[1, 0]) and np.all(np.isfinite(got.lse))
    np.testing.assert_allclose(got.out[1, 1, 0], v[1, 0, 0], atol=KERNEL_ATOL["float32"])


def test_vmap_over_layers():
    q, k, v = (np.stack([x, 2 * np.asarray(x)]) for x in arrays(6, 2, 1, 2, 2, 16, 8))
    length = np.array([16, 3], np.int32)
    got = jax.jit(jax.vmap(lambda q, k, v: decode_attention(q, k, v, length=length)))(q, k, v)
    for layer in range(2):
        alone = run(q[layer], k[layer], v[layer], length=length)
        np.testing.assert_allclose(got.out[layer], alone.out, atol=KERNEL_ATOL["float32"])


_SHARDED = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from tests.pallas_kernels.test_decode_attention import arrays
from pallas_kernels.decode_attention import decode_attention
q, k, v = arrays(7, 4, 2, 2, 2, 16, 8)
length = np.array([16, 3, 0, 9], np.int32)
automatic = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=automatic)
fn = lambda q, k, v, n: decode_attention(q, k, v, length=n)
cache = P("data", "tensor")
split = jax.shard_map(fn, mesh=mesh, in_specs=(P("data", None, "tensor"), cache, cache, P("data")),
    out_specs=P("data", None, "tensor"))
np.testing.assert_allclose(jax.jit(split)(q, k, v, length).out, fn(q, k, v, length).out, atol=1e-6)
"""


def test_shard_map_over_batch_and_heads():
    code = 'import os; os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"\n'
    subprocess.run([sys.executable, "-c", code + _SHARDED], check=True, timeout=120)


def test_decoding_never_copies_or_transposes_the_cache():
    """The compiled step has no cache-sized temporaries, whatever the cache's length."""
    q, k, v = arrays(8, 1, 1, 4, 2, 8192, 64)
    fn = jax.jit(lambda q, k, v, n: decode_attention(q, k, v, length=n))
    compiled = fn.lower(q, k, v, jnp.array([8000], jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < k.nbytes


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": (2, 1, 3, 8)}, "multiple of K=2"),
        ({"q": (2, 65, 4, 8)}, "1 to 64 rows"),
        ({"q": (2, 1, 4, 4)}, "H=4"),
        ({"v": (2, 2, 15, 8)}, "must equal k.shape"),
        ({"dtype": "int32"}, "float32, bfloat16, float16"),
        ({"length": np.array([17, 0])}, "length=17 must be <= S=16"),
        ({"length": np.array([1])}, "length.shape"),
        ({"length": [3, 4]}, r"length=\[3, 4\] must be an array of integers"),
        ({"length": np.array([3.7, 4.0])}, "length='float64' must be an array of integers"),
        ({"starts": np.zeros((2, 1))}, "starts='float64' must be an array of integers"),
        ({"k": (2, 2, 0, 8), "v": (2, 2, 0, 8)}, "must not have an empty axis"),
        ({"window": 0}, "window=0 must be >= 1"),
        ({"window": 3, "starts": np.zeros((2, 1), int)}, "give one of them"),
        ({"limits": np.zeros((2, 2), int)}, "limits.shape"),
        ({"tail_mask": np.ones((2, 2), bool)}, "tail_mask.shape"),
        ({"tail_mask": np.ones((1, 1), bool), "limits": np.ones((2, 1), int)}, "one of them"),
        ({"sinks": -1}, "sinks=-1"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"backend": "triton"}, "backend='triton' is unknown .* auto, mosaic_gpu"),
        ({"backend": "mosaic_gpu"}, "needs a GPU, not a cpu; use backend='auto'"),
        ({"backend": "mosaic_tpu"}, "needs a TPU, not a cpu"),
        ({"interpret": True}, "name backend='mosaic_gpu'"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, match):
    change = dict(change)
    dtype = change.pop("dtype", "float32")
    shapes = {"q": (2, 1, 4, 8), "k": (2, 2, 16, 8), "v": (2, 2, 16, 8)}
    given = {name: jnp.ones(change.pop(name, shape), dtype) for name, shape in shapes.items()}
    options = {"length": np.array([3, 4], np.int32), **change}
    with pytest.raises(ValueError, match=match):
        decode_attention(**given, **options)
