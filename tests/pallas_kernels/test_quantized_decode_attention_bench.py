# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases of `quantized_decode_attention`: what they hold, move and compare."""

from typing import Any

import numpy as np
import pytest

from pallas_kernels.packing import words_of
from pallas_kernels.qtensor import dequantize
from pallas_kernels.quantized_decode_attention import bench
from pallas_kernels.quantized_decode_attention.api import tuning_key
from pallas_kernels.quantized_decode_attention.shapes import Shape
from tests.tolerances import KERNEL_ATOL

SMALL = Shape(4, 2, 128, 1, 128)


def test_cases_fit_a_device_and_have_names_of_their_own():
    cases = bench.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert max(case.bytes_moved for case in cases) < 20e9


@pytest.mark.parametrize(("name", "bits"), [("kvquant3", 3), ("kvquant2", 2)])
def test_bytes_are_those_of_codes_scales_tables_and_exact_entries(name, bits):
    case: Any = bench._case(name, SMALL, bench.FORMS[name])
    tokens = SMALL.batch * SMALL.kv_heads * SMALL.slots
    per_token = 2 * 4 * words_of(128, bits) + 2 * 3 + 2 * 2
    fixed = SMALL.kv_heads * 128 * 2 * 4 + 2 * 4 * 2**bits
    queries = SMALL.heads * 128 * (2 + 4)
    assert case.bytes_moved == tokens * per_token + fixed + queries


def turn(x, angle):
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = x[..., :64], x[..., 64:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@pytest.mark.parametrize("name", [pytest.param("int4_g32", marks=pytest.mark.slow), "kvquant3"])
def test_packed_candidates_compute_attention(name):
    form = bench.FORMS[name]
    case: Any = bench._case(name, SMALL, form)
    q, k, v, *plain = case.make_inputs(0)
    got = case.candidates["ours"](q, k, v, *plain)
    keys, values = (np.asarray(dequantize(x), np.float64) for x in (k, v))
    queries = np.asarray(q, np.float64)
    if form.rotated:
        angle = np.arange(SMALL.slots)[:, None] * bench._THETA ** (-np.arange(64) / 64)
        keys, queries = turn(keys, angle), turn(queries, angle[-1])
    scores = np.einsum("btnh,bnsh->bnts", queries, np.repeat(keys, 2, axis=1)) / np.sqrt(128)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnts,bnsh->btnh", weights, np.repeat(values, 2, axis=1))
    np.testing.assert_allclose(got, expected, atol=KERNEL_ATOL["bfloat16"])


def test_forms_are_tuned_apart():
    keys = set()
    for form in bench.FORMS.values():
        q, k, v, *_ = bench._make_inputs.eval_shape(SMALL, form, 0)
        keys.add(tuning_key(q, k, v, form.rotated))
    assert len(keys) == len(bench.FORMS)
