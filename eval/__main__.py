# SPDX-License-Identifier: Apache-2.0
"""`python -m eval CONFIG [key=value ...]`: evaluate models, or measure their speed."""

import sys
from pathlib import Path
from typing import Any

from sqzjax.cli import EXIT_OK, Command, Program, main

PROGRAM = Program(
    name="eval",
    summary="Evaluate models side by side (or time them: `kind: speed`) and write a report.",
    commands={
        "": Command(schema="eval.config:EvalConfig", run="eval.run:run"),
        "speed": Command(schema="eval.speed_config:SpeedConfig", run="eval.__main__:run_speed"),
    },
    example="python -m eval configs/eval/demo.yaml --workdir runs/demo/eval",
)


def run_speed(config: Any, *, workdir: Path, dry_run: bool) -> int:
    """Time models, write `speed.json` and `speed.md`, and print the tables."""
    if dry_run:
        from sqzjax.config import dump

        print(dump(config), end="")
        return EXIT_OK
    from eval import speed

    print(speed.markdown(speed.run_speed(config, workdir)))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(PROGRAM))
