# SPDX-License-Identifier: Apache-2.0
"""Command line of `python -m train` and `python -m eval`: read a config, check it, hand it over.

Everything heavy is imported late: `--help` needs neither jax nor pydantic, and a bad config is
reported before jax is imported and before anything is written.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from sqzjax.errors import DISK_ERRORS, CheckpointError, ConfigError, DataError, RequestError

_TUNABLES = "GLIBC_TUNABLES"
EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_NONFINITE = 3
EXIT_PREEMPTED = 75

_EXIT_CODES = """\
exit codes:
  0   done
  1   data, a checkpoint or a request cannot be used, or a file cannot be written
  2   bad config or usage; every problem is listed and nothing was written
"""
_RESUMABLE_EXIT_CODES = """\
  3   the loss stayed non-finite; the last good state was kept
  75  asked to stop (SIGTERM or Ctrl-C) and saved; the same command continues
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One kind of config: `schema`, `run` and `plan` are `module:name`, imported when needed.

    `plan(config, topology=...)`, where there is one, is what `--dry-run --topology` runs.
    """

    schema: str
    run: str
    plan: str | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """A command line. `commands` is keyed by the config's top-level `kind`; "" is the default."""

    name: str
    summary: str
    commands: Mapping[str, Command]
    example: str
    resumable: bool = False


def main(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Run a program and return its exit code; user errors are printed without a traceback."""
    options = _parser(program).parse_intermixed_args(arguments)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    for name in ("sqzjax", "train", "eval"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        return _print_schemas(program) if options.schema else _run(program, options)
    except ConfigError as error:
        return _report(options.config, error.problems)
    except (CheckpointError, DataError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {_disk_problem(error)}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def start(program: Program) -> NoReturn:
    """Run a program as a process, with memory in huge pages where Linux offers them.

    On CPU, XLA takes the memory of a step from the system and gives it back each time: in pages of
    4 KB, touching it anew costs up to a third of the step. The C library reads the setting when a
    process starts, so it starts again; whoever has set GLIBC_TUNABLES is left alone.
    """
    if sys.platform == "linux" and _TUNABLES not in os.environ:
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main(program))


def _parser(program: Program) -> argparse.ArgumentParser:
    modules = ", ".join(command.schema.replace(":", ".") for command in program.commands.values())
    codes = _EXIT_CODES + _RESUMABLE_EXIT_CODES * program.resumable
    parser = argparse.ArgumentParser(
        prog=f"python -m {program.name}",
        description=program.summary,
        epilog=f"{codes}\nexample:\n  {program.example}\n\nThe keys of a config are the "
        f"fields of {modules}; --schema prints them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="replace one setting; key.sub=value reaches inside, key.0.sub=value into a list",
    )
    parser.add_argument("--workdir", type=_folder, metavar="DIR", help="where results are written")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the resolved config, run nothing"
    )
    if any(command.plan for command in program.commands.values()):
        parser.add_argument(
            "--topology",
            metavar="CHIP:TORUS",
            help="with --dry-run: compile for TPU chips that need not be here, such as v5p:4x4x4, "
            "and tell whether the run fits",
        )
    if program.resumable:
        parser.add_argument(
            "--resume",
            type=_resume,
            default="auto",
            metavar="auto|never|STEP",
            help="auto: continue from the newest good checkpoint of the folder, if any (default)",
        )
    parser.add_argument("--schema", action="store_true", help="print every key and its default")
    return parser


def _folder(text: str) -> Path:
    if not text.strip():  # an unset shell variable; Path("") is the current folder
        raise argparse.ArgumentTypeError(f"{text!r} must name a folder; is a shell variable unset?")
    return Path(text)


def _resume(text: str) -> str:
    if text not in ("auto", "never") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be auto, never or a step number")
    return text


def _disk_problem(error: OSError) -> str:
    name = "a file" if error.filename is None else os.fsdecode(error.filename)
    return (
        f"cannot use {name} ({error.strerror}); free the disk, permit access or choose another "
        "--workdir, then give the same command again"
    )


def _run(program: Program, options: argparse.Namespace) -> int:
    from sqzjax import config as configs

    if options.config is None:
        raise ConfigError(f"no CONFIG given; for example: {program.example}")
    if "=" in options.config and not Path(options.config).exists():
        raise ConfigError("CONFIG must come before key=value")
    path = Path(options.config)
    command = _command_for(program, path)
    config = configs.load(_load(command.schema), path, options.overrides)
    if topology := getattr(options, "topology", None):
        if not options.dry_run or command.plan is None:
            raise ConfigError(
                f"--topology {topology} plans a run without starting it: "
                + ("add --dry-run" if command.plan else "this kind of config has no such plan")
            )
        return _load(command.plan)(config, topology=topology)
    workdir = options.workdir or getattr(config, "workdir", None) or Path("runs") / path.stem
    extra = {"resume": options.resume} if program.resumable else {}
    run = _load(command.run)
    return run(config, workdir=Path(workdir), dry_run=options.dry_run, **extra)


def _command_for(program: Program, path: Path) -> Command:
    from sqzjax import config as configs

    default = program.commands[""]
    if len(program.commands) == 1:
        return default
    kind = configs.read(_load(default.schema), path).get(configs.KIND)
    return program.commands.get(kind, default) if isinstance(kind, str) else default


def schema_for(program: Program, path: Path) -> Any:
    """Return the schema type that a program reads a config file with."""
    return _load(_command_for(program, path).schema)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _print_schemas(program: Program) -> int:
    from sqzjax.config import describe

    print("\n\n".join(describe(_load(command.schema)) for command in program.commands.values()))
    return EXIT_OK


def _report(name: str | None, problems: Sequence[str]) -> int:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"error: {name or 'usage'}: {count}", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return EXIT_CONFIG
