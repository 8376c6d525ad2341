# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of `int_gemv`, interpreted: values, both ways to floats, races, mutations."""

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

from pallas_kernels.common import Target
from pallas_kernels.int_gemv import mosaic_tpu as kernel
from pallas_kernels.int_gemv import shapes
from pallas_kernels.int_gemv.mosaic_tpu import Config, default_config, int_gemv_mosaic_tpu
from tests.tolerances import INTEGER_PRODUCT_REL

OLD, NEW = Target("tpu", "TPU v5 lite"), Target("tpu", "TPU v6 lite")
WORDS, CONVERT = Config(256, 256, words=True), Config(256, 256, words=False)


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """Simulated memory outlives a test that raised, or that asked for another number of cores."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


def make(rows, inputs, outputs, group_size, bits=4, dtype="float32", seed=0):
    """Return x, codes and scales; the extreme codes are among them."""
    rng = np.random.default_rng(seed)
    highest = 2 ** (bits - 1)
    codes = rng.integers(-highest, highest, (inputs, outputs))
    codes[0], codes[-1] = -highest, highest - 1
    scales = rng.uniform(0.5, 2.0, (inputs // group_size, outputs)) * 1e-2
    x = jnp.asarray(rng.standard_normal((rows, inputs)), dtype)
    stored = jnp.asarray(codes, jnp.int4 if bits == 4 else jnp.int8)
    return x, stored, jnp.asarray(scales, jnp.float32)


@functools.partial(jax.jit, static_argnames=("group_size", "bits", "target", "config", "interpret"))
def run(x, codes, scales, **options):
    return int_gemv_mosaic_tpu(x, codes, scales, **options)


def expected(x, codes, scales):
    """Return the product in float64, weight by weight."""
    group_size = codes.shape[0] // scales.shape[0]
    weights = np.asarray(codes).astype(np.float64) * np.repeat(
        np.asarray(scales, np.float64), group_size, axis=0
    )
    return np.asarray(x).astype(np.float64) @ weights


def compare(got, x, codes, scales):
    right = expected(x, codes, scales)
    assert got.dtype == jnp.float32
    limit = INTEGER_PRODUCT_REL[str(x.dtype)] * np.abs(right).max()
    np.testing.assert_allclose(got, right, rtol=0, atol=limit)


def check_case(rows, inputs, outputs, group_size, bits=4, dtype="float32", **options):
    arrays = make(rows, inputs, outputs, group_size, bits, dtype)
    options = {"target": NEW, "config": CONVERT, "interpret": True, **options}
    compare(run(*arrays, group_size=group_size, bits=bits, **options), *arrays)


# rows, inputs, outputs, group_size, bits, dtype, config: both ways to floats, blocks that do not
# divide the inputs (384) and the outputs, groups below, at and above a block, one group.
CASES: dict[str, Any] = {
    "words": (3, 512, 256, 128, 4, "bfloat16", WORDS),
    "words_tails": (1, 384, 384, 128, 4, "float32", WORDS),
    "words_groups_of_64": (17, 384, 128, 64, 4, "float16", WORDS),
    "words_one_group": (2, 640, 128, 640, 4, "float32", WORDS),
    "words_wide_group": (2, 768, 128, 384, 4, "bfloat16", WORDS),
    "words_not_for_32": (2, 256, 128, 32, 4, "bfloat16", WORDS),
    "convert": (64, 512, 256, 128, 4, "bfloat16", CONVERT),
    "convert_tails": (5, 384, 384, 64, 4, "float32", CONVERT),
    "convert_groups_of_32": (2, 384, 128, 32, 4, "float32", CONVERT),
    "int8": (8, 512, 128, 128, 8, "float32", CONVERT),
    "int8_words_config": (8, 384, 256, 32, 8, "float16", WORDS),
    "int8_one_group": (8, 384, 256, 384, 8, "bfloat16", CONVERT),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    *case, config = CASES[name]
    check_case(*case, config=config)


@pytest.mark.parametrize("name", ["words_tails", "convert_tails"])
def test_equals_the_definition_in_simulated_memory(name):
    """Uninitialised buffers hold NaN here, reads out of bounds raise, and two cores race."""
    *case, config = CASES[name]
    params = pltpu.InterpretParams(
        detect_races=True, on_race="raise", num_cores_or_threads=2, random_seed=1
    )
    check_case(*case, config=config, interpret=params)


@pytest.mark.parametrize("target", [OLD, NEW])
def test_default_sizes(target):
    check_case(4, 1280, 256, 128, target=target, config=None)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_numbers(data):
    """Any codes, rows of any magnitude, groups with scale zero."""
    numbers = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    config = data.draw(st.sampled_from([WORDS, CONVERT]))
    magnitude = 10.0 ** data.draw(st.integers(-6, 6))
    x, codes, scales = make(2, 256, 128, 64, seed=int(numbers.integers(1000)))
    x = x * numbers.choice([0, 1, magnitude], x.shape).astype(np.float32)
    scales = scales * numbers.choice([0, 1, -1], scales.shape).astype(np.float32)
    got = run(x, codes, scales, group_size=64, bits=4, target=NEW, config=config, interpret=True)
    compare(got, x, codes, scales)


def test_codes_alone_are_exact():
    """With one input switched on per row, the result is its row of weights to the last bit."""
    _, codes, scales = make(1, 256, 128, 128)
    for config in (WORDS, CONVERT):
        for first in range(0, 256, 64):
            x = jnp.eye(256, dtype=jnp.bfloat16)[first : first + 64]
            got = run(x, codes, scales, group_size=128, bits=4, target=NEW, config=config,
                      interpret=True)  # fmt: skip
            weights = np.asarray(codes).astype(np.float32) * np.repeat(scales, 128, axis=0)
            np.testing.assert_array_equal(got, weights[first : first + 64])


def test_default_sizes_of_real_layers_fit():
    """Blocks keep their budgets and waste little; v5 chips unpack words."""
    for shape in shapes.SHAPES.values():
        for bits in (4, 8):
            for target in (OLD, NEW):
                config = default_config(16, *shape, 128, bits, target)
                fetched = config.block_in * config.block_out * bits // 8
                assert fetched <= kernel.STEP_BYTES
                padding = -shape.inputs % config.block_in
                assert padding < 0.05 * shape.inputs
                assert config.words == (target is OLD)
                strip = shape.inputs // 128 * config.block_out * 4
                assert strip <= kernel.SCALE_BYTES


def test_vmap_equals_a_loop():
    layers = [make(2, 256, 128, 128, seed=seed) for seed in (0, 1)]
    call = functools.partial(
        int_gemv_mosaic_tpu, group_size=128, bits=4, target=NEW, config=WORDS, interpret=True
    )
    got = jax.jit(jax.vmap(call))(*(jnp.stack(pair) for pair in zip(*layers)))
    for y, layer in zip(got, layers):
        compare(y, *layer)


def test_outputs_shard_over_devices():
    arrays = make(2, 256, 256, 128)
    outputs = PartitionSpec(None, "x")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

    def sharded(interpret):
        call = functools.partial(
            int_gemv_mosaic_tpu,
            group_size=128,
            bits=4,
            target=NEW,
            config=WORDS,
            interpret=interpret,
        )
        # The interpreter slices replicated by varying numbers, which the check does not allow.
        return jax.jit(
            jax.shard_map(
                call,
                mesh=mesh,
                in_specs=(PartitionSpec(), outputs, outputs),
                out_specs=outputs,
                check_vma=not interpret,
            )
        )

    compare(sharded(True)(*arrays), *arrays)
    sharded(None).trace(*arrays).lower(lowering_platforms=("tpu",))


def test_unsupported_inputs_say_so():
    def refused(case, match, **changes):
        x, codes, scales = make(*case)
        options = {"group_size": case[3], "bits": 4, "target": NEW, "interpret": True, **changes}
        with pytest.raises(NotImplementedError, match=f"mosaic_tpu: {match}"):
            int_gemv_mosaic_tpu(x, codes, scales, **options)

    refused((65, 128, 128, 128), "serves up to 64 rows, not 65")
    refused((1, 192, 128, 64), "needs K_in, here 192,")
    refused((1, 128, 96, 128), "needs N, here 96,")
    refused((1, 128, 128, 16), "needs groups of 32, 64 or a multiple of 128 inputs, not 16")
    refused((1, 128, 128, 128), "does not take int4 codes of 8 bits", bits=8)
    with pytest.raises(ValueError, match="block_out=100 must be"):
        Config(256, 100)


# What is replaced, and by what.
MUTATIONS = {
    "no_offset": (kernel, "OFFSET", 0),
    "rows_in_place": (kernel, "_in_order_of_words", lambda x, unit: x),
    "no_lower_addends": (kernel, "_ADDENDS", {"float32": 1}),
    "sums_not_reset": (jnp, "zeros_like", lambda x: x[...]),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    monkeypatch.setattr(*MUTATIONS[name])
    # `run` would find the unchanged kernel in its cache of traces.
    monkeypatch.setitem(globals(), "run", int_gemv_mosaic_tpu)
    with pytest.raises(AssertionError, match="Not equal"):
        check_case(2, 512, 128, 128, config=WORDS, interpret=pltpu.InterpretParams())
