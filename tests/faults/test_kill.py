# SPDX-License-Identifier: Apache-2.0
"""`kill -9` at any moment: the next start continues and ends at the same bytes.

Cases 1 and 2, with a toy loop around the checkpointer and with `python -m train` itself.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sqzjax.io.checkpoint import Checkpointer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Let the many short processes share compiled programs; the first one compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def _start(*arguments: object) -> Any:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def _toy(folder: Path, steps: int = STEPS) -> Any:
    return _start("-m", "tests.faults.checkpoint_toy", folder, steps)


def _finish(process: Any) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the final bytes of an undisturbed toy run with a given number of steps."""
    results: dict[int, bytes] = {}

    def final(steps: int) -> bytes:
        if steps not in results:
            folder = tmp_path_factory.mktemp("undisturbed")
            _finish(_toy(folder, steps))
            results[steps] = (folder / "final.npy").read_bytes()
        return results[steps]

    return final


def _require_clean(folder: Path, keep: int) -> None:
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {".lock", *map(str, Checkpointer(folder / "checkpoints").steps())}
    assert len(names) == keep + 1


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_random_kills_change_nothing(tmp_path, undisturbed, kills):
    """Case 1: every kill strikes some steps into a run that saves each step in the background."""
    moments = random.Random(0)
    steps, newest = 4 * kills + 4, 0
    expected = undisturbed(steps)
    for _ in range(kills):
        process = _toy(tmp_path, steps)
        for _ in range(moments.randint(2, 3)):
            assert process.stdout.readline().startswith("step")
        time.sleep(moments.uniform(0, 0.06))
        process.kill()
        process.communicate()
        good = Checkpointer(tmp_path / "checkpoints").latest_good() or 0
        assert good >= newest
        newest = good
    _finish(_toy(tmp_path, steps))
    assert (tmp_path / "final.npy").read_bytes() == expected
    _require_clean(tmp_path, keep=2)


_KILL_POINT = """
import os, signal, sys
from pathlib import Path
from sqzjax.io import manifest, step_files
from tests.faults import checkpoint_toy

point, folder, delay = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def delete_half(folder):
    for path in sorted(folder.rglob("*"))[::2]:
        path.is_file() and path.unlink()
    die()

def write_and_die(*arguments, write=step_files.write_step):
    signal.setitimer(signal.ITIMER_REAL, delay)  # the default action of SIGALRM is to kill
    write(*arguments)
    while True:
        pass

if point == "before write": step_files.write_step = die
if point == "inside write": step_files.write_step = write_and_die
if point == "before manifest": manifest.write = die
if point == "inside manifest": manifest._render = die
if point == "before deletion": manifest.shutil.rmtree = die
if point == "inside deletion": manifest.shutil.rmtree = delete_half
checkpoint_toy.run(folder, 16)
"""


@pytest.mark.parametrize(
    ("point", "good", "delay"),
    [
        ("inside write", None, 0.02),
        ("before manifest", None, 1.0),
        ("inside deletion", 3, 1.0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("before write", None, 1.0),
                ("inside manifest", None, 1.0),
                ("before deletion", 3, 1.0),
                *(("inside write", None, delay) for delay in (0.002, 0.005, 0.01, 0.03)),
            )
        ),
    ],
)
def test_kill_in_first_save_and_in_deletion(tmp_path, undisturbed, point, good, delay):
    """Case 2: the process is killed at a named place of the first save or of the first deletion."""
    expected = undisturbed(STEPS)
    process = _start("-c", _KILL_POINT, point, tmp_path, delay)
    process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGKILL, -signal.SIGALRM)
    assert Checkpointer(tmp_path / "checkpoints").latest_good() == good
    _finish(_toy(tmp_path))
    assert (tmp_path / "final.npy").read_bytes() == expected
    _require_clean(tmp_path, keep=2)


_LEAVE = """
import sys
from tests.faults.checkpoint_toy import Checkpointer, init_state

with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, init_state(), {})
    checkpointer.save(2, init_state(), {})
    raise SystemExit(3)
"""


def test_exception_right_after_save_loses_nothing(tmp_path):
    process = _start("-c", _LEAVE, tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == 3
    assert Checkpointer(tmp_path).latest_good() == 2
