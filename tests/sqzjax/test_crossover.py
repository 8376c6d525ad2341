# SPDX-License-Identifier: Apache-2.0
"""Whole generations, break-even, crossing batch and batch plans against sums over passes."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from sqzjax.analysis import DEVICES, Hardware
from sqzjax.analysis.crossover import (
    Contest,
    generation,
    passes_per_block,
    plan_batches,
    tokens_per_pass,
)
from sqzjax.analysis.profiling_model import PROFILED_A6000
from sqzjax.analysis.regimes import PUBLISHED, Regime, StepOptions, regime
from sqzjax.models import SIZES, ModelConfig
from tests import tolerances

LLAMA3, LLADA = SIZES["llama3_8b"], SIZES["llada_8b"]
A100, H200 = DEVICES["A100 80GB"], DEVICES["H200"]
TINY = ModelConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=352,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
)


def test_block_sizes_without_cache_are_reproduced_to_the_last_digit():
    expected = {
        512: ("400.2126", "11287.70"),
        256: ("345.9858", "9028.50"),
        128: ("315.4992", "8231.28"),
        64: ("299.2796", "7832.70"),
        32: ("290.9062", "7633.42"),
    }
    for block, printed in expected.items():
        made = generation(
            LLADA,
            "block_uncached",
            prompt=128,
            length=512,
            block=block,
            tokens_per_step=2,
            hardware=PROFILED_A6000,
            options=PUBLISHED,
        )
        assert (f"{made.intensity:.4f}", f"{1e3 * made.seconds:.2f}") == printed
        assert made.passes == 256


def test_generation_is_the_sum_of_its_passes():
    """Interpolation must give what adding every pass gives."""
    prompt, length, block, batch = 300, 96, 8, 2
    shape: dict[str, Any] = {"hardware": H200, "options": StepOptions(), "batch": batch}

    def passes(name, contexts, new=1, options=shape["options"]):
        steps = [
            regime(LLAMA3, name, context=c, new=new, **shape | {"options": options})
            for c in contexts
        ]
        return np.sum([(1, s.seconds, s.operations, s.bytes) for s in steps], axis=0)

    fill = StepOptions(head="none")
    starts = range(prompt, prompt + length, block)
    expected: dict[Regime, Any] = {
        "arm_decode": passes("arm_prefill", [prompt])
        + passes("arm_decode", range(prompt, prompt + length - 1)),
        "full_dlm": passes("full_dlm", [prompt] * 32, length),
        "block_uncached": 3 * passes("block_uncached", starts, block),
        "block_cached": passes("arm_prefill", [prompt], options=fill)
        + 3 * passes("block_cached", starts, block)
        + passes("block_cached", starts, block, fill),
    }
    for name, total in expected.items():
        made = generation(
            LLAMA3,
            name,
            prompt=prompt,
            length=length,
            block=block,
            tokens_per_step=3,
            **shape,
        )
        got = (made.passes, made.seconds, made.operations, made.bytes)
        np.testing.assert_allclose(got, total, rtol=tolerances.SUMMED_STEPS)
        cached = name in ("arm_decode", "block_cached")
        assert (made.prefill_seconds > 0) == cached and made.prefill_seconds < made.seconds


@pytest.mark.parametrize(("density", "error"), [(1.0, "SUMMED_STEPS"), (0.37, "RECOMPUTED")])
def test_bends_of_the_step_time_are_not_interpolated_across(density, error):
    """A device on which attention turns from compute to memory, a window that fills up.

    With sparse attention whole keys are read, which the interpolation may round differently.
    """
    model = dataclasses.replace(TINY, sliding_window=64)
    device = Hardware(name="x", bandwidth=1e9, peak_flops=3e9, peak_vector=2e9)
    options = StepOptions(density=density)
    made = generation(
        model, "arm_decode", prompt=1, length=200, hardware=device, options=options, batch=3
    )
    steps = [
        regime(model, "arm_decode", context=c, batch=3, hardware=device, options=options).seconds
        for c in range(1, 200)
    ]
    assert made.seconds - made.prefill_seconds == pytest.approx(
        sum(steps), rel=getattr(tolerances, error)
    )


def test_passes_per_block_count_the_one_that_stores():
    assert passes_per_block("block_cached", 32, 3) == 12
    assert passes_per_block("block_uncached", 32, 3) == 11
    assert passes_per_block("arm_decode", 1, 3) == 1
    assert tokens_per_pass("full_dlm", 512, 2) == 2
    with pytest.raises(ValueError, match="tokens_per_step=5"):
        passes_per_block("block_cached", 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "arm_prefill"}, "generates nothing"),
        ({"name": "block_cached", "length": 30}, "length=30"),
        ({"name": "arm_decode", "length": 0}, "length=0"),
    ],
)
def test_generations_that_make_no_sense(change, message):
    settings: dict[str, Any] = {"prompt": 8, "length": 32, "block": 8, "hardware": H200} | change
    with pytest.raises(ValueError, match=message):
        generation(TINY, settings.pop("name"), **settings)


# ---------------------------------------------------------------------------- crossing, plans


def contest(**fields):
    settings: dict[str, Any] = {"arm": LLAMA3, "dlm": LLADA, "name": "block_cached", "new": 32}
    return Contest(**settings | {"context": 1024, "hardware": A100} | fields)


def test_crossing_batch_is_where_throughputs_meet():
    for tokens, hardware in itertools.product((1.5, 2, 4), (A100, H200)):
        match = contest(hardware=hardware)
        batch = match.crossing_batch(tokens, 1024)
        assert batch is not None and batch > 1

        def throughputs(batch, match=match, tokens=tokens):
            shape = {"context": match.context, "batch": batch, "hardware": match.hardware}
            yielded = tokens_per_pass(match.name, match.new, tokens)
            arm = regime(match.arm, "arm_decode", **shape).tokens_per_second(1)
            dlm = regime(match.dlm, match.name, new=match.new, **shape).tokens_per_second(yielded)
            return arm, dlm

        arm, dlm = throughputs(batch)
        assert arm > dlm
        arm, dlm = throughputs(batch - 1)
        assert arm <= dlm


def test_more_tokens_per_step_move_the_crossing_to_larger_batches():
    found = [contest().crossing_batch(tokens, 1024) or 1025 for tokens in (1.1, 2, 4, 8, 16)]
    assert found == sorted(found) and found[0] < found[-1]
    assert contest(name="full_dlm", new=512).crossing_batch(2, 1024) == 1
    assert contest(arm=LLADA, new=1).crossing_batch(1, 64) == 1  # the pass that stores
    assert contest(arm=LLADA, new=1, name="block_uncached", context=1).crossing_batch(1, 1) == 1


def test_search_ends_at_the_largest_batch():
    slow = StepOptions(floor_seconds=10.0)
    assert contest(options=slow).crossing_batch(2, 100) is None
    assert contest().crossing_batch(2, 4) is None
    assert contest().crossing_batch(2, 1000) == contest().crossing_batch(2, 1024)


def test_break_even_with_the_pass_that_stores():
    match = contest()
    tokens = match.tokens_per_step(1)
    assert tokens is not None
    ratio = match.ratio(1)
    assert 1 < ratio < tokens
    assert match.new / (match.new / tokens + 1) == pytest.approx(ratio)
    # Both read the same weights: a step costs about one token, and no overhead makes it exactly so.
    assert contest(arm=LLADA, options=StepOptions(floor_seconds=1e3)).ratio(1) == pytest.approx(
        1, rel=tolerances.THREE_DIGITS
    )
    assert contest(new=4, context=32768).tokens_per_step(64) is None
    uncached = contest(name="block_uncached")
    assert uncached.tokens_per_step(1) == uncached.ratio(1)
    assert contest(name="block_uncached", context=32768).tokens_per_step(8) is None


def test_planner_finds_the_batch_that_reaches_the_ridge():
    """LLaDA's shape at 640 tokens on an A100: a block of 32 needs 8 sequences."""
    plan = plan_batches(
        LLADA,
        A100,
        context=640,
        blocks=(1, 32),
        batches=(1, 2, 4, 8, 16, 32),
        options=PUBLISHED,
    )
    assert plan.ridge == A100.ridge
    reached = plan.reaching[32]
    assert reached is not None and reached.batch == 8 and plan.reaching[1] is None
    pairs = itertools.product((1, 32), (1, 2, 4, 8, 16, 32))
    intensity = {
        (block, batch): regime(
            LLADA,
            "block_cached",
            context=640,
            new=block,
            batch=batch,
            hardware=PROFILED_A6000,
            options=PUBLISHED,
        ).intensity
        for block, batch in pairs
    }
    best = min(intensity, key=lambda pair: abs(np.log(intensity[pair] / A100.ridge)))
    assert plan.nearest is not None and (plan.nearest.block, plan.nearest.batch) == best


def test_planner_leaves_out_what_does_not_fit():
    small = dataclasses.replace(A100, memory_bytes=18e9)
    settings = {"context": 640, "blocks": (32,), "batches": (1, 2, 4, 8, 64)}
    plan = plan_batches(LLADA, small, **settings)
    assert plan.reaching[32] is None and plan.nearest is not None and plan.nearest.batch <= 4
    none = plan_batches(LLADA, dataclasses.replace(A100, memory_bytes=1e9), **settings)
    assert none.nearest is None
    unknown = plan_batches(LLADA, dataclasses.replace(A100, memory_bytes=0.0), **settings)
    assert unknown.reaching[32] is not None
