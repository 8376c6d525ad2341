# SPDX-License-Identifier: Apache-2.0
"""Where and with what a record was made."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from eval.machine import usable_cores

_PACKAGES = ("sqzjax", "jax", "jaxlib", "flax", "optax", "numpy")


def provenance(kind: str, *, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return date, commit, machine load and versions; `packages` come besides the usual ones."""
    versions = {name: _version(name) for name in (*_PACKAGES, *packages)}
    return {
        "kind": kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cores": usable_cores(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def _commit() -> str:
    """Return the commit of this checkout, marked when files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        run = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
