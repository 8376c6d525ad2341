# SPDX-License-Identifier: Apache-2.0
"""The kernels lower and compile for devices that are not there; every check of that fires."""

import dataclasses
import json
from typing import Any

import pytest

from tests.aot import Case, Kernel, Record, cases, dumps, sass, targets
from tests.aot import __main__ as command
from tests.aot.parent import Options, run_target


def _failures(records: list[Record]) -> list[str]:
    return [f"{r.target} {r.name}: {r.error}" for r in records if not r.ok]


@pytest.fixture(scope="module")
def collected() -> dict[str, Case]:
    return cases.load(cases.default_modules())


@pytest.mark.parametrize("target", ["v5e", "v6e", "h200", "a100"])
def test_every_case_lowers(target, collected):
    """Layouts, block shapes, unsupported operations: found without any compiler."""
    _lower_all(target, {name: case for name, case in collected.items() if case.wants(target)})


def test_every_fast_case_lowers(collected):
    fast = {name: x for name, x in collected.items() if x.wants("h200") and not x.is_slow("h200")}
    _lower_all("h200", fast)


def _lower_all(target, wanted):
    from tests.aot.compile import lower_only

    assert wanted
    records = [lower_only(name, case, target) for name, case in wanted.items()]
    assert not _failures(records)
    assert any(record.failed_as_expected for record in records), "nothing was really lowered"


def _compile_all(target, folder, *, fast=False):
    missing = targets.missing_support(target)
    if missing:
        pytest.skip(missing)
    options = Options(modules=tuple(cases.default_modules()), fast=fast)
    records = run_target(target, options, folder)
    assert records
    assert not _failures(records)
    return {record.name: record for record in records}


@pytest.mark.parametrize(("target", "scheduled"), [("v5e", set()), ("v6e", {"tpu_bundles"})])
def test_every_fast_case_compiles(target, scheduled, tmp_path):
    records = _compile_all(target, tmp_path, fast=True)
    _check_expected(records, {"temporaries", "tpu_block_shape"} | scheduled)


def test_what_is_slow_on_some_targets_is_compiled_for_another(collected):
    for name, case in collected.items():
        if not isinstance(case.slow, bool):
            assert any(case.wants(t) and not case.is_slow(t) for t in ("v5e", "v6e")), name


@pytest.mark.slow
@pytest.mark.parametrize("target", targets.TPUS)
def test_every_case_compiles_for_tpus(target, tmp_path):
    _compile_all(target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "h200", "a100"])
def test_every_case_compiles_for_cuda(target, tmp_path):
    records = _compile_all(target, tmp_path)
    names = {"spills", "memory", "registers", "loop", "blocks"}
    _check_expected(records, {"temporaries", *(f"gpu_{name}" for name in names)})


def _check_expected(records, names):
    """The self-test failed in all the ways it should, and in no other."""
    failed = {name for name, record in records.items() if record.failed_as_expected}
    assert {name for name in failed if name.startswith("self_test.")} == {
        f"self_test.{name}" for name in names
    }


MOSAIC = Kernel("mosaic", "m", registers=64, blocks_per_sm=4, sass_loop=100, shared_memory=0)
TPU = Kernel("mosaic", "t", bundles=90)


def _judge(
    target: str = "h200",
    *kernels: Kernel,
    temporaries: int | None = 0,
    error: str = "",
    **limits: Any,
) -> Record:
    case = Case("case", lambda: None, (), **limits)
    record = Record("case", target, error=error, temporaries=temporaries, kernels=kernels)
    return cases.judge(case, record)


@pytest.mark.parametrize(
    ("target", "kernel", "limit", "value", "better"),
    [
        ("h200", MOSAIC, "max_registers", 63, 64),
        ("h200", MOSAIC, "max_sass_loop", 99, 100),
        ("h200", MOSAIC, "min_blocks_per_sm", 5, 4),
        ("v5e", TPU, "max_bundles", 89, 90),
    ],
)
def test_a_kernel_over_its_budget_fails(target, kernel, limit, value, better):
    assert _judge(target, kernel, **{limit: better}).ok
    bad = _judge(target, kernel, **{limit: value})
    assert not bad.ok
    assert str(value) in bad.error
    nothing = _judge(target, **{limit: better})
    assert not nothing.ok, "a budget that nothing measured is not kept"
    unknown = dataclasses.replace(Kernel(kernel.source, "k"))
    assert not _judge(target, unknown, **{limit: better}).ok


def test_budgets_of_another_platform_are_ignored():
    assert _judge("v5e", TPU, max_registers=1, max_sass_loop=1, min_blocks_per_sm=32).ok
    assert _judge("h200", MOSAIC, max_bundles=1).ok


def test_temporaries_over_their_budget_fail():
    assert _judge(max_temporaries=4, temporaries=4).ok
    assert not _judge(max_temporaries=4, temporaries=5).ok
    assert not _judge(max_temporaries=4, temporaries=None).ok


def test_spills_fail_unless_allowed():
    spilling = dataclasses.replace(MOSAIC, spill_loads=4)
    assert not _judge("h200", spilling).ok
    assert _judge("h200", spilling, allow_spill=True).ok
    assert not _judge("h200", MOSAIC, dataclasses.replace(spilling, source="xla")).ok


def test_budgets_hold_for_the_written_kernels_where_there_are_any():
    large = dataclasses.replace(MOSAIC, source="xla", registers=200)
    assert _judge("h200", MOSAIC, large, max_registers=64).ok
    assert not _judge("h200", large, max_registers=64).ok


def test_an_expected_failure_must_happen_with_its_words():
    over: dict[str, Any] = {"max_temporaries": 0, "temporaries": 1}
    as_expected = _judge(expect_failure="temporaries, limit 0", **over)
    assert as_expected.ok and as_expected.failed_as_expected
    assert not _judge(expect_failure="registers", **over).ok
    assert not _judge(expect_failure="temporaries").ok
    assert _judge(expect_failure="boom", error="ValueError: boom").ok
    assert not _judge(error="ValueError: boom").ok


ODD_CASES = """
import os, time
import jax, jax.numpy as jnp
from tests.aot import Case

X = jax.ShapeDtypeStruct((8,), jnp.float32)

def aot_cases():
    return [
        Case("first", lambda x: x + 1, (X,)),
        Case("aborts", lambda x: os.abort(), (X,)),
        Case("between", lambda x: x * 2, (X,), expect_failure="later, in the compiler"),
        Case("hangs", lambda x: time.sleep(600), (X,)),
        Case("raises", lambda x: 1 / 0, (X,)),
        Case("slow", lambda x: 1 / 0, (X,), slow=True),
        Case("last", lambda x: x - 1, (X,), targets=("tpu",)),
        Case("other", lambda x: x - 1, (X,), targets=("cuda",)),
    ]
"""


@pytest.mark.slow
def test_a_crash_or_a_hang_is_the_failure_of_one_case(tmp_path):
    module = tmp_path / "odd.py"
    module.write_text(ODD_CASES)
    options = Options(modules=(str(module),), lower_only=True, fast=True, timeout=5)
    records = {r.name: r for r in run_target("v5e", options, tmp_path / "dumps")}
    names = ["first", "aborts", "between", "hangs", "raises", "last"]
    assert list(records) == [f"odd.{name}" for name in names]
    good = {"odd.first", "odd.between", "odd.last"}
    assert {name for name, record in records.items() if record.ok} == good
    assert "aborted the process" in records["odd.aborts"].error
    assert "ran past 5 s" in records["odd.hangs"].error
    assert "ZeroDivisionError" in records["odd.raises"].error


def test_a_module_that_cannot_be_loaded_fails_the_run(tmp_path, capsys):
    module = tmp_path / "broken.py"
    module.write_text("raise RuntimeError('no such kernel')\n")
    arguments = [str(module), "--targets", "v5e", "--lower-only", "--json", str(tmp_path / "r")]
    assert command.main(arguments) == 1
    assert "no such kernel" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "r").read_text())
    assert record["name"] == "(start-up)" and not record["ok"]
    assert Record.from_dict(record).error == record["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no function aot_cases"),
        ("def aot_cases(): return [{}]", "not a Case"),
        ("def aot_cases(): return [CASE, CASE]", "two cases are named 'bad.x'"),
        ("def aot_cases(): return [Case('x', id, (), targets=('h300',))]", "h300"),
    ],
)
def test_bad_modules_are_refused(text, message, tmp_path):
    head = "from tests.aot import Case\nCASE = Case('x', id, ())\n"
    (tmp_path / "bad.py").write_text(head + text)
    with pytest.raises(ValueError, match=message):
        cases.load([str(tmp_path / "bad.py")])


def test_missing_compilers_end_the_run_or_are_skipped(monkeypatch, capsys):
    monkeypatch.setattr(targets, "has_module", lambda name: False)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--targets", "v5e"])
    assert stopped.value.code == 2
    assert "aot-tpu" in capsys.readouterr().err
    assert command.main(["--targets", "v5e,h200", "--skip-missing"]) == 0
    assert capsys.readouterr().out.count("skip") == 2
    with pytest.raises(SystemExit) as stopped:
        command.main(["--targets", "h300"])
    assert stopped.value.code == 2


PTXAS = """
ptxas info    : Compiling entry function 'kernel_a' for 'sm_90a'
ptxas info    : Function properties for kernel_a
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 66 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'kernel_b' for 'sm_90a'
ptxas info    : Function properties for kernel_b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers
"""


def test_ptxas_reports_are_read():
    first, second = dumps.read_ptxas(PTXAS, "h200", source="xla", threads=128, scratch=100_000)
    assert (first.name, first.registers, first.spill_stores, first.spill_loads) == (
        "kernel_a",
        66,
        16,
        24,
    )
    # 233472 bytes of shared memory hold two blocks of 102048 + 1024; registers would allow seven.
    assert (first.shared_memory, first.blocks_per_sm) == (102_048, 2)
    assert (second.name, second.registers, second.shared_memory) == ("kernel_b", 12, 100_000)
    # 72 registers (in units of 8) of 128 threads: 65536 / 9216.
    (first, _) = dumps.read_ptxas(PTXAS, "h200", source="xla", threads=128)
    assert first.blocks_per_sm == 7
    (first, _) = dumps.read_ptxas(PTXAS, "h200", source="xla", threads=None)
    assert first.blocks_per_sm is None


def test_threads_of_a_block_are_read():
    assert dumps.read_threads(".maxntid 128, 2, 1\n") == 256
    assert dumps.read_threads(".reqntid 64\n") == 64
    assert dumps.read_threads("ret;") is None


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4] ;
.L_x_1:
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/              @P0  BRA `(.L_x_1) ;
        /*0040*/             @!P1  FADD.FTZ R2, R2, R5 ;
        /*0050*/              @P2  BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2) ;
"""


def test_the_longest_loop_is_found():
    found = sass.read(SASS)
    assert (found["sass_total"], found["sass_loop"], found["sass_least"]) == (8, 5, 5)
    assert found["opcodes"] == {"FADD": 2, "BRA": 2, "LDG": 1}
    assert sass.read("/*0000*/ EXIT ;")["sass_loop"] == 0


GUARDED = """
        /*0000*/                   BRA `(.L_x_3) ;
.L_x_0:
        /*0010*/              @P1  BRA `(.L_x_1) ;
        /*0020*/                   LDG.E R2, [R4] ;
        /*0030*/                   LDG.E R3, [R4] ;
.L_x_1:
        /*0040*/                   SYNCS.PHASECHK P0, [R2] ;
        /*0050*/             @!P0  BRA `(.L_x_4) ;
.L_x_3:
        /*0060*/             @!P2  BRA `(.L_x_0) ;
        /*0070*/                   FADD R2, R2, R3 ;
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/                   SYNCS.TRYWAIT P0, [R2] ;
        /*00a0*/             @!P0  BRA `(.L_x_4) ;
        /*00b0*/                   BRA `(.L_x_3) ;
"""


def test_what_some_warps_skip_and_what_follows_a_loop_is_told_apart():
    found = sass.read(GUARDED)
    # All but the first jump and the three at the end; the shortest way skips loads and waiting.
    assert (found["sass_loop"], found["sass_least"]) == (9, 4)


def _dump(folder, stem, module, ptxas=None):
    (folder / f"{stem}.resources.txt").write_text("Resources(smem_scratch_bytes=64)")
    text = f'module {{dump_basename = "{stem}"}} {module}'
    (folder / f"{stem}.after_layout_inference.txt").write_text(text)
    if ptxas:
        (folder / f"{stem}.ptxas").write_text(ptxas)


def test_a_kernel_compiled_before_keeps_its_figures(tmp_path):
    """A process compiles equal modules once; the later ones leave no report of their own."""
    folder = tmp_path / "mosaic"
    folder.mkdir()
    _dump(folder, "k_0", "one", PTXAS)
    first = dumps.cuda_kernels("h200", tmp_path, set())
    assert [kernel.registers for kernel in first] == [66, 12]
    before = dumps.present(tmp_path)
    _dump(folder, "k_1", "one")
    again = dumps.cuda_kernels("h200", tmp_path, before)
    assert [kernel.registers for kernel in again] == [66, 12]
    before = dumps.present(tmp_path)
    _dump(folder, "k_2", "another")
    (unknown,) = dumps.cuda_kernels("h200", tmp_path, before)
    assert unknown.registers is None
    assert not _judge("h200", unknown).ok


def test_code_is_matched_to_modules_in_the_order_of_compilation(tmp_path):
    """Two layers with equal kernels: module 2 is the second that is compiled, as code 1."""
    folder = tmp_path / "mosaic"
    folder.mkdir()
    for stem, module in (("k_0", "one"), ("k_1", "one"), ("k_10", "three"), ("k_2", "two")):
        _dump(folder, stem, module)
    one_kernel = PTXAS[PTXAS.index("ptxas info    : Compiling entry function 'kernel_b'") :]
    for number, registers in ((0, 12), (1, 34), (2, 56)):
        report = one_kernel.replace("Used 12", f"Used {registers}")
        (folder / f"k_{number}.ptxas").write_text(report)
    found = dumps.cuda_kernels("h200", tmp_path, set())
    assert [kernel.registers for kernel in found] == [12, 12, 34, 56]


def test_schedules_tell_pallas_kernels_from_fusions(tmp_path):
    folder = tmp_path / "llo"
    folder.mkdir()
    for name in ("call.1", "fusion.2", "<program>"):
        path = folder / f"171-{name}-12-schedule-analysis_final_bundles.txt"
        path.write_text("x\n total scheduled bundles: 34\n")
    hlo = '  %call.1 = f32[8] custom-call(%p), custom_call_target="tpu_custom_call", x={}\n'
    found = dumps.tpu_kernels(tmp_path, set(), hlo)
    assert {(k.source, k.name, k.bundles) for k in found} == {
        ("mosaic", "call.1", 34),
        ("xla", "fusion.2", 34),
    }
