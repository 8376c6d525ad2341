# SPDX-License-Identifier: Apache-2.0
"""`python -m train` killed, asked to stop and started twice: cases 1, 3 and 10 end to end."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sqzjax.io.checkpoint import Checkpointer, restore_params

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300
INTERVAL = 10
TIMEOUT = 240
LAST_ONLY = ("checkpoint.interval=0", "checkpoint.minutes=0")
"""Saves at the end, or when asked to stop: half of the time of such a run is saving."""

pytestmark = pytest.mark.skipif(
    not (ROOT / "train" / "run.py").exists(), reason="the trainer is not part of this checkout"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return the config of a tiny run that saves often and compiles once for all tests."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "text.txt").write_text("".join(f"line {i}, {i * i}.\n" for i in range(2000)))
    model = {
        "family": "llama",
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 2,
    }
    document = {
        "model": {"kind": "custom", "config": model},
        "data": {
            "sources": [{"kind": "text", "paths": [str(folder / "text.txt")]}],
            "eval_fraction": 0.0,
        },
        "batch_size": 2,
        "seq_len": 32,
        "steps": STEPS,
        "schedule": {"kind": "constant"},
        "checkpoint": {"interval": INTERVAL, "keep": 2},
        "log": {"interval": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)  # one device, as the batch of two rows needs
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield folder / "config.yaml"


def _start(config: Path, workdir: Path, *overrides: str) -> Any:
    command = [sys.executable, "-m", "train", str(config), *overrides, "--workdir", str(workdir)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _end(process: Any) -> tuple[int, str]:
    _, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, errors


def _newest(workdir: Path) -> int:
    return max(Checkpointer(workdir / "checkpoints").steps(), default=-1)


def _wait_for_step(process: Any, workdir: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while _newest(workdir) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _final(workdir: Path) -> dict[str, bytes]:
    import jax

    assert Checkpointer(workdir / "checkpoints").latest_good() == STEPS
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        restore_params(workdir / "checkpoints").items["params"]
    )
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> dict[str, bytes]:
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, errors = _end(_start(config, workdir, *LAST_ONLY))
    assert code == 0, errors
    return _final(workdir)


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_run_ends_at_the_same_bytes(config, undisturbed, tmp_path, kills):
    moments = random.Random(1)
    for _ in range(kills):
        process = _start(config, tmp_path)
        _wait_for_step(process, tmp_path, _newest(tmp_path) + 1 + INTERVAL * moments.randint(0, 2))
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        _end(process)
    code, errors = _end(_start(config, tmp_path, *LAST_ONLY))
    assert code == 0, errors
    assert _final(tmp_path) == undisturbed
    assert not list((tmp_path / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def test_sigterm_saves_within_seconds_and_the_same_command_continues(config, undisturbed, tmp_path):
    process = _start(config, tmp_path, *LAST_ONLY)
    _wait_for_log(process, tmp_path)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, errors = _end(process)
    assert code == 75, errors
    assert time.monotonic() - start < 30
    assert 0 < _newest(tmp_path) < STEPS
    code, errors = _end(_start(config, tmp_path, *LAST_ONLY))
    assert code == 0, errors
    assert _final(tmp_path) == undisturbed


def test_second_run_in_one_workdir_is_refused(config, tmp_path):
    process = _start(config, tmp_path, "steps=1000000")
    try:
        _wait_for_log(process, tmp_path)
        code, errors = _end(_start(config, tmp_path))
        assert code not in (0, 75) and f"in use by process {process.pid}" in errors
        assert process.poll() is None
    finally:
        process.kill()
        _end(process)


def _wait_for_log(process: Any, workdir: Path) -> None:
    """Wait for the first line of metrics: the loop is running."""
    deadline = time.monotonic() + TIMEOUT
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
