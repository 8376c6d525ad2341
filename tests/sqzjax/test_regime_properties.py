# SPDX-License-Identifier: Apache-2.0
"""Costs of decoding regimes: bounds, limits, closed forms and what every option adds."""

import dataclasses
import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.analysis import Precision, roofline
from sqzjax.analysis.regimes import (
    PUBLISHED,
    REGIMES,
    StepOptions,
    memory_bytes,
    ridge,
    workload,
)
from tests import tolerances
from tests.sqzjax.test_regimes import H200, LLADA, LLAMA3, TINY, cost, stored_intensity

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
