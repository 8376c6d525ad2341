# SPDX-License-Identifier: Apache-2.0
"""Find the fastest tile sizes of each kernel: `python -m pallas_kernels.tune` on the device.

An operation offers `tune_cases(target)` in its `bench.py`: benchmark cases whose shape name is the
key of the tuning table and whose candidates are named by their sizes as JSON. The winners go to
`tuning/<device>.json`, which the operations read when they are traced; shapes that are not in it
keep their derived sizes. Run again to add shapes; what is measured replaces what was there.

Exit status: 0 written, 2 wrong usage or nothing to tune on this device.
"""

import argparse
import importlib
import importlib.util
import json
import pkgutil
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import pallas_kernels
from pallas_kernels.bench.case import BenchCase
from pallas_kernels.bench.timing import Effort, Timing, measure
from pallas_kernels.common import Target, current_target, device_slug

FOLDER = Path(__file__).resolve().parent / "tuning"


def tune(
    cases: Sequence[BenchCase], effort: Effort, *, budget_seconds: float
) -> Iterator[tuple[BenchCase, dict[str, int], float]]:
    """Yield (case, best sizes, gain over the derived sizes) until the time is spent.

    The first candidate of a case has the derived sizes; it stays unless another is 2 % faster,
    so that noise does not fill the table.
    """
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > budget_seconds:
            return
        timings = measure(case, effort).timings
        times = {n: t.median_seconds for n, t in timings.items() if isinstance(t, Timing)}
        derived = next(iter(case.candidates))
        if derived not in times:
            continue
        best = min(times, key=times.__getitem__)
        gain = times[derived] / times[best]
        if gain > 1.02:
            yield case, json.loads(best), gain


def tuning_cases(target: Target) -> list[BenchCase]:
    """Return what every operation wants tuned on this device."""
    found: list[BenchCase] = []
    for package in pkgutil.iter_modules(pallas_kernels.__path__):
        name = f"pallas_kernels.{package.name}.bench"
        if package.ispkg and importlib.util.find_spec(name):
            module = importlib.import_module(name)
            found += getattr(module, "tune_cases", lambda target: [])(target)
    return found


def update(path: Path, case: BenchCase, sizes: dict[str, int], about: dict[str, Any]) -> None:
    """Put one winner into a tuning file; the file is replaced whole."""
    table = json.loads(path.read_text()) if path.is_file() else {}
    table["about"] = about
    table.setdefault(case.op, {})[case.shape_name] = sizes
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Tune; return the exit status."""
    parser = argparse.ArgumentParser("pallas_kernels.tune", description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="only keys that match")
    parser.add_argument("--budget-seconds", type=float, default=300.0, help="default 300")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the tables are")
    options = parser.parse_args(arguments)
    try:
        wanted = re.compile(options.only)
    except re.error as error:
        parser.error(f"--only {options.only!r} is no regular expression: {error}")
    target = current_target()
    cases = [case for case in tuning_cases(target) if wanted.search(case.name)]
    if not cases:
        print(f"nothing to tune on {target.kind}", file=sys.stderr)
        return 2
    path = options.folder / f"{device_slug(target.kind)}.json"
    about = {"device": target.kind, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    for case, sizes, gain in tune(cases, Effort(repeats=3), budget_seconds=options.budget_seconds):
        update(path, case, sizes, about)
        print(f"{case.name}: {sizes}, {gain:.2f} times the derived sizes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
