# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of `decode_attention`, interpreted with the race detector on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from pallas_kernels.common import MASK_VALUE, Target
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention import mosaic_gpu as kernel
from pallas_kernels.decode_attention.mosaic_gpu import Config, decode_attention_mosaic_gpu
from tests.pallas_kernels import reference, versions
from tests.pallas_kernels.synchronisation import events, nth_call_dropped
from tests.tolerances import KERNEL_ATOL, LSE_ATOL

pytestmark = versions.interprets_gpu

CPU = Target("cpu", "cpu")
HOPPER = Target("gpu", "NVIDIA H200", (9, 0), 132)


@pytest.fixture(autouse=True)
def clean_interpreter():
    """An exception inside a kernel leaves state behind that would fail the next one."""
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


def arrays(batch, rows, width, slots, dtype="bfloat16", kv_heads=1, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, kv_heads, rows, width))
    k, v = rng.standard_normal((2, batch, kv_heads, slots, width))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def bounds(lengths, rows, slots, window=None, sinks=0):
    """Return length, span, starts, limits; the rows end at different positions."""
    length = np.array(lengths, np.int32)
    limits = np.maximum(length[:, None] - np.arange(rows) % 5, 0)
    starts = np.zeros_like(limits) if window is None else np.maximum(limits - window, 0)
    full = (length > slots) | (sinks > 0)
    first = np.where(full, 0, np.minimum(starts.min(1), length))
    end = np.minimum(np.where(length > slots, slots, length), slots)
    return tuple(
        np.asarray(x, np.int32) for x in (length, np.stack([first, end], 1), starts, limits)
    )


def launch(q, k, v, rest, config=None, *, races=True, softcap=None, sinks=0, scale=0.3):
    fn = functools.partial(
        decode_attention_mosaic_gpu,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        target=CPU,
        config=config,
        interpret=plgpu.InterpretGPUParams(detect_races=races),
    )
    return jax.block_until_ready(jax.jit(fn)(q, k, v, *map(jnp.asarray, rest)))


def compare(got, q, k, v, rest, *, dtype="bfloat16", **options):
    length, _, starts, limits = rest
    rows_first = np.asarray(q, np.float64).swapaxes(1, 2)
    out, lse = reference.decode_attention(rows_first, k, v, length, starts, limits, **options)
    np.testing.assert_allclose(got[0], out.swapaxes(1, 2), atol=KERNEL_ATOL[dtype])
    np.testing.assert_allclose(got[1], lse.swapaxes(1, 2), atol=LSE_ATOL[dtype])
    empty = lse.swapaxes(1, 2) == MASK_VALUE
    assert not np.any(np.asarray(got[0])[empty])


def check(lengths, rows, width, slots, config, *, window=None, dtype="bfloat16", **options):
    q, k, v = arrays(len(lengths), rows, width, slots, dtype)
    rest = bounds(lengths, rows, slots, window, options.get("sinks", 0))
    options = {"scale": 0.3, **options}
    got = launch(q, k, v, rest, config, **options)
    compare(got, q, k, v, rest, dtype=dtype, **options)
    assert not gpu_callbacks.get_races().races_found


SMALL = Config(64, 3, 1)
"""Three tiles of the ring: from the second step on, tiles are overwritten."""


def test_ragged_lengths_at_the_edges_of_blocks():
    check([0, 1, 63, 64, 65, 320], 4, 64, 320, Config(64, 3, 2))


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 100])
def test_rings_that_have_wrapped(window):
    check([201, 399, 600, 1], 4, 64, 200, Config(64, 4, 2), window=window)


def test_sinks_stay_visible_before_the_window():
    check([150, 3, 192], 4, 64, 192, SMALL, window=20, sinks=5)


@pytest.mark.slow
def test_sinks_in_a_wrapped_ring_are_seen_only_while_held():
    check([193, 400, 191], 4, 64, 192, SMALL, window=20, sinks=5)


@pytest.mark.parametrize("rows", [20, 128])
def test_rows_are_padded_and_tiled(rows):
    check([130], rows, 64, 136, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_other_numbers_of_rows(rows):
    check([130, 7], rows, 64, 136, SMALL)


@pytest.mark.parametrize("width", [80, 128])
def test_head_widths(width):
    check([200], 4, width, 200, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_every_width_with_every_ring(width, dtype, stages):
    check([330, 0], 8, width, 392, Config(64, stages, 1), dtype=dtype, window=250)


def test_softcap_and_float16():
    check([200, 90], 4, 96, 200, Config(64, 4, 1), dtype="float16", softcap=1.5)


def test_larger_blocks_and_more_splits_than_blocks():
    check([300, 40], 8, 64, 304, Config(128, 4, 7))


@pytest.mark.slow
def test_derived_sizes():
    check([1100, 513], 8, 64, 1200, None)


def test_slots_outside_the_span_are_not_read():
    q, k, v = arrays(1, 4, 64, 320)
    rest = bounds([250], 4, 320, window=100)
    first, end = rest[1][0] // 64 * 64 + [0, 64]
    dirty = [x.at[:, :, :first].set(jnp.nan).at[:, :, end:].set(jnp.nan) for x in (k, v)]
    compare(launch(q, dirty[0], dirty[1], rest, SMALL), q, k, v, rest, scale=0.3)


def test_public_function_runs_it_by_name():
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((2, 2, 4, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((2, 2, 128, 64)), jnp.bfloat16) for _ in "kv")
    length = np.array([128, 1], np.int32)
    fn = functools.partial(decode_attention, backend="mosaic_gpu", interpret=True)
    got = fn(q, k, v, length=jnp.asarray(length))
    limits = np.maximum(length[:, None] - 2 + np.arange(2) + 1, 0)
    out, lse = reference.decode_attention(q, k, v, length, 0 * limits, limits, scale=0.125)
    np.testing.assert_allclose(got.out, out, atol=KERNEL_ATOL["bfloat16"])
    np.testing.assert_allclose(got.lse, lse, atol=LSE_ATOL["bfloat16"])


def test_vmap_over_layers():
    q, k, v = (jnp.stack([x, -x]) for x in arrays(1, 4, 64, 128))
    rest = bounds([100], 4, 128)
    fn = functools.partial(launch, rest=rest, config=SMALL, races=False)
    got = jax.vmap(fn)(q, k, v)
    for layer in range(2):
        compare([x[layer] for x in got], q[layer], k[layer], v[layer], rest, scale=0.3)


RACE = "RACE DETECTED"


@pytest.mark.parametrize(
    ("name", "dropped", "match"),
    [
        ("barrier_wait", 0, RACE),  # rows
        ("barrier_wait", 1, RACE),  # keys
        ("barrier_wait", 2, RACE),  # values
        ("commit_smem", 2, RACE),  # outputs before their copy
        ("wait_smem_to_gmem", 0, "Not all copy_smem_to_gmem"),
    ],
)
@versions.detects_races
def test_a_missing_synchronisation_is_noticed(monkeypatch, name, dropped, match):
    nth_call_dropped(monkeypatch, name, dropped)
    q, k, v = arrays(1, 4, 64, 320)
    with pytest.raises(jax.errors.JaxRuntimeError, match=match):
        launch(q, k, v, bounds([320], 4, 320), SMALL)


@versions.detects_races
def test_products_are_ordered_with_what_they_read():
    """Interpretation runs products at once and so cannot notice these errors; the order can.

    Weights are committed between their write and their product. A tile is loaded anew only after
    a commit, where warps meet, that follows the wait for the product which read its predecessor.
    """
    fn = functools.partial(
        decode_attention_mosaic_gpu, scale=1.0, softcap=None, sinks=0, target=HOPPER, config=SMALL
    )
    jaxpr = jax.make_jaxpr(fn)(*arrays(1, 4, 64, 320), *bounds([320], 4, 320))
    prologue = ["load"] * (2 + SMALL.stages - 1) + ["wait"]
    keys = ["wait", "product", "wait for product", "write", "commit", "load", "load"]
    values = ["wait", "product", "wait for product"]
    epilogue = ["write", "commit", "write", "commit", "store", "store", "wait for stores"]
    assert list(events(jaxpr.jaxpr)) == [*prologue, "[", *keys, *values, "]", *epilogue]


def test_a_missing_mask_is_noticed(monkeypatch):
    monkeypatch.setattr(kernel, "_visible", lambda plan, position, *_: position == position)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check([130], 4, 64, 192, SMALL, window=50)


@pytest.mark.parametrize(
    ("width", "slots", "dtype", "target", "reason"),
    [
        (64, 128, "bfloat16", Target("gpu", "A100", (8, 0), 108), "needs a Hopper GPU"),
        (64, 128, "bfloat16", Target("gpu", "B200", (10, 0), 148), "needs a Hopper GPU"),
        (64, 128, "bfloat16", CPU, "needs a Hopper GPU"),
        (64, 128, "float32", HOPPER, "not float32"),
        (72, 128, "bfloat16", HOPPER, "head width 72"),
        (64, 132, "bfloat16", HOPPER, "a multiple of 8"),
        (64, 56, "bfloat16", HOPPER, "at least 64"),
    ],
)
def test_what_the_kernel_cannot_do_is_not_implemented(width, slots, dtype, target, reason):
    q, k, v = arrays(1, 4, width, slots, dtype)
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu: .*{reason}"):
        decode_attention_mosaic_gpu(
            q,
            k,
            v,
            *map(jnp.asarray, bounds([9], 4, slots)),
            scale=1.0,
            softcap=None,
            sinks=0,
            target=target,
            config=SMALL,
        )


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"block_kv": 96}, "block_kv=96 must be a positive multiple of 64"),
        ({"stages": 1}, "stages=1 must be >= 2"),
        ({"splits": 0}, "splits=0 must be >= 1"),
    ],
)
def test_bad_sizes_are_refused(sizes, match):
    with pytest.raises(ValueError, match=match):
        Config(**sizes)


def test_sizes_beyond_shared_memory_are_refused():
    q, k, v = arrays(1, 4, 256, 128)
    with pytest.raises(ValueError, match=r"stages=9.*lower its stages"):
        launch(q, k, v, bounds([9], 4, 128), Config(64, 9, 1))


@pytest.mark.parametrize("width", kernel.WIDTHS)
@pytest.mark.parametrize("rows", [1, 8, 20, 64, 256])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_derived_sizes_fit_and_fill_the_device(width, rows, softcap):
    tile = kernel.row_tile(rows, width, softcap)
    tiles = -(-rows // tile)
    for batch, slots in ((1, 64), (1, 8192), (64, 8192), (1, 524288)):
        config = kernel.default_config(batch, 8, slots, width, tiles, tile, HOPPER)
        assert config.shared_bytes(width, tile) <= 227 * 1024
        assert config.splits * max(256, 8 * tile) <= max(slots, 8 * tile, 256)
    assert batch * 8 * tiles * config.splits >= 2 * 132  # the longest context


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_over_batch_and_heads_lowers(check_vma):
    """Interpretation of one kernel on several devices fails in jax 0.12, whatever the kernel."""
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=automatic)
    fn = functools.partial(
        decode_attention_mosaic_gpu, scale=1.0, softcap=None, sinks=0, target=HOPPER
    )
    args = (*arrays(2, 4, 64, 128, kv_heads=2), *bounds([100, 3], 4, 128))
    heads, rows = P("data", "tensor"), P("data")
    sharded = jax.shard_map(
        fn, mesh=mesh, in_specs=(heads,) * 3 + (rows,) * 4, out_specs=heads, check_vma=check_vma
    )
    text = jax.jit(sharded).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
