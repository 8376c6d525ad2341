# SPDX-License-Identifier: Apache-2.0
"""Ten thousand steps: memory, open files and speed stay what they were (reliability case 34)."""

import gc
import json
import os
from pathlib import Path

import pytest

from tests.tolerances import SOAK_MEMORY, SOAK_SPEED
from tests.train import toy
from train.config import CheckpointConfig, LogConfig
from train.loop import Loop
from train.run import run

STEPS = 10_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_soak(tmp_path, monkeypatch):
    samples = []
    original = Loop._log

    def log(self, step, metrics):
        gc.collect()
        samples.append((step, resident(), len(os.listdir("/proc/self/fd"))))
        original(self, step, metrics)

    monkeypatch.setattr(Loop, "_log", log)
    config = toy.run_config(
        toy.write_text(tmp_path),
        steps=STEPS,
        log=LogConfig(interval=STEPS // 20),
        checkpoint=CheckpointConfig(interval=STEPS // 10),
    )
    assert run(config, workdir=tmp_path / "run") == 0
    settled, last = samples[9], samples[-1]  # storage libraries fill their caches at first
    assert last[1] < settled[1] * (1 + SOAK_MEMORY)
    assert last[2] == settled[2]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["throughput/tokens_per_second"] for line in lines]
    assert sum(speeds[-2:]) > sum(speeds[:2]) * (1 - SOAK_SPEED)
