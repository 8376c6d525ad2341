# SPDX-License-Identifier: Apache-2.0
"""Measure every operation at its named shapes on the default device.

Results go to `pallas_kernels/results/<device>.json`. The command may be stopped at any time, and
stops by itself when its time is spent; the same command goes on with the missing shapes.

Exit status: 0 all measured, 1 all measured but a kernel failed, 2 wrong usage, 75 shapes are left.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import jax

from pallas_kernels.bench import run as runner
from pallas_kernels.bench.case import MIB, all_cases, copy_case
from pallas_kernels.bench.table import table
from pallas_kernels.bench.timing import Effort
from pallas_kernels.common import device_slug

_LEFT = 75


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "pallas_kernels.bench", description=__doc__, formatter_class=formatter
    )
    add = parser.add_argument
    add("--only", default="", metavar="REGEX", help="only cases whose op/shape matches")
    add("--budget-seconds", type=float, default=540.0, help="stop after (default 540)")
    add("--max-bytes", type=int, help="leave out larger cases (default: 256 MiB on a CPU)")
    add("--min-seconds", type=float, default=0.02, help="length of a timed loop (default 0.02)")
    add("--repeats", type=int, default=5, help="timed loops per candidate (default 5)")
    add("--fresh", action="store_true", help="measure again what is done already")
    add("--results", type=Path, default=runner.PACKAGE / "results", metavar="DIR")
    add("--progress", type=Path, default=Path("runs/kernels"), metavar="DIR")
    add("--table", action="store_true", help="print the results file and measure nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        effort = Effort(min_seconds=options.min_seconds, repeats=options.repeats)
        wanted = re.compile(options.only)
    except (ValueError, re.error) as error:
        parser.error(str(error))
    slug = device_slug(jax.devices()[0].device_kind)
    path = options.results / f"{slug}.json"
    if options.table:
        if not path.is_file():
            parser.error(f"no results {path}; run without --table first")
        print(table(json.loads(path.read_text())))
        return 0
    cases, copy = all_cases(), copy_case()
    if not any(wanted.search(case.name) for case in cases):
        operations = ", ".join(sorted({case.op for case in cases}))
        parser.error(f"--only {options.only!r} matches no shape; operations are {operations}")
    most = _most_bytes(options.max_bytes)
    cases = [case for case in cases if case.bytes_moved <= most]
    chosen = [case for case in cases if wanted.search(case.name)]
    progress = runner.Progress(options.progress / f"{slug}.jsonl", runner.describe_run())
    if options.fresh:
        progress.forget([case.name for case in chosen])
    done = sum(case.name in progress.rows for case in chosen)
    print(f"{len(chosen)} shapes, {done} of them measured before", flush=True)
    for row in runner.run(chosen, copy, progress, effort, budget_seconds=options.budget_seconds):
        print(_line(row), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(runner.results(progress, cases, copy), indent=1) + "\n")
    left = [case.name for case in chosen if case.name not in progress.rows]
    if left:
        print(f"{len(left)} shapes are left; the same command goes on with {left[0]}")
        return _LEFT
    failed = runner.failures([progress.rows[case.name] for case in chosen])
    print(*(f"failed: {text}" for text in failed), f"results: {path}", sep="\n")
    return 1 if failed else 0


def _most_bytes(wanted: int | None) -> float:
    """Return the limit of `bytes_moved`, for which inputs are made several times over."""
    if wanted is not None:
        return wanted
    return 256 * MIB if jax.default_backend() == "cpu" else float("inf")


def _line(row: runner.Row) -> str:
    parts = [
        f"{name} failed"
        if "error" in values
        else f"{name} {values['median_seconds'] * 1e6:.1f} us ({values['percent_of_copy']:.0f} %)"
        for name, values in row["candidates"].items()
    ]
    return f"{row['op']}/{row['shape']}: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
