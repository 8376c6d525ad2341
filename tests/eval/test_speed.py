# SPDX-License-Identifier: Apache-2.0
"""Speed measurements: what they count, what they write, and that they time the real thing."""

import ast
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from eval import machine, speed, speed_measure, speed_peer
from eval.speed_config import SpeedConfig, SpeedEmulator, SpeedModel
from eval.train_step import emulator_step
from sqzjax.analysis import Hardware, swin_flops, training_flops
from sqzjax.config import load
from sqzjax.models import SIZES, DecoderLM, Execution, ModelConfig, stack_layers
from sqzjax.models.swin import SwinEmulator
from sqzjax.models.swin_config import SwinConfig
from sqzjax.sphere import Grid
from tests import tolerances
from tests.parameters import drawn

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=80,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    max_positions=64,
)
SLOW_DEVICE = Hardware(name="slow", bandwidth=1e6, peak_flops=1e7)

# Speaks the worker's protocol and repeats each prompt's last id, with one wrong id at the end.
FAKE_WORKER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["cache"] == "compiled":
        sys.exit(7)
    tokens = [[row[-1]] * (request["new_tokens"] - 1) + [-1] for row in request["prompts"]]
    reply = {"seconds": 0.5, "tokens": tokens, "versions": {"transformers": sys.argv[2]}}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture(scope="module")
def tiny():
    model = DecoderLM(TINY, Execution(scan_layers=False))
    return model, drawn(model)


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER)
    monkeypatch.setattr(speed_peer, "_WORKER", script)
    return sys.executable


@pytest.fixture
def quick_machine(monkeypatch):
    """Replace the three-second calibration by a small one."""
    measure = machine.measure
    monkeypatch.setattr(machine, "measure", lambda: measure(megabytes=1, matmul_size=64, repeats=2))


def test_measure_decode_counts_what_it_claims(tiny):
    model, params = tiny
    result = speed_measure.measure_decode(
        model,
        params,
        batch=2,
        prompt_len=5,
        new_tokens=12,
        repeats=3,
        hardware=SLOW_DEVICE,
    )
    assert result.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert len(result.seconds) == 3 and result.num_steps == 11
    assert result.tokens_per_second == pytest.approx(24 / np.median(result.seconds))
    assert 0 < result.step_ms <= result.step_p90_ms

    per_token = 2 * 4 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim
    assert result.cache_bytes >= 2 * 17 * per_token
    # At the middle of the generation: all parameters but the embedding, and the keys so far.
    kernels = 4 * (TINY.num_params - TINY.vocab_size * TINY.hidden_size)
    assert result.step_bytes == kernels + 2 * per_token * (5 + 6) + 2 * per_token
    assert result.bound == "memory"
    least = 1e3 * result.step_bytes / SLOW_DEVICE.bandwidth
    assert result.roofline_ms is not None and result.roofline_ms > least
    assert result.roofline_percent == pytest.approx(100 * result.roofline_ms / result.tpot_ms)


def test_measure_train_step_leaves_parameters_alone(tiny):
    _, params = tiny
    model, stacked = DecoderLM(TINY), stack_layers(params)
    before = jax.tree.map(np.array, stacked)
    result = speed_measure.measure_train_step(
        model, stacked, batch=2, seq_len=16, repeats=3, hardware=SLOW_DEVICE
    )
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, stacked))
    assert result.flops == training_flops(TINY, 2, 16)
    assert result.tokens_per_second == pytest.approx(32 / (result.step_ms / 1e3))
    expected = 100 * result.flops / (result.step_ms / 1e3) / SLOW_DEVICE.peak_flops
    assert result.mfu_percent == pytest.approx(expected)


def test_steps_of_emulators_are_timed_on_their_own_flops(tmp_path, quick_machine):
    grid = Grid(latitudes=8, longitudes=16, layout="gauss")
    architecture = SwinConfig(grid=grid, in_channels=4, out_channels=3, embed_dim=8, depth=2)
    entries = [
        SpeedEmulator(name="b", architecture=architecture, batch=3, remat="dots"),
    ]
    config = SpeedConfig(emulators=tuple(entries), repeats=3)
    rows = speed.run_speed(config, tmp_path)["emulators"]
    for entry, row in zip(entries, rows, strict=True):
        assert row["num_params"] == architecture.num_params and len(row["seconds"]) == 3
        assert row["flops"] == swin_flops.training_flops(architecture, entry.batch)
        assert row["samples_per_second"] == pytest.approx(entry.batch / row["step_ms"] * 1e3)
    assert "| b | 3 | stacked | dots |" in (tmp_path / "speed.md").read_text()


@pytest.mark.slow
def test_a_step_of_an_emulator_learns_to_forecast():
    grid = Grid(latitudes=8, longitudes=16, layout="gauss")
    shape = SwinConfig(grid=grid, in_channels=3, out_channels=3, embed_dim=8, depth=1)
    model = SwinEmulator(shape)
    fields = jax.random.normal(jax.random.key(1), (2, 2, 3, 8, 16))
    optimizer, step = emulator_step(model)
    params = jax.jit(model.init_params)(jax.random.key(0))
    state = optimizer.init(params)

    def loss(params):
        return float(np.square(model.forward(params, fields[:, :1]) - fields[:, 1]).mean())

    before, run = loss(params), jax.jit(step)
    for _ in range(20):
        params, state = run(params, state, fields)
    assert loss(params) < before - 1e-4


def test_seconds_of_drops_the_warm_up():
    calls = []

    def run():
        calls.append(None)
        time.sleep(0.2 if len(calls) == 1 else 0.001)

    times = machine.seconds_of(run, 4)
    assert len(calls) == 5 and len(times) == 4 and max(times) < 0.2


def test_run_speed_writes_record_and_tables(tmp_path, fake_worker, quick_machine):
    config = SpeedConfig(
        models=(SpeedModel(name="tiny", architecture=TINY),),
        batches=(1, 2),
        prompt_len=4,
        new_tokens=6,
        repeats=2,
        train_batch=1,
        train_seq_len=8,
        transformers_python=fake_worker,
        transformers_caches=("dynamic",),
        threads=3,
    )
    record = speed.run_speed(config, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [row["batch"] for row in kept["decode"]] == [1, 2]
    assert [row["seconds"] for row in kept["transformers"]] != [[], []]
    assert kept["transformers"][0]["transformers_tokens_per_second"] == 12.0
    assert kept["versions"]["transformers"] == {"transformers": "3"}  # the threads asked for
    assert kept["versions"]["jax"] == jax.__version__
    assert kept["hardware"]["bandwidth"] > 0 and kept["commit"]
    assert (tmp_path / "out" / "models" / "tiny" / "config.json").is_file()
    text = (tmp_path / "out" / "speed.md").read_text()
    assert text == speed.markdown(record) == speed.markdown(kept)
    assert "| tiny | 2 | dynamic |" in text and "MFU" in text
    assert "quote no figure" in speed.markdown({**kept, "load_average": 5.0})
    assert "quote no figure" not in speed.markdown({**kept, "load_average": 0.2})


def test_worker_failure_is_reported(tmp_path, fake_worker):
    with speed_peer.Peer(fake_worker, threads=1) as peer:
        seconds, tokens = peer.generate(tmp_path, [[1, 2]], 3, "static")
        assert seconds == 0.5
        np.testing.assert_array_equal(tokens, [[2, 2, -1]])
        with pytest.raises(RuntimeError, match="exit code 7"):
            peer.generate(tmp_path, [[1, 2]], 3, "compiled")


def test_missing_interpreter_is_named(tmp_path):
    with pytest.raises(ValueError, match="transformers_python"):
        speed_peer.Peer(str(tmp_path / "python"), threads=1)


def test_agreement_stops_at_first_difference():
    left = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
    right = np.array([[1, 9, 3, 4], [1, 2, 3, 4]])
    assert speed_peer.agreement(left, right) == (1 + 4) / 8
    with pytest.raises(ValueError, match="must match"):
        speed_peer.agreement(left, right[:, :2])


def test_machine_is_measured_once_and_again_when_asked(tmp_path, quick_machine):
    first = machine.load_or_measure(tmp_path)
    assert first.bandwidth > 0 and first.matmul_flops > 0
    assert machine.load_or_measure(tmp_path) == first
    path = tmp_path / "machine.json"
    other = dataclasses.replace(first, jax_version="0.0", scale_bandwidth=1.0)
    path.write_text(json.dumps(dataclasses.asdict(other)))
    assert machine.load_or_measure(tmp_path).scale_bandwidth > 1.0
    path.write_text("{")
    assert machine.load_or_measure(tmp_path).bandwidth > 0
    assert machine.hardware_here(tmp_path).peak_flops > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"models": ()}, "at least one model"),
        ({"models": (SpeedModel(name="llama_25m"),) * 2}, "must differ"),
        ({"batches": ()}, "batches"),
        ({"models": (SpeedModel(name="llama_25m"),), "generate": False}, "nothing to measure"),
        ({"new_tokens": 2}, "new_tokens=2"),
        ({"dtype": "bfloat16", "transformers_python": "python"}, "float32"),
    ],
)
def test_bad_configs_are_refused(change, match):
    fields = {"models": (SpeedModel(name="stories260k"),), **change}
    with pytest.raises(ValueError, match=match):
        SpeedConfig(**fields)


@pytest.mark.parametrize("name", ["speed.yaml", "speed_vs_transformers.yaml"])
def test_shipped_configs_load_and_fit_their_models(name):
    path = Path(__file__).resolve().parents[2] / "configs" / "eval" / name
    config = load(SpeedConfig, path, ["models.0.path=some/folder"])
    paths = [model.path for model in config.models]
    assert paths[0] == "some/folder" and not any(paths[1:])
    for entry in config.models:
        assert config.prompt_len + config.new_tokens <= SIZES[entry.name].max_positions


def test_unknown_model_and_overlong_generation_are_refused(tmp_path, quick_machine):
    with pytest.raises(ValueError, match="no known size"):
        SpeedModel(name="gpt9")
    entry = SpeedModel(name="tiny", architecture=TINY)
    with pytest.raises(ValueError, match="max_positions=64"):
        speed.run_speed(SpeedConfig(models=(entry,), new_tokens=100), tmp_path)


def test_worker_imports_neither_jax_nor_this_project():
    source = Path(speed_peer.__file__).with_name("bench_transformers.py").read_text()
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots == {
        "argparse",
        "json",
        "platform",
        "sys",
        "time",
        "torch",
        "transformers",
    }


@pytest.mark.slow
def test_transformers_generates_the_same_tokens(shared_data, tmp_path):
    """Against the real library: set SQZJAX_TRANSFORMERS_PYTHON to an interpreter that has it."""
    python = os.environ.get("SQZJAX_TRANSFORMERS_PYTHON")
    if not python:
        pytest.skip("SQZJAX_TRANSFORMERS_PYTHON names no environment with transformers")
    config = SpeedConfig(
        models=(SpeedModel(name="stories260K", path=str(shared_data / "stories260K")),),
        batches=(1,),
        prompt_len=4,
        new_tokens=24,
        repeats=1,
        transformers_python=python,
    )
    record = speed.run_speed(config, tmp_path)
    assert {row["cache"] for row in record["transformers"]} == {"dynamic", "static"}
    assert all(row["same_tokens"] == 1.0 for row in record["transformers"])


@pytest.mark.slow
def test_prediction_is_within_a_factor_of_the_measurement(tmp_path):
    """A decode step of a model beyond the caches takes what its bytes and bandwidth say."""
    config = SpeedConfig(
        models=(SpeedModel(name="llama_25m"),), batches=(1,), new_tokens=64, repeats=3
    )
    (row,) = speed.run_speed(config, tmp_path)["decode"]
    ratio = row["tpot_ms"] / row["roofline_ms"]
    assert 1 / tolerances.ROOFLINE_FACTOR < ratio < tolerances.ROOFLINE_FACTOR
