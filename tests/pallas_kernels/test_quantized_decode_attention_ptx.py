# SPDX-License-Identifier: Apache-2.0
"""The code by which the Hopper kernel decodes packed caches: compiled, then executed as PTX.

Nothing else runs it without a GPU: interpretation uses jnp instead.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import pack
from pallas_kernels.qtensor import dequantize
from pallas_kernels.quantized_decode_attention import gpu_lookup, gpu_tiles
from pallas_kernels.rotary import Rotary
from tests.pallas_kernels import aot_quantized_gpu as aot
from tests.pallas_kernels import ptx
from tests.pallas_kernels import ptx_matrices as matrices
from tests.tolerances import KERNEL_ATOL


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    only = "quantized_(keys|values|elements|take)_"
    return ptx.compiled("aot_quantized_gpu", only, tmp_path_factory.mktemp("ptx"))


def _run(text, *arrays, block=0):
    ptx.run(text, [x.view(np.uint8).reshape(-1) for x in arrays], block=block)


def _decode(text, which, bits):
    """Return what a decoder's kernel yields, and what it should, each element on its own."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (128, 128))
    codes[64:66] = np.array([[0], [2**bits - 1]])
    words = np.array(pack(jnp.asarray(codes), bits))
    order = {"keys": gpu_tiles.key_order, "values": gpu_tiles.value_order}[which](bits)
    second = codes[64:, order] + gpu_tiles.BASE[bits]
    expected = second if which == "keys" else second.T
    # One 1 to a row: each product is one element. In a random order, to tell rows from columns.
    chosen = rng.permutation(expected.shape[1])
    other = np.eye(expected.shape[1])[chosen].astype(jnp.bfloat16)
    got = np.full(expected.shape, np.nan, np.float32)
    _run(text, other, got, words, block=1)
    return got, expected[:, chosen]


@pytest.mark.parametrize("bits", gpu_tiles.BASE)
@pytest.mark.parametrize("which", ["keys", "values"])
def test_every_code_reaches_its_place_in_the_operand(compiled, which, bits):
    np.testing.assert_array_equal(*_decode(compiled[f"decode_{which}_{bits}"], which, bits))


def _elements(text, name):
    """Return what a kernel makes of a random tile, and its numbers in float64."""
    which, packing = aot.ELEMENTS[name]
    tensor = packing.make((1, 1, 64, 128), 3)
    rotary = Rotary(tuple(1e4 ** (-np.arange(64) / 64)), 1.5) if "rotated" in name else None
    arrays = {k: np.array(x) for k, x in aot.element_arrays(name, tensor, rotary).items()}
    expected = np.asarray(dequantize(tensor), np.float64)[0, 0]
    if rotary is not None:
        angle = np.arange(64)[:, None] * np.asarray(rotary.inverse)
        cos, sin = np.cos(angle) * rotary.factor, np.sin(angle) * rotary.factor
        x, y = expected[:, :64], expected[:, 64:]
        expected = np.concatenate([x * cos - y * sin, y * cos + x * sin], axis=1)
    order = {"keys": gpu_lookup.key_order, "values": gpu_lookup.value_order}[which]
    expected = expected[:, order(packing.bits)]
    expected = expected if which == "keys" else expected.T
    other = np.eye(expected.shape[1], dtype=np.float16)
    got = np.full(expected.shape, np.nan, np.float32)
    _run(text, other, got, *arrays.values(), block=1)
    return got, expected


def _close(got, expected):
    return np.allclose(got, expected, rtol=0, atol=KERNEL_ATOL["float16"] * np.abs(expected).max())


@pytest.mark.parametrize("name", aot.ELEMENTS)
def test_every_number_reaches_its_place_in_the_operand(compiled, name):
    assert _close(*_elements(compiled[f"elements_{name}"], name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_entries_are_taken_for_their_rows(compiled, dtype):
    rng = np.random.default_rng(0)
    entries = rng.standard_normal(256).astype(jnp.dtype(dtype))
    index = rng.integers(0, 256, 128, dtype=np.int32)
    got = np.full(128, np.nan, np.float32)
    _run(compiled[f"take_{dtype}"], index, got, entries)
    np.testing.assert_array_equal(got, entries[index].astype(np.float32))


MUTANTS = {
    "not transposed": ("values", r"\.trans\b", ""),
    "registers swapped": ("keys", r"\}, \{(%\w+),(%\w+),", r"}, {\2,\1,"),
    "other words": ("values", r"(ldmatrix.*\[%\w+)\]", r"\1+16]"),
    "unordered": ("keys", r"LAB_WAIT:(.|\n)*?DONE:", ""),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(compiled, name):
    which, pattern, replacement = MUTANTS[name]
    text = compiled[f"decode_{which}_4"]
    mutant = re.sub(pattern, replacement, text)
    assert mutant != text
    got, expected = _decode(mutant, which, 4)
    assert not (got == expected).all()


ELEMENT_MUTANTS = {
    "turned the other way": ("keys_4_rotated", r"neg\.f16x2", "mov.b32"),
    "offsets lost": (
        "keys_2",
        r"(fma\.rn\.f16x2\s+%r\d+, )(%r\d+), (%r\d+), %r\d+",
        r"\1\2, \3, \3",
    ),
    "no exact entries": ("values_3", r"set\.eq\.f16x2\.f16x2", "sub.f16x2"),
}


@pytest.mark.parametrize("mutant", ELEMENT_MUTANTS)
def test_mutants_of_numbers_are_caught(compiled, mutant):
    name, pattern, replacement = ELEMENT_MUTANTS[mutant]
    text = compiled[f"elements_{name}"]
    changed = re.sub(pattern, replacement, text)
    assert changed != text
    assert not _close(*_elements(changed, name))


def _numbered(count):
    """Return `count` matrices of different numbers in memory, and where each row starts."""
    memory = np.arange(64 * count, dtype=np.uint16).view(np.uint8)
    starts = np.zeros(32, np.int64)
    starts[: 8 * count] = 16 * np.arange(8 * count)
    return memory, starts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_spread_over_lanes_as_the_manual_states(count, transposed):
    memory, starts = _numbered(count)
    registers = matrices.load(memory, starts, count, transposed)
    for i, register in enumerate(registers):
        for lane, value in enumerate(register):
            row, column = lane // 4, 2 * (lane % 4)
            places = [(column + z, row) if transposed else (row, column + z) for z in range(2)]
            low, high = (64 * i + 8 * place[0] + place[1] for place in places)
            assert int(value) == low | high << 16
    copy = np.zeros_like(memory)
    matrices.store(copy, starts, registers, transposed)
    np.testing.assert_array_equal(copy, memory)


def test_rows_of_matrices_must_be_aligned():
    memory, starts = _numbered(4)
    with pytest.raises(ValueError, match="16 bytes"):
        matrices.load(memory, starts + 8, 4, False)
