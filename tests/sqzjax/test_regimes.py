# SPDX-License-Identifier: Apache-2.0
"""Costs of decoding regimes against published figures, closed forms, XLA, and their properties."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.analysis import DEVICES, Precision, Workload
from sqzjax.analysis.jaxpr import count_flops
from sqzjax.analysis.profiling_model import PROFILED_A6000, published_operators
from sqzjax.analysis.regimes import (
    PUBLISHED,
    StepOptions,
    regime,
)
from sqzjax.kvcache import Dense
from sqzjax.models import SIZES, DecoderLM, Execution, ModelConfig
from tests import tolerances

LLAMA3, LLADA, QWEN3 = SIZES["llama3_8b"], SIZES["llada_8b"], SIZES["qwen3_8b"]
H200 = DEVICES["H200"]
TINY = ModelConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=352,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    mask="block_causal",
    block_size=8,
)


def cost(model, name, hardware=PROFILED_A6000, options=PUBLISHED, **shape):
    return regime(model, name, hardware=hardware, options=options, **shape)


def stored_intensity(step):
    """Matrix operations per byte of parameters and cache: intensity without activations."""
    return step.flops / step.stored_bytes


# ------------------------------------------------------------------------- published figures


def test_prefill_log_is_reproduced_to_its_last_digit():
    expected = {
        160: ("130.5025", "0.022417"),
        256: ("194.5236", "0.024142"),
        640: ("383.3396", "0.045610"),
        2048: ("708.9658", "0.148951"),
        2176: ("726.7953", "0.158756"),
    }
    for length, printed in expected.items():
        step = cost(LLAMA3, "arm_prefill", context=length)
        assert (f"{step.intensity:.4f}", f"{step.seconds:.6f}") == printed


def test_decode_log_is_reproduced_to_its_last_digit():
    step = cost(LLAMA3, "arm_decode", context=2048)
    assert (f"{step.intensity:.4f}", f"{step.seconds:.6f}") == ("1.0519", "0.019913")


@pytest.mark.parametrize(
    ("name", "linear", "attention"),
    [("arm_prefill", "1110.3567", "1529.7000"), ("arm_decode", "0.9996", "3.9922")],
)
def test_intensity_of_linear_layers_and_attention(name, linear, attention):
    rows = cost(LLAMA3, name, context=2048).roofline.rows

    def intensity(chosen):
        ops = [row.operator for row in rows if chosen(row.operator.name)]
        return sum(op.flops * op.count for op in ops) / sum(op.bytes * op.count for op in ops)

    assert f"{intensity(lambda n: n.endswith('_proj') or n == 'lm_head'):.4f}" == linear
    assert f"{intensity(lambda n: n in ('scores', 'values')):.4f}" == attention


def test_shares_of_a_prefill():
    """Feed-forward, projections, attention, everything element-wise, classifier."""
    step = cost(LLAMA3, "arm_prefill", context=2048)
    groups = {
        "63.91": ("gate_proj", "up_proj", "down_proj"),
        "15.22": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "5.68": ("scores", "values"),
        "0.92": ("lm_head",),
    }
    seconds = {row.operator.name: row.seconds for row in step.roofline.rows}
    shares = {p: sum(seconds.pop(name) for name in names) for p, names in groups.items()}
    shares["14.28"] = sum(seconds.values())
    assert {f"{100 * part / step.seconds:.2f}" for part in shares.values()} == set(shares)
    assert all(f"{100 * part / step.seconds:.2f}" == text for text, part in shares.items())


def test_whole_sequence_log_is_reproduced_to_its_last_digit():
    expected = {
        160: ("138.8347", "21.0764"),
        256: ("205.9421", "22.8178"),
        640: ("400.2126", "44.0926"),
        2176: ("743.0780", "157.3615"),
    }
    for length, printed in expected.items():
        step = cost(LLADA, "full_dlm", context=128, new=length - 128)
        assert (f"{step.intensity:.4f}", f"{1e3 * step.seconds:.4f}") == printed


def test_cached_block_table():
    expected = {
        1: (1.0, 2.0, 3.7, 6.8, 11.7, 18.2, 25.2, 31.2),
        4: (4.0, 7.8, 14.7, 26.8, 45.3, 69.1, 93.9, 114.3),
        16: (15.8, 30.4, 56.5, 99.4, 160.0, 230.2, 295.0, 343.2),
        32: (31.1, 59.0, 107.3, 181.4, 277.1, 376.5, 458.8, 515.1),
    }
    for block, row in expected.items():
        got = [
            cost(LLADA, "block_cached", context=640, new=block, batch=2**n).intensity
            for n in range(8)
        ]
        np.testing.assert_allclose(
            got, row, rtol=tolerances.RECOMPUTED, atol=tolerances.PRINTED_TENTH
        )


@pytest.mark.parametrize(
    ("batch", "milliseconds"),
    [(1, (18.6, 18.7, 18.9, 19.2)), (8, (21.8, 22.3, 24.0, 26.3)), (32, (32.7, 34.5, 49.2, 84.5))],
)
def test_cached_block_times(batch, milliseconds):
    got = [
        1e3 * cost(LLADA, "block_cached", context=640, new=block, batch=batch).seconds
        for block in (1, 4, 16, 32)
    ]
    np.testing.assert_allclose(
        got, milliseconds, rtol=tolerances.RECOMPUTED, atol=tolerances.PRINTED_TENTH
    )


def test_whole_sequence_by_batch_and_length():
    batches = {1: (400.2, 44.1), 8: (859.3, 352.7), 32: (979.8, 1410.9)}
    for batch, expected in batches.items():
        step = cost(LLADA, "full_dlm", context=128, new=512, batch=batch)
        np.testing.assert_allclose(
            (step.intensity, 1e3 * step.seconds),
            expected,
            rtol=tolerances.RECOMPUTED,
            atol=tolerances.PRINTED_TENTH,
        )
    lengths = {32: 31.0, 128: 114.1, 1024: 526.4, 4096: 930.3, 32768: 2174.5, 131072: 5908.3}
    lengths |= {740: 437.8, 768: 447.7}
    got = [cost(LLADA, "full_dlm", context=0, new=n).intensity for n in lengths]
    np.testing.assert_allclose(
        got, list(lengths.values()), rtol=tolerances.RECOMPUTED, atol=tolerances.PRINTED_TENTH
    )


def test_grouped_heads_keep_intensity_at_long_contexts():
    expected = {QWEN3: (38.6, 176.4, 285.8), LLADA: (31.3, 90.2, 113.0)}
    for model, row in expected.items():
        got = [
            cost(model, "block_cached", context=8192, new=32, batch=batch).intensity
            for batch in (1, 8, 32)
        ]
        np.testing.assert_allclose(
            got, row, rtol=tolerances.RECOMPUTED, atol=tolerances.PRINTED_TENTH
        )


def test_head_that_the_published_model_leaves_out():
    """At a block of 32 the head of LLaDA moves 1.04 GB and does 33 GFLOP."""
    both = [
        cost(LLADA, "block_cached", context=640, new=32, options=options)
        for options in (dataclasses.replace(PUBLISHED, head="all"), PUBLISHED)
    ]
    assert both[0].flops - both[1].flops == pytest.approx(33e9, rel=tolerances.TWO_DIGITS)
    weights = both[0].stored_bytes - both[1].stored_bytes
    assert weights == pytest.approx(1.04e9, rel=tolerances.THREE_DIGITS)


def test_published_model_is_for_one_device_and_bad_options_are_refused():
    with pytest.raises(ValueError, match="tensor_parallel=2"):
        work = Workload(phase="decode", context=8, tensor_parallel=2)
        published_operators(LLADA, Precision(), work)
    with pytest.raises(ValueError, match="floor_seconds=-1"):
        StepOptions(floor_seconds=-1)
    with pytest.raises(ValueError, match="density=0"):
        StepOptions(density=0)
    bad: dict[str, dict[str, Any]] = {
        "batch=0": {"context": 1, "batch": 0},
        "new=0": {"context": 1, "new": 0},
        "context=-1": {"context": -1},
    }
    for field, shape in bad.items():
        with pytest.raises(ValueError, match=field):
            cost(TINY, "block_cached", **shape)


# ---------------------------------------------------------------------------------- XLA


def compiled_flops(fn, *args):
    cost: Any = jax.jit(fn).lower(*args).compile().cost_analysis()
    return cost["flops"]


@pytest.mark.parametrize("name", ["block_cached", "full_dlm"])
def test_operations_of_diffusion_steps_match_xla(name):
    batch, context, new = 2, 40, 8
    lm = DecoderLM(TINY, Execution(scan_layers=False))
    params = lm.abstract_params()
    step = cost(TINY, name, H200, StepOptions(), context=context, new=new, batch=batch)

    def block(params, tokens, positions, caches):
        out = lm.forward(
            params, tokens, positions=positions, caches=caches, update_cache=False, logits="all"
        )
        return out.logits

    def full(params, tokens):
        hidden = lm.forward(params, tokens, logits="none", return_hidden="last").hidden
        assert hidden is not None
        return lm.head(params, hidden[:, context:])

    if name == "block_cached":
        caches = jax.eval_shape(
            lambda: lm.init_caches(Dense(), batch=batch, capacity=context, max_new=new)
        )
        tokens = jax.ShapeDtypeStruct((batch, new), jnp.int32)
        call: tuple[Any, ...] = (block, params, tokens, tokens, caches)
    else:
        call = (full, params, jax.ShapeDtypeStruct((batch, context + new), jnp.int32))
    assert count_flops(*call) == step.flops
    assert compiled_flops(*call) == pytest.approx(step.flops, rel=tolerances.FLOPS_REL)
