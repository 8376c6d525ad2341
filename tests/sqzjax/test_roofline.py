# SPDX-License-Identifier: Apache-2.0
"""The roofline model against published tables and closed forms, and its properties."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.analysis import (
    DEVICES,
    Hardware,
    Operator,
    Precision,
    Workload,
    hardware_for,
    operators,
    roofline,
)
from sqzjax.models import SIZES, ModelConfig
from tests import tolerances

A6000, H200 = DEVICES["A6000"], DEVICES["H200"]
LLAMA2, LLAMA3, LLADA = SIZES["llama2_7b"], SIZES["llama3_8b"], SIZES["llada_8b"]
FORMATS = {
    "bf16": Precision(),
    "w4": Precision(weight_bits=4),
    "w8a8kv8": Precision(weight_bits=8, activation_bits=8, kv_bits=8),
    "kv4": Precision(kv_bits=4),
    "w4g128": Precision(weight_bits=4, weight_group=128),
    "w4g128kv4": Precision(weight_bits=4, weight_group=128, kv_bits=4),
}
TINY = ModelConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=352,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
)


def estimate(model, precision, workload, hardware=H200, *, compat=False):
    return roofline(operators(model, precision, workload, compat=compat), hardware)


# ----------------------------------------------------------------------------- published tables


@pytest.mark.parametrize(
    ("precision", "batch", "prefill", "decode"),
    [
        ("bf16", 1, (2.8751e13, 6.5861e10, 0.22688), (1.4170e10, 1.4313e10, 0.018637)),
        ("w4", 1, (2.8751e13, 5.5951e10, 0.22662), (1.4170e10, 4.4025e9, 0.0057325)),
        (
            "w8a8kv8",
            1,
            (2.8751e13, 3.2931e10, 0.11343),
            (1.4170e10, 7.1566e9, 0.0093185),
        ),
        ("kv4", 1, (2.8751e13, 6.4251e10, 0.22583), (1.4170e10, 1.3507e10, 0.017588)),
        ("bf16", 16, (4.6002e14, 8.5556e11, 3.6249), (2.2671e11, 3.0797e10, 0.0401)),
    ],
)
def test_compat_reproduces_llm_viewer_totals(precision, batch, prefill, decode):
    works = (
        Workload(phase="prefill", context=2048, batch=batch),
        Workload(phase="decode", context=2048, batch=batch),
    )
    for work, expected in zip(works, (prefill, decode), strict=True):
        result = estimate(LLAMA2, FORMATS[precision], work, A6000, compat=True)
        got = (result.operations, result.bytes, result.seconds)
        np.testing.assert_allclose(got, expected, rtol=tolerances.FOUR_DIGITS)


def test_compat_reproduces_llm_viewer_operators():
    expected = {
        "prefill": {
            "q_proj": (6.872e10, 6.711e7, 1024, "compute"),
            "gate_proj": (1.847e11, 1.520e8, 1214.7, "compute"),
            "qk_matmul": (3.436e10, 3.020e8, 113.8, "memory"),
            "softmax": (6.71e8, 5.37e8, 1.25, "memory"),
        },
        "decode": {
            "q_proj": (3.355e7, 3.357e7, 1.0, "memory"),
            "gate_proj": (9.018e7, 9.021e7, 1.0, "memory"),
            "qk_matmul": (1.678e7, 1.692e7, 0.992, "memory"),
        },
    }
    works = (
        Workload(phase="prefill", context=2048),
        Workload(phase="decode", context=2048),
    )
    for work in works:
        table = expected[work.phase]
        rows = {
            row.operator.name: row
            for row in estimate(LLAMA2, Precision(), work, A6000, compat=True).rows
        }
        for name, (ops, moved, intensity, bound) in table.items():
            row = rows[name]
            got = (row.operator.operations, row.operator.bytes, row.intensity)
            np.testing.assert_allclose(
                got, (ops, moved, intensity), rtol=tolerances.THREE_DIGITS, err_msg=name
            )
            assert row.bound == bound


@pytest.mark.parametrize(
    ("model", "batch", "context", "gigabytes", "milliseconds"),
    [
        (LLAMA2, 1, 2048, (14.298, 4.594, 13.493, 3.788), (2.979, 0.957, 2.811, 0.789)),
        (LLAMA2, 32, 8192, (150.98, 141.28, 47.89, 38.19), (31.45, 29.43, 9.98, 7.96)),
        (LLAMA3, 1, 2048, (15.289, 4.267, 15.088, 4.065), (3.185, 0.889, 3.143, 0.847)),
        (LLAMA3, 32, 8192, (49.73, 38.71, 23.96, 12.94), (10.36, 8.06, 4.99, 2.70)),
    ],
)
def test_corrected_decode_table(model, batch, context, gigabytes, milliseconds):
    work = Workload(phase="decode", batch=batch, context=context)
    results = [
        estimate(model, FORMATS[name], work) for name in ("bf16", "w4g128", "kv4", "w4g128kv4")
    ]
    np.testing.assert_allclose(
        [r.bytes / 1e9 for r in results], gigabytes, rtol=tolerances.FOUR_DIGITS
    )
    np.testing.assert_allclose(
        [r.seconds * 1e3 for r in results], milliseconds, rtol=tolerances.THREE_DIGITS
    )
    assert all(result.bound == "memory" for result in results)


@pytest.mark.parametrize(("model", "milliseconds"), [(LLAMA2, 31.1), (LLAMA3, 33.7)])
def test_corrected_prefill(model, milliseconds):
    result = estimate(model, Precision(), Workload(phase="prefill", context=2048))
    assert result.seconds * 1e3 == pytest.approx(milliseconds, rel=tolerances.THREE_DIGITS)
    assert result.bound == "compute"


def test_cached_diffusion_block_matches_profiling_model():
    """Operator model of arXiv 2510.04146 (LLaDA shape, 640 cached tokens, A6000 as coded there)."""
    device = dataclasses.replace(A6000, peak_flops=242.6e12, peak_vector=0.0)
    intensity = {
        1: (1.0, 2.0, 3.7, 6.8),
        4: (4.0, 7.8, 14.7, 26.8),
        32: (31.1, 59.0, 107.3),
    }
    seconds = {1: 18.6e-3, 4: 18.7e-3, 32: 19.2e-3}
    for block, row in intensity.items():
        for batch, expected in zip((1, 2, 4, 8), row, strict=False):
            work = Workload(
                phase="decode",
                batch=batch,
                query_tokens=block,
                context=640 + block,
                logit_rows=0,
            )
            result = estimate(LLADA, Precision(), work, device)
            np.testing.assert_allclose(
                result.intensity,
                expected,
                rtol=tolerances.PROFILING_MODEL,
                atol=tolerances.PRINTED_TENTH,
            )
            if batch == 1:
                assert result.seconds == pytest.approx(
                    seconds[block], rel=tolerances.PROFILING_MODEL
                )
    decode = estimate(LLAMA3, Precision(), Workload(phase="decode", context=2048), device)
    assert decode.seconds == pytest.approx(0.019913, rel=tolerances.THREE_DIGITS)
    assert decode.intensity == pytest.approx(1.0519, rel=tolerances.THREE_DIGITS)


@given(block=st.integers(1, 64), batch=st.integers(1, 64), past=st.integers(0, 4096))
@settings(deadline=None)
def test_block_step_closed_form(block, batch, past):
    """Closed forms of the cached block step: FLOPs, and bytes of weights and cached keys."""
    model, context = LLAMA3, past + block
    work = Workload(phase="decode", batch=batch, query_tokens=block, context=context, logit_rows=0)
    ops = operators(model, Precision(), work)
    embeddings = 2 * model.embedding_size * model.hidden_size
    norms = (2 * model.num_layers + 1) * model.hidden_size
    kernels = model.num_params - embeddings - norms
    scores = model.num_layers * model.num_heads * batch * block * context
    flops = 2 * kernels * batch * block + 4 * scores * model.head_dim
    assert sum(op.flops * op.count for op in ops) == flops
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * context * batch
    moved = sum((op.weight_bytes + op.kv_read) * op.count for op in ops)
    assert moved == 2 * (kernels + norms) + 2 * kv


# ---------------------------------------------------------------------------------- properties

WORKLOADS = st.builds(
    lambda phase, batch, past, queries, causal: Workload(
        phase=phase,
        batch=batch,
        context=past + queries,
        query_tokens=queries,
        causal=causal,
    ),
    st.sampled_from(["prefill", "decode"]),
    st.integers(1, 8),
    st.integers(0, 200),
    st.integers(1, 40),
    st.booleans(),
)


@given(work=WORKLOADS, name=st.sampled_from(sorted(FORMATS)), factor=st.floats(1.0, 8.0))
@settings(deadline=None, max_examples=40)
def test_time_is_bounded_and_monotone(work, name, factor):
    ops = operators(TINY, FORMATS[name], work)
    result = roofline(ops, H200)
    least = 1 - tolerances.FLOAT64_REL
    for row in result.rows:
        op = row.operator
        peak = H200.peak_int8 if op.low_precision else H200.peak_flops
        assert row.seconds >= least * op.count * op.flops / peak
        assert row.seconds >= least * op.count * op.bytes / H200.bandwidth
    for field in ("bandwidth", "peak_flops", "peak_int8", "peak_vector"):
        faster = dataclasses.replace(H200, **{field: getattr(H200, field) * factor})
        assert least * roofline(ops, faster).seconds <= result.seconds


@given(past=st.integers(0, 60), queries=st.integers(1, 40), window=st.integers(1, 80))
@settings(deadline=None)
def test_causal_scores_and_keys_match_enumeration(past, queries, window):
    work = Workload(phase="decode", context=past + queries, query_tokens=queries, causal=True)
    for limit in (window, None):
        seen = [
            {key for key in range(p + 1) if limit is None or key > p - limit}
            for p in range(past, past + queries)
        ]
        assert work.scores(limit) == sum(map(len, seen))
        assert work.keys_read(limit) == len(set().union(*seen))


def test_bytes_are_linear_in_bits_and_context():
    def weights(bits):
        work = Workload(phase="decode", context=16)
        ops = operators(TINY, Precision(weight_bits=bits), work)
        return sum(op.weight_bytes * op.count for op in ops)

    def cache(context):
        ops = operators(TINY, Precision(), Workload(phase="decode", context=context))
        return sum(op.kv_read * op.count for op in ops)

    assert weights(8) - weights(4) == weights(12) - weights(8) > 0
    assert cache(32) == 2 * cache(16) > 0


def test_metadata_outliers_and_residual_tokens_are_counted():
    grouped = Precision(weight_bits=4, weight_group=128)
    assert grouped.weight_bytes(256, 10) == 256 * 10 / 2 + 2 * 10 * 4
    assert grouped.weight_bytes(260, 10) == 260 * 10 / 2 + 3 * 10 * 4  # a partial last group
    sparse = Precision(weight_bits=4, weight_outliers=0.5, weight_lookup=True)
    assert sparse.weight_bytes(256, 10) == 256 * 10 / 2 + 1280 * 6 + 10 * 16 * 2
    cache = Precision(kv_bits=2, kv_group=32, kv_residual=16)
    assert cache.kv_bytes(100, 64) == 84 * 64 * (2 + 1) / 8 + 16 * 64 * 2
    assert cache.kv_bytes(10, 64) == 10 * 64 * 2


def test_vector_operations_of_norms_softmax_activation_and_dequantization():
    work = Workload(phase="decode", batch=3, context=50)

    def total(precision):
        return sum(op.vector_flops * op.count for op in operators(TINY, precision, work))

    width, ffn, scores = TINY.hidden_size, TINY.intermediate_size, TINY.num_heads * 50
    layer = 2 * 7 * width + 2 * width + 5 * ffn + 5 * scores
    assert total(Precision()) == 3 * (TINY.num_layers * layer + 7 * width)
    head = width * TINY.embedding_size
    kernels = TINY.num_params - 2 * head - width * (2 * TINY.num_layers + 1) + head
    assert total(Precision(weight_bits=4)) - total(Precision()) == kernels
    keys = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 50 * 3
    assert total(Precision(kv_bits=4)) - total(Precision()) == keys


def test_single_token_prefill_equals_decode_and_layers_do_not_change_intensity():
    prefill = operators(TINY, Precision(), Workload(phase="prefill", context=1))
    assert prefill == operators(TINY, Precision(), Workload(phase="decode", context=1))
    work = Workload(phase="decode", context=32, logit_rows=0)
    body = [op for op in operators(TINY, Precision(), work) if op.name != "final_norm"]
    deeper = dataclasses.replace(TINY, num_layers=12)
    more = [op for op in operators(deeper, Precision(), work) if op.name != "final_norm"]
    assert roofline(body, H200).intensity == pytest.approx(roofline(more, H200).intensity)


@given(block=st.integers(1, 32), batch=st.sampled_from([1, 4, 32]))
@settings(deadline=None, max_examples=20)
def test_intensity_tends_to_attention_limit(block, batch):
    """As the context grows, intensity moves monotonically to (query heads per KV head) x block."""
    group = LLAMA3.num_heads // LLAMA3.num_kv_heads

    def intensity(context):
        work = Workload(
            phase="decode",
            batch=batch,
            query_tokens=block,
            context=context,
            logit_rows=0,
        )
        ops = operators(LLAMA3, Precision(), work)
        moved = sum((op.weight_bytes + op.kv_read) * op.count for op in ops)
        return sum(op.flops * op.count for op in ops) / moved

    values = [intensity(4**n) for n in range(4, 13)]
    distance = np.abs(np.array(values) - group * block)
    assert np.all(np.diff(distance) <= 0)
    assert values[-1] == pytest.approx(group * block, rel=tolerances.FLOPS_REL)


def test_tensor_parallel_divides_work_and_adds_all_reduce():
    work = Workload(phase="decode", batch=4, context=1024)
    split = dataclasses.replace(work, tensor_parallel=4)
    one, four = (operators(LLAMA3, Precision(), w) for w in (work, split))
    flops = [sum(op.flops * op.count for op in ops) for ops in (one, four)]
    assert flops[0] == 4 * flops[1]
    reads = [sum(op.kv_read * op.count for op in ops) for ops in (one, four)]
    assert reads[0] == 4 * reads[1]
    link = sum(op.link_bytes * op.count for op in four)
    assert link == 2 * 32 * (2 * 3 / 4) * 4 * 4096 * 2
    assert roofline(four, H200).seconds < roofline(one, H200).seconds
    with pytest.raises(ValueError, match="link_bandwidth"):
        roofline(four, dataclasses.replace(H200, link_bandwidth=0.0))
    with pytest.raises(ValueError, match="tensor_parallel=3"):
        operators(LLAMA3, Precision(), dataclasses.replace(work, tensor_parallel=3))


def test_operator_without_bytes_has_a_time():
    result = roofline([Operator(name="x", flops=1e9), Operator(name="nothing")], H200)
    assert result.seconds == pytest.approx(1e9 / H200.peak_flops)
    assert [row.intensity for row in result.rows] == [0.0, 0.0]
    assert "| total |" in result.markdown()


# --------------------------------------------------------------------------------- device table


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA L40", "L40"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
    ],
)
def test_device_kinds(kind, name):
    assert hardware_for(kind) is DEVICES[name] is hardware_for(name)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GH200 480GB", "NVIDIA L40S", "TPU v4 lite"])
def test_unknown_device_kinds_are_refused(kind):
    with pytest.raises(ValueError, match="no hardware record"):
        hardware_for(kind)


def test_bad_inputs_name_the_field():
    with pytest.raises(ValueError, match="bandwidth=0"):
        Hardware(name="x", bandwidth=0, peak_flops=1)
    with pytest.raises(ValueError, match="query_tokens=9"):
        Workload(phase="decode", context=8, query_tokens=9)
    with pytest.raises(ValueError, match="weight_bits=0"):
        Precision(weight_bits=0)
    with pytest.raises(ValueError, match="weight_outliers"):
        Precision(weight_outliers=1.0)


def test_import_needs_no_jax():
    code = "import sys, sqzjax.analysis; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
