# SPDX-License-Identifier: Apache-2.0
"""Read what the compilers dump: ptxas reports, PTX, SASS listings, TPU schedules."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.aot import sass, targets
from tests.aot.cases import Kernel

_PTXAS = re.compile(
    r"entry function '([^']+)' for '([^']+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)
_THREADS = re.compile(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")
_PALLAS_CALL = re.compile(r"%([\w.-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"")
_RESOURCES = ".resources.txt"
_CODE = ".code"
_NUMBER = re.compile(r"_(\d+)$")
_SCHEDULE = "-schedule-analysis_final_bundles.txt"


def present(work: Path) -> set[Path]:
    """Return the dumps that lie below `work`, to tell those of the next case from them."""
    return set(work.glob("*/*"))


def cuda_kernels(target: str, work: Path, before: set[Path]) -> tuple[Kernel, ...]:
    """Return the kernels whose dumps have appeared since `before`."""
    fresh = present(work) - before
    kernels = [
        kernel
        for module, code in _compiled_modules(fresh)
        for kernel in _mosaic(target, module, code)
    ]
    for path in sorted(fresh):
        if path.parent.name == "xla" and path.suffix == ".ptx":
            kernels += _xla(target, path)
    return tuple(kernels)


def _compiled_modules(fresh: set[Path]) -> Iterator[tuple[Path, Path | None]]:
    """Yield the stem of every Mosaic module lowered, and that of the dumps of its code.

    Modules are numbered as they are lowered, code as it is compiled, and a process compiles equal
    modules once. What belongs together is noted in a file, for later modules that equal this one.
    """
    modules = _stems(fresh, _RESOURCES)
    codes = iter(_stems(fresh, ".ptxas"))
    for module in modules:
        code = next(_noted(module), None) or next(codes, None)
        if code is not None:
            _beside(module, _CODE).write_text(code.name)
        yield module, code


def _stems(paths: set[Path], ending: str) -> list[Path]:
    """Return Mosaic's dumps with an ending, without it, in the order of their numbers."""
    stems = [
        path.with_name(path.name.removesuffix(ending))
        for path in paths
        if path.parent.name == "mosaic" and path.name.endswith(ending)
    ]
    return sorted(stems, key=lambda stem: (int(_NUMBER.search(stem.name)[1]), stem.name))  # type: ignore[index]


def _noted(module: Path) -> Iterator[Path]:
    own = _module_text(module)
    for path in sorted(module.parent.glob(f"*{_CODE}")):
        other = path.with_name(path.name.removesuffix(_CODE))
        if own and _module_text(other) == own:
            yield path.with_name(path.read_text())


def _mosaic(target: str, module: Path, code: Path | None) -> Iterator[Kernel]:
    if code is None:
        note = "left no report of ptxas, so nothing is known of it"
        yield Kernel("mosaic", module.name, note=note)
    else:
        yield from _mosaic_dumps(target, module, code)


def _module_text(stem: Path) -> str:
    text = _text(_beside(stem, ".after_layout_inference.txt"))
    return text.replace(f'dump_basename = "{stem.name}"', "")


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _mosaic_dumps(target: str, module: Path, code: Path) -> Iterator[Kernel]:
    found = re.search(r"smem_scratch_bytes=(\d+)", _text(_beside(module, _RESOURCES)))
    listing = _text(_beside(code, ".sass_ctrl")) or _text(_beside(code, ".sass"))
    yield from read_ptxas(
        _text(_beside(code, ".ptxas")),
        target,
        source="mosaic",
        threads=read_threads(_text(_beside(code, ".ptx"))),
        scratch=int(found[1]) if found else 0,
        **(sass.read(listing) if listing else {}),
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
