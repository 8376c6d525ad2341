# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: a flag at first, the end at the second."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from train.preempt import EXIT_PREEMPTED, Preemption

_LOOP = """
import hashlib, sys, time
from train.preempt import EXIT_PREEMPTED, Preemption
with Preemption() as preemption:
    print("ready", flush=True)
    while not preemption.requested:
        time.sleep(0.01)
    print("stopping", flush=True)
    if sys.argv[1] == "save":
        raise SystemExit(EXIT_PREEMPTED)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes of native code, as a compilation is
"""


def _start(mode) -> Any:
    process: Any = subprocess.Popen(
        [sys.executable, "-c", _LOOP, mode], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_lets_the_loop_save(number):
    process = _start("save")
    process.send_signal(number)
    assert process.communicate(timeout=5)[0] == "stopping\n"
    assert process.returncode == EXIT_PREEMPTED == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_exits_at_once_even_in_native_code(number):
    process = _start("native")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    time.sleep(0.2)
    start = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert time.monotonic() - start < 2
    assert process.returncode == 128 + number


def test_handlers_return_and_the_object_can_be_used_again():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    threads = threading.active_count()
    for _ in range(3):
        with Preemption() as preemption:
            assert not preemption.requested and not preemption.wait(0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.wait(5) and preemption.requested
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_other_signals_are_left_alone():
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        with Preemption() as preemption:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
            assert len(received) == 3 and not preemption.wait(0.1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
