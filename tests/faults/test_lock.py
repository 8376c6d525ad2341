# SPDX-License-Identifier: Apache-2.0
"""The lock on a folder: one holder, a clear refusal, gone with its process."""

import os
import signal
import socket
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import pytest

from sqzjax.errors import CheckpointError
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.io.lock import NAME, WorkdirLock

_HOLD = """
import sys
from sqzjax.errors import CheckpointError
from sqzjax.io.lock import WorkdirLock
lock = WorkdirLock(sys.argv[1])
sys.stdin.readline()  # both contenders start together
try:
    lock.acquire()
except CheckpointError as error:
    print("refused", error, flush=True)
    raise SystemExit(2)
print("held", flush=True)
sys.stdin.readline()
"""


def _contender(folder) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _race(folder):
    """Start two processes at once; return the winner's and the loser's line."""
    contenders = [_contender(folder), _contender(folder)]
    lines = {}
    try:
        for process in contenders:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in contenders:
            lines[process.pid] = process.stdout.readline()
    finally:
        for process in contenders:
            process.communicate("\n", timeout=60)
    return lines


@pytest.mark.parametrize(
    "trial", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 10))]
)
def test_second_process_refuses_and_names_the_first(tmp_path, trial):
    """Case 10."""
    lines = _race(tmp_path)
    [winner] = [pid for pid, line in lines.items() if line == "held\n"]
    [refusal] = [line for line in lines.values() if line.startswith("refused")]
    assert f"in use by process {winner} on host {socket.gethostname()}" in refusal


def test_lock_of_a_killed_process_is_free(tmp_path):
    process = _contender(tmp_path)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=f"process {process.pid}"):
        WorkdirLock(tmp_path).acquire()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    with WorkdirLock(tmp_path) as lock:
        assert lock.held


def test_lock_within_one_process(tmp_path):
    first, second = WorkdirLock(tmp_path), WorkdirLock(tmp_path)
    with first:
        assert first.acquire() is first  # taking what one has is harmless
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
            second.acquire()
        assert not second.held
    assert not first.held
    with second:
        (tmp_path / NAME).write_text("")
        with pytest.raises(CheckpointError, match="another process"):
            first.acquire()
    first.release()


def test_lock_that_is_forgotten_is_released(tmp_path):
    WorkdirLock(tmp_path).acquire()
    with WorkdirLock(tmp_path) as lock:
        assert lock.held


def test_release_frees_the_lock_although_a_forked_child_lives(tmp_path):
    lock = WorkdirLock(tmp_path).acquire()
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"],
        stdin=subprocess.PIPE,
        pass_fds=[lock._descriptor],  # what a fork without exec would share
    )
    lock.release()
    with WorkdirLock(tmp_path):
        child.communicate(b"\n", timeout=60)


def test_two_checkpointers_cannot_write_one_folder(tmp_path):
    items = {"params": {"w": jnp.ones(2)}}
    with Checkpointer(tmp_path) as first, Checkpointer(tmp_path) as second:
        first.save(1, items, {})
        assert first.wait()
        with pytest.raises(CheckpointError, match="in use by process"):
            second.save(2, items, {})
        assert second.restore(None, items).step == 1  # reading needs no lock
        first.close()
        second.save(2, items, {})
        assert second.wait() and second.steps() == [1, 2]
