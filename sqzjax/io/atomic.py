# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced as a whole: a reader sees the old content or the new one, never half.

The content is on disk before the file gets its name, so that holds after power loss too.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqzjax.errors import DISK_ERRORS


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` at the end, and vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        # A failed write names no file, and the temporary name says nothing to the user.
        if error.errno in DISK_ERRORS and error.filename in (None, os.fspath(temporary)):
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
