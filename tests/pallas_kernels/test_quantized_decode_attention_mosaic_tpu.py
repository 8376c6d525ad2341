# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel over packed caches, interpreted: every form against XLA, skipped blocks, races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import MASK_VALUE, Target
from pallas_kernels.quantized_decode_attention import mosaic_tpu as kernel
from pallas_kernels.quantized_decode_attention import quantized_decode_attention, tpu_scores
from pallas_kernels.quantized_decode_attention.form import (
    digit_order,
    floats,
    gather_digits,
    spread_digits,
    stored,
)
from pallas_kernels.quantized_decode_attention.mosaic_tpu import Config
from pallas_kernels.rotary import Rotary
from tests.pallas_kernels import packed, versions
from tests.pallas_kernels.packed import Packed
from tests.tolerances import KERNEL_ATOL, LSE_ATOL

ROTARY = Rotary(tuple(1e4 ** (-np.arange(64) / 64)), 1.1)


@pytest.fixture(autouse=True)
def fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def attend(keys, values, lengths, *, slots=256, heads=1, rows=2, dtype="float32", **options):
    """Return the kernel's result and XLA's, of `rows` tokens that see ever more."""
    batch, width = len(lengths), options.pop("width", 128)
    rotary = options.pop("rotary", None)
    window = options.pop("window", None)
    shape = (batch, heads, slots, width)
    k, v = keys.make(shape, 1), values.make(shape, 2)
    q = np.random.default_rng(0).standard_normal((batch, rows, 2 * heads, width))
    q = jnp.asarray(q, dtype)
    length = jnp.asarray(lengths, jnp.int32)
    positions = length[:, None] - rows + jnp.arange(rows)
    given = {"length": length, "limits": jnp.maximum(positions + 1, 0)}
    if window:
        given["starts"] = positions - window
    if rotary:
        given |= {"query_positions": positions + 3}
    run = functools.partial(quantized_decode_attention, rotary=rotary, scale=0.1)
    fixed = {"backend": "mosaic_tpu", "interpret": True, **options}
    got = jax.jit(lambda q, k, v, given: run(q, k, v, **given, **fixed))(q, k, v, given)
    expected = jax.jit(lambda q, k, v, given: run(q, k, v, **given, backend="xla"))(q, k, v, given)
    return got, expected


def compare(got, expected, dtype="float32"):
    np.testing.assert_allclose(got.out, expected.out, atol=KERNEL_ATOL[dtype])
    # XLA multiplies floats, the kernel bfloat16 queries that are scaled or turned.
    atol = (LSE_ATOL if dtype == "float32" else KERNEL_ATOL)[dtype]
    np.testing.assert_allclose(got.lse, expected.lse, atol=atol)
    empty = np.asarray(expected.lse) == MASK_VALUE
    assert not np.any(np.asarray(got.out)[empty])


SMALL = Config(256, 8, 128)
STATIC = Packed(4, "static", bias=7)
NUQ = (packed.NUQ_KEYS, packed.NUQ_VALUES)
CASES = {
    "int4": (packed.INT4, packed.SYMMETRIC, [300, 0], {}),
    "groups": (Packed(2, group=64), packed.INT4_GROUPS, [130], {"dtype": "bfloat16"}),
    "kivi_blocks": (
        packed.KIVI_KEYS,
        packed.KIVI_VALUES,
        [900, 333],
        {"slots": 640, "config": Config(512, 8, 128), "dtype": "bfloat16", "window": 300},
    ),
    "kvquant": (*NUQ, [300], {"rotary": ROTARY, "config": SMALL}),
    "few_groups_of_a_chunk": (  # 2 and 4 of the 16 rows of scales in a block
        Packed(2, "channel", 128),
        Packed(4, "channel", 64),
        [2300],
        {"slots": 4096, "config": Config(2048, 8, 256)},
    ),
}
SLOW_CASES = {
    "int3_static": (STATIC, Packed(3), [200], {}),
    "nuq": (*NUQ, [100], {"slots": 128}),
    "int8": (packed.INT8, packed.INT8, [300, 1], {}),
    "narrow": (Packed(3), Packed(2), [200], {"width": 64}),
    "wide": (Packed(4), Packed(3), [200], {"width": 256}),
    "many_rows": (packed.INT4, packed.INT4_GROUPS, [250], {"rows": 40}),
    "kivi_float32": (packed.KIVI_KEYS, packed.KIVI_VALUES, [255], {}),
    "kivi_128": (Packed(2, "channel", 128), Packed(4, "channel", 32), [250], {}),
    "kivi_before_rotation": (packed.KIVI_KEYS, packed.INT4, [300], {"rotary": ROTARY}),
}


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_equals_xla(name):
    keys, values, lengths, options = {**CASES, **SLOW_CASES}[name]
    compare(*attend(keys, values, lengths, **options), options.get("dtype", "float32"))


@versions.detects_races
def test_simulated_memory_and_races():
    """Uninitialised buffers hold NaN here; the last block reaches beyond the slots."""
    interpret = pltpu.InterpretParams(detect_races=True, on_race="raise")
    options = {"slots": 384, "config": SMALL, "interpret": interpret, "dtype": "bfloat16"}
    compare(*attend(packed.INT4, packed.INT4, [384], **options), "bfloat16")


def test_mutants_are_caught(monkeypatch):
    zero = tpu_scores.zero_level
    monkeypatch.setattr(tpu_scores, "zero_level", lambda *x: zero(*x) + 1)
    got, expected = attend(packed.KIVI_KEYS, packed.INT4, [200], rows=1)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(got, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_digits_are_those_of_the_codes(bits, width):
    channels, weights = digit_order(width, bits)
    codes = np.random.default_rng(0).integers(0, 2**bits, width)
    total = np.zeros(width, int)
    # The digit of a weight is what the weight's bits of the code say.
    for channel, weight in zip(channels, weights):
        above = weights[channels == channel]
        top = min(above[above > weight], default=1 << bits)
        total[channel] += codes[channel] // weight % (top // weight) * weight
    assert (total == codes).all()
    x = jnp.asarray(np.random.default_rng(1).standard_normal(width), jnp.float32)
    once = jnp.where(jnp.asarray(weights) == 1, spread_digits(x, width, bits), 0)
    np.testing.assert_array_equal(gather_digits(once, width, bits), x)


def test_float16_is_read_from_its_bits():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = jnp.asarray(x[np.isfinite(x)])
    np.testing.assert_array_equal(floats(stored(x)), x.astype(jnp.float32))


@pytest.mark.parametrize(
    ("shape", "form", "dtype", "reason"),
    [
        ((1, 1, 128, 96), packed.INT4, "float32", "head_dim=96"),
        ((1, 1, 96, 128), packed.INT4, "float32", "96 slots"),
        ((1, 1, 128, 128), packed.INT4, "float16", "float16"),
        ((1, 1, 192 * 2, 128), Packed(4, "channel", 192), "float32", "192 tokens"),
    ],
)
def test_what_the_kernel_cannot_do_is_not_implemented(shape, form, dtype, reason):
    k, v = form.struct(shape), packed.INT4.struct(shape)
    q = jax.ShapeDtypeStruct((1, 1, 1, shape[-1]), dtype)
    rows = [jax.ShapeDtypeStruct(x, jnp.int32) for x in ((1,), (1, 2), (1, 1), (1, 1))]
    run = functools.partial(
        kernel.quantized_decode_attention_mosaic_tpu,
        query_positions=None,
        rotary=None,
        scale=1.0,
        softcap=None,
        target=Target("tpu", "TPU"),
    )
    with pytest.raises(NotImplementedError, match=f"mosaic_tpu: .*{reason}"):
        jax.eval_shape(run, q, k, v, *rows)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="chunk=100"):
        Config(512, 8, 100)
    with pytest.raises(ValueError, match="block_kv=640"):
        Config(640, 8, 512)
    with pytest.raises(ValueError, match=r"config.block_kv.*multiple of 512"):
        attend(packed.KIVI_KEYS, packed.INT4, [5], slots=1024, config=Config(256, 8, 128))
