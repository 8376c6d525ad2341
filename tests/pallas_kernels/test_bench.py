# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: what it times, what it keeps, where it stops and goes on."""

import dataclasses
import itertools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import BenchCase, Foreign, torch_candidate
from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import case as bench_case
from pallas_kernels.bench import run as runner
from pallas_kernels.bench.table import table
from pallas_kernels.bench.timing import Effort, Timing, _program, measure

QUICK = Effort(min_seconds=1e-4, repeats=2, cache_bytes=0)
COPY = bench_case.copy_case(4096)


def _inputs(seed):
    return jnp.full(8, seed, jnp.float32), jnp.arange(8, dtype=jnp.float32)


def _fails(x, y):
    raise NotImplementedError("mosaic_gpu: needs a GPU")


def _case(shape="small", **candidates):
    return BenchCase("add", shape, _inputs, candidates or {"xla": jnp.add}, 96)


def _sleep(seconds):
    """A candidate of known speed that no compiler can change."""
    return Foreign(lambda *_: time.sleep(seconds), lambda inputs: inputs, lambda: None)


def test_times_are_those_of_one_call():
    case = _case(short=_sleep(2e-3), long=_sleep(8e-3))
    measured = measure(case, dataclasses.replace(QUICK, min_seconds=1e-2))
    short, long = measured.timings.values()
    assert isinstance(short, Timing) and isinstance(long, Timing)
    # A sleep is never shorter than asked for; on a busy machine it may be much longer.
    assert short.median_seconds >= 2e-3 and long.median_seconds >= 8e-3
    assert short.calls >= 2, "a loop is at least min_seconds long"
    assert short.repeats == 2 and short.spread >= 0


def test_every_input_set_is_used_and_is_different():
    seen = []
    collect = Foreign(lambda x, y: seen.append(float(x[0])), lambda inputs: inputs, lambda: None)
    size = sum(x.nbytes for x in _inputs(0))
    effort = dataclasses.replace(QUICK, min_seconds=1e-2, cache_bytes=2 * size)
    measured = measure(_case(collect=collect), effort)
    assert measured.copies == 4 and not measured.from_cache
    assert set(seen) == {0.0, 1.0, 2.0, 3.0}
    assert all(a != b for a, b in itertools.pairwise(seen)), (
        "a loop goes on where the last one ended"
    )
    few = measure(_case(), dataclasses.replace(effort, max_copies=3))
    assert few.copies == 3 and few.from_cache


def test_one_dispatch_makes_all_its_calls():
    inputs = tuple(_inputs(seed) for seed in range(3))
    outputs = jax.jit(_program(jnp.add))(inputs)
    for out, (x, y) in zip(outputs, inputs, strict=True):
        np.testing.assert_array_equal(out, x + y)
    text = jax.jit(_program(jnp.add)).lower(inputs).as_text()
    assert text.count("stablehlo.add") == 3 and text.count("optimization_barrier") == 2


def test_the_copy_moves_what_it_says():
    (held,) = COPY.make_inputs(3)
    (copy,) = COPY.candidates.values()
    assert isinstance(copy, Foreign)
    arguments = copy.convert((held,))
    copy.fn(*arguments)
    copy.fn(*arguments)
    np.testing.assert_array_equal(arguments[0][0], np.full(1024, 5, np.float32))
    assert COPY.bytes_moved == 2 * 4096


@pytest.mark.parametrize(
    "bad", [{"min_seconds": 0}, {"repeats": 0}, {"calls": 0}, {"max_copies": 1}]
)
def test_bad_efforts_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Effort(**bad)


def _progress(path, **changes):
    return runner.Progress(path / "device.jsonl", {**runner.describe_run(), **changes})


def _run(path, cases, budget=1e9, clock=time.monotonic, **changes):
    progress = _progress(path, **changes)
    rows = runner.run(cases, COPY, progress, QUICK, budget_seconds=budget, clock=clock)
    return [f"{row['op']}/{row['shape']}" for row in rows], progress


def test_a_row_holds_bandwidth_and_ratios(tmp_path):
    case = _case(ours=_sleep(1e-3), baseline=_sleep(4e-3), absent=None, broken=_fails)
    _, progress = _run(tmp_path, [case])
    row = progress.rows["add/small"]
    assert list(row["candidates"]) == ["ours", "baseline", "broken"]
    ours, baseline, broken = row["candidates"].values()
    assert broken == {"error": "NotImplementedError: mosaic_gpu: needs a GPU"}
    assert math.isclose(ours["gb_per_s"], 96e-9 / ours["median_seconds"])
    copy = progress.rows[COPY.name]["candidates"]["xla"]["gb_per_s"]
    assert row["copy_gb_per_s"] == copy
    assert math.isclose(ours["percent_of_copy"], 100 * ours["gb_per_s"] / copy)
    assert ours["ratio_to_first"] == 1
    ratio = baseline["median_seconds"] / ours["median_seconds"]
    assert math.isclose(baseline["ratio_to_first"], ratio)
    assert not runner.failures([row])
    _, progress = _run(tmp_path, [_case("other", broken=_fails, xla=jnp.add)])
    other = progress.rows["add/other"]
    assert "ratio_to_first" not in other["candidates"]["xla"]
    assert len(runner.failures([row, other])) == 1


def test_a_second_run_skips_what_is_done(tmp_path):
    first, second = _case("first"), _case("second")
    assert _run(tmp_path, [first])[0] == [COPY.name, first.name]
    assert _run(tmp_path, [first, second])[0] == [COPY.name, second.name]
    names, progress = _run(tmp_path, [first, second])
    assert names == [COPY.name]
    assert list(progress.rows) == [COPY.name, first.name, second.name]
    progress.forget([first.name, "unknown"])
    assert list(progress.rows) == [COPY.name, second.name]


@pytest.mark.parametrize("key", ["sources", "device", "processor", "versions"])
def test_rows_of_another_program_or_device_are_measured_again(tmp_path, key):
    _run(tmp_path, [_case()])
    assert _progress(tmp_path).rows
    assert not _progress(tmp_path, **{key: "another"}).rows
    assert _progress(tmp_path, date="later", commit="another").rows


@pytest.mark.parametrize(
    "damage", ["", "{", "not json\n", "[1]\n", '{"device": "x"}\n', "header[]\n"]
)
def test_a_damaged_progress_file_is_started_over(tmp_path, damage):
    header = json.dumps(runner.describe_run()) + "\n"
    (tmp_path / "device.jsonl").write_text(damage.replace("header", header))
    names, progress = _run(tmp_path, [_case()])
    assert names == [COPY.name, "add/small"]
    assert _progress(tmp_path).rows == progress.rows


def test_a_run_stops_before_its_budget_is_spent(tmp_path):
    cases = [_case(f"shape{index}") for index in range(5)]
    # The clock is read at the start and around each case: every case takes 10 seconds.
    seconds = itertools.count(0, 10)
    names, progress = _run(tmp_path, cases, budget=55, clock=lambda: next(seconds))
    # Cases begin at 10, 30 and 50 s; the third would end at 60 s.
    assert names == [COPY.name, "add/shape0", "add/shape1"]
    assert not runner.results(progress, cases, COPY)["complete"]
    names, progress = _run(tmp_path, cases, budget=0)
    assert names == [COPY.name, "add/shape2"], "a spent budget must not stop all progress"
    names, progress = _run(tmp_path, cases)
    assert runner.results(progress, cases, COPY)["complete"]


def test_the_table_shows_every_candidate(tmp_path):
    case = _case(ours=_sleep(1e-3), baseline=jnp.add, broken=_fails)
    _, progress = _run(tmp_path, [case])
    results = json.loads(json.dumps(runner.results(progress, [case], COPY)))
    text = table(results)
    assert "cpu" in text and jax.__version__ in text and results["commit"] in text
    lines = text.splitlines()
    (ours,) = (line for line in lines if "ours" in line)
    seconds = results["rows"][1]["candidates"]["ours"]["median_seconds"]
    assert f"| {seconds * 1e6:.1f} |" in ours
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert any("broken | failed" in line for line in lines)
    assert "not been measured" not in text
    assert "not been measured" in table({**results, "complete": False})


def test_torch_is_a_baseline_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(bench_case.importlib.util, "find_spec", lambda name: None)
    assert torch_candidate(lambda x: x) is None


def test_a_torch_candidate_gets_tensors_and_is_waited_for(monkeypatch):
    calls = []

    class Cuda:
        is_available = staticmethod(lambda: True)
        synchronize = staticmethod(lambda: calls.append("wait"))

    class Torch:
        cuda = Cuda
        from_dlpack = staticmethod(np.from_dlpack)

    monkeypatch.setitem(sys.modules, "torch", Torch)
    monkeypatch.setattr(bench_case.importlib.util, "find_spec", lambda name: object())
    candidate = torch_candidate(lambda x, y: calls.append((type(x), float(x[1] + y[1]))))
    measured = measure(_case(torch=candidate), QUICK)
    assert isinstance(measured.timings["torch"], Timing)
    assert calls[0] == (np.ndarray, 1.0)
    assert calls[1] == "wait"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The command with two small cases and folders of its own; returns how to run it."""
    copy = bench_case.copy_case(4096)
    monkeypatch.setattr(command, "copy_case", lambda: copy)
    monkeypatch.setattr(command, "all_cases", lambda: [_case("one"), _case("two")])
    monkeypatch.setattr(command, "Effort", lambda **options: QUICK)
    folders = ["--results", str(tmp_path / "results"), "--progress", str(tmp_path)]
    return lambda *arguments: command.main([*arguments, *folders])


def test_the_command_measures_goes_on_and_prints(small, tmp_path, capsys):
    assert small("--budget-seconds", "0") == 75
    assert "1 shapes are left; the same command goes on with add/two" in capsys.readouterr().out
    path = tmp_path / "results" / "cpu.json"
    assert not json.loads(path.read_text())["complete"]
    assert small() == 0
    assert "2 shapes, 1 of them measured before" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["complete"]
    assert [row["shape"] for row in results["rows"]] == ["0.00390625MiB", "one", "two"]
    assert small("--table") == 0
    assert "| add | two" in capsys.readouterr().out
    assert small("--fresh", "--only", "one") == 0
    out = capsys.readouterr().out
    assert "1 shapes, 0 of them measured before" in out and "add/two:" not in out
    assert json.loads(path.read_text())["complete"], "the other rows are kept"
    assert small("--max-bytes", "95") == 0
    assert "0 shapes" in capsys.readouterr().out


def test_the_command_fails_with_a_failed_kernel(small, monkeypatch, capsys):
    cases = [_case("bad", ours=_fails, xla=jnp.add)]
    monkeypatch.setattr(command, "all_cases", lambda: cases)
    assert small() == 1
    assert "failed: add/bad ours: NotImplementedError" in capsys.readouterr().out


def test_wrong_usage_is_refused(small, tmp_path, capsys):
    for arguments in (["--only", "("], ["--only", "three"], ["--table"]):
        with pytest.raises(SystemExit) as stopped:
            small(*arguments)
        assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "--only 'three' matches no shape; operations are add" in said
    assert "run without --table first" in said
    assert not (tmp_path / "results").exists()


def test_registered_cases_can_be_measured():
    for case in bench_case.all_cases():
        assert case.candidates and case.bytes_moved > 0


def test_two_cases_of_one_name_are_refused(monkeypatch):
    module = type(sys)("bench")
    module.cases = lambda: [_case("one"), _case("one")]  # type: ignore[attr-defined]
    found = [type("Info", (), {"name": "add", "ispkg": True})]
    monkeypatch.setattr(bench_case.pkgutil, "iter_modules", lambda path: found)
    monkeypatch.setattr(bench_case.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "pallas_kernels.add.bench", module)
    monkeypatch.setattr(bench_case.importlib, "import_module", lambda name: sys.modules[name])
    with pytest.raises(ValueError, match="add/one"):
        bench_case.all_cases()
