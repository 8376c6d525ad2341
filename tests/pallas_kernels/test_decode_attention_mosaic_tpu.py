# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of `decode_attention`, interpreted: values, skipped blocks, races, mutations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.common import MASK_VALUE, Target
from pallas_kernels.decode_attention import api, decode_attention
from pallas_kernels.decode_attention import mosaic_tpu as kernel
from pallas_kernels.decode_attention.mosaic_tpu import Config, decode_attention_mosaic_tpu
from tests.pallas_kernels import reference, versions
from tests.tolerances import KERNEL_ATOL, LSE_ATOL

TPU = Target("tpu", "TPU")


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """Simulated memory outlives a test that raised, or that asked for another number of cores."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


SMALL = Config(block_kv=128, block_rows=16)
STATIC = ("sinks", "scale", "softcap", "ring", "window", "interpret", "config")
run = jax.jit(functools.partial(decode_attention, backend="mosaic_tpu"), static_argnames=STATIC)


def arrays(shape, dtype="float32", seed=0):
    """Return q `[B, T, N, H]` and k, v for a shape (B, T, K, G, S, H)."""
    batch, rows, kv_heads, group, slots, width = shape
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, rows, kv_heads * group, width)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, kv_heads, slots, width)).astype(np.float32)
    return tuple(jnp.asarray(x.astype(jnp.dtype(dtype))) for x in (q, k, v))


def compare(got, expected, dtype="float32"):
    np.testing.assert_allclose(got[0], expected[0], atol=KERNEL_ATOL[dtype])
    np.testing.assert_allclose(got[1], expected[1], atol=LSE_ATOL[dtype])


def check_case(
    shape, lengths, dtype="float32", interpret: Any = True, config: Config | None = SMALL, **fixed
):
    """Compare the causal attention of the last T tokens with the definition."""
    q, k, v = arrays(shape, dtype)
    length = np.array(lengths, np.int32)
    limits = np.maximum(length[:, None] - shape[1] + np.arange(shape[1]) + 1, 0).astype(np.int32)
    window = fixed.pop("window", None)
    starts = np.zeros_like(limits) if window is None else limits - window
    fixed = {"scale": shape[-1] ** -0.5, **fixed}
    got = run(q, k, v, length=length, limits=limits, starts=starts, ring=True, config=config,
              interpret=interpret, **fixed)  # fmt: skip
    compare(got, reference.decode_attention(q, k, v, length, starts, limits, **fixed), dtype)


# (B, T, K, G, S, H): widths that fill no, one and two tiles of lanes, both orders of the cache
# (capacities that are a multiple of 128 and not), tails, caches below one block, several row tiles.
CASES: dict[str, Any] = {
    "one_row": ((4, 1, 2, 1, 384, 128), [0, 1, 128, 384], {}),
    "grouped": ((3, 1, 1, 8, 256, 64), [129, 255, 256], {}),
    "tokens": ((2, 5, 1, 4, 256, 80), [200, 3], {}),
    "row_tiles": ((2, 10, 1, 4, 256, 96), [256, 131], {}),
    "wide": ((2, 1, 1, 2, 256, 256), [256, 40], {}),
    "tail": ((3, 2, 1, 2, 300, 128), [300, 257, 256], {}),
    "tiny": ((3, 2, 1, 2, 20, 64), [20, 1, 0], {}),
    "ring": ((4, 2, 1, 2, 256, 64), [257, 384, 1000, 256], {}),
    "ring_tail": ((2, 1, 1, 2, 300, 128), [301, 899], {}),
    "window": ((3, 2, 1, 2, 384, 128), [384, 270, 5], {"window": 100}),
    "window_sinks_ring": ((3, 2, 1, 2, 256, 64), [700, 256, 90], {"window": 30, "sinks": 4}),
    "softcap": ((2, 1, 1, 2, 256, 64), [200, 1], {"softcap": 2.0, "scale": 1.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    shape, lengths, fixed = CASES[name]
    check_case(shape, lengths, **fixed)


@pytest.mark.parametrize("name", ["one_row", "tail", "window_sinks_ring"])
def test_equals_the_definition_in_simulated_memory(name):
    """Uninitialised buffers hold NaN here, and reads out of bounds raise."""
    shape, lengths, fixed = CASES[name]
    check_case(shape, lengths, interpret=pltpu.InterpretParams(), **fixed)


@pytest.mark.parametrize("shape", [(2, 1, 2, 4, 256, 128), (2, 3, 1, 4, 256, 64)])
def test_bfloat16(shape):
    check_case(shape, [256, 100], dtype="bfloat16")


@pytest.mark.parametrize("shape", [(2, 1, 1, 4, 1152, 128), (2, 40, 1, 8, 128, 64)])
def test_default_sizes(shape):
    check_case(shape, [shape[4], 77], config=None)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_range_of_positions(data):
    """Ragged lengths, rows that see nothing, ranges that cross blocks and the end of a ring."""
    draw = data.draw
    rows, group, slots = draw(st.sampled_from([(1, 6, 256), (3, 1, 300)]))
    length = np.array([draw(st.integers(0, 2 * slots + 50)) for _ in "ab"], np.int32)
    bounds = st.lists(st.integers(-2, 2 * slots + 60), min_size=2 * rows, max_size=2 * rows)
    starts, limits = (np.array(draw(bounds), np.int32).reshape(2, rows) for _ in "ab")
    sinks = draw(st.sampled_from([0, 2]))
    q, k, v = arrays((2, rows, 1, group, slots, 16), seed=draw(st.integers(0, 99)))
    got = run(q, k, v, length=length, starts=starts, limits=limits, ring=True, sinks=sinks,
              scale=0.3, config=SMALL, interpret=True)  # fmt: skip
    fixed = {"scale": 0.3, "sinks": sinks}
    compare(got, reference.decode_attention(q, k, v, length, starts, limits, **fixed))


def folded(lengths, spans, *, slots=512, rows=4):
    """Return the kernel's own arguments with every row seeing all of its sequence."""
    batch = len(lengths)
    q, k, v = arrays((batch, 1, 1, rows, slots, 128))
    length = np.array(lengths, np.int32)
    limits = np.repeat(length[:, None], rows, axis=1)
    q = np.asarray(q).reshape(batch, 1, rows, 128)
    rest = (length, np.array(spans, np.int32), np.zeros_like(limits), limits)
    return tuple(map(jnp.asarray, (q, k, v, *rest)))


def call(*inputs, interpret: Any = True, config=SMALL):
    return decode_attention_mosaic_tpu(
        *inputs,
        scale=0.1,
        softcap=None,
        sinks=0,
        target=TPU,
        config=config,
        interpret=interpret,
    )


run_call = jax.jit(call, static_argnames="interpret")


def test_empty_spans_give_zeros_and_read_inside_the_cache():
    inputs = folded([512, 300, 0], [[512, 512], [128, 128], [0, 0]])
    out, lse = run_call(*inputs, interpret=pltpu.InterpretParams())
    assert not np.any(out)
    assert np.all(lse == np.float32(MASK_VALUE))


def test_steps_follow_the_longest_span_and_not_the_capacity(monkeypatch):
    steps, original = [], kernel._grid_spec
    monkeypatch.setattr(kernel, "_grid_spec", lambda *a: steps.append(int(a[-1])) or original(*a))
    call(*folded([512, 300], [[120, 300], [0, 20]]))
    assert steps == [3]  # Blocks 0, 1 and 2 of the first sequence.


def test_slots_outside_the_span_may_hold_anything():
    q, k, v, *rest = folded([512], [[140, 400]])
    out, lse = run_call(q, k, v, *rest)
    slot = np.arange(512)[:, None]
    # The first block is not fetched; in a visited block, scores are masked before the maximum.
    k = np.where((slot < 140) | (slot >= 400), np.float32(np.nan), k)
    v = np.where(slot < 128, np.float32(np.nan), v)
    again = run_call(q, k, v, *rest)
    np.testing.assert_array_equal(again[0], out)
    np.testing.assert_array_equal(again[1], lse)


@versions.detects_races
def test_two_cores_share_sequences_and_heads_without_races():
    """Every core order writes each output tile once, after all of its own steps."""
    params = pltpu.InterpretParams(
        detect_races=True, on_race="raise", num_cores_or_threads=2, random_seed=1
    )
    check_case((2, 1, 2, 2, 256, 128), [256, 70], interpret=params)


def test_vmap_equals_a_loop():
    inputs = [folded([300, 20], [[0, 300], [0, 20]]), folded([0, 512], [[0, 0], [0, 512]])]
    stacked = [np.stack(pair) for pair in zip(*inputs)]
    got = jax.jit(jax.vmap(call))(*stacked)
    for index, one in enumerate(inputs):
        compare([np.asarray(x)[index] for x in got], run_call(*one))


@pytest.mark.parametrize("check_vma", [True, False])
def test_heads_shard_over_devices(check_vma):
    inputs = folded([300, 20], [[0, 300], [0, 20]])
    heads = PartitionSpec(None, "x")
    q, k, v = (np.concatenate([x, np.float32(0.5) * x], axis=1) for x in inputs[:3])
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(heads,) * 3 + (PartitionSpec(),) * 4,
        out_specs=heads,
        check_vma=check_vma,
    )
    got = jax.jit(sharded)(q, k, v, *inputs[3:])
    compare(got, run_call(q, k, v, *inputs[3:]))


def test_unsupported_inputs_say_so():
    inputs = folded([300], [[0, 300]])
    halves = [x.astype(jnp.float16) for x in inputs[:3]]
    with pytest.raises(NotImplementedError, match="mosaic_tpu: has no products of float16"):
        call(*halves, *inputs[3:])
    narrow = [x[..., :12] for x in inputs[:3]]
    with pytest.raises(NotImplementedError, match="mosaic_tpu: head_dim=12"):
        call(*narrow, *inputs[3:])
    with pytest.raises(ValueError, match="block_kv=100 must be"):
        Config(100, 16)
    with pytest.raises(ValueError, match="block_rows=8 must be"):
        Config(128, 8)


MUTATIONS = {
    "no_mask": ("_scores", lambda fixed, q, k, *_: kernel._dot(q, k, contract=1) * fixed.scale),
    "no_reset": ("_reset", lambda *_: None),
    "no_tail": ("_without_tail", lambda values, *_, **__: values),
    "no_rescaling": ("MASK_VALUE", -1.0),
    "no_ring": ("_positions", None),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    attribute, replacement = MUTATIONS[name]
    original = getattr(kernel, attribute)
    if name == "no_ring":
        # Forgets that a slot's token may be a whole capacity older.
        replacement = lambda fixed, slot, length, begin, end: original(  # noqa: E731
            fixed._replace(slots=1 << 20), slot, length, begin, end
        )
    monkeypatch.setattr(kernel, attribute, replacement)
    # `run` would find the unchanged kernel in its cache of traces.
    mutant = functools.partial(api.decode_attention, backend="mosaic_tpu")
    monkeypatch.setitem(globals(), "run", jax.jit(mutant, static_argnames=STATIC))
    with pytest.raises(AssertionError, match="Not equal"):
        check_case((2, 1, 1, 2, 300, 128), [700, 90], interpret=pltpu.InterpretParams(), window=250)
