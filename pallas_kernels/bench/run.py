# SPDX-License-Identifier: Apache-2.0
"""Measure cases one by one, within a time budget, so that another run can go on.

Each finished case is a line of a progress file. A run of the same sources, device and versions
skips what is there; the results are written from it. A copy of memory is measured anew in every
process, and bandwidths are compared with that of their own process.
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.bench.case import BenchCase
from pallas_kernels.bench.timing import Effort, Timing, as_dict, measure

Row = dict[str, Any]
PACKAGE = Path(__file__).resolve().parents[1]


class Progress:
    """The finished rows of a run, in a file of JSON lines that survives interruption."""

    def __init__(self, path: Path, header: Mapping[str, Any]):
        """Read `path`; rows of other sources, versions or devices are dropped."""
        self.path = path
        self.header = dict(header)
        self.rows: dict[str, Row] = {}
        header, *rows = _read(path) or [{}]
        if _same_run(header, self.header):
            self.rows = {_key(row): row for row in rows}

    def forget(self, names: Sequence[str]) -> None:
        """Drop rows, so that they are measured again."""
        for name in names:
            self.rows.pop(name, None)

    def add(self, row: Row) -> None:
        """Keep a row; the whole file is replaced at once, so that it is never half a file."""
        self.rows[_key(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in (self.header, *self.rows.values()))
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)


def describe_run() -> dict[str, Any]:
    """Return device, processor, versions, date, commit and a digest of the kernels' sources."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": processor_name(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "numpy": np.__version__,
            "runtime": device.client.platform_version.splitlines()[0],
        },
        "commit": _commit(),
        "sources": _digest(),
        "date": _now(),
    }


def processor_name() -> str:
    """Return what this machine calls its processor."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run(
    cases: Sequence[BenchCase],
    copy: BenchCase,
    progress: Progress,
    effort: Effort,
    *,
    budget_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """Measure the copy and what is missing of `cases`; yield each row when it is kept.

    Stops before a case that the budget is unlikely to hold, judged by the longest so far; one is
    always measured, so that repeated runs come to an end.
    """
    start = clock()
    reference = _row(copy, effort, None)
    progress.add(reference)
    yield reference
    bandwidth = next(iter(reference["candidates"].values()))["gb_per_s"]
    longest = 0.0
    missing = [case for case in cases if case.name not in progress.rows]
    for case in missing:
        before = clock()
        if case is not missing[0] and before - start + longest > budget_seconds:
            return
        row = _row(case, effort, bandwidth)
        longest = max(longest, clock() - before)
        progress.add(row)
        yield row


def results(progress: Progress, cases: Sequence[BenchCase], copy: BenchCase) -> dict[str, Any]:
    """Return everything measured for the results file; `complete` if no case is missing."""
    names = [copy.name, *(case.name for case in cases)]
    rows = [progress.rows[name] for name in names if name in progress.rows]
    return {**progress.header, "complete": len(rows) == len(names), "rows": rows}


def failures(rows: Sequence[Row]) -> list[str]:
    """Return what went wrong with the candidate that each case is about, its first."""
    first = [(_key(row), next(iter(row["candidates"].items()))) for row in rows]
    return [f"{key} {name}: {c['error']}" for key, (name, c) in first if "error" in c]


def _row(case: BenchCase, effort: Effort, copy_bandwidth: float | None) -> Row:
    measured = measure(case, effort)
    candidates = {name: as_dict(timing) for name, timing in measured.timings.items()}
    times = [t.median_seconds if isinstance(t, Timing) else None for t in measured.timings.values()]
    for values, seconds in zip(candidates.values(), times, strict=True):
        if seconds is None:
            continue
        values["gb_per_s"] = case.bytes_moved / seconds / 1e9
        if copy_bandwidth is None:
            copy_bandwidth = values["gb_per_s"]
        values["percent_of_copy"] = 100 * values["gb_per_s"] / copy_bandwidth
        if times[0] is not None:
            values["ratio_to_first"] = seconds / times[0]
    return {
        "op": case.op,
        "shape": case.shape_name,
        "bytes_moved": case.bytes_moved,
        "copy_gb_per_s": copy_bandwidth,
        "input_copies": measured.copies,
        "from_cache": measured.from_cache,
        "date": _now(),
        "candidates": candidates,
    }


def _key(row: Row) -> str:
    return f"{row['op']}/{row['shape']}"


def _same_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    names = ("device", "platform", "processor", "versions", "sources")
    return all(old.get(name) == new[name] for name in names)


def _read(path: Path) -> list[Row]:
    """Return header and rows; nothing if they are not what `Progress.add` writes."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        return []
    good = all(isinstance(line, dict) for line in lines)
    good = good and all({"op", "shape", "candidates"} <= line.keys() for line in lines[1:])
    return lines if good else []


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
