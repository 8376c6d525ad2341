# SPDX-License-Identifier: Apache-2.0
"""Read what the compilers dump: ptxas reports, PTX, SASS listings, TPU schedules."""

import collections
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.aot import targets
from tests.aot.cases import Kernel

_PTXAS = re.compile(
    r"entry function '([^']+)' for '([^']+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)
_THREADS = re.compile(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_LABEL = re.compile(r"\s*(\.L_x_\w+):")
_INSTRUCTION = re.compile(r".*?/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")
_PALLAS_CALL = re.compile(r"%([\w.-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"")
_RESOURCES = ".resources.txt"
_SCHEDULE = "-schedule-analysis_final_bundles.txt"


def present(work: Path) -> set[Path]:
    """Return the dumps that lie below `work`, to tell those of the next case from them."""
    return set(work.glob("*/*"))


def cuda_kernels(target: str, work: Path, before: set[Path]) -> tuple[Kernel, ...]:
    """Return the kernels whose dumps have appeared since `before`."""
    kernels: list[Kernel] = []
    for path in sorted(present(work) - before):
        if path.parent.name == "mosaic" and path.name.endswith(_RESOURCES):
            kernels += _mosaic(target, path.with_name(path.name.removesuffix(_RESOURCES)))
        elif path.parent.name == "xla" and path.suffix == ".ptx":
            kernels += _xla(target, path)
    return tuple(kernels)


def _mosaic(target: str, stem: Path) -> Iterator[Kernel]:
    """Yield a kernel from its own dumps or, compiled for an earlier case, from that one's.

    Every kernel that is lowered leaves its module, but a process compiles equal modules once.
    """
    for other in [stem, *_equal_modules(stem)]:
        if _beside(other, ".ptxas").is_file():
            yield from _mosaic_dumps(target, other)
            return
    yield Kernel("mosaic", stem.name, note="left no report of ptxas, so nothing is known of it")


def _equal_modules(stem: Path) -> Iterator[Path]:
    own = _module_text(stem)
    for path in sorted(stem.parent.glob(f"*{_RESOURCES}")):
        other = path.with_name(path.name.removesuffix(_RESOURCES))
        if own and other != stem and _module_text(other) == own:
            yield other


def _module_text(stem: Path) -> str:
    text = _text(_beside(stem, ".after_layout_inference.txt"))
    return text.replace(f'dump_basename = "{stem.name}"', "")


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _mosaic_dumps(target: str, stem: Path) -> Iterator[Kernel]:
    found = re.search(r"smem_scratch_bytes=(\d+)", _text(_beside(stem, _RESOURCES)))
    sass = _text(_beside(stem, ".sass_ctrl")) or _text(_beside(stem, ".sass"))
    yield from read_ptxas(
        _text(_beside(stem, ".ptxas")),
        target,
        source="mosaic",
        threads=read_threads(_text(_beside(stem, ".ptx"))),
        scratch=int(found[1]) if found else 0,
        **(read_sass(sass) if sass else {}),
    )


def _xla(target: str, path: Path) -> Iterator[Kernel]:
    ptxas = targets.find_tool("ptxas")
    text = _text(path)
    architecture = re.search(r"\.target\s+(\w+)", text)
    if ptxas is None or architecture is None:
        yield Kernel("xla", path.name, note="no ptxas" if ptxas is None else "unreadable PTX")
        return
    command = [ptxas, "-v", f"-arch={architecture[1]}", str(path), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    yield from read_ptxas(report, target, source="xla", threads=read_threads(text))


def read_ptxas(
    text: str, target: str, *, source: str, threads: int | None, scratch: int = 0, **more: Any
) -> Iterator[Kernel]:
    """Yield the kernels of a `ptxas -v` report; `scratch` is dynamic shared memory in bytes."""
    for name, architecture, _, stores, loads, registers, static in _PTXAS.findall(text):
        shared = int(static or 0) + scratch
        blocks = None
        if threads:
            blocks = targets.blocks_per_core(
                target, registers=int(registers), shared_memory=shared, threads=threads
            )
        yield Kernel(
            source,
            name,
            architecture=architecture,
            registers=int(registers),
            spill_stores=int(stores),
            spill_loads=int(loads),
            shared_memory=shared,
            threads=threads,
            blocks_per_sm=blocks,
            **more,
        )


def read_threads(ptx: str) -> int | None:
    """Return the threads of a block as the PTX declares them."""
    found = _THREADS.search(ptx)
    if found is None:
        return None
    x, y, z = (int(size or 1) for size in found.groups())
    return x * y * z


def read_sass(text: str) -> dict[str, Any]:
    """Return the instructions of a SASS listing, and of its longest loop with its opcodes.

    A loop is what lies between a backward branch and its label, so an outer loop counts whole.
    """
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        if found := _INSTRUCTION.match(line):
            code.append((found[1], found[2]))
    first, end = 0, 0
    for index, (opcode, operands) in enumerate(code):
        label = re.search(r"\.L_x_\w+", operands) if opcode.startswith("BRA") else None
        start = labels.get(label[0], index) if label else index
        # A branch to itself is the padding at the end of a program.
        if start < index and index + 1 - start > end - first:
            first, end = start, index + 1
    counts = collections.Counter(opcode.split(".")[0] for opcode, _ in code[first:end])
    return {
        "sass_total": len(code),
        "sass_loop": end - first,
        "opcodes": dict(counts.most_common(10)),
    }


def tpu_kernels(work: Path, before: set[Path], hlo: str) -> tuple[Kernel, ...]:
    """Return the kernels whose schedules have appeared since `before`.

    `hlo` is the compiled program; its custom calls are the Pallas kernels.
    """
    pallas = set(_PALLAS_CALL.findall(hlo))
    kernels = []
    for path in sorted(present(work) - before):
        bundles = _BUNDLES.search(_text(path)) if path.name.endswith(_SCHEDULE) else None
        name = re.sub(rf"^\d+-|-\d+{re.escape(_SCHEDULE)}$", "", path.name)
        if bundles and not name.startswith(("<", "TLP")):  # the program around the kernels
            source = "mosaic" if name in pallas else "xla"
            kernels.append(Kernel(source, name, bundles=int(bundles[1])))
    return tuple(kernels)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
