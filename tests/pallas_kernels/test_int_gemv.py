# SPDX-License-Identifier: Apache-2.0
"""`int_gemv`: stored forms, XLA's forms against float64, sharding, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pallas_kernels.common import Target
from pallas_kernels.int_gemv import PackedWeights, int_gemv, pack, quantize, unpack
from pallas_kernels.int_gemv import api as module
from pallas_kernels.int_gemv.xla import int_gemv_xla
from tests.pallas_kernels.int_gemv_reference import product, random_weights, relative_error
from tests.tolerances import KERNEL_ATOL

TOLERANCE = KERNEL_ATOL["float32"]  # inputs are exact in their type, sums are float32
CPU, A100 = Target("cpu", "cpu"), Target("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
TPU = Target("tpu", "TPU v5e")
run_pack = jax.jit(pack, static_argnames=("bits", "layout"))
run_xla = jax.jit(int_gemv_xla, static_argnames="target")


def _x(rows, inputs, dtype="float32"):
    x = np.random.default_rng(1).standard_normal((rows, inputs))
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    layout=st.sampled_from(["words", "rows"]),
    # Few shapes: each is compiled.
    tiles=st.sampled_from([1, 3]),
    outputs=st.sampled_from([1, 9]),
    group_size=st.sampled_from([32, 64]),
    seed=st.integers(0, 99),
)
def test_unpack_is_the_inverse_of_pack(bits, layout, tiles, outputs, group_size, seed):
    generator = np.random.default_rng(seed)
    inputs = 64 * tiles
    codes = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (inputs, outputs))
    scales = generator.standard_normal((inputs // group_size, outputs)).astype(np.float32)
    weights = pack(codes.astype(np.int8), scales, bits=bits, layout=layout)
    assert (weights.shape, weights.group_size) == ((inputs, outputs), group_size)
    assert weights.nbytes == inputs * outputs * bits // 8 + 4 * scales.size
    assert weights.codes.dtype == {"words": jnp.uint32, "rows": f"int{bits}"}[layout]
    for before, after in zip((codes, scales), unpack(weights)):
        assert (np.asarray(after) == before).all()
    assert unpack(weights)[0].dtype == jnp.int8


@pytest.mark.parametrize(
    ("target", "inputs", "group_size", "layout"),
    [
        (CPU, 128, 32, "words"),
        (A100, 128, 32, "words"),
        (TPU, 128, 32, "rows"),
        (A100, 96, 32, "rows"),
        (A100, 128, 16, "rows"),
    ],
)
def test_the_layout_is_that_of_the_platform_if_it_fits(target, inputs, group_size, layout):
    codes, scales = random_weights(4, inputs, 4, group_size)
    assert pack(codes, scales, bits=4, target=target).layout == layout


def test_pack_works_under_jit_and_on_int4_arrays():
    codes, scales = random_weights(4, 64, 8, 32)
    plain = pack(codes, scales, bits=4, layout="words")
    traced = jax.jit(lambda c, s: pack(c, s, bits=4, layout="words"))(codes, scales)
    narrow = pack(jnp.asarray(codes, jnp.int4), scales, bits=4, layout="words")
    for other in (traced, narrow):
        assert jax.tree.structure(other) == jax.tree.structure(plain)
        assert (np.asarray(other.codes) == np.asarray(plain.codes)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_rounds_to_nearest_within_its_range(bits):
    kernel = np.random.default_rng(0).standard_normal((96, 5)).astype(np.float32)
    kernel[:32, 0] = 0
    codes, scales = (np.asarray(a) for a in quantize(kernel, bits=bits, group_size=32))
    highest = 2 ** (bits - 1) - 1
    largest = np.abs(kernel.reshape(3, 32, 5)).max(axis=1)
    np.testing.assert_allclose(scales, largest / highest, rtol=TOLERANCE)
    assert codes.dtype == np.int8 and np.abs(codes).max() == highest
    error = np.abs(kernel - codes * np.repeat(scales, 32, axis=0).astype(np.float64))
    assert (error <= np.repeat(scales, 32, axis=0) * (0.5 + TOLERANCE * highest)).all()
    assert (codes[:32, 0] == 0).all() and scales[0, 0] == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["words", "rows"])
@pytest.mark.parametrize("target", [CPU, A100], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("rows", "outputs", "group_size", "dtype"),
    [(1, 136, 32, "float32"), (5, 40, 192, "bfloat16")],
)
def test_xla_equals_float64(bits, layout, target, rows, outputs, group_size, dtype):
    codes, scales = random_weights(bits, 192, outputs, group_size)
    weights = run_pack(codes, scales, bits=bits, layout=layout)
    x = _x(rows, 192, dtype)
    y = run_xla(x, weights, target=target)
    assert y.shape == (rows, outputs) and y.dtype == jnp.float32
    assert relative_error(y, product(x, codes, scales)) < TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [96, 160])
def test_groups_that_end_within_a_tile_of_words(bits, group_size):
    codes, scales = random_weights(bits, 960, 24, group_size)
    weights = run_pack(codes, scales, bits=bits, layout="words")
    for rows, target in ((1, CPU), (1, A100), (6, A100)):
        y = run_xla(_x(rows, 960), weights, target=target)
        assert relative_error(y, product(_x(rows, 960), codes, scales)) < TOLERANCE


def _temporaries(fn, x, weights):
    memory = jax.jit(fn).lower(x, weights).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8])
def test_no_copy_of_the_weights_as_floats(bits, rows):
    sizes = (1024, 4096)
    floats = 4 * sizes[0] * sizes[1]
    weights = PackedWeights(
        jax.ShapeDtypeStruct((sizes[1], sizes[0] * bits // 32), jnp.uint32),
        jax.ShapeDtypeStruct((sizes[0] // 128, sizes[1]), jnp.float32),
        bits,
        128,
        "words",
    )
    x = jax.ShapeDtypeStruct((rows, sizes[0]), jnp.float32)
    assert _temporaries(int_gemv, x, weights) < floats / 10

    def naive(x, weights):
        codes, scales = unpack(weights)
        return x @ (codes * jnp.repeat(scales, weights.group_size, axis=0))

    if rows > 1:  # one row is fused with the decoding, whose loop is slow
        assert _temporaries(naive, x, weights) >= floats, "the measure must see such a copy"


def test_leading_axes_result_type_and_no_rows():
    codes, scales = random_weights(4, 128, 24, 64)
    weights = run_pack(codes, scales, bits=4)
    x = _x(6, 128)
    reference = product(x, codes, scales)
    y = int_gemv(x.reshape(2, 3, 128), weights, dtype=jnp.bfloat16)
    assert y.shape == (2, 3, 24) and y.dtype == jnp.bfloat16
    assert relative_error(y.reshape(6, 24), reference) < KERNEL_ATOL["bfloat16"]
    assert relative_error(int_gemv(x[0], weights), reference[0]) < TOLERANCE
    assert int_gemv(x[:0], weights).shape == (0, 24)


@pytest.mark.parametrize("layout", ["words", "rows"])
def test_stacked_layers_work_under_vmap_and_scan(layout):
    layers = [random_weights(4, 128, 72, 64, seed) for seed in range(3)]
    packed = [run_pack(*layer, bits=4, layout=layout) for layer in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *packed)
    assert stacked.shape == (128, 72) and stacked.nbytes == 3 * packed[0].nbytes
    x = _x(2, 128)
    mapped = jax.jit(jax.vmap(int_gemv, in_axes=(None, 0)))(x, stacked)
    scan = lambda x, stacked: jax.lax.scan(lambda c, one: (c, int_gemv(x, one)), 0, stacked)  # noqa: E731
    _, scanned = jax.jit(scan)(x, stacked)
    mapped, scanned = np.asarray(mapped), np.asarray(scanned)
    for i, layer in enumerate(layers):
        reference = product(x, *layer)
        assert relative_error(mapped[i], reference) < TOLERANCE
        assert relative_error(scanned[i], reference) < TOLERANCE


@pytest.mark.parametrize(("layout", "rows"), [("words", 1), ("words", 5), ("rows", 5)])
def test_sharded_over_eight_devices(layout, rows):
    codes, scales = random_weights(4, 512, 128, 64)
    weights = run_pack(codes, scales, bits=4, layout=layout)
    x = _x(rows, 512)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    columns, rows_ = PartitionSpec(None, "i"), PartitionSpec()
    by_outputs = jax.shard_map(
        int_gemv, mesh=mesh, in_specs=(rows_, weights.specs(outputs="i")), out_specs=columns
    )
    by_inputs = jax.shard_map(
        lambda x, weights: jax.lax.psum(int_gemv(x, weights), "i"),
        mesh=mesh,
        in_specs=(columns, weights.specs(inputs="i")),
        out_specs=rows_,
    )
    for sharded in (by_outputs, by_inputs):
        y = jax.jit(sharded)(x, weights)
        assert relative_error(y, product(x, codes, scales)) < TOLERANCE


def test_only_what_a_kernel_cannot_do_falls_through_to_xla(monkeypatch):
    codes, scales = random_weights(4, 128, 64, 64)
    rows = run_pack(codes, scales, bits=4, layout="rows")
    words = run_pack(codes, scales, bits=4, layout="words")
    monkeypatch.setattr(module, "current_target", lambda: A100)
    x = _x(1, 128)
    for weights in (rows, words):  # wrong layout, wrong device
        assert relative_error(int_gemv(x, weights), product(x, codes, scales)) < TOLERANCE
        with pytest.raises(ValueError, match="backend='mosaic_gpu' cannot run int_gemv here"):
            int_gemv(x, weights, backend="mosaic_gpu")
    monkeypatch.setattr(module, "current_target", lambda: TPU)
    with pytest.raises(ValueError, match="reads weights packed for a TPU"):
        int_gemv(x, words, backend="mosaic_tpu")


def _weights(**changes):
    weights = run_pack(*random_weights(4, 128, 64, 64), bits=4, layout="words")
    return dataclasses.replace(weights, **changes)


@pytest.mark.parametrize(
    ("x", "weights", "options", "message"),
    [
        (_x(1, 64), _weights(), {}, r"x.shape=\(1, 64\) must end in K_in=128"),
        (jnp.ones((1, 128), jnp.int32), _weights(), {}, "x.dtype='int32' must be one of"),
        (_x(1, 128), np.ones((128, 64)), {}, "weights='ndarray' must be PackedWeights"),
        (_x(1, 128), _weights(bits=3), {}, "weights.bits=3 must be 4 or 8"),
        (_x(1, 128), _weights(layout="tiles"), {}, "weights.layout='tiles' must be one of"),
        (_x(1, 128), _weights(group_size=48), {}, "do not fit together with group_size=48"),
        (_x(1, 128), _weights(scales=jnp.ones((3, 64))), {}, "do not fit together"),
        (_x(1, 128), _weights(codes=jnp.ones((2, 64, 16), jnp.uint32)), {}, "two axes each"),
        (_x(1, 128), _weights(codes=jnp.ones((64, 16), jnp.int32)), {}, "must be uint32"),
        (_x(1, 128), _weights(), {"backend": "cuda"}, "backend='cuda' is unknown to int_gemv"),
        (_x(1, 128), _weights(), {"interpret": True}, "name backend='mosaic_gpu'"),
        (_x(1, 128), _weights(), {"dtype": jnp.int8}, "dtype='int8' must be one of"),
    ],
)
def test_bad_calls_say_what_is_wrong(x, weights, options, message):
    with pytest.raises(ValueError, match=message):
        int_gemv(x, weights, **options)


_CODES, _SCALES = random_weights(4, 128, 8, 64)


@pytest.mark.parametrize(
    ("codes", "scales", "options", "message"),
    [
        (_CODES, _SCALES, {"bits": 3}, "bits=3 must be 4 or 8"),
        (_CODES.astype(np.int32), _SCALES, {"bits": 4}, "must be int8"),
        (_CODES[0], _SCALES, {"bits": 4}, "must be int8"),
        (_CODES + np.int8(1), _SCALES, {"bits": 4}, r"codes='-7..8' must lie in -8..7"),
        (_CODES, _SCALES[:, :5], {"bits": 4}, r"must have shape \[K_in/group_size, N=8\]"),
        (_CODES, np.ones((3, 8)), {"bits": 4}, "groups must divide K_in=128"),
        (_CODES, np.ones((2, 8), np.int8), {"bits": 4}, "must be a floating type"),
        (_CODES, _SCALES, {"bits": 4, "layout": "tiles"}, "layout='tiles' is unknown"),
        (_CODES[:96], _SCALES[:1], {"bits": 4, "layout": "words"}, "use layout='rows'"),
    ],
)
def test_bad_codes_say_what_is_wrong(codes, scales, options, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, scales, **options)


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (np.ones((8, 8)), {"bits": 2, "group_size": 8}, "bits=2 must be 4 or 8"),
        (np.ones((8, 8)), {"bits": 4, "group_size": 3}, "group_size=3 must divide K_in=8"),
        (np.ones((8, 8), int), {"bits": 4, "group_size": 8}, "of a floating type"),
        (np.ones(8), {"bits": 4, "group_size": 8}, "must have two axes"),
    ],
)
def test_bad_kernels_say_what_is_wrong(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(kernel, **options)
