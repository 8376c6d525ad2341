# SPDX-License-Identifier: Apache-2.0
"""The benchmark of packed caches on a CPU: every form runs, and rows hold what they say."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels.qtensor import validate
from pallas_kernels.quantized_decode_attention import cpu_bench

SLOTS = 1024


@pytest.mark.parametrize("name", cpu_bench.FORMS)
def test_every_form_can_be_attended_to(name):
    fn, arguments = cpu_bench.candidate(name, SLOTS)
    given = arguments()
    validate(given[1]), validate(given[2])
    out = jax.jit(fn)(*given)
    assert out.shape == (1, 1, cpu_bench.HEADS, cpu_bench.WIDTH) and np.all(np.isfinite(out))


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "platform", "other")  # leaves out the processes that measure memory
    options = ["--slots", str(SLOTS), "--rounds", "2", "--only", "kivi3", "--out", str(path)]
    assert cpu_bench.main(options) == 0
    record = json.loads(path.read_text())
    assert list(record["rows"]) == ["float32", "kivi3"] and record["torch"] is None
    dense, kivi = record["rows"].values()
    elements = 2 * cpu_bench.KV_HEADS * SLOTS * cpu_bench.WIDTH
    assert dense["cache_bytes"] == 4 * elements and dense["ratio_to_float32"] == 1
    assert kivi["cache_bytes"] == elements * (3 + 1) // 8  # a scale and an offset for 32 elements
    assert kivi["least_seconds"] <= kivi["median_seconds"] and kivi["ratio_to_float32"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_cache():
    slots = 32768
    # A process of its own: here freed memory would be used again unnoticed.
    command = [sys.executable, "-m", cpu_bench.__name__, "--slots", str(slots)]
    done = subprocess.run([*command, "--resident", "int4"], capture_output=True, check=True)
    held = int(done.stdout)
    cache = 2 * cpu_bench.KV_HEADS * slots * (cpu_bench.WIDTH // 2 + 4)
    assert cache < held < 3 * cache


def test_a_worker_that_ends_is_reported():
    with pytest.raises(RuntimeError, match="PyTorch worker ended"):
        cpu_bench.Torch("/bin/true", SLOTS)
