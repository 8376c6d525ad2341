# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

import os

import pytest

from sqzjax.io import atomic


def test_a_file_is_replaced_whole_and_after_it_reached_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.txt"
    atomic.write_text(path, "old")
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (events.append(n), f(*a))[1])
    atomic.write_text(path, "né")
    assert events == ["fsync", "replace"]
    assert path.read_text(encoding="utf-8") == "né"
    assert [one.name for one in path.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(RuntimeError), atomic.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
