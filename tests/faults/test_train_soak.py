# SPDX-License-Identifier: Apache-2.0
"""Ten thousand steps: memory, open files and speed stay what they were (reliability case 34).

Without checkpoints on the way: each save leaves some 0.1 MB in the storage library's caches, which
is much against a tiny model and nothing against a real one.
"""

import gc
import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

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
        # Processor time: the speed of the program, not of what else runs on the machine.
        samples.append((resident(), len(os.listdir("/proc/self/fd")), time.process_time()))
        original(self, step, metrics)

    monkeypatch.setattr(Loop, "_log", log)
    config = toy.run_config(
        toy.write_text(tmp_path),
        steps=STEPS,
        log=LogConfig(interval=STEPS // 20),
        checkpoint=CheckpointConfig(interval=0),
    )
    assert run(config, workdir=tmp_path / "run") == 0
    settled, last = samples[9], samples[-1]
    assert last[0] < settled[0] * (1 + SOAK_MEMORY)
    assert last[1] == settled[1]
    seconds = [after[2] - before[2] for before, after in pairwise(samples)]
    assert median(seconds[-5:]) < median(seconds[:5]) * (1 + SOAK_SPEED)
