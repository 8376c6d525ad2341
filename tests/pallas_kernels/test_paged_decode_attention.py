# SPDX-License-Identifier: Apache-2.0
"""`paged_decode_attention` on every backend, the kernels interpreted, against the definition."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.decode_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.decode_attention.shapes import SHAPES
from pallas_kernels.paged_decode_attention import bench, paged_decode_attention, xla
from tests.pallas_kernels import versions
from tests.pallas_kernels.synchronisation import nth_call_dropped
from tests.tolerances import KERNEL_ATOL, LSE_ATOL

run = jax.jit(
    paged_decode_attention,
    static_argnames=("page_size", "scale", "backend", "interpret", "config"),
)


@pytest.fixture(autouse=True)
def clean_interpreters():
    """Simulated memory and the state of a kernel that raised outlive their test."""
    yield
    pltpu.reset_tpu_interpret_mode_state()
    gpu_callbacks.reset_gpu_interpret_mode_state()


def case(shape, page_size, most, *, lengths=None, dtype="float32", seed=0) -> dict[str, Any]:
    """Return arguments for a shape (B, T, K, G, S, H) and lists of up to `most` pages."""
    batch, rows, heads, group, slots, width = shape
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, rows, heads * group, width))
    k, v = rng.standard_normal((2, batch, heads, slots, width))
    length = rng.integers(0, slots + 1, batch) if lengths is None else np.array(lengths)
    if lengths is None:
        length[0] = slots - 3  # the first head of the first row has as many pages as fit
    # What follows a list's end is no page that could be read by mistake without being noticed.
    pages = rng.integers(0, slots // page_size, (batch, heads, most))
    count = np.zeros((batch, heads), int)
    for b, h in np.ndindex(batch, heads):
        held = -(-int(length[b]) // page_size)
        count[b, h] = rng.integers(0, min(most, held) + 1) if b + h else min(most, held)
        pages[b, h, : count[b, h]] = np.sort(rng.permutation(held)[: count[b, h]])
    arrays = {name: jnp.asarray(x, dtype) for name, x in {"q": q, "k": k, "v": v}.items()}
    lists = {"pages": pages, "count": count, "length": length}
    asking = rng.random((batch, rows)) < 0.8
    return arrays | {name: jnp.asarray(x, jnp.int32) for name, x in lists.items()} | {
        "asking": jnp.asarray(asking),
        "page_size": page_size,
    }  # fmt: skip


def definition(q, k, v, pages, count, length, asking, page_size):
    """Attend every query to the visible tokens of its head's pages, one by one, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], MASK_VALUE)
    for b, t, n in np.ndindex(*q.shape[:3]):
        head = n // (q.shape[2] // k.shape[1])
        listed = [int(p) for p in pages[b, head, : int(count[b, head])]]
        tokens = [p * page_size + i for p in listed for i in range(page_size)]
        tokens = [token for token in tokens if token < length[b]]
        if tokens and asking[b, t]:
            scores = k[b, head, tokens] @ q[b, t, n] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, head, tokens] / weights.sum()
            lse[b, t, n] = scores.max() + np.log(weights.sum())
    return out, lse


def check(given_, backend="xla", **options):
    dtype = str(given_["q"].dtype)
    got, expected = run(**given_, backend=backend, **options), definition(**given_)
    np.testing.assert_allclose(got.out, expected[0], atol=KERNEL_ATOL[dtype])
    np.testing.assert_allclose(got.lse, expected[1], atol=LSE_ATOL[dtype])


@settings(max_examples=12, deadline=None)
@given(sizes=st.sampled_from([(1, 1, 4), (5, 3, 1), (40, 1, 4)]), seed=st.integers(0, 1000))
def test_xla_equals_the_definition(sizes, seed):
    most, rows, group = sizes
    check(case((2, rows, 2, group, 320, 16), 8, most, seed=seed))


def test_long_lists_are_gathered_in_chunks(monkeypatch):
    monkeypatch.setattr(xla, "CHUNK", 64)
    jax.clear_caches()
    check(case((3, 2, 2, 2, 512, 32), 16, 30))
    check(case((3, 2, 2, 2, 512, 32), 16, 30, lengths=[0, 0, 0]))
    jax.clear_caches()


TPU_CASES = {
    "one_row": ((3, 1, 2, 4, 512, 128), 16, 20, "float32"),
    "several_rows": ((2, 3, 1, 2, 512, 128), 32, 5, "float32"),
    "slots_last": ((2, 1, 2, 2, 1024, 64), 128, 6, "float32"),
    "bfloat16": ((2, 1, 2, 4, 1024, 128), 64, 18, "bfloat16"),
}


@pytest.mark.parametrize("name", TPU_CASES)
def test_tpu_kernel_equals_the_definition(name):
    shape, page_size, most, dtype = TPU_CASES[name]
    given_ = case(shape, page_size, most, dtype=dtype)
    check(given_, "mosaic_tpu", interpret=True)


def test_tpu_kernel_stays_within_its_buffers():
    """Uninitialised buffers hold NaN here, and reads out of bounds raise."""
    given_ = case((3, 1, 2, 2, 512, 128), 16, 20, lengths=[0, 200, 512])
    check(given_, "mosaic_tpu", interpret=pltpu.InterpretParams())


GPU_CASES = {
    "pages_of_a_tile": ((3, 1, 2, 4, 512, 64), 16, 13, "bfloat16"),
    "small_pages": ((2, 3, 1, 2, 256, 80), 8, 11, "float16"),
    "whole_tiles": ((2, 1, 2, 2, 1024, 128), 64, 5, "bfloat16"),
    "tiles_of_a_page": ((2, 1, 1, 2, 1024, 64), 256, 3, "bfloat16"),
}
SMALL = mosaic_gpu.Config(64, 3, 2)


@versions.interprets_gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_kernel_equals_the_definition(name):
    shape, page_size, most, dtype = GPU_CASES[name]
    given_ = case(shape, page_size, most, dtype=dtype)
    params = plgpu.InterpretGPUParams(detect_races=True)
    check(given_, "mosaic_gpu", interpret=params, config=SMALL)
    assert not gpu_callbacks.get_races().races_found


@versions.interprets_gpu
@versions.detects_races
def test_a_missing_wait_for_pages_is_noticed(monkeypatch):
    nth_call_dropped(monkeypatch, "barrier_wait", 1)
    given_ = case((1, 1, 1, 4, 512, 64), 16, 13, lengths=[500], dtype="bfloat16")
    params = plgpu.InterpretGPUParams(detect_races=True)
    call = functools.partial(paged_decode_attention, backend="mosaic_gpu", config=SMALL)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
        jax.block_until_ready(call(**given_, interpret=params))


@pytest.mark.parametrize("backend", ["xla", "mosaic_tpu"])
def test_pages_that_are_not_listed_may_hold_anything(backend):
    given_ = case((2, 1, 2, 2, 512, 128), 16, 9, lengths=[300, 512])
    options = {"backend": backend, "interpret": None if backend == "xla" else True}
    want = run(**given_, **options)
    read = np.zeros(given_["k"].shape[:3], bool)
    for b, h in np.ndindex(2, 2):
        for page in np.asarray(given_["pages"])[b, h]:  # entries beyond the count are fetched, too
            read[b, h, page * 16 : (page + 1) * 16] = True
    assert not read.all()
    for name in "kv":
        given_[name] = jnp.where(read[..., None], given_[name], jnp.nan)
    got = run(**given_, **options)
    np.testing.assert_array_equal(got.out, want.out)
    np.testing.assert_array_equal(got.lse, want.lse)


def test_vmap_over_layers():
    layers = [case((2, 1, 2, 2, 256, 128), 16, 7, seed=seed) for seed in (0, 1)]
    sizes = {"page_size": layers[0].pop("page_size")}
    assert layers[1].pop("page_size") == 16
    for options in ({}, {"backend": "mosaic_tpu", "interpret": True}):
        call = functools.partial(paged_decode_attention, **sizes, **options)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        got = jax.vmap(lambda x, call=call: call(**x))(stacked)
        for index, layer in enumerate(layers):
            out, lse = definition(**layer, **sizes)
            np.testing.assert_allclose(got.out[index], out, atol=KERNEL_ATOL["float32"])
            np.testing.assert_allclose(got.lse[index], lse, atol=LSE_ATOL["float32"])


def test_heads_shard_over_devices():
    given_ = case((2, 2, 2, 2, 256, 128), 16, 7)
    size = given_.pop("page_size")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    tokens, heads = PartitionSpec(None, None, "x"), PartitionSpec(None, "x")
    specs = {"q": tokens, **dict.fromkeys(("k", "v", "pages", "count"), heads)}
    specs |= dict.fromkeys(("length", "asking"), PartitionSpec())
    call = functools.partial(
        paged_decode_attention, page_size=size, backend="mosaic_tpu", interpret=True
    )
    mapped = jax.shard_map(
        lambda x: call(**x), mesh=mesh, in_specs=(specs,), out_specs=tokens, check_vma=False
    )
    got = jax.jit(mapped)(given_)
    np.testing.assert_allclose(
        got.out, definition(**given_, page_size=size)[0], atol=KERNEL_ATOL["float32"]
    )


@pytest.mark.slow
def test_benchmarks_compute_attention_and_count_what_is_read():
    case_ = bench._case(SHAPES["llama3_8b"], "small", 2, 512, 16, 4)
    inputs = case_.make_inputs(0)
    assert (
        case_.bytes_moved
        == sum(x.nbytes for x in inputs[::3])
        + 2 * inputs[0].nbytes
        + (inputs[1].nbytes + inputs[2].nbytes) // 4
    )
    got: Any = {name: run_(*inputs) for name, run_ in case_.candidates.items() if run_}
    np.testing.assert_allclose(got["ours"], got["xla"], atol=KERNEL_ATOL["bfloat16"])
    every = bench._case(SHAPES["llama3_8b"], "all", 2, 512, 16, 1)
    inputs = every.make_inputs(0)
    got = {name: run_(*inputs) for name, run_ in every.candidates.items() if run_}
    np.testing.assert_allclose(got["ours"], got["whole_cache"], atol=KERNEL_ATOL["bfloat16"])
    assert max(case_.bytes_moved for case_ in bench.cases()) < 20e9


@pytest.mark.parametrize(("pages", "length"), [("int8", "int32"), ("uint32", "uint32")])
def test_lists_may_be_of_any_integers(pages, length):
    """Neither slots of a page beyond 127 nor tokens that a page lacks wrap around."""
    given_ = case((2, 1, 2, 2, 256, 8), 16, 9, lengths=[250, 131])
    given_["length"] = jnp.array([90, 40])  # some of the listed pages lie beyond
    other = {
        "pages": np.asarray(given_["pages"]).astype(pages),
        "length": np.asarray(given_["length"]).astype(length),
    }
    got, expected = (paged_decode_attention(**(given_ | change)) for change in (other, {}))
    np.testing.assert_array_equal(got.out, expected.out)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"page_size": 24}, "page_size=24 must be >= 1 and divide the 256 slots"),
        ({"pages": np.zeros((2, 1, 3), int)}, r"pages.shape=\(2, 1, 3\) must be \[B=2, K=2, U\]"),
        ({"pages": np.zeros((2, 2, 3))}, "pages='float64' must be an array of integers"),
        ({"pages": np.full((2, 2, 1), 3), "count": np.ones((2, 2))}, "count='float64' must be"),
        (
            {"pages": np.tile([3, 5, 4], (2, 2, 1)), "count": np.full((2, 2), 3)},
            "must ascend, none twice",
        ),
        ({"pages": np.full((2, 2, 3), 16)}, r"pages=\(16, 16\) must lie in \[0, 16\)"),
        ({"count": np.zeros(2, int)}, r"count.shape=\(2,\) must be \(2, 2\)"),
        ({"length": np.zeros(3, int)}, r"length.shape=\(3,\) must be \(2,\)"),
        ({"asking": np.zeros((2, 5), bool)}, r"asking.shape=\(2, 5\) must be \(2, 1\)"),
        ({"q": np.zeros((2, 1, 3, 64))}, "multiple of K=2 query heads"),
        ({"backend": "mosaic_tpu"}, "needs a TPU"),
        ({"backend": "mosaic_tpu", "interpret": True}, "page_size=16 must be a multiple of 128"),
        ({"backend": "mosaic_gpu", "interpret": True}, "serves bfloat16 and float16, not float32"),
    ],
)
def test_bad_input_is_refused(change, match):
    given_ = case((2, 1, 2, 2, 256, 64), 16, 7)
    with pytest.raises(ValueError, match=match):
        paged_decode_attention(**(given_ | change))


@pytest.mark.parametrize("page_size", [4, 24])
def test_pages_that_a_gpu_cannot_fetch(page_size):
    given_ = case((2, 1, 2, 2, 192, 64), page_size, 7, dtype="bfloat16")
    with pytest.raises(ValueError, match=f"mosaic_gpu: page_size={page_size} must be a multiple"):
        paged_decode_attention(**given_, backend="mosaic_gpu", interpret=True)


def test_a_kernel_that_reads_pages_in_another_order_is_noticed(monkeypatch):
    original = mosaic_tpu.Fixed.row
    monkeypatch.setattr(mosaic_tpu.Fixed, "row", lambda self, b, h: original(self, b, 0 * h))
    with pytest.raises(AssertionError, match="Not equal"):
        given_ = case((2, 1, 2, 2, 512, 128), 16, 9, lengths=[300, 512])
        call = functools.partial(paged_decode_attention, backend="mosaic_tpu", interpret=True)
        np.testing.assert_allclose(call(**given_).out, definition(**given_)[0], atol=1e-3)
