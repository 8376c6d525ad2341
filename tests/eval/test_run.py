# SPDX-License-Identifier: Apache-2.0
"""Whole evaluations of a tiny model: results, report, failures, exit codes, configurations."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from eval import report, run, summary
from eval.config import EvalConfig
from sqzjax import config as configs
from sqzjax.errors import ConfigError
from tests.eval.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]


class Checker(HTMLParser):
    """Follows the nesting of tags and collects text and what would be fetched."""

    VOID = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self, page):
        super().__init__()
        self.stack, self.text, self.tags, self.fetched = [], [], set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text("A short story.<sep>Another <b>short</b> story.")
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(3)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad.jsonl").write_text('{"question": "?"}\n')
    return {"folder": folder, "model": str(tiny_folder)}


def config(inputs, tasks, **options) -> EvalConfig:
    models = [
        {"name": "first", "path": inputs["model"]},
        {"name": "<second>", "path": inputs["model"], "cache": {"kind": "dense"}},
    ]
    return configs.load(EvalConfig, {"models": models, "tasks": tasks, "batch_size": 4} | options)


@pytest.fixture(scope="module")
def evaluated(inputs, tmp_path_factory):
    """One evaluation with every kind of task that runs quickly, and one that fails."""
    folder, sampling = inputs["folder"], {"max_new_tokens": 4}
    tasks = [
        {"kind": "perplexity", "data": f"{folder}/text.txt", "separator": "<sep>", "context": 16},
        {"kind": "generation", "name": "bad", "data": f"{folder}/bad.jsonl"},
        {"kind": "generation", "name": "sums", "data": f"{folder}/q.jsonl", "sampling": sampling},
        {"kind": "samples", "prompts": ["<script>alert(1)</script>"], "sampling": sampling},
        {"kind": "needle", "lengths": [90], "depths": [0, 1], "samples": 1, "alternatives": 2},
        {"kind": "training_curve"},
    ]
    workdir = tmp_path_factory.mktemp("work") / "deep"
    code = run.run(config(inputs, tasks, title="A & B"), workdir=workdir)
    return code, workdir, json.loads((workdir / "results.json").read_text())


def test_a_failing_task_costs_nothing_but_itself(evaluated):
    code, _, document = evaluated
    assert code == 1
    status = {(r["task"], r["model"]): r["status"] for r in document["results"]}
    assert status.pop(("bad", "first")) == status.pop(("bad", "<second>")) == "failed"
    assert status.pop(("training", "first")) == status.pop(("training", "<second>")) == "skipped"
    assert set(status.values()) == {"ok"} and len(status) == 8
    (failure, _) = run.failures(document)
    assert "no answer field 'answer'" in failure and "line 1" in failure


def test_results_say_how_they_were_made(evaluated):
    _, workdir, document = evaluated
    assert document["versions"]["jax"] and document["device"]["platform"] == "cpu"
    assert document["config"]["batch_size"] == 4
    perplexity = next(r for r in document["results"] if r["kind"] == "perplexity")
    assert perplexity["settings"]["separator"] == "<sep>"
    assert (perplexity["metrics"]["context"], perplexity["metrics"]["stride"]) == (16, 16)
    assert perplexity["metrics"]["documents"] == 2 and perplexity["metrics"]["bos"] == "no"
    assert (workdir / "samples_sums_first.jsonl").is_file()


def test_cache_and_plain_columns_agree(evaluated):
    _, _, document = evaluated
    by_task = {}
    for result in document["results"]:
        if result["status"] == "ok":
            by_task.setdefault(result["task"], []).append(result["metrics"])
    one, two = by_task["perplexity_text"]
    assert one["nll"] == pytest.approx(two["nll"], rel=1e-5)
    assert by_task["samples"][0] == by_task["samples"][1]


def test_report_is_one_escaped_self_contained_page(evaluated):
    _, workdir, document = evaluated
    page = (workdir / "report.html").read_text()
    checked = Checker(page)
    assert checked.stack == [] and checked.fetched == []
    assert "script" not in checked.tags and "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    text = " ".join("".join(checked.text).split())
    for expected in ("A & B", "<second>", "<script>alert(1)</script>", "What failed", "Needle"):
        assert expected in text
    assert f"{document['results'][0]['metrics']['perplexity']:,.3f}" in text
    assert page.count("<svg") == 5
    # Figures share one page: their element ids must not clash.
    assert len(set(re.findall(r'<clipPath id="([^"]+)"', page))) == page.count("<clipPath ")


def test_summary_names_every_task(evaluated, capsys):
    _, workdir, document = evaluated
    summary.show(document, workdir)
    out = capsys.readouterr().out
    assert "perplexity_text" in out and "failed: bad on first" in out and "report.html" in out


def test_summary_of_many_models_has_a_line_for_each(tmp_path, capsys):
    names = [f"model [{i}]" for i in range(30)]
    metrics = {"accuracy": 0.5, "interval_95": [0.4, 0.6]}
    result = {"task": "sums", "kind": "problems", "status": "ok", "metrics": metrics}
    document = {
        "title": "Many",
        "models": [{"name": name} for name in names],
        "results": [{**result, "model": name} for name in names[:-1]],
    }
    summary.show(document, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "model [" in line]
    assert len(lines) == 30 and "not loaded" in lines[-1]
    for name, line in zip(names[:-1], lines, strict=False):
        assert name in line and "50.0% (40.0% to 60.0%)" in line


def full_document(evaluated) -> dict:
    """The document with kinds of results that are too slow to make here."""
    _, _, document = evaluated
    document = json.loads(json.dumps(document))
    series = {
        "train/loss": [[i, 5 / (i + 1)] for i in range(50)],
        "eval/held_out/loss": [[10, 2.0], [40, 1.0]],
    }
    curve = {
        "series": series,
        "steps": 49,
        "final": {"train/loss": 0.1, "eval/held_out/loss": 1.0},
        "best": {"eval/held_out/loss": 1.0},
        "tokens_per_second": None,
        "baselines": {"unigram": {"nll": 3.0, "perplexity": 20.1}},
    }
    harness = {"metrics": {"local": {"acc": {"value": 0.25, "stderr": 0.1}}}}
    row = {"model": "m", "batch": 1, "tokens_per_second": 12.5, "ttft_ms": 1.0, "tpot_ms": None}
    machine = {"name": "cpu", "bandwidth": 1e10, "peak_flops": 1e11, "source": "measured"}
    speed = {"hardware": machine, "decode": [row], "training": [], "transformers": []}
    for kind, metrics in (("training_curve", curve), ("lm_eval", harness), ("speed", speed)):
        document["results"].append(
            {
                "task": kind,
                "kind": kind,
                "model": "" if kind == "speed" else "first",
                "status": "ok",
                "seconds": 1.0,
                "settings": {},
                "metrics": metrics,
            }
        )
    document["models"].append({"name": "third", "source": "nowhere", "error": "CheckpointError: x"})
    return document


def test_report_of_every_kind_of_result(evaluated):
    checked = Checker(report.render(full_document(evaluated)))
    assert checked.stack == [] and checked.fetched == []
    text = " ".join("".join(checked.text).split())
    for expected in ("Training", "lm-eval", "± 0.1000", "Greedy decoding", "12.5", "Loading third"):
        assert expected in text


def test_report_without_matplotlib_keeps_its_numbers(evaluated, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    page = report.render(full_document(evaluated))
    assert "matplotlib is not installed" in page and "<svg" not in page
    assert "0.2500" in page


def test_a_model_that_does_not_load_does_not_stop_the_others(inputs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    models = [{"name": "broken", "path": str(empty)}, {"name": "good", "path": inputs["model"]}]
    tasks = [{"kind": "perplexity", "data": f"{inputs['folder']}/text.txt", "context": 16}]
    settings = configs.load(EvalConfig, {"models": models, "tasks": tasks})
    assert run.run(settings, workdir=tmp_path / "out") == 1
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert "no weights" in document["models"][0]["error"]
    assert [(r["model"], r["status"]) for r in document["results"]] == [("good", "ok")]


def test_held_out_documents_and_baselines_of_a_run(inputs, tmp_path, tiny_folder):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "run/export")
    np.savez(tmp_path / "run/heldout.npz", tokens=np.arange(40), offsets=np.array([0, 15, 40]))
    (tmp_path / "run/baselines.json").write_text('{"unigram": {"nll": 2.5}, "bigram": {"nll": 2}}')
    models = [{"name": "run", "path": str(tmp_path / "run")}, {"path": inputs["model"]}]
    tasks = [{"kind": "perplexity", "name": "held_out", "data": "heldout"}]
    settings = configs.load(EvalConfig, {"models": models, "tasks": tasks})
    assert run.run(settings, workdir=tmp_path / "out") == 0
    document = json.loads((tmp_path / "out/results.json").read_text())
    result, skipped = document["results"]
    assert result["metrics"]["tokens"] == 38
    assert set(result["metrics"]["baselines"]) == {"unigram", "bigram"}
    assert skipped["status"] == "skipped"
    assert "unigram" in (tmp_path / "out/report.html").read_text()


def test_missing_inputs_are_all_listed_before_anything_runs(inputs, tmp_path):
    models = [{"name": "a", "path": str(tmp_path / "gone")}, {"name": "b", "path": inputs["model"]}]
    shots = {"data": str(tmp_path / "shots.jsonl")}
    tasks = [
        {"kind": "perplexity", "data": str(tmp_path / "gone.txt")},
        {"kind": "generation", "data": f"{inputs['folder']}/q.jsonl", "few_shot": shots},
        {"kind": "needle", "filler": str(tmp_path / "filler.txt")},
    ]
    settings = configs.load(EvalConfig, {"models": models, "tasks": tasks})
    with pytest.raises(ConfigError) as caught:
        run.run(settings, workdir=tmp_path / "out")
    found = [problem.split(":")[0] for problem in caught.value.problems]
    assert found == ["models.0.path", "tasks.0.data", "tasks.1.few_shot.data", "tasks.2.filler"]
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(inputs, tmp_path, capsys):
    tasks = [{"kind": "perplexity", "data": str(tmp_path / "gone.txt")}]
    assert run.run(config(inputs, tasks), workdir=tmp_path / "out", dry_run=True) == 0
    out = capsys.readouterr().out
    printed = "\n".join(line for line in out.splitlines() if not line.startswith("# "))
    import yaml

    assert configs.load(EvalConfig, yaml.safe_load(printed)) == config(inputs, tasks)
    assert f"{TINY.num_params:,} parameters" in out
    assert "not found yet: tasks.0.data" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "models"),
        ({"tasks": []}, "tasks"),
        ({"batch_size": 0}, "batch_size"),
        ({"tasks": [{"kind": "perplexity", "data": "x", "stride": 9, "context": 8}]}, "stride=9"),
        ({"tasks": [{"kind": "perplexty", "data": "x"}]}, "perplexity"),
        ({"tasks": [{"kind": "samples", "prompts": []}]}, "prompts"),
        ({"tasks": [{"kind": "samples"}]}, "prompts"),
        ({"tasks": [{"kind": "training_curve"}] * 2}, "used twice"),
        ({"models": [{"path": ""}]}, "path"),
        ({"models": [{"path": "a"}, {"path": "b/a"}]}, "used twice"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    good = {"models": [{"path": "m"}], "tasks": [{"kind": "training_curve"}]}
    configs.load(EvalConfig, good)
    with pytest.raises(ConfigError, match=message):
        configs.load(EvalConfig, good | change)


@pytest.mark.parametrize("name", ["demo", "perplexity", "needle", "gsm8k"])
def test_shipped_configurations_survive_a_round_trip(name):
    loaded = configs.load(EvalConfig, ROOT / f"configs/eval/{name}.yaml")
    import yaml

    assert configs.load(EvalConfig, yaml.safe_load(configs.dump(loaded))) == loaded
    assert run.run(loaded, workdir=Path("unused"), dry_run=True) == 0


def test_progress_is_logged_now_and_then(caplog):
    ticker = run.Ticker("task", interval=0.0)
    with caplog.at_level("INFO", logger="eval.run"):
        ticker(3)
        ticker(4)
    assert [record.getMessage() for record in caplog.records] == [
        "task: 3 requests done",
        "task: 7 requests done",
    ]
