# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases of `decode_attention`: what they move, compare and tune."""

import json
import re
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.common import Target
from pallas_kernels.decode_attention import bench
from pallas_kernels.decode_attention.mosaic_gpu import SHARED_BYTES, Config, row_tile
from pallas_kernels.decode_attention.shapes import SHAPES
from tests.tolerances import KERNEL_ATOL

HOPPER = Target("gpu", "NVIDIA H200", (9, 0), 132)


def test_cases_fit_a_device_and_have_names_of_their_own():
    cases = bench.cases()
    assert len({case.name for case in cases}) == len(cases) >= len(SHAPES)
    # The bench holds at least two sets of inputs.
    assert max(case.bytes_moved for case in cases) < 20e9


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_are_those_of_the_arrays(name):
    shape = SHAPES[name]
    case = bench._case(name, shape, 2, 64)
    inputs = jax.eval_shape(case.make_inputs, 0)
    ours: Any = case.candidates["ours"]
    out = jax.eval_shape(ours, *inputs)
    size = sum(x.size * x.dtype.itemsize for x in (*inputs, out))
    assert case.bytes_moved == size


def test_a_window_moves_what_it_sees():
    shape = SHAPES["mistral_7b_window"]
    whole = bench._case("whole", SHAPES["llama3_8b"], 1, 8192).bytes_moved
    half = bench._case("half", shape, 1, 8192).bytes_moved
    fixed = 6 * shape.heads * shape.head_dim
    assert (half - fixed) * 2 == whole - fixed


def test_candidates_agree():
    case = bench._case("small", SHAPES["llama3_8b"], 1, 128)
    inputs = case.make_inputs(0)
    candidates: Any = case.candidates
    got = [candidates[name](*inputs) for name in ("ours", "xla")]
    np.testing.assert_allclose(*got, atol=KERNEL_ATOL["bfloat16"])


def test_tuning_tries_sizes_that_fit_from_the_derived_ones_on():
    cases = bench.tune_cases(HOPPER)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert len(case.candidates) > 1
        found = re.search(r"rows(\d+)-width(\d+)", case.shape_name)
        assert found
        rows, width = map(int, found.groups())
        for text in case.candidates:
            shared = Config(**json.loads(text)).shared_bytes(width, row_tile(rows, width, None))
            assert shared <= SHARED_BYTES


def test_nothing_is_tuned_elsewhere():
    assert bench.tune_cases(Target("cpu", "cpu")) == []
