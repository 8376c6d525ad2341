# SPDX-License-Identifier: Apache-2.0
"""The process that compiles the cases of one target; started by `tests.aot.parent` only.

Every result is written before the next case begins, so that the parent knows which case was being
compiled when a code generator aborted the process.
"""

import dataclasses
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tests.aot import targets
from tests.aot.cases import Case, load
from tests.aot.parent import Options


def main(request: Mapping[str, Any]) -> None:
    """Compile what `request` (made by the parent) asks for; write JSON lines to its file."""
    options = Options(**request["options"])
    target, work = request["target"], Path(request["work"])
    cases = {
        name: case
        for name, case in load(options.modules).items()
        if name not in request["skip"] and case.wants(target) and re.search(options.only, name)
        if not (options.fast and case.is_slow(target))
    }
    with open(request["results"], "a", buffering=1) as file:
        chosen = cases
        if options.lower_only:
            _lower_all(cases, target, file)
        else:
            chosen = _first_part(cases, target, options)
            _compile_all(chosen, target, work, options, file)
        _write(file, finished=len(chosen) == len(cases))
    os._exit(0)  # tearing the plugins down is slow and of no interest


def _first_part(cases: dict[str, Case], target: str, options: Options) -> dict[str, Case]:
    """Return the cases to compile in this process; the parent starts another for the rest.

    Schedules make compilation several times slower, and are dumped for a whole process.
    """
    plain = {name: case for name, case in cases.items() if case.max_bundles is None}
    if targets.platform_of(target) == "cuda" or options.schedule or not plain:
        return cases
    return plain


def _lower_all(cases: Mapping[str, Case], target: str, file: TextIO) -> None:
    from tests.aot import compile as compiler

    for name, case in cases.items():
        _write(file, start=name, at=time.time())
        _write(file, record=dataclasses.asdict(compiler.lower_only(name, case, target)))


def _compile_all(
    cases: Mapping[str, Case], target: str, work: Path, options: Options, file: TextIO
) -> None:
    schedule = options.schedule or any(case.max_bundles is not None for case in cases.values())
    if targets.platform_of(target) == "tpu" and schedule:
        _dump_schedules(work)
    sass = options.sass or any(case.max_sass_loop is not None for case in cases.values())
    if targets.platform_of(target) == "cuda" and sass:
        _dump_sass()
    from tests.aot import compile as compiler

    lower = compiler.lowerer(target, compiler.topology_of(target))
    for name, case in cases.items():
        _write(file, start=name, at=time.time())
        record = compiler.compile_case(name, case, target, lower, work, schedule=schedule)
        _write(file, record=dataclasses.asdict(record))


def _dump_schedules(work: Path) -> None:
    """Ask libtpu, which has not been loaded yet, to write its schedules."""
    flags = f"--xla_jf_dump_to={work / 'llo'} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def _dump_sass() -> None:
    """Ask Mosaic GPU to write SASS; without a disassembler there is none."""
    tool = targets.find_tool("nvdisasm")
    if tool is None:
        return
    os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"
    # Importing this module sets the variable, so it can be changed only afterwards.
    importlib.import_module("jax.experimental.mosaic.gpu")
    os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(Path(tool).parents[1])


def _write(file: TextIO, **values: Any) -> None:
    file.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
