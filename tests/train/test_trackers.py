# SPDX-License-Identifier: Apache-2.0
"""Metrics: windows add up, files are cut back on resume, trackers receive what is logged."""

import json
import math

import pytest

from sqzjax.errors import ConfigError
from train import trackers
from train.metrics import Window
from train.progress import Progress, summary


def step_metrics(total, weight, norm=1.0, in_row=0):
    return {
        "loss": (total, weight),
        "accuracy": (weight / 2, weight),
        "grad_norm": norm,
        "learning_rate": 0.1,
        "rejected": in_row,
        "rejected_in_row": in_row,
    }


def test_window_divides_sums_once():
    """The mean over tokens, not the mean of step means; rejected steps only count."""
    window = Window()
    window.add(step_metrics(10.0, 2.0, norm=1.0))
    window.add(step_metrics(1.0, 8.0, norm=3.0))
    window.add(step_metrics(math.nan, 5.0, norm=math.nan, in_row=1))
    assert window.close() == {
        "train/loss": 1.1,
        "train/accuracy": 0.5,
        "train/grad_norm": 2.0,
        "train/learning_rate": 0.1,
        "train/rejected_steps": 1.0,
    }


def test_window_goes_through_json():
    whole, first = Window(), Window()
    for window in (whole, first):
        window.add(step_metrics(0.1, 3.0))
    second = Window(json.loads(json.dumps(first.state)))
    for window in (whole, second):
        window.add(step_metrics(0.2, 7.0))
    assert whole.close() == second.close()


def test_json_lines_append_and_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = trackers.JsonLines(path)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": step / 2})
    tracker.log(3, {"eval/held_out/loss": math.inf})
    tracker.close()
    with path.open("a") as file:
        file.write('{"step": 1, "train/lo')  # a kill in the middle of a line
    assert trackers.truncate(path, 3) == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1] == {"step": 3, "eval/held_out/loss": None}
    assert trackers.truncate(path, 1) == 3
    assert path.read_text() == '{"step": 1, "train/loss": 0.5}\n'
    assert trackers.truncate(path, 1) == 0
    assert trackers.truncate(tmp_path / "absent", 1) == 0


def test_evaluations_reach_the_disk_before_the_checkpoint_of_their_step(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(trackers.os, "fsync", synced.append)
    tracker = trackers.JsonLines(tmp_path / "metrics.jsonl")
    tracker.log(1, {"train/loss": 1.0})
    assert not synced
    tracker.log(1, {"eval/held_out/loss": 1.0})
    assert len(synced) == 1
    tracker.close()


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboardX")
    opened = trackers.open_trackers(("tensorboard",), tmp_path, 0, {})
    with trackers.closing(opened):
        for tracker in opened:
            tracker.log(1, {"train/loss": 2.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 2.5


def test_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"install sqzjax\[wandb\]"):
        trackers.open_trackers(("wandb",), tmp_path, 0, {})


def test_progress_off_and_on_a_terminal(caplog, capsys):
    metrics = {"train/loss": 1.25, "throughput/tokens_per_second": 12345.0, "time": 1.0}
    assert summary(metrics) == "loss 1.2500, 12,345 tokens/s"
    caplog.set_level("INFO", logger="train.progress")
    with Progress(0, 10, terminal=False) as progress:
        progress.advance(5)
        progress.report(5, metrics)
    assert caplog.messages == ["step 5/10: loss 1.2500, 12,345 tokens/s"]
    with Progress(0, 10, terminal=True) as progress:
        progress.advance(10)
        progress.report(10, metrics)
        progress.report(10, {"eval/held_out/loss": 2.0})
    shown = capsys.readouterr().err
    assert "held-out loss 2.0000" in shown and "10/10" in shown
