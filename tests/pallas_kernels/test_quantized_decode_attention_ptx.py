# SPDX-License-Identifier: Apache-2.0
"""The code by which the Hopper kernel decodes packed caches: compiled, then executed as PTX.

Nothing else runs it without a GPU: interpretation uses jnp instead.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import pack
from pallas_kernels.quantized_decode_attention import gpu_tiles
from tests.pallas_kernels import ptx
from tests.pallas_kernels import ptx_matrices as matrices


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    only = "quantized_(keys|values|take)_"
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
