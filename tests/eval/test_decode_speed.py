# SPDX-License-Identifier: Apache-2.0
"""Decode steps at a context: what is timed, where the time goes, what the record says."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import speed, speed_steps, speed_trace
from eval.speed_config import SpeedConfig, SpeedModel
from sqzjax import kvcache
from sqzjax.analysis import Hardware
from sqzjax.analysis.timeline import PARTS
from sqzjax.config import load
from sqzjax.decode import SamplingConfig, generate
from sqzjax.decode.autoregressive import Autoregressive
from sqzjax.decode.base import advance
from sqzjax.models import SIZES, DecoderLM, Execution, ModelConfig
from tests.parameters import drawn

# Times of programs that nobody would run mean nothing.
OPTIMIZED = True
SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=704,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_positions=1024,
)
DEVICE = Hardware(name="slow", bandwidth=1e6, peak_flops=1e7)
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "eval"


@pytest.fixture(scope="module")
def small():
    model = DecoderLM(SMALL, Execution(scan_layers=False))
    return model, drawn(model)


@pytest.fixture(scope="module")
def measured(small):
    model, params = small
    return speed_steps.measure_steps(
        model, params, batch=2, context=384, steps=4, repeats=3, hardware=DEVICE
    )


@pytest.mark.slow
def test_step_figures_are_consistent(measured):
    assert len(measured.seconds) == 3
    assert measured.step_ms == pytest.approx(1e3 * np.median(measured.seconds) / 4)
    assert measured.tokens_per_second == pytest.approx(2e3 / measured.step_ms)
    per_token = 2 * 4 * SMALL.num_layers * SMALL.num_kv_heads * SMALL.head_dim
    assert measured.cache_bytes >= 2 * (384 + 4) * per_token
    # All kernels, the keys of the mean context, and one token written.
    kernels = 4 * (SMALL.num_params - SMALL.vocab_size * SMALL.hidden_size)
    assert measured.step_bytes == kernels + 2 * per_token * (384 + 2) + 2 * per_token
    assert measured.roofline_percent == pytest.approx(100 * measured.roofline_ms / measured.step_ms)
    assert measured.bound == "memory"


def test_breakdown_sums_to_the_step(measured):
    parts = measured.breakdown
    assert parts is not None and set(parts.parts) == set(PARTS)
    assert sum(parts.parts.values()) + parts.idle_ms == pytest.approx(parts.total_ms)
    assert parts.idle_ms >= 0 and all(time >= 0 for time in parts.parts.values())
    off = 100 * (parts.total_ms / measured.step_ms - 1)
    assert parts.error_percent == pytest.approx(off)
    assert parts.within_margin == (abs(off) <= speed_trace.MARGIN_PERCENT)
    # A wrong attribution would leave them in "rest".
    assert all(parts.parts[name] > 0 for name in ("linear", "attention", "head"))


def test_margin_is_stated_and_applied():
    fields = {"parts": {}, "idle_ms": 0.0, "total_ms": 1.0}
    inside, outside = speed_trace.MARGIN_PERCENT - 1, -speed_trace.MARGIN_PERCENT - 1
    assert speed_trace.Breakdown(**fields, error_percent=inside).within_margin
    assert not speed_trace.Breakdown(**fields, error_percent=outside).within_margin


def test_no_breakdown_where_the_profiler_sees_nothing(monkeypatch, small):
    monkeypatch.setattr(speed_trace, "read_intervals", lambda folder: iter(()))

    class Compiled:
        def as_text(self):
            return ""

    found = speed_trace.measure_breakdown(Compiled(), lambda: 0.1, steps=2, step_seconds=0.05)
    assert found is None


def test_filled_caches_hold_the_context_and_have_room(small):
    model, _ = small
    key = jax.random.key(1)
    policy = kvcache.Dense()
    caches = speed_steps.filled_caches(model, policy, batch=2, context=7, room=3, key=key)
    np.testing.assert_array_equal(caches.length, [7, 7])
    kvcache.check_room(caches.length, 3, 10)
    assert all(state.capacity >= 10 for state in caches.states)
    half = DecoderLM(SMALL, Execution(dtype="bfloat16", scan_layers=False))
    caches = speed_steps.filled_caches(half, policy, batch=2, context=7, room=3, key=key)
    first, second = caches.states
    assert first.k.dtype == jnp.bfloat16 and float(jnp.std(first.k.astype(jnp.float32))) > 0.5
    assert not np.array_equal(first.k, first.v) and not np.array_equal(first.k, second.k)


@pytest.mark.slow
def test_the_timed_loop_decodes(small):
    """From a cache that a real prompt filled, the timed program gives what generation gives."""
    model, params = small
    prompt, steps = list(range(3, 23)), 5
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=steps + 1, ignore_eos=True)
    wanted = generate(model, params, [prompt], sampling).tokens[0]
    caches = model.init_caches(kvcache.Dense(), batch=1, capacity=64, max_new=32)
    filled = jax.jit(model.forward)(params, jnp.asarray([prompt]), caches=caches)
    first = jnp.argmax(filled.logits[:, -1], axis=-1).astype(jnp.int32)
    begun, decoder = [int(first[0])], Autoregressive(model=model)
    state = speed_steps.start_state(decoder, 1, len(prompt), steps, jax.random.key(0))
    state, done = advance(
        decoder, params, replace(state, caches=filled.caches, pending=first), steps
    )
    assert int(done) == steps
    np.testing.assert_array_equal(begun + state.output.tokens[0].tolist(), wanted)


def test_record_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "hardware_here", lambda workdir, refresh: DEVICE)
    config = SpeedConfig(
        models=(SpeedModel(name="small", architecture=replace(SMALL, num_layers=1)),),
        batches=(2,),
        contexts=(16, 64),
        steps=3,
        repeats=1,
        generate=False,
        breakdown=False,
    )
    record = speed.run_speed(config, tmp_path)
    assert not record["decode"]
    pairs = [(row["context"], row["batch"]) for row in record["steps"]]
    assert pairs == [(16, 2), (64, 2)]
    text = (tmp_path / "speed.md").read_text()
    assert text == speed.markdown(json.loads((tmp_path / "speed.json").read_text()))
    assert "| small | 64 | 2 |" in text and "time goes" not in text
    parts = dict.fromkeys(PARTS, 0.5)
    profiled = {"parts": parts, "idle_ms": 0.1, "total_ms": 2.6, "error_percent": 40.0}
    rows = [record["steps"][0] | {"breakdown": profiled}]
    rows.append({"model": "big", "batch": 8, "context": 99, "out_of_memory": True})
    text = speed.markdown(record | {"steps": rows})
    assert "+40.0 % (!)" in text and "big, batch 8, context 99: out of memory" in text


def test_a_combination_without_room_is_recorded(tmp_path, monkeypatch):
    def measure(model, params, *, context, **rest):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99G")

    monkeypatch.setattr(speed, "hardware_here", lambda workdir, refresh: DEVICE)
    monkeypatch.setattr(speed, "measure_steps", measure)
    entry = SpeedModel(name="small", architecture=SMALL)
    config = SpeedConfig(models=(entry,), batches=(1,), contexts=(16,), generate=False)
    assert speed.run_speed(config, tmp_path)["steps"][0]["out_of_memory"]
    message = "INTERNAL: broken"
    monkeypatch.setattr(
        speed,
        "measure_steps",
        lambda *a, **k: (_ for _ in ()).throw(jax.errors.JaxRuntimeError(message)),
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        speed.run_speed(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"generate": False}, "nothing to measure"),
        ({"contexts": (0,)}, "contexts"),
        ({"contexts": (8,), "steps": 0}, "steps=0"),
    ],
)
def test_bad_configs_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        SpeedConfig(models=(SpeedModel(name="llama_10m"),), **change)


def test_contexts_beyond_the_model_are_refused(tmp_path, monkeypatch):
    """Before any model, also one that would do, is measured."""
    monkeypatch.setattr(speed, "hardware_here", lambda workdir, refresh: pytest.fail("too late"))
    entries = tuple(
        SpeedModel(name=f"{most}", architecture=replace(SMALL, max_positions=most))
        for most in (2048, 1024)
    )
    config = SpeedConfig(models=entries, contexts=(1020,), generate=False)
    with pytest.raises(ValueError, match="max_positions=1024"):
        speed.run_speed(config, tmp_path)


@pytest.mark.parametrize("name", ["decode_speed", "decode_speed_cpu"])
def test_shipped_configs_fit_their_models(name):
    config = load(SpeedConfig, CONFIGS / f"{name}.yaml")
    assert config.contexts and not config.generate
    for entry in config.models:
        assert max(config.contexts) + config.steps <= SIZES[entry.name].max_positions


def test_random_weights_are_made_in_the_dtype_that_is_timed():
    entry = SpeedModel(name="one layer", architecture=replace(SMALL, num_layers=1))
    _, params = speed.load_model(entry, "bfloat16", 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
