# SPDX-License-Identifier: Apache-2.0
"""Compile kernels ahead of time for TPUs and GPUs that are not there, and check their budgets.

Without MODULE all of `tests/pallas_kernels/aot_*.py` is compiled. Shown for each case and target:
seconds to lower and to compile, bytes of XLA's temporaries, arguments and results; on CUDA the
registers, spills, shared memory and resident blocks of every kernel; with --sass the instructions
of the longest loop, with --schedule the bundles of TPU kernels (both are also measured when a case
states a budget for them).

TPU targets need the wheel `libtpu` (in the extra `dev`), CUDA targets those of the extra `aot-cuda`
(`make aot-cuda`); neither needs a device or a driver. XLA does not autotune without a device, so
its own matrix products may differ from those on the device; Pallas kernels do not.

Exit status: 0 all passed, 1 something failed, 2 wrong usage or a missing compiler.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.aot import report, targets
from tests.aot.cases import default_modules
from tests.aot.parent import Options, run_target


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tests.aot", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("modules", nargs="*", metavar="MODULE", help="a .py path or a dotted name")
    default = ",".join(targets.DEFAULT)
    add("--targets", default=default, help=f"of {','.join(targets.NAMES)} (default {default})")
    add("--only", default="", metavar="REGEX", help="only cases whose names match")
    add("--lower-only", action="store_true", help="lowering alone: fast, needs no compiler")
    add("--fast", action="store_true", help="leave out the slow cases")
    add("--skip-missing", action="store_true", help="skip targets without an installed compiler")
    add("--sass", action="store_true", help="count instructions of Mosaic GPU kernels")
    add("--schedule", action="store_true", help="count instruction bundles of TPU kernels")
    add("--timeout", type=float, default=300.0, help="seconds for one case (default 300)")
    add("--json", type=Path, metavar="FILE", help="write all records to FILE")
    add("--kernels", type=Path, metavar="FILE", help="write what the Pallas GPU kernels take up")
    add("--keep", type=Path, metavar="DIR", help="keep the dumps (PTX, SASS, schedules) in DIR")
    return parser


def _choose_targets(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    chosen = [name for name in options.targets.split(",") if name]
    unknown = sorted(set(chosen) - set(targets.NAMES))
    if unknown:
        parser.error(f"unknown targets {unknown}; known: {', '.join(targets.NAMES)}")
    if options.lower_only:
        return chosen
    missing = {name: why for name in chosen if (why := targets.missing_support(name))}
    for name, why in missing.items():
        if not options.skip_missing:
            parser.error(
                f"cannot compile for {name}: {why} (--skip-missing skips such targets, "
                "--lower-only needs no compiler)"
            )
        print(f"skip  {name:5} {why}")
    return [name for name in chosen if name not in missing]


def _clean(folder: Path) -> Path:
    """Return a folder for dumps without those of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in targets.NAMES:
        for old in folder.glob(f"{name}-[0-9]*"):
            shutil.rmtree(old)
    return folder.resolve()


def main(arguments: list[str] | None = None) -> int:
    """Run the checker; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    chosen = _choose_targets(parser, options)
    modules = [
        str(Path(name).resolve()) if name.endswith(".py") else name for name in options.modules
    ]
    wanted = Options(
        modules=tuple(modules or default_modules()),
        only=options.only,
        lower_only=options.lower_only,
        fast=options.fast,
        sass=options.sass,
        schedule=options.schedule,
        timeout=options.timeout,
    )
    records = []
    with tempfile.TemporaryDirectory(prefix="aot-") as temporary:
        folder = _clean(options.keep) if options.keep else Path(temporary)
        for target in chosen:
            for record in run_target(target, wanted, folder):
                print(*report.lines(record), sep="\n", flush=True)
                records.append(record)
    print(report.summary(records))
    if options.json:
        report.write_json(records, options.json)
    if options.kernels:
        report.write_kernels(records, options.kernels)
    passed = all(record.ok for record in records) and (records or not chosen)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
