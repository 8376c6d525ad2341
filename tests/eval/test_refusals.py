# SPDX-License-Identifier: Apache-2.0
"""What an evaluation refuses, and how: before any work, in one line, leaving no half file."""

import errno
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from eval import __main__ as evaluation
from eval import models
from sqzjax import cli
from sqzjax.io import atomic
from tests.eval.conftest import TINY
from train import __main__ as training

ROOT = Path(__file__).resolve().parents[2]
QUICK = [
    "configs/eval/cache_bytes.yaml",
    "configs/eval/arm_vs_dlm.yaml",
    "configs/eval/scaling_published.yaml",
]


def _never(*_, **__):
    raise AssertionError("a model was loaded")


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Evaluate settings as the command line does; return the exit code and what it said."""

    def start(settings, *arguments):
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(settings))
        code = cli.main(evaluation.PROGRAM, [str(path), *arguments])
        out, error = capsys.readouterr()
        return code, out, error

    return start


def _settings(folder, context=16, **options):
    (folder / "text.txt").write_text("A short story about a long context.")
    task = {"kind": "perplexity", "data": str(folder / "text.txt"), "context": context}
    return {"tasks": [task], **options}


@pytest.fixture
def leaderboard(tmp_path, tiny_folder):
    """A comparison of caches that would run."""
    (task,) = _settings(tmp_path)["tasks"]
    return {
        "kind": "kv_leaderboard",
        "model": {"path": str(tiny_folder)},
        "caches": [{"cache": {"kind": "dense"}}],
        "perplexity": [task],
        "speed": None,
    }


@pytest.mark.parametrize("program", [evaluation.PROGRAM, training.PROGRAM], ids=lambda p: p.name)
@pytest.mark.parametrize("workdir", ["", " "])
def test_an_empty_workdir_is_bad_usage(program, workdir, capsys):
    config = ROOT / f"configs/{program.name}/demo.yaml"
    with pytest.raises(SystemExit) as caught:
        cli.main(program, [str(config), "--dry-run", "--workdir", workdir])
    assert caught.value.code == cli.EXIT_CONFIG
    assert "must name a folder" in capsys.readouterr().err


@pytest.mark.parametrize("config", QUICK)
def test_a_workdir_that_cannot_be_one_is_refused_in_one_line(config, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", Path("/proc/foo")):
        code = cli.main(evaluation.PROGRAM, [str(ROOT / config), "--workdir", str(folder)])
        error = capsys.readouterr().err
        assert code == cli.EXIT_CONFIG
        assert f"folder {folder} is not writable (" in error and "choose another folder" in error
    assert (tmp_path / "file").read_text() == "kept"


def test_a_model_is_not_loaded_for_a_workdir_that_cannot_be_one(
    evaluate, leaderboard, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load", _never)
    ordinary = _settings(tmp_path, models=[{"path": str(tiny_folder)}])
    for settings in (ordinary, leaderboard):
        code, _, error = evaluate(settings, "--workdir", str(tmp_path / "text.txt"))
        assert code == cli.EXIT_CONFIG and "is not writable" in error


def _fill_the_disk(monkeypatch, name):
    """Let writes of files with this name stop half way, as on a full disk."""
    write = Path.write_text

    def half(path, text, **options):
        if name not in path.name:
            return write(path, text, **options)
        write(path, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", half)


def test_a_full_disk_leaves_no_half_page_and_one_line(evaluate, tiny_folder, tmp_path, monkeypatch):
    workdir = tmp_path / "work"
    workdir.mkdir()
    (workdir / "report.html").write_text("the page before")
    _fill_the_disk(monkeypatch, "report.html")
    settings = _settings(tmp_path, models=[{"path": str(tiny_folder)}])
    code, _, error = evaluate(settings, "--workdir", str(workdir))
    assert code == cli.EXIT_FAILED
    assert f"error: cannot use {workdir / 'report.html'} (No space left on device)" in error
    assert "choose another --workdir" in error and "Traceback" not in error
    assert (workdir / "report.html").read_text() == "the page before"
    assert {path.name for path in workdir.iterdir()} == {"report.html", "results.json"}


@pytest.mark.parametrize(
    ("config", "name"),
    list(zip(QUICK, ["cache_bytes.md", "report.html", "table.md"], strict=True)),
)
def test_every_report_is_replaced_as_a_whole(config, name, tmp_path, capsys, monkeypatch):
    _fill_the_disk(monkeypatch, name)
    assert cli.main(evaluation.PROGRAM, [str(ROOT / config), "--workdir", str(tmp_path)]) == 1
    assert f"cannot use {tmp_path / name} (" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_other_errors_of_the_system_keep_their_traceback(evaluate, leaderboard, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOTDIR, "Not a directory", "a fault here")

    monkeypatch.setattr("eval.kv_leaderboard.run_kv_leaderboard", fail)
    with pytest.raises(NotADirectoryError):
        evaluate(leaderboard)


def test_a_failed_write_names_the_file_that_was_meant(tmp_path, monkeypatch):
    _fill_the_disk(monkeypatch, "x.json")
    with pytest.raises(OSError, match=r"x\.json") as caught:
        atomic.write_text(tmp_path / "x.json", "long text")
    assert caught.value.filename == str(tmp_path / "x.json") and not list(tmp_path.iterdir())


def test_a_context_beyond_the_model_is_refused_before_it_is_loaded(
    evaluate, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load", _never)
    settings = _settings(tmp_path, 100_000, models=[{"path": str(tiny_folder), "name": "toy"}])
    workdir = tmp_path / "work"
    code, _, error = evaluate(settings, "--workdir", str(workdir))
    said = f"tasks.0.context=100000 exceeds max_positions={TINY.max_positions} of model 'toy'"
    assert code == cli.EXIT_CONFIG and said in error and not workdir.exists()
    code, out, _ = evaluate(settings, "--dry-run")
    assert code == cli.EXIT_OK and f"# {said}" in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"path": "not/there"}}, "model.path: no such folder 'not/there'"),
        (
            {"perplexity": [{"kind": "perplexity", "data": "not/there.txt"}]},
            "perplexity.0.data: no such file 'not/there.txt'",
        ),
        (
            {"retrieval": [{"kind": "needle", "filler": "not/there.txt"}]},
            "retrieval.0.filler: no such file 'not/there.txt'",
        ),
        (
            {"caches": [{"cache": {"kind": "kvquant", "bits": 3, "calibration": "not/there"}}]},
            "no such calibration file 'not/there'",
        ),
        ({"context": 2048}, "context=2048 exceeds max_positions=128"),
    ],
)
def test_a_comparison_of_caches_tells_up_front_what_is_missing(
    evaluate, leaderboard, tmp_path, monkeypatch, change, said
):
    monkeypatch.setattr(models, "load", _never)
    workdir = tmp_path / "work"
    code, out, _ = evaluate(leaderboard | change, "--workdir", str(workdir), "--dry-run")
    comments = [line for line in out.splitlines() if line.startswith("# ")]
    assert code == cli.EXIT_OK and len(comments) == 1 and said in comments[0]
    code, _, error = evaluate(leaderboard | change, "--workdir", str(workdir))
    assert code == cli.EXIT_CONFIG and said in error and "models.0" not in error
    assert not workdir.exists()


def _commands(text):
    lines = re.findall(r"^python -m eval .*$", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line, comments=True)[3:] for line in lines]


@pytest.mark.parametrize(
    "arguments", _commands((ROOT / "README.md").read_text()), ids=lambda words: words[0]
)
def test_commands_printed_in_the_readme_miss_nothing_but_their_model(
    arguments, tmp_path, capsys, monkeypatch
):
    """Whatever a printed command reads is either given in it or made by the one above it."""
    monkeypatch.chdir(ROOT)
    flags = [] if "--workdir" in arguments else ["--workdir", str(tmp_path)]
    assert cli.main(evaluation.PROGRAM, [*arguments, "--dry-run", *flags]) == cli.EXIT_OK
    missing = [line for line in capsys.readouterr().out.splitlines() if "not found yet" in line]
    made_above = ("runs/", "'FOLDER'")
    assert all(any(name in line for name in made_above) for line in missing), missing
