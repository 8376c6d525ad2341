# SPDX-License-Identifier: Apache-2.0
"""Bad configurations: every problem is listed with path, value and rule, and nothing is written."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from sqzjax import config
from sqzjax.errors import ConfigError
from tests.config_schema import Config

ROOT = Path(__file__).resolve().parents[2]
MODEL = "model: {width: 64}\n"


class Bad(NamedTuple):
    """YAML text, overrides, and for each expected problem the fragments it must contain."""

    name: str
    text: str
    expected: tuple[tuple[str, ...], ...]
    overrides: tuple[str, ...] = ()


CASES = (
    Bad("unknown key", MODEL + "step: 3", (("step: unknown key", "did you mean 'steps'"),)),
    Bad(
        "unknown nested key",
        "model: {width: 64, rope: {tetha: 1}}",
        (("model.rope.tetha: unknown key", "'theta'"),),
    ),
    Bad(
        "unknown key, nothing like it",
        MODEL + "zzz: 3",
        (("zzz: unknown key", "known: model, optimizer"),),
    ),
    Bad(
        "unknown key in a list",
        MODEL + "files: [{path: a}, {path: b, wait: 2}]",
        (("files.1.wait: unknown key", "'weight'"),),
    ),
    Bad("key of another kind", MODEL + "optimizer: {kind: lion, betas: [0, 1]}",
        (("optimizer.betas: unknown key", "known: kind, learning_rate, momentum"),)),
    Bad("missing", "{}", (("model: missing", "a section (width, heads"),)),
    Bad("missing nested", "model: {heads: 2}", (("model.width: missing", "an integer"),)),
    Bad("empty file", "", (("model: missing",),)),
    Bad("text for integer", "model: {width: '64'}", (("model.width", "text '64'", "an integer"),)),
    Bad("fraction for integer", "model: {width: 64.5}", (("model.width", "64.5", "an integer"),)),
    Bad("float for integer", MODEL + "steps: 1e2", (("steps", "100.0", "an integer"),)),
    Bad("boolean for integer", MODEL + "steps: true", (("steps", "got true", "an integer"),)),
    Bad("null for integer", MODEL + "steps:", (("steps", "got null", "an integer"),)),
    Bad("text for number", MODEL + "clip: high", (("clip", "'high'", "a number or null"),)),
    Bad("quoted number", MODEL + "clip: '1e-4'", (("clip", "text '1e-4'", "a number"),)),
    Bad("comma for point", MODEL + "clip: 0,5", (("clip", "'0,5'", "a number"),)),
    Bad("integer for text", MODEL + "name: 5", (("name", "got 5", "quotes: '5'"),)),
    Bad("1e-4 for text", MODEL + "name: 1e-4", (("name", "0.0001", "must be text"),)),
    Bad("no for boolean", "model: {width: 64, tied: no}",
        (("model.tied", "text 'no'", "only true and false"),)),
    Bad("integer for boolean", "model: {width: 64, tied: 1}",
        (("model.tied", "got 1", "true or false"),)),
    Bad("bad choice", "model: {width: 64, dtype: bf16}",
        (("model.dtype", "'bf16'", "one of float32, bfloat16", "did you mean 'bfloat16'"),)),
    Bad("bad union tag", MODEL + "optimizer: {kind: adm}",
        (("optimizer.kind", "'adm'", "one of adam, lion", "did you mean 'adam'"),)),
    Bad("union tag of a wrong type", MODEL + "optimizer: {kind: [adam]}",
        (("optimizer.kind", '["adam"]', "one of adam, lion"),)),
    Bad("scalar for section", "model: 64", (("model", "got 64", "a section (width"),)),
    Bad("list for section", "model: [64]", (("model", "got [64]", "a section (width"),)),
    Bad("scalar for list", MODEL + "seeds: 3", (("seeds", "got 3", "a list, each item an int"),)),
    Bad("bad list item", MODEL + "seeds: [1, x, 2.5]",
        (("seeds.1", "text 'x'"), ("seeds.2", "2.5", "an integer"))),
    Bad("wrong length", MODEL + "optimizer: {kind: adam, betas: [0.9]}",
        (("optimizer.betas", "1 items", "2"),)),
    Bad("bad mapping value", MODEL + "scales: {a: 1, b: x}", (("scales.b", "'x'", "a number"),)),
    Bad("out of range", MODEL + "steps: 0", (("top level", "steps=0 must be >= 1"),)),
    Bad("out of range, twice in a section", MODEL + "steps: 0\nbatch: -1",
        (("steps=0 must be",), ("batch=-1 must be",))),
    Bad("relation", "model: {width: 64, heads: 7}",
        (("model: width=64 must be a multiple of heads=7",),)),
    Bad("both of two exclusive keys", MODEL + "files: [{path: a, url: b}]",
        (("files.0: path='a' and url='b'", "exactly one"),)),
    Bad("duplicate keys", "model: {width: 64}\nsteps: 1\nsteps: 2\nmodel: {width: 3}",
        (("line 3", "'steps' is given twice"), ("line 4", "'model' is given twice"))),
    Bad("tab", "model:\n\twidth: 64", (("line 2, column 1", "tab", "spaces"),)),
    Bad("no YAML", "model: {width: 64", (("line 1, column 18",),)),
    Bad("not a mapping", "- 1\n- 2", (("must be a mapping", "[1, 2]"),)),
    Bad("number as key", MODEL + "extra: {1: x}", (("line 2", "key 1 must be text"),)),
    Bad("alias", "model: &m {width: 64}\nextra: *m", (("line 2", "aliases", "base:"),)),
    Bad("python tag", "model: !!python/object/apply:os.getcwd []", (("line 1", "python/object"),)),
    Bad("missing base", "base: nowhere.yaml\n" + MODEL,
        (("nowhere.yaml", "base of", "No such file"),)),
    Bad("base of a wrong type", "base: 3\n" + MODEL, (("base: got 3", "a file name"),)),
    Bad("recursive base", "base: config.yaml\n" + MODEL,
        (("config.yaml -> config.yaml", "include each other"),)),
    Bad("override without value", MODEL, (("override 'steps'", "key.sub=value"),), ("steps",)),
    Bad("override of a section", MODEL,
        (("override 'model=3'", "replace a section", "width"),), ("model=3",)),
    Bad("override inside a value", MODEL + "steps: 3",
        (("override 'steps.x=1'", "no 'x' inside the value 3"),), ("steps.x=1",)),
    Bad("override of an item that is not there", MODEL + "seeds: [1]",
        (("override 'seeds.1=2'", "'1'", "one of 1 items"),), ("seeds.1=2",)),
    Bad("override with bad YAML", MODEL, (("override 'seeds=[1'", "line 1"),), ("seeds=[1",)),
    Bad("unknown override", MODEL, (("stesp: unknown key", "'steps'"),), ("stesp=3",)),
)  # fmt: skip


def _problems(case: Bad, folder: Path) -> tuple[str, ...]:
    path = folder / "config.yaml"
    path.write_text(case.text)
    with pytest.raises(ConfigError) as caught:
        config.load(Config, path, case.overrides)
    return caught.value.problems


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_bad_config_is_reported_once_with_path_value_and_rule(case, tmp_path):
    start = time.monotonic()
    problems = _problems(case, tmp_path)
    assert time.monotonic() - start < 2
    assert len(problems) == len(case.expected), problems
    for fragments in case.expected:
        matching = [text for text in problems if all(part in text for part in fragments)]
        assert len(matching) == 1, (fragments, problems)


def test_one_file_with_many_errors_lists_them_all(tmp_path):
    text = """
model: {width: 64.5, heads: 0, tied: yes, dtyp: float32, rope: {theta: big, kind: cubic}}
optimizer: {kind: adam, learning_rate: -1, betas: [1, 2, 3]}
files: [{path: a, url: b}, {}, {path: 3}]
name: 3
steps: -1
batch: 0
seeds: [a]
by_name: {x: {path: [1]}}
colour: red
"""
    case = Bad("many", text, (), ("clip=off", "nothing", "name.x=1"))
    expected = """colour: unknown key|model.dtyp: unknown key|model.width: got 64.5|
        model.rope.kind: got|model.rope.theta: got|model.tied: got|model: heads=0|
        optimizer.betas: got|optimizer: learning_rate=-1|files.0: path|files.1: path|files.2.path:|
        name: got 3|seeds.0: got|by_name.x.path: got|clip: got|top level: steps=-1|
        top level: batch=0|override 'nothing'|override 'name.x=1'"""
    starts = [part.strip() for part in expected.split("|")]
    problems = _problems(case, tmp_path)
    for start in starts:
        assert sum(text.startswith(start) for text in problems) == 1, (start, problems)
    assert len(problems) == len(starts), problems


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("model: {width: 64, dtype: zzz}", "float32, bfloat16"),
        (MODEL + "optimizer: {kind: zzz}", "adam, lion"),
    ],
)
def test_choices_like_nothing_given_are_listed_once(text, choices, tmp_path):
    (problem,) = _problems(Bad("choices", text, ()), tmp_path)
    assert problem.count(choices) == 1 and problem.endswith(choices)


def test_a_base_cycle_of_two_files_is_found(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml -> b\.yaml -> a\.yaml"):
        config.load(Config, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00bad", "UTF-8"),
        (b"name: \x00", "not valid YAML"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"#" * (5 << 20), "larger than"),
        (b"a: 1\n---\nb: 2\n", "line 2"),
    ],
    ids=["encoding", "control character", "nesting", "size", "two documents"],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        config.load(Config, path)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(Config, tmp_path)


def _program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program; it must end within two seconds, at the third try on a busy machine."""
    if importlib.util.find_spec(f"{name}.config") is None:
        pytest.skip(f"this checkout has no {name}.config")
    command = [sys.executable, "-m", name, *arguments]
    seconds = []
    while not seconds or (seconds[-1] > 2 and len(seconds) < 3):
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2, seconds
    return done


COMMAND_LINE = {
    "unknown": ("colour: red\nshape: round\n", (), ("colour: unknown key", "shape: unknown key")),
    "duplicate": ("seed: 1\nseed: 2\n", (), ("line 2: key 'seed' is given twice",)),
    "tab": ("seed:\n\t- 1\n", (), ("line 2, column 1", "spaces")),
    "recursive": ("base: config.yaml\n", (), ("include each other",)),
    "overrides": ("seed: x\n", ("nothing", "wrong=1"), ("'nothing'", "wrong: unk", "seed: got")),
}  # fmt: skip


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize("case", COMMAND_LINE)
def test_programs_list_problems_and_write_nothing(name, case, tmp_path):
    text, overrides, fragments = COMMAND_LINE[case]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    done = _program(name, str(path), *overrides, "--workdir", str(tmp_path / "work"))
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in done.stderr
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_missing_file_is_a_bad_config(name, tmp_path):
    done = _program(name, str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "none.yaml: cannot be read" in done.stderr
