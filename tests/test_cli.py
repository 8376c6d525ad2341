# SPDX-License-Identifier: Apache-2.0
"""The command line of `train` and `eval`: flags, exit codes, and that nothing heavy is imported."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from sqzjax import cli
from sqzjax.errors import CheckpointError, ConfigError, DataError, RequestError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A schema with a folder of its own."""

    steps: int = 3
    workdir: str = "runs/job"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A second schema, told apart by `kind`."""

    kind: str = "timing"
    repeats: int = 1


@pytest.fixture
def program(monkeypatch):
    """A program whose two commands record how they were called."""
    module = types.ModuleType("fake_job")
    calls: list[tuple] = []

    def run(config, *, workdir, dry_run, resume):
        calls.append((config, workdir, dry_run, resume))
        return cli.EXIT_PREEMPTED

    def measure(config, *, workdir, dry_run, resume):
        calls.append((config, workdir, dry_run, resume))
        return cli.EXIT_OK

    def plan(config, *, topology):
        calls.append((config, topology))
        return cli.EXIT_OK

    vars(module).update(Job=Job, Timing=Timing, run=run, measure=measure, plan=plan, calls=calls)
    monkeypatch.setitem(sys.modules, "fake_job", module)
    commands = {
        "": cli.Command(schema="fake_job:Job", run="fake_job:run", plan="fake_job:plan"),
        "timing": cli.Command(schema="fake_job:Timing", run="fake_job:measure"),
    }
    return cli.Program(
        name="job", summary="Do it.", commands=commands, example="python -m job", resumable=True
    ), module


@pytest.fixture
def config_file(tmp_path):
    """A config for `Job` in an otherwise empty folder."""
    path = tmp_path / "quick.yaml"
    path.write_text("steps: 5\n")
    return path


def test_the_config_flags_and_overrides_reach_the_command(program, config_file):
    main, module = program
    arguments = [str(config_file), "--resume", "7", "steps=9", "--workdir", "w", "--dry-run"]
    assert cli.main(main, arguments) == 75
    assert module.calls == [(Job(steps=9), Path("w"), True, "7")]


def test_defaults(program, config_file):
    main, module = program
    cli.main(main, [str(config_file)])
    assert module.calls == [(Job(steps=5), Path("runs/job"), False, "auto")]


def test_a_top_level_kind_picks_the_command_and_the_file_names_the_folder(program, tmp_path):
    main, module = program
    (tmp_path / "kind.yaml").write_text("kind: timing\n")
    (tmp_path / "fast.yaml").write_text("base: kind.yaml\nrepeats: 4\n")
    assert cli.main(main, [str(tmp_path / "fast.yaml")]) == 0
    assert module.calls == [(Timing(repeats=4), Path("runs/fast"), False, "auto")]


def test_a_dry_run_for_a_topology_is_the_commands_plan(program, config_file):
    main, module = program
    arguments = [str(config_file), "--dry-run", "--topology", "v5p:4x4x4", "steps=9"]
    assert cli.main(main, arguments) == 0
    assert module.calls == [(Job(steps=9), "v5p:4x4x4")]


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [("steps: 5", [], "add --dry-run"), ("kind: timing", ["--dry-run"], "has no such plan")],
)
def test_a_topology_without_a_plan_is_bad_usage(program, tmp_path, capsys, text, flags, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert cli.main(program[0], [str(path), "--topology", "v5e:2x2", *flags]) == 2
    assert message in capsys.readouterr().err and not program[1].calls


@pytest.mark.parametrize(
    "arguments",
    [["FILE", "--resume", "latest"], ["FILE", "--resume", "-1"], ["FILE", "--colour"], ["-n"]],
)
def test_bad_usage_exits_with_2(program, config_file, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(program[0], [a.replace("FILE", str(config_file)) for a in arguments])
    assert caught.value.code == 2
    assert not program[1].calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no CONFIG given"),
        (["steps=3"], "CONFIG must come before"),
        (["FILE", "steps=0.5", "stps=1"], "2 problems"),
        (["FILE", "other.yaml"], "key.sub=value"),
    ],
)
def test_bad_configs_exit_with_2(program, config_file, capsys, arguments, message):
    arguments = [a.replace("FILE", str(config_file)) for a in arguments]
    assert cli.main(program[0], arguments) == 2
    assert message in capsys.readouterr().err
    assert not program[1].calls


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["a: one", "b: two"]), 2),
        (DataError("broken file"), 1),
        (CheckpointError("damaged"), 1),
        (RequestError("too long"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_user_errors_during_a_run_have_no_traceback(program, config_file, capsys, error, code):
    def fail(config, **_):
        raise error

    program[1].run = fail
    assert cli.main(program[0], [str(config_file)]) == code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    for text in getattr(error, "problems", [str(error)]):
        assert text in shown


def test_bugs_keep_their_traceback(program, config_file):
    def fail(config, **_):
        raise ZeroDivisionError("a bug")

    program[1].run = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(program[0], [str(config_file)])


def test_schema_lists_every_key_of_every_command(program, capsys):
    assert cli.main(program[0], ["--schema"]) == 0
    shown = capsys.readouterr().out
    assert "steps: an integer (default 3)" in shown
    assert "repeats: an integer (default 1)" in shown


_SELF = """
import os, sys
from sqzjax import cli
cli.main = lambda program: print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], program) or 7
print("started")
sys.stdout.flush()
cli.start("PROGRAM")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
@pytest.mark.parametrize(
    ("told", "starts", "seen"),
    [(None, 2, "glibc.malloc.hugetlb=1"), ("a=1", 1, "a=1")],
)
def test_a_process_starts_again_with_huge_pages_unless_told_otherwise(told, starts, seen, tmp_path):
    (tmp_path / "program.py").write_text(_SELF)
    told = {} if told is None else {"GLIBC_TUNABLES": told}
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | told
    command = [sys.executable, "-m", "program", "x y.yaml", "a.b=[1, 2]"]
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wanted = ["started"] * starts + [f"{seen} ['x y.yaml', 'a.b=[1, 2]'] PROGRAM"]
    assert (done.returncode, done.stdout.splitlines()) == (7, wanted), done.stderr


_IMPORTS = """
import sys, time
start = time.perf_counter()
from {name}.__main__ import PROGRAM
from sqzjax.cli import main
try:
    main(PROGRAM, ["--help"])
except SystemExit as end:
    assert end.code == 0
seconds = time.perf_counter() - start
heavy = sorted({{"jax", "pydantic", "numpy", "yaml", "flax"}} & set(sys.modules))
print("HEAVY", heavy, seconds, file=sys.stderr)
"""


@pytest.mark.parametrize("name", ["train", "eval"])
def test_help_is_quick_and_complete(name):
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        command = [sys.executable, "-m", name, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.5, seconds
    for text in ("usage:", "--dry-run", "--workdir", "exit codes", "--schema", f"{name}.config"):
        assert text in done.stdout
    assert ("--resume" in done.stdout) == (name == "train")


@pytest.mark.parametrize("name", ["train", "eval"])
def test_help_imports_nothing_heavy(name):
    command = [sys.executable, "-c", _IMPORTS.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stderr


@pytest.mark.parametrize("name", ["train", "eval"])
def test_checking_a_config_does_not_import_jax(name):
    if importlib.util.find_spec(f"{name}.config") is None:
        pytest.skip(f"this checkout has no {name}.config")
    code = (
        f"import sys; from {name}.__main__ import PROGRAM; from sqzjax.cli import main; "
        "code = main(PROGRAM, ['pyproject.toml']); sys.exit(10 * ('jax' in sys.modules) + code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 2, done.stderr


_CONFIGS = sorted([*ROOT.glob("configs/train/**/*.y*ml"), *ROOT.glob("configs/eval/**/*.y*ml")])


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_file_dry_runs_and_writes_nothing(path, tmp_path, capsys):
    name = path.relative_to(ROOT).parts[1]
    program = importlib.import_module(f"{name}.__main__").PROGRAM
    workdir = tmp_path / "work"
    code = cli.main(program, [str(path), "--dry-run", "--workdir", str(workdir)])
    out, error = capsys.readouterr()
    assert not list(tmp_path.iterdir())
    earlier = re.search(r"^[^#]*path: (runs/\w+/export|MODEL)", path.read_text(), re.MULTILINE)
    if earlier and not (ROOT / earlier[1]).exists():  # for a model, or of a run, that is not there
        assert code == 1 and f"{earlier[1]} is not a folder" in error
    else:
        assert code == 0 and out.strip()
