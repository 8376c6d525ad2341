# SPDX-License-Identifier: Apache-2.0
"""Folders of weights that appear whole or not at all, and replace only folders of weights."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqzjax.errors import CheckpointError
from sqzjax.io.manifest import sync_folder

CONFIG = "config.json"


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a path that holds something, unless `overwrite` and it is a checkpoint."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists and is not empty; choose another or overwrite=True")
    if not (target / CONFIG).is_file():
        raise CheckpointError(f"{target} is not a checkpoint (no {CONFIG}) and is not replaced")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` at the end, and vanishes on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, target: Path) -> None:
    """Give the finished folder its name; the one it replaces is deleted afterwards."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    sync_folder(temporary)
    if target.is_dir() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old)
    else:
        os.rename(temporary, target)
    sync_folder(target.parent)
