# SPDX-License-Identifier: Apache-2.0
"""Costs of decoding regimes against published figures, closed forms, XLA, and their properties."""

import dataclasses
import itertools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.analysis import DEVICES, Precision, Workload, roofline
from sqzjax.analysis.jaxpr import count_flops
from sqzjax.analysis.profiling_model import PROFILED_A6000, published_operators
from sqzjax.analysis.regimes import (
    PUBLISHED,
    REGIMES,
    StepOptions,
    memory_bytes,
    regime,
    ridge,
    workload,
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


# ---------------------------------------------------------------------------- properties

GRID = list(itertools.product((0, 64, 4096), (1, 4, 32), (1, 3, 64)))


@pytest.mark.parametrize("options", [PUBLISHED, StepOptions()], ids=["published", "fused"])
@pytest.mark.parametrize("model", [LLAMA3, LLADA], ids=["grouped", "multi_head"])
def test_intensity_grows_with_block_and_batch(model, options):
    for context, block, batch in GRID:
        here = {"context": context, "new": block, "batch": batch}
        step = cost(model, "block_cached", H200, options, **here)
        for key in ("new", "batch"):
            more = cost(model, "block_cached", H200, options, **here | {key: 2 * here[key]})
            assert more.intensity > step.intensity


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 1 << 20))
@settings(deadline=None, max_examples=60)
def test_intensity_is_bounded(block, batch, context):
    """At most the rows of a linear layer, or those that share a key."""
    for model in (LLAMA3, LLADA):
        group = model.num_heads // model.num_kv_heads
        step = cost(
            model, "block_cached", options=StepOptions(), context=context, new=block, batch=batch
        )
        bound = max(block * batch, group * block)
        assert stored_intensity(step) <= bound * (1 + tolerances.FLOAT64_REL)


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("block", [1, 16])
def test_intensity_tends_to_that_of_attention_as_the_context_grows(batch, block):
    group = LLAMA3.num_heads // LLAMA3.num_kv_heads
    values = [
        stored_intensity(cost(LLAMA3, "block_cached", context=4**n, new=block, batch=batch))
        for n in range(4, 15)
    ]
    steps = np.diff(values)
    assert np.all(steps <= 0 if batch > group else steps >= 0)
    assert np.all(np.diff(np.abs(np.array(values) - group * block)) <= 0)
    assert values[-1] == pytest.approx(group * block, rel=tolerances.FLOPS_REL)


@pytest.mark.parametrize("model", [LLAMA3, LLADA], ids=["grouped", "multi_head"])
def test_intensity_at_large_batch_stays_below_its_limit(model):
    context, block = 640, 32
    options = StepOptions(head="none")
    embeddings = 2 * model.embedding_size * model.hidden_size
    kernels = model.num_params - embeddings - (2 * model.num_layers + 1) * model.hidden_size
    keys = 2 * model.num_layers * model.num_kv_heads * model.head_dim * (context + block)
    limit = kernels * block / keys + block * model.num_heads / model.num_kv_heads
    values = [
        stored_intensity(
            cost(model, "block_cached", options=options, context=context, new=block, batch=8**n)
        )
        for n in range(7)
    ]
    assert all(value < limit for value in values) and np.all(np.diff(values) > 0)
    assert values[-1] == pytest.approx(limit, rel=tolerances.THREE_DIGITS)


@pytest.mark.parametrize("options", [StepOptions(), PUBLISHED], ids=["fused", "published"])
def test_a_cached_block_of_one_is_decoding(options):
    options = dataclasses.replace(options, head="all")
    for context, batch in itertools.product((0, 100, 5000), (1, 7)):
        shape = {"context": context, "batch": batch}
        steps = [
            cost(LLAMA3, name, H200, options, **shape) for name in ("arm_decode", "block_cached")
        ]
        for field in ("flops", "operations", "bytes", "seconds", "stored_bytes", "fed"):
            assert getattr(steps[0], field) == getattr(steps[1], field)


@pytest.mark.parametrize("options", [StepOptions(), PUBLISHED], ids=["fused", "published"])
def test_a_cache_never_costs_operations(options):
    for context, block, batch in GRID:
        shape = {"context": context, "new": block, "batch": batch}
        cached, uncached, full = (
            cost(LLADA, name, H200, options, **shape)
            for name in ("block_cached", "block_uncached", "full_dlm")
        )
        assert cached.flops <= uncached.flops and cached.seconds <= uncached.seconds
        assert (cached.flops == uncached.flops) == (context == 0)
        assert dataclasses.replace(full, regime="block_uncached") == uncached


@given(st.integers(1, 64), st.integers(1, 32), st.integers(0, 5000))
@settings(deadline=None, max_examples=40)
def test_closed_form_of_the_cached_step(block, batch, context):
    """FLOP = 2 W B b + 4 L H hd B b (C + B); bytes = 2 W + 4 L Hk hd (C + B) b."""
    model, options = LLAMA3, StepOptions(head="none")
    step = cost(model, "block_cached", options=options, context=context, new=block, batch=batch)
    layer = model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads) * 2
    weights = model.num_layers * (layer + 3 * model.hidden_size * model.intermediate_size)
    norms = (2 * model.num_layers + 1) * model.hidden_size
    keys = model.num_layers * model.head_dim * (context + block) * batch
    assert step.flops == 2 * weights * block * batch + 4 * model.num_heads * keys * block
    assert step.stored_bytes == 2 * (weights + norms) + 4 * model.num_kv_heads * keys


def test_options_add_what_they_say():
    shape: dict[str, Any] = {"context": 1000, "new": 16, "batch": 3}
    plain = StepOptions(sampling_bits=0)
    step = cost(LLADA, "block_cached", H200, plain, **shape)

    def changed(**fields):
        options = dataclasses.replace(plain, **fields)
        return cost(LLADA, "block_cached", H200, options, **shape)

    rows, table = 16 * 3, LLADA.embedding_size * LLADA.hidden_size
    assert changed(floor_seconds=1.0).seconds == step.seconds + 1.0
    assert changed(floor_seconds=1.0).bound == "floor" and step.bound == "memory"
    for bits in (32, 64):
        moved = changed(sampling_bits=bits).bytes - step.bytes
        assert moved == rows * LLADA.embedding_size * bits / 8
    residual = changed(residual=True)
    assert residual.flops - step.flops == 2 * rows * table
    assert residual.stored_bytes - step.stored_bytes == 2 * table
    sparse = changed(density=0.25)
    key = 2 * 2 * LLADA.num_layers * LLADA.num_kv_heads * LLADA.head_dim
    assert step.stored_bytes - sparse.stored_bytes == 750 * 3 * key
    headless = changed(head="none")
    assert step.flops - headless.flops == 2 * rows * table
    assert changed(head="arm").flops == headless.flops
    quarter = changed(precision=Precision(weight_bits=4)).roofline
    kernels = sum(op.weight_bytes * op.count for op in (row.operator for row in quarter.rows))
    whole = sum(row.operator.weight_bytes * row.operator.count for row in step.roofline.rows)
    norms = 2 * (2 * LLADA.num_layers + 1) * LLADA.hidden_size
    assert kernels - norms == (whole - norms) / 4
    assert step.tokens_per_second(2) == 6 / step.seconds
    # Autoregressive passes have no residual stream, and a dense pass reads every key.
    for name in ("arm_decode", "arm_prefill"):
        both = [
            cost(LLAMA3, name, options=dataclasses.replace(plain, residual=on), context=9)
            for on in (True, False)
        ]
        assert both[0] == dataclasses.replace(both[1])
    assert workload("full_dlm", context=10, new=2, batch=1, options=StepOptions(density=0.5)) == (
        workload("full_dlm", context=10, new=2, batch=1)
    )


def test_sampling_width_and_ridge_of_integer_formats():
    eight = Precision(weight_bits=8, activation_bits=8, kv_bits=8)
    assert ridge(H200, Precision()) == H200.ridge
    assert ridge(H200, eight) == H200.peak_int8 / H200.bandwidth
    assert ridge(dataclasses.replace(H200, peak_int8=0.0), eight) == H200.ridge


def test_memory_counts_the_cache_where_there_is_one():
    shape: dict[str, Any] = {"context": 1000, "new": 16, "batch": 3}
    steps = [cost(LLADA, name, **shape) for name in ("block_cached", "block_uncached")]
    held = [memory_bytes(LLADA, Precision(), step, 1000) for step in steps]
    weights = 2 * LLADA.num_params
    cache = 2 * 2 * 3 * 1016 * LLADA.num_layers * LLADA.num_kv_heads * LLADA.head_dim
    assert weights + cache < held[0] < 1.02 * (weights + cache)
    assert weights < held[1] < 1.02 * weights


def test_every_regime_has_a_cost_and_import_needs_no_jax():
    for name in REGIMES:
        step = cost(TINY, name, H200, StepOptions(), context=16, new=4, batch=2)
        assert step.seconds > 0 and step.bytes > 0 and step.batch == 2
        assert step.seconds == roofline((r.operator for r in step.roofline.rows), H200).seconds
    code = "import sys, sqzjax.analysis.crossover; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
