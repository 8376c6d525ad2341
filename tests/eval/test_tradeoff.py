# SPDX-License-Identifier: Apache-2.0
"""Records of accuracy against speed: what is kept, means over seeds, the table, the figure."""

import json

import pytest

from eval import tradeoff


def result(model, accuracy, passes, seconds, **more):
    usage = {
        "mean_tokens": 32.0,
        "tokens_per_forward": 32.0 / passes,
        "tokens_per_second": 1600.0 / seconds,
        "seconds": seconds,
        **more,
    }
    metrics = {
        "accuracy": accuracy,
        "interval_95": [accuracy - 0.1, accuracy + 0.1],
        "questions": 50,
        "usage": usage,
    }
    settings = {"problems": {"kind": "sorting"}, "count": 50, "seed": 1, "name": "sorting"}
    return {
        "model": model,
        "task": "sorting",
        "status": "ok",
        "metrics": metrics,
        "settings": settings,
    }


def document(*results):
    return {
        "created": "2026-01-01",
        "versions": {},
        "device": {},
        "title": "T",
        "results": list(results),
    }


def test_a_record_holds_accuracy_and_cost_of_every_model(tmp_path, capsys):
    found = document(
        result("teacher", 0.8, 32, 10.0), result("student, 0.9", 0.78, 4, 1.0, density=0.25)
    )
    (tmp_path / "results.json").write_text(json.dumps(found))
    arguments = [str(tmp_path / "results.json"), str(tmp_path / "record.json")]
    assert tradeoff.main(arguments) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    teacher, student = record["rows"]
    assert (teacher["passes"], teacher["milliseconds"]) == (32.0, 200.0)
    assert (student["tokens_per_forward"], student["density"]) == (8.0, 0.25)
    assert record["task"] == {"problems": {"kind": "sorting"}, "count": 50, "seed": 1}
    shown = capsys.readouterr().out
    assert "| teacher | 80.0 % | 70.0 to 90.0 | 32.0 | 1.0 | 200.0 | all |" in shown
    assert "| student, 0.9 | 78.0 % | 68.0 to 88.0 | 4.0 | 8.0 | 20.0 | 25 % |" in shown
    assert (tmp_path / "record.svg").read_text().startswith("<svg")


def test_seeds_are_put_together():
    results = [
        result(f"{method} {seed}, {level}", accuracy + seed / 100, 4, 1.0)
        for method, accuracy in (("rcd", 0.5), ("seqd", 0.4))
        for seed in range(3)
        for level in ("0.9", "0.5")
    ]
    record = tradeoff.over_seeds(tradeoff.record_of(document(*results)))
    names = [row["model"] for row in record["rows"]]
    assert names == ["rcd, 0.9", "rcd, 0.5", "seqd, 0.9", "seqd, 0.5"]
    first = record["rows"][0]
    assert (first["seeds"], first["accuracy"]) == (3, pytest.approx(0.51))
    assert first["spread"] == pytest.approx([0.5, 0.52])
    assert first["by_seed"] == pytest.approx([0.5, 0.51, 0.52])
    with pytest.raises(ValueError, match="not named"):
        tradeoff.over_seeds(tradeoff.record_of(document(result("rcd", 0.5, 4, 1.0))))


def test_results_without_costs_are_refused():
    broken = result("teacher", 0.8, 32, 10.0)
    broken["metrics"]["usage"] = None
    with pytest.raises(ValueError, match="has no costs"):
        tradeoff.record_of(document(broken))
