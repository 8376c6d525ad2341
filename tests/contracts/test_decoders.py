# SPDX-License-Identifier: Apache-2.0
"""The contract that every decoder of `decoders.CASES` passes, driven as a user drives it."""

import jax
import numpy as np
import pytest

from sqzjax.decode import Generator, Run, SamplingConfig, advance, start
from sqzjax.decode import requests as checking
from sqzjax.decode.base import LENGTH, RUNNING, STOP
from tests.contracts.decoders import (
    CASES,
    EOS,
    VOCABULARY,
    DecoderCase,
    plain_greedy,
    tiny_model,
)

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(8, VOCABULARY, n).tolist() for n in (3, 21, 1, 9, 16, 17, 30, 8)]
GREEDY = SamplingConfig(max_new_tokens=12)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> DecoderCase:
    return request.param


def _model(decoder):
    """The model that decides what a lossless decoder emits."""
    return getattr(decoder, "model", None) or tiny_model()


def _generator(case: DecoderCase, **fields) -> Generator:
    decoder, params = case.build()
    fields = {"capacity": 64, "prefill_chunk": getattr(decoder, "prefill_chunk", 512)} | fields
    return Generator(_model(decoder), params, decoder=decoder, **fields)


def _run(case: DecoderCase, prompts, sampling, **fields) -> Run:
    generator = _generator(case, **fields)
    checked = checking.check(prompts, sampling, generator.config, generator.limits)
    padded = checking.pad(checked, generator.config, generator.limits)
    return Run(generator.decoder, generator.params, padded)


def test_lossless_decoders_equal_plain_greedy(case):
    if not case.lossless:
        pytest.skip("not lossless by design")
    generator = _generator(case)
    out = generator.generate(PROMPTS, GREEDY)
    model = _model(generator.decoder)
    for row, prompt in enumerate(PROMPTS):
        expected = plain_greedy(model, generator.params, prompt, GREEDY.max_new_tokens)
        assert out.row(row) == expected
        assert out.finish_reason[row] == ("stop" if expected[-1] == EOS else "length")


def test_rows_do_not_depend_on_their_batch(case):
    generator = _generator(case)
    together = generator.generate(PROMPTS, GREEDY)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    shuffled = generator.generate([PROMPTS[i] for i in order], GREEDY)
    wide = _generator(case, capacity=128, batch_size=11).generate(PROMPTS, GREEDY)
    assert generator.generate([PROMPTS[6]], GREEDY).row(0) == together.row(6)
    for row in range(len(PROMPTS)):
        assert shuffled.row(order.index(row)) == together.row(row)
        assert wide.row(row) == together.row(row)


def test_any_step_budget_gives_the_same_tokens(case):
    whole = _run(case, PROMPTS, GREEDY)
    whole.advance()
    for budget in (1, 3):
        steps = _run(case, PROMPTS, GREEDY)
        while (steps.read().reason == RUNNING).any():
            steps.advance(budget)
        jax.tree.map(np.testing.assert_array_equal, steps.read(), whole.read())
        assert steps.steps == whole.steps


def test_limits_are_per_row_and_exact(case):
    limits = [0, 1, 2, 3, 5, 7, 11, 12]
    configs = [SamplingConfig(max_new_tokens=n, ignore_eos=True) for n in limits]
    out = _generator(case).generate(PROMPTS, configs)
    full = _generator(case).generate(PROMPTS, SamplingConfig(max_new_tokens=12, ignore_eos=True))
    np.testing.assert_array_equal(out.lengths, limits)
    assert set(out.finish_reason) == {"length"}
    for row, limit in enumerate(limits):
        assert out.row(row) == full.row(row)[:limit]


def test_stop_ids_end_rows_and_are_kept(case):
    full = _generator(case).generate(PROMPTS, SamplingConfig(max_new_tokens=12, ignore_eos=True))
    stops = [full.row(row)[3 + row % 3] for row in range(len(PROMPTS))]
    configs = [
        SamplingConfig(max_new_tokens=12, ignore_eos=True, stop_token_ids=(s,)) for s in stops
    ]
    out = _generator(case).generate(PROMPTS, configs)
    for row, stop in enumerate(stops):
        tokens = full.row(row)
        assert out.row(row) == tokens[: tokens.index(stop) + 1]
        assert out.finish_reason[row] == "stop"


def test_done_rows_never_change_again(case):
    configs = [SamplingConfig(max_new_tokens=2 + row, ignore_eos=True) for row in range(8)]
    run = _run(case, PROMPTS, configs)
    ended = {}
    while (run.read().reason == RUNNING).any():
        run.advance(1)
        output = run.read()
        for row in np.flatnonzero(output.reason != RUNNING):
            now = (output.tokens[row].tolist(), output.lengths[row], output.reason[row])
            assert ended.setdefault(row, now) == now
            assert output.reason[row] in (STOP, LENGTH)
    assert len(ended) == 8


def test_rows_ended_by_the_host_stop_there(case):
    run = _run(case, PROMPTS, SamplingConfig(max_new_tokens=12, ignore_eos=True))
    run.advance(2)
    run.end_rows(np.arange(8) == 3)
    length = run.read().lengths[3]
    run.advance()
    output = run.read()
    assert output.lengths[3] == length and output.reason[3] == STOP
    assert (np.delete(output.lengths, 3) == 12).all()


def test_finished_run_is_a_fixed_point(case):
    run = _run(case, PROMPTS, GREEDY)
    run.advance()
    before, steps = run.read(), run.steps
    run.advance()
    assert run.steps == steps
    jax.tree.map(np.testing.assert_array_equal, run.read(), before)


def test_values_do_not_recompile(case):
    generator = _generator(case)

    def run(prompts, **fields):
        fields = {"max_new_tokens": 9, "temperature": 0.5, "top_k": 3} | fields
        generator.generate(prompts, SamplingConfig(**fields))

    run(PROMPTS)
    compiled = start._cache_size(), advance._cache_size()
    run(PROMPTS, temperature=1.5, top_k=0, top_p=0.3)
    run(PROMPTS[::-1], seed=9, max_new_tokens=12, min_p=0.1)
    run([prompt[-20:] for prompt in PROMPTS], stop_token_ids=(3, 4), ignore_eos=True)
    mixed = [SamplingConfig(max_new_tokens=t, temperature=t / 5, top_k=5) for t in range(8)]
    generator.generate(PROMPTS, mixed)
    assert (start._cache_size(), advance._cache_size()) == compiled
    run([prompt[-16:] for prompt in PROMPTS])  # another prefill bucket, the same decoding
    assert (start._cache_size(), advance._cache_size()) == (compiled[0] + 1, compiled[1])
