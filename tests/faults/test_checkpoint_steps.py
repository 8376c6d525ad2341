# SPDX-License-Identifier: Apache-2.0
"""Which steps are kept, what a start cleans up, and saving in the background."""

import logging
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.errors import CheckpointError
from sqzjax.io import manifest, step_files
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.io.lock import WorkdirLock
from tests.faults.checkpoint_toy import abstract, init_state, train_step
from tests.tolerances import SAVE_OVERHEAD


@pytest.fixture
def saver(tmp_path):
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpointer:
        yield checkpointer


def _save(checkpointer, step, items, **meta):
    checkpointer.save(step, items, meta)
    assert checkpointer.wait()


def _error(function, *arguments, **keywords) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


# Retention and folders.


def test_keep_and_keep_every(tmp_path):
    items = {"params": {"w": jnp.zeros(2)}}
    with Checkpointer(tmp_path, keep=2, keep_every=4) as checkpointer:
        for step in range(10):
            _save(checkpointer, step, items)
            assert step in checkpointer.steps()
        assert checkpointer.steps() == [0, 4, 8, 9]
    with Checkpointer(tmp_path / "all", keep=None) as checkpointer:
        for step in range(5):
            _save(checkpointer, step, items)
        assert checkpointer.steps() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)


def test_old_step_goes_only_after_the_new_manifest(saver, monkeypatch):
    _save(saver, 1, init_state())
    _save(saver, 2, init_state())
    monkeypatch.setattr(manifest, "write", _fail)
    saver.save(3, init_state(), {})
    assert "saving step 3" in _error(saver.wait)
    assert saver.steps() == [1, 2]
    assert not (saver.directory / "3").exists()


def _fail(*_):
    raise OSError(28, "No space left on device")


def test_start_removes_leftovers_of_a_killed_run_and_nothing_else(tmp_path):
    items = {"params": {"w": jnp.ones(2)}}
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            _save(checkpointer, step, items)
    (tmp_path / "1" / manifest.NAME).unlink()
    stale = tmp_path / "3.orbax-checkpoint-tmp"
    foreign = [tmp_path / name for name in ("notes", "x.orbax-checkpoint-tmp", "007")]
    for folder in (stale, *foreign):
        folder.mkdir()
        (folder / "file").write_text("x")
    with WorkdirLock(tmp_path / "work") as lock:
        Checkpointer(tmp_path)  # reading alone removes nothing
        assert stale.exists() and (tmp_path / "1").exists()
        Checkpointer(tmp_path, lock=lock)
    assert not stale.exists() and not (tmp_path / "1").exists()
    assert (tmp_path / "2").exists() and all((folder / "file").exists() for folder in foreign)


def test_lone_step_without_manifest_is_ignored_and_kept(tmp_path):
    items = {"params": {"w": jnp.ones(2)}}
    with Checkpointer(tmp_path) as checkpointer:
        _save(checkpointer, 1, items)
    (tmp_path / "1" / manifest.NAME).unlink()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [] and checkpointer.latest_good() is None
        _save(checkpointer, 2, items)
        assert checkpointer.steps() == [2] and (tmp_path / "1").exists()
    with Checkpointer(tmp_path) as checkpointer:
        _save(checkpointer, 3, items)
        assert not (tmp_path / "1").exists()


def test_steps_of_an_abandoned_run_are_renamed(tmp_path, caplog):
    old, new = ({"params": {"w": jnp.full(2, value)}} for value in (1.0, 2.0))
    with Checkpointer(tmp_path, keep=None) as checkpointer:
        for step in (1, 2, 3):
            _save(checkpointer, step, old)
    with Checkpointer(tmp_path, keep=None) as checkpointer:
        checkpointer.restore(1, old)
        _save(checkpointer, 2, new)
        assert checkpointer.steps() == [1, 2]
        assert checkpointer.restore(None, new).items["params"]["w"][0] == 2.0
    assert {"2.abandoned", "3.abandoned"} <= {path.name for path in tmp_path.iterdir()}
    assert "abandoned run" in caplog.text


def test_same_step_is_written_once_and_older_step_refused(saver, monkeypatch):
    items = init_state()
    _save(saver, 5, items)
    saver.restore(None, abstract(items))
    monkeypatch.setattr(step_files, "write_step", _fail)
    _save(saver, 5, items)
    with pytest.raises(ValueError, match="step=4 must not be below 5"):
        saver.save(4, items, {})


# Background saving.


def test_save_returns_early_and_never_two_in_flight(saver, monkeypatch):
    running, peak, gate = [], [], threading.Event()
    write_step = step_files.write_step

    def slow(folder, step, *rest):
        running.append(step)
        peak.append(len(running))
        assert gate.wait(10)
        write_step(folder, step, *rest)
        running.remove(step)

    monkeypatch.setattr(step_files, "write_step", slow)
    saver.save(1, init_state(), {})
    assert saver.steps() == []  # still writing: `save` did not wait
    saver.poll()
    threading.Timer(0.05, gate.set).start()
    saver.save(2, init_state(), {})
    assert saver.last_saved == 1  # the second save waited for the first
    saver.close()
    assert saver.steps() == [1, 2] and peak == [1, 1]


def test_failed_background_save_surfaces_at_next_call(saver, monkeypatch):
    _save(saver, 1, init_state())
    with monkeypatch.context() as patch:
        patch.setattr(step_files, "write_step", _fail)
        saver.save(2, init_state(), {})
        assert "saving step 2" in _error(saver.save, 3, init_state(), {})
        saver.save(3, init_state(), {})
        deadline = time.monotonic() + 10
        with pytest.raises(CheckpointError, match="saving step 3"):
            while time.monotonic() < deadline:
                saver.poll()
    _save(saver, 4, init_state())
    assert saver.steps() == [1, 4]


def test_synchronous_save_fails_at_once(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, async_save=False) as checkpointer:
        checkpointer.save(1, init_state(), {})
        assert checkpointer.steps() == [1]
        monkeypatch.setattr(step_files, "write_step", _fail)
        assert "No space left" in _error(checkpointer.save, 2, init_state(), {})


def test_orbax_stays_quiet(saver, caplog):
    caplog.set_level(logging.INFO)
    _save(saver, 1, init_state())
    saver.restore(None, abstract(init_state()))
    assert not [record for record in caplog.records if "orbax" in record.pathname]
    logging.getLogger("absl").info("the user's own message")
    assert "the user's own message" in caplog.text


@pytest.mark.slow
def test_save_blocks_less_than_five_percent_of_a_step(tmp_path):
    """Case 9: time inside `save`, every fifth step, against steps of 100 ms."""
    items, pause, blocked = init_state(size=1024), 0.1, []
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in range(1, 61):
            items = jax.block_until_ready(train_step(items))
            time.sleep(pause)  # the device computes, the host is free
            if step % 5 == 0:
                start = time.perf_counter()
                checkpointer.save(step, items, {})
                blocked.append(time.perf_counter() - start)
    assert np.median(blocked) < SAVE_OVERHEAD * pause
