# SPDX-License-Identifier: Apache-2.0
"""Damaged files and full disks: everything is detected, named and survived; nothing is deleted."""

import logging
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io import manifest
from sqzjax.io.checkpoint import Checkpointer, restore_params
from sqzjax.io.lock import check_writable
from tests.faults.checkpoint_toy import abstract, digest, init_state, train_step


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Folder with steps 1 and 2, and the items of both."""
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    first = init_state()
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, first, {})
        second = train_step(init_state())
        checkpointer.save(2, second, {})
    return folder, first, second


@pytest.fixture
def damaged(pristine, tmp_path):
    """A copy of `pristine` to be damaged."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(pristine[0], folder)
    return folder


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _require_fallback(folder, path, pristine, caplog):
    """Require that damage at `path` of step 2 is named and that step 1 comes back exactly."""
    caplog.clear()
    checkpointer = Checkpointer(folder)
    restored = checkpointer.restore(None, abstract(pristine[1]))
    if path.name == manifest.NAME and not path.exists():
        assert checkpointer.steps() == [1]  # as if the save had been killed
    else:
        assert str(path) in caplog.text and "damaged" in caplog.text
        assert (folder / "2").exists()
    assert restored.step == 1 and digest(restored.items) == digest(pristine[1])


def test_undamaged_copy_restores_newest(pristine, damaged, caplog):
    restored = Checkpointer(damaged).restore(None, abstract(pristine[2]))
    assert restored.step == 2 and digest(restored.items) == digest(pristine[2])
    assert "damaged" not in caplog.text


def test_hundred_bit_flips_are_all_detected(pristine, damaged, caplog):
    """Case 4; every file gets its share, the manifest included."""
    random = np.random.default_rng(0)
    files = _files(damaged / "2")
    for trial in range(100):
        path = files[trial % len(files)]
        original = path.read_bytes()
        content = bytearray(original)
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(content)
        problems = manifest.verify(damaged / "2")
        assert len(problems) == 1 and str(path) in problems[0]
        if trial < 2 * len(files):
            _require_fallback(damaged, path, pristine, caplog)
        path.write_bytes(original)
    assert not manifest.verify(damaged / "2")


@pytest.mark.parametrize("kind", ["empty", "one byte", "half", "99 %", "longer", "deleted"])
def test_truncation_extension_and_deletion_of_each_file(pristine, damaged, caplog, kind):
    """Case 5."""
    for path in _files(damaged / "2"):
        original = path.read_bytes()
        length = len(original)
        sizes = {"empty": 0, "one byte": 1, "half": length // 2, "99 %": length * 99 // 100}
        if kind == "deleted":
            path.unlink()
        else:
            path.write_bytes(original[: sizes[kind]] if kind in sizes else original + b"\0")
        _require_fallback(damaged, path, pristine, caplog)
        path.write_bytes(original)


def test_file_that_does_not_belong_is_named(pristine, damaged, caplog):
    path = damaged / "2" / "params" / "extra"
    path.write_text("x")
    _require_fallback(damaged, path, pristine, caplog)


def test_all_steps_damaged_is_one_error_and_deletes_nothing(pristine, damaged):
    paths = [damaged / step / "meta" / "metadata" for step in ("1", "2")]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    before = _files(damaged)
    checkpointer = Checkpointer(damaged)
    for call in (checkpointer.latest_good, lambda: checkpointer.restore(None, pristine[1])):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert all(str(path) in str(caught.value) for path in paths)
    assert _files(damaged) == before


def test_named_step_that_is_damaged_is_not_replaced_by_another(pristine, damaged):
    path = damaged / "2" / "meta" / "metadata"
    path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="metadata"):
        Checkpointer(damaged).restore(2, pristine[1])


def test_params_survive_damage_to_other_items(pristine, damaged):
    next((damaged / "2" / "opt_state").rglob("manifest.ocdbt")).unlink()
    restored = restore_params(damaged)
    assert restored.step == 2 and digest(restored.items) == digest(pristine[2]["params"])


def test_training_goes_on_after_falling_back(pristine, damaged):
    path = damaged / "2" / "meta" / "metadata"
    path.write_bytes(b"{}")
    with Checkpointer(damaged, keep=1) as checkpointer:
        items = checkpointer.restore(None, abstract(pristine[1])).items
        checkpointer.save(2, items, {})
        assert checkpointer.wait() and checkpointer.latest_good() == 2
    assert (damaged / "2.abandoned" / "meta" / "metadata").read_bytes() == b"{}"


# Full disks.


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_training_survives_a_full_disk(small_disk, caplog):
    """Case 6 on a real file system that runs full and gets space back."""
    items = init_state()
    caplog.set_level(logging.WARNING)
    with Checkpointer(small_disk / "c", on_error="warn", warn_interval=3600.0) as checkpointer:
        checkpointer.save(1, items, {})
        assert checkpointer.wait()
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space"), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for step in (2, 3, 4):
            checkpointer.save(step, items, {})
            assert not checkpointer.wait()
            assert checkpointer.latest_good() == 1
            assert {path.name for path in (small_disk / "c").iterdir()} == {"1", ".lock"}
        messages = [record.getMessage() for record in caplog.records if record.name != "absl"]
        assert len(messages) == 1 and "saving step 2" in messages[0]
        ballast.unlink()
        checkpointer.save(5, items, {})
        assert checkpointer.wait() and checkpointer.steps() == [1, 5]
        assert digest(checkpointer.restore(None, abstract(items)).items) == digest(items)


_LIMITED = """
import resource, signal, sys
import jax.numpy as jnp
from sqzjax.io.checkpoint import Checkpointer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail with EFBIG
small, large = ({"params": {"w": jnp.ones(size)}} for size in (4, 1 << 20))
checkpointer = Checkpointer(sys.argv[1], on_error="warn")
checkpointer.save(1, small, {})
assert checkpointer.wait()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
checkpointer.save(2, large, {})
assert not checkpointer.wait() and checkpointer.latest_good() == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
checkpointer.save(3, large, {})
checkpointer.close()
assert checkpointer.steps() == [1, 3], checkpointer.steps()
"""


def test_write_errors_of_the_kernel_are_survived(tmp_path):
    """The same without root: a limit on file size makes every larger write fail."""
    result = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("saving step 2") == 1


def test_read_only_folder_is_refused_before_work(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match="not writable"):
        check_writable(small_disk / "run")
    with pytest.raises(ConfigError, match="not writable"):
        Checkpointer(small_disk / "run").save(1, {"params": {"w": jnp.zeros(1)}}, {})


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not writable"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "new" / "run")
    assert os.listdir(tmp_path / "new" / "run") == []
