# SPDX-License-Identifier: Apache-2.0
"""Run the cases of a target in child processes; a crash or a hang is the failure of one case."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.aot import targets
from tests.aot.cases import ROOT, Record

_TELLING = re.compile(r"LLVM ERROR|fatal|check failed|assert|error:", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compile and what to dump of it, for all targets of a run."""

    modules: tuple[str, ...]
    only: str = ""  # regular expression on case names
    lower_only: bool = False
    fast: bool = False  # leave out the slow cases
    sass: bool = False
    schedule: bool = False
    timeout: float = 300.0  # seconds for one case


def run_target(target: str, options: Options, folder: Path) -> list[Record]:
    """Return the records of all cases of a target; dumps go to new folders `<target>-<n>`."""
    records: list[Record] = []
    attempt = 0
    while True:
        work = folder / f"{target}-{attempt}"
        new, finished = _attempt(target, options, work, skip=[r.name for r in records])
        records += new
        if finished:
            return records
        attempt += 1


def _attempt(
    target: str, options: Options, work: Path, skip: list[str]
) -> tuple[list[Record], bool]:
    """Run one child; return its records, with that of the case in which it died if it did.

    The second value says that nothing is left for another child.
    """
    for name in ("xla", "mosaic", "llo"):
        (work / name).mkdir(parents=True)
    results, log = work / "results.jsonl", work / "log.txt"
    request = {
        "options": dataclasses.asdict(options),
        "target": target,
        "work": str(work),
        "results": str(results),
        "skip": skip,
    }
    ending = _run_child(
        request,
        results,
        log,
        options,
        targets.environment(target, work, lower_only=options.lower_only),
    )
    lines = _json_lines(results)
    records = [Record.from_dict(line["record"]) for line in lines if "record" in line]
    endings = [line["finished"] for line in lines if "finished" in line]
    if endings:
        return records, endings[0]
    started = [line["start"] for line in lines if "start" in line]
    text = log.read_text(errors="replace")
    if started and started[-1] not in {record.name for record in records}:
        died = Record(started[-1], target, error=f"{ending}: {_tail(text)}")
        return [*records, died], False
    error = f"the child process failed outside of any case: {text[-3000:]}"
    return [*records, Record("(start-up)", target, error=error)], True


def _run_child(
    request: dict[str, Any], results: Path, log: Path, options: Options, extra: dict[str, str]
) -> str:
    """Run a child until it ends or a case hangs; return how it ended."""
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", **extra}
    path = [str(ROOT), os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-m", "tests.aot.child", json.dumps(request)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
        try:
            while process.poll() is None:
                time.sleep(0.05)
                last = _json_lines(results)[-1:]
                if last and time.time() - last[0].get("at", time.time()) > options.timeout:
                    return f"ran past {options.timeout:g} s"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return f"the compiler aborted the process (status {process.returncode})"


def _tail(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    return "\n".join(telling[-5:] or lines[-8:])[-1500:]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file that another process may be writing."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in _whole_lines(text)]


def _whole_lines(text: str) -> Iterable[str]:
    return text[: text.rfind("\n") + 1].splitlines()
