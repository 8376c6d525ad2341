# SPDX-License-Identifier: Apache-2.0
"""What is compiled (`Case`), what came out (`Record`), and whether that is good enough.

A budget is a promise that must be measured: where nothing measured it (no disassembler, no kernel),
the case fails just as if it were exceeded.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.aot import targets

ROOT = Path(__file__).resolve().parents[2]
CASE_FOLDER = ROOT / "tests" / "pallas_kernels"


@dataclass(frozen=True)
class Case:
    """A function to compile for some targets, and the limits that its code must keep.

    `fn` is jitted by the checker; `args` are pytrees of `jax.ShapeDtypeStruct`. `targets` are
    names ("h200", "v5e") or platforms ("cuda", "tpu"), None for all. Limits of kernels hold for
    each Mosaic kernel, or for XLA's kernels where the case has no other; spilling is forbidden to
    both.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    targets: tuple[str, ...] | None = None
    options: Mapping[str, Any] | None = None  # XLA's compiler options
    allow_spill: bool = False
    max_registers: int | None = None  # per thread
    min_blocks_per_sm: int | None = None
    max_sass_loop: int | None = None  # instructions of the longest loop of a Mosaic GPU kernel
    max_bundles: int | None = None  # instruction bundles of a TPU kernel: a step and the prologue
    max_temporaries: int | None = None  # bytes that XLA allocates besides arguments and results
    max_copied: int | None = None  # elements of the largest array that XLA copies or transposes
    donate: tuple[int, ...] = ()  # arguments whose memory the results take over
    expect_failure: str | None = None  # the case passes only if it fails with these words
    # Left to the slow tests, on all or some targets: takes seconds, or others meet its branches.
    slow: bool | tuple[str, ...] = False

    def wants(self, target: str) -> bool:
        """Return whether the case is meant for a target."""
        names = self.targets
        return names is None or target in names or targets.platform_of(target) in names

    def is_slow(self, target: str) -> bool:
        """Return whether the default tests leave the case out on a target."""
        return self.slow if isinstance(self.slow, bool) else target in self.slow


@dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled program; None where this kind of kernel has no such figure."""

    source: str  # "mosaic" or "xla"
    name: str
    architecture: str | None = None
    registers: int | None = None
    spill_stores: int = 0  # bytes
    spill_loads: int = 0
    shared_memory: int | None = None  # bytes; static ones only for XLA's kernels
    threads: int | None = None
    blocks_per_sm: int | None = None
    sass_total: int | None = None
    sass_loop: int | None = None
    sass_least: int | None = None  # of the loop, on the shortest way round
    opcodes: Mapping[str, int] | None = None  # the commonest of the longest loop
    bundles: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Record:
    """The result of one case on one target; sizes in bytes, None where not reached or unknown."""

    name: str
    target: str
    ok: bool = False
    error: str = ""
    lower_seconds: float | None = None
    compile_seconds: float | None = None
    temporaries: int | None = None
    copied: int | None = None  # elements of the largest copy or transposition in the program
    arguments: int | None = None
    outputs: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    kernels: tuple[Kernel, ...] = ()
    failed_as_expected: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Record":
        """Return the record that `dataclasses.asdict` and JSON made `values` of."""
        kernels = tuple(Kernel(**kernel) for kernel in values["kernels"])
        return cls(**{**values, "kernels": kernels})


def judge(case: Case, record: Record) -> Record:
    """Return the record of a full compilation with its verdict: budgets, expected failures."""
    if not record.error:
        problems = list(_problems(case, record))
        record = dataclasses.replace(record, ok=not problems, error="; ".join(problems))
    return judge_expectation(case, record)


def judge_expectation(case: Case, record: Record, *, lower_only: bool = False) -> Record:
    """Return the record turned round if the case must fail; `ok` and `error` are set already.

    Lowering alone does not reach the failures of the compilers, so there it may also succeed.
    """
    expected = case.expect_failure
    if expected is None or (lower_only and record.ok):
        return record
    if record.ok:
        error = f"expected a failure with {expected!r}, but it passed"
        return dataclasses.replace(record, ok=False, error=error)
    as_expected = expected in record.error
    return dataclasses.replace(record, ok=as_expected, failed_as_expected=as_expected)


def _problems(case: Case, record: Record) -> Iterator[str]:
    for kernel in record.kernels:
        if not case.allow_spill and kernel.spill_stores + kernel.spill_loads:
            yield f"{kernel.name} spills {kernel.spill_stores}/{kernel.spill_loads} bytes"
        if kernel.note:
            yield f"{kernel.name}: {kernel.note}"
    if case.max_temporaries is not None:
        yield from _above("", "bytes of temporaries", record.temporaries, case.max_temporaries)
    if case.max_copied is not None:
        yield from _above("", "elements copied at once", record.copied, case.max_copied)
    mosaic = [kernel for kernel in record.kernels if kernel.source == "mosaic"]
    kernels = mosaic or record.kernels
    if targets.platform_of(record.target) == "tpu":
        yield from _limit(kernels, "bundles", "bundles", case.max_bundles)
        return
    yield from _limit(kernels, "registers", "registers", case.max_registers)
    yield from _limit(kernels, "sass_loop", "instructions in a loop", case.max_sass_loop)
    yield from _occupancy(kernels, case.min_blocks_per_sm)


def _limit(kernels: Iterable[Kernel], field: str, what: str, limit: int | None) -> Iterator[str]:
    if limit is None:
        return
    measured = [kernel for kernel in kernels if getattr(kernel, field) is not None]
    if not measured:
        yield f"no kernel with a measured number of {what}, although the limit is {limit}"
    for kernel in measured:
        yield from _above(f"{kernel.name}: ", what, getattr(kernel, field), limit)


def _above(prefix: str, what: str, value: float | None, limit: int) -> Iterator[str]:
    if value is None:
        yield f"{prefix}unknown {what}, limit {limit}"
    elif value > limit:
        yield f"{prefix}{value} {what}, limit {limit}"


def _occupancy(kernels: Iterable[Kernel], least: int | None) -> Iterator[str]:
    if least is None:
        return
    measured = [kernel for kernel in kernels if kernel.blocks_per_sm is not None]
    if not measured:
        yield f"no kernel with a known number of blocks per SM, although {least} are asked for"
    for kernel in measured:
        if (kernel.blocks_per_sm or 0) < least:
            yield f"{kernel.name}: {kernel.blocks_per_sm} blocks per SM, at least {least} wanted"


def default_modules() -> list[str]:
    """Return the modules of cases of all kernels, as paths."""
    return [str(path) for path in sorted(CASE_FOLDER.glob("aot_*.py"))]


def load(modules: Iterable[str]) -> dict[str, Case]:
    """Return all cases of modules (dotted names or paths) by name, "<module>.<case>"."""
    cases: dict[str, Case] = {}
    for name in modules:
        module = _import(name)
        stem = module.__name__.rpartition(".")[2].removeprefix("aot_")
        if not hasattr(module, "aot_cases"):
            raise ValueError(f"module {name!r} has no function aot_cases(); define it")
        for case in module.aot_cases():
            if not isinstance(case, Case):
                raise ValueError(f"aot_cases() of {name!r} returned {case!r}, not a Case")
            full = f"{stem}.{case.name}"
            if full in cases:
                raise ValueError(f"two cases are named {full!r}; rename one")
            unknown = set(case.targets or ()) - set(targets.NAMES) - set(targets.PLATFORMS)
            if unknown:
                raise ValueError(
                    f"case {full!r} names the targets {sorted(unknown)}; known are "
                    f"{', '.join([*targets.PLATFORMS, *targets.NAMES])}"
                )
            cases[full] = case
    return cases


def _import(name: str) -> Any:
    path = Path(name).resolve()
    if not name.endswith(".py"):
        return importlib.import_module(name)
    if not path.is_file():
        raise ValueError(f"no such module of cases: {name}")
    if path.is_relative_to(ROOT):
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
