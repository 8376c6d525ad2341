# SPDX-License-Identifier: Apache-2.0
"""`int_gemv` on Mosaic GPU: interpreted against float64, lowered, its code for registers run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

from pallas_kernels.common import Target
from pallas_kernels.int_gemv import int_gemv, pack
from pallas_kernels.int_gemv import mosaic_gpu as kernel
from pallas_kernels.int_gemv.mosaic_gpu import Config, default_config, int_gemv_mosaic_gpu
from pallas_kernels.int_gemv.shapes import SHAPES
from tests.pallas_kernels import ptx, versions
from tests.pallas_kernels.int_gemv_reference import product, random_weights, relative_error
from tests.tolerances import KERNEL_ATOL

pytestmark = versions.interprets_gpu

H100 = Target("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
TOLERANCE = KERNEL_ATOL["float32"]  # inputs are exact in their type, sums are float32


@pytest.fixture(autouse=True)
def fresh_interpreter():
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


def _run(bits, rows, inputs, outputs, group_size, dtype="bfloat16", config=None, races=True):
    """Return the largest relative error of the interpreted kernel, and whether it had races."""
    codes, scales = random_weights(bits, inputs, outputs, group_size)
    weights = pack(codes, scales, bits=bits, layout="words")
    x = np.random.default_rng(1).standard_normal((rows, inputs))
    x = jnp.asarray(x, dtype)
    y = int_gemv_mosaic_gpu(
        x,
        weights.codes,
        weights.scales,
        group_size=group_size,
        bits=bits,
        target=H100,
        config=config,
        interpret=plgpu.InterpretGPUParams(detect_races=races),
    )
    assert y.shape == (rows, outputs) and y.dtype == jnp.float32
    found = interpreter.get_races().races_found if races else None
    return relative_error(y, product(x, codes, scales)), found


@pytest.mark.parametrize(
    ("bits", "rows", "inputs", "outputs", "group_size", "dtype", "config"),
    [
        # Five tiles in a ring of two: every slot is filled anew.
        (4, 1, 640, 64, 128, "bfloat16", Config(64, 128, 2, 1)),
        (8, 3, 320, 64, 64, "bfloat16", Config(64, 64, 2, 1)),
        # Groups of half a tile of words; two 64-row halves per block.
        (4, 17, 384, 128, 32, "float16", Config(128, 64, 2, 1)),
        (8, 8, 192, 128, 32, "float16", Config(128, 64, 2, 1)),
        # One group; tiles that do not divide among the splits, and a split without any.
        (4, 2, 320, 64, 320, "bfloat16", Config(64, 64, 2, 2)),
        (4, 2, 256, 64, 64, "bfloat16", Config(64, 64, 2, 3)),
        (8, 33, 128, 64, 128, "bfloat16", None),
        (4, 64, 256, 64, 64, "bfloat16", None),
        (4, 2, 512, 64, 128, "float32", None),
    ],
)
def test_interpreted_kernel_equals_float64(bits, rows, inputs, outputs, group_size, dtype, config):
    error, races = _run(bits, rows, inputs, outputs, group_size, dtype, config)
    assert error < TOLERANCE
    assert not races


def _without_commit(monkeypatch):
    # Reads of shared memory are then not ordered before it is filled again.
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)


def _without_wait(monkeypatch):
    monkeypatch.setattr(plgpu, "barrier_wait", lambda _: None)


def _without_last_wait(monkeypatch):
    monkeypatch.setattr(plgpu, "wait_smem_to_gmem", lambda _: None)


def _with_a_wrong_bit(monkeypatch):
    decode = kernel.decode_words
    monkeypatch.setattr(kernel, "decode_words", lambda words, bits: decode(words ^ 16, bits))


@pytest.mark.parametrize(
    ("mutate", "symptom"),
    [
        (_without_commit, "race"),
        (_without_wait, "race"),
        (_without_last_wait, "not all copy_smem_to_gmem"),
        (_with_a_wrong_bit, "error"),
    ],
)
def test_mutants_are_caught(monkeypatch, mutate, symptom):
    mutate(monkeypatch)
    try:
        error, races = _run(4, 1, 640, 64, 128, config=Config(64, 128, 2, 1))
    except Exception as failure:
        seen = str(failure).lower()
    else:
        seen = "race" if races else "error" if not error < TOLERANCE else "nothing"
    assert symptom in seen


def test_public_function_reaches_the_kernel_under_jit_and_vmap():
    codes, scales = random_weights(4, 256, 64, 64)
    weights = pack(codes, scales, bits=4, layout="words")
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, 256)), jnp.bfloat16)

    def run(x):
        return int_gemv(x, weights, backend="mosaic_gpu", interpret=True)

    reference = product(x.reshape(4, 256), codes, scales).reshape(2, 2, 64)
    assert relative_error(jax.jit(run)(x), reference) < TOLERANCE
    assert relative_error(jax.vmap(run)(x), reference) < TOLERANCE


def test_lowers_for_hopper_inside_shard_map():
    codes, scales = random_weights(4, 256, 512, 64)
    weights = pack(codes, scales, bits=4, layout="words")
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def multiply(x, weights):
        sizes = {"group_size": weights.group_size, "bits": weights.bits}
        return int_gemv_mosaic_gpu(x, weights.codes, weights.scales, **sizes, target=H100)

    specs = (PartitionSpec(), weights.specs(outputs="i"))
    sharded = jax.shard_map(multiply, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(None, "i"))
    traced = jax.jit(sharded).trace(jnp.ones((1, 256), jnp.bfloat16), weights)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("dtype", "rows", "inputs", "outputs", "group_size", "target"),
    [
        ("bfloat16", 65, 256, 64, 64, H100),
        ("float32", 22, 256, 64, 64, H100),
        ("bfloat16", 1, 256, 96, 64, H100),
        ("bfloat16", 1, 192, 64, 96, H100),
        ("bfloat16", 1, 160, 64, 32, H100),
        ("bfloat16", 1, 256, 64, 16, H100),
        ("bfloat16", 1, 256, 64, 64, Target("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)),
        ("bfloat16", 1, 256, 64, 64, Target("gpu", "NVIDIA B200", (10, 0), 148)),
    ],
)
def test_what_it_cannot_do_is_left_to_others(dtype, rows, inputs, outputs, group_size, target):
    x = jax.ShapeDtypeStruct((rows, inputs), dtype)
    words = jax.ShapeDtypeStruct((outputs, inputs // 8), jnp.uint32)
    scales = jax.ShapeDtypeStruct((inputs // group_size, outputs), jnp.float32)

    def run(x, words, scales):
        return int_gemv_mosaic_gpu(x, words, scales, group_size=group_size, bits=4, target=target)

    with pytest.raises(NotImplementedError, match="mosaic_gpu: "):
        jax.eval_shape(run, x, words, scales)


@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_default_sizes_fit_every_real_shape(layer, bits):
    inputs, outputs = SHAPES[layer]
    for rows in (8, 16, 32, 64):
        for group_size in (32, 64, 128, inputs):
            sizes = {"group_size": group_size, "bits": bits}
            config = default_config(rows, inputs, outputs, **sizes, target=H100)
            assert inputs % config.block_k == 0 and outputs % config.block_n == 0
            assert config.splits <= inputs // config.block_k and config.stages >= 2
            shared = kernel.shared_bytes(config, rows, **sizes)
            assert 2 * shared <= kernel.SHARED_BYTES, "two blocks must be resident"


def test_measured_sizes_are_preferred(monkeypatch):
    sizes = {"block_n": 64, "block_k": 128, "stages": 3, "splits": 5}
    asked = []

    def tuned(*key):
        asked.append(key)
        return sizes

    monkeypatch.setattr(kernel, "tuned", tuned)
    config = default_config(8, 4096, 512, group_size=128, bits=4, target=H100)
    assert config == Config(**sizes)
    assert asked == [("int_gemv", "m8_k4096_n512_b4_g128", H100)]


def _words_and_codes(bits):
    words = np.random.default_rng(0).integers(0, 2**32, (64, 16), dtype=np.uint32)
    half = 16 // bits
    codes = np.zeros((64, 512 // bits))
    # The order that the kernel's documentation states, written as loops.
    for tile in range(2):
        for even in range(2):
            for j in range(half):
                for q in range(4):
                    for z in range(2):
                        column = 8 * ((2 * tile + even) * half + j) + 2 * q + z
                        field = words[:, 8 * tile + 2 * q + even] >> (bits * (j + half * z))
                        unsigned = (field & (2**bits - 1)).astype(np.int64)
                        if bits == 4:
                            codes[:, column] = unsigned - 8
                        else:
                            codes[:, column] = (unsigned + 128) % 256 - 128
    return words, codes


@pytest.mark.parametrize("bits", [4, 8])
def test_jnp_decoding_follows_the_stated_order(bits):
    words, codes = _words_and_codes(bits)
    assert (np.asarray(kernel.decode_words(jnp.asarray(words), bits)) == codes).all()


@pytest.fixture(scope="module")
def compiled_decoders(tmp_path_factory):
    """PTX of the decoders, compiled ahead of time: {(bits, dtype, part): text}."""
    texts, folder = {}, tmp_path_factory.mktemp("ptx")
    for name, text in ptx.compiled("aot_int_gemv_gpu", "decoder", folder).items():
        _, bits, dtype, part = name.split("_")
        texts[int(bits), dtype, int(part)] = text
    return texts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("bits", "part"), [(4, 128), (4, 32), (8, 64), (8, 32)])
def test_compiled_decoder_yields_exact_codes_in_order(compiled_decoders, bits, part, dtype):
    words, codes = _words_and_codes(bits)
    out = np.zeros((64, 512 // bits), np.uint16)
    buffers = [words.view(np.uint8).reshape(-1), out.view(np.uint8).reshape(-1)]
    ptx.run(compiled_decoders[bits, dtype, part], buffers)
    values = out.view(jnp.dtype(dtype)).astype(np.float64)
    assert (values == codes).all()
