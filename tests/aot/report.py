# SPDX-License-Identifier: Apache-2.0
"""Records as text and as JSON."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.aot.cases import Kernel, Record


def lines(record: Record) -> Iterator[str]:
    """Yield what is shown of a record: a line, one or two per kernel, the error."""
    yield _headline(record)
    for kernel in record.kernels:
        yield from (f"        {line}" for line in _kernel(kernel))
    if not record.ok:
        yield from (f"        {line}" for line in record.error.strip().splitlines())


def summary(records: Sequence[Record]) -> str:
    """Return the last line of a run."""
    failed = sum(not record.ok for record in records)
    return f"{len(records) - failed} passed, {failed} failed" if records else "nothing was checked"


def write_json(records: Sequence[Record], path: Path) -> None:
    """Write all records to a file, a list of objects."""
    path.write_text(json.dumps([dataclasses.asdict(r) for r in records], indent=1) + "\n")


def write_kernels(records: Sequence[Record], path: Path) -> None:
    """Write what each compiled Mosaic GPU kernel takes up, a list of objects."""
    rows = [
        {
            "name": record.name.split(".", 1)[1],
            "target": record.target,
            "registers": kernel.registers,
            "spill_bytes": (kernel.spill_stores or 0) + (kernel.spill_loads or 0),
            "shared_memory": kernel.shared_memory,
            "blocks_per_sm": kernel.blocks_per_sm,
            "loop_instructions": kernel.sass_loop,
            "least_instructions": kernel.sass_least,
        }
        for record in records
        for kernel in record.kernels
        if kernel.source == "mosaic" and kernel.registers is not None
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def _headline(record: Record) -> str:
    parts = [f"{'pass' if record.ok else 'FAIL'}  {record.target:5} {record.name:40}"]
    if record.lower_seconds is not None:
        parts.append(f"lower {record.lower_seconds:.2f}s")
    if record.compile_seconds is not None:
        parts.append(f"compile {record.compile_seconds:.2f}s")
    figures = {
        "temp": record.temporaries,
        "args": record.arguments,
        "out": record.outputs,
        "flops": record.flops,
        "bytes": record.bytes_accessed,
    }
    parts += [f"{name} {_size(value)}" for name, value in figures.items() if value is not None]
    if record.failed_as_expected:
        parts.append("(failed as expected)")
    return " ".join(parts)


def _kernel(kernel: Kernel) -> Iterator[str]:
    if kernel.bundles is not None:
        yield f"[{kernel.source}] {kernel.name}: {kernel.bundles} bundles"
        return
    if kernel.registers is None:
        yield f"[{kernel.source}] {kernel.name}: {kernel.note}"
        return
    text = (
        f"[{kernel.source}] {kernel.name} ({kernel.architecture}): {kernel.registers} registers, "
        f"spills {kernel.spill_stores}/{kernel.spill_loads} B, "
        f"shared memory {_size(kernel.shared_memory or 0)}"
    )
    if kernel.blocks_per_sm is not None:
        text += f", {kernel.blocks_per_sm} blocks/SM of {kernel.threads} threads"
    yield text
    if kernel.sass_loop is not None:
        opcodes = ", ".join(f"{name} {count}" for name, count in (kernel.opcodes or {}).items())
        loop = f"longest loop {kernel.sass_loop}, at least {kernel.sass_least}: {opcodes}"
        yield f"    SASS: {kernel.sass_total} instructions, {loop}"


def _size(value: float) -> str:
    for unit in ("", "K", "M", "G"):
        if abs(value) < 1024:
            return f"{value:.1f}{unit}" if unit and value < 10 else f"{value:.0f}{unit}"
        value /= 1024
    return f"{value:.1f}T"
