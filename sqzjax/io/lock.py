# SPDX-License-Identifier: Apache-2.0
"""One writer per folder: a lock that dies with its process.

The kernel holds the lock (`flock`), so `kill -9` releases it; the text inside the file is only for
the message to the process that comes second. Processes forked from the holder share the lock until
they end. Works on local disks and on network file systems that support `flock`.
"""

import fcntl
import json
import os
import socket
import tempfile
import weakref
from pathlib import Path
from typing import Self

from sqzjax.errors import CheckpointError, ConfigError

NAME = ".lock"


class WorkdirLock:
    """Exclusive lock on a folder; taken by `acquire` or `with`, refused while anybody holds it.

    The file `<folder>/.lock` stays after release: deleting it would let two processes lock two
    different files of the same name.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder).absolute() / NAME
        self._close: weakref.finalize | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._close is not None and self._close.alive

    def acquire(self) -> Self:
        """Take the lock; raise `CheckpointError` naming the holder if another object has it."""
        if self.held:
            return self
        check_writable(self.path.parent)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = {"pid": os.getpid(), "host": socket.gethostname()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise CheckpointError(self._refusal(holder)) from None
            raise CheckpointError(
                f"cannot lock {self.path}: {error}; use a file system with flock"
            ) from error
        self._close = weakref.finalize(self, os.close, descriptor)
        return self

    def release(self) -> None:
        """Give the lock up; harmless when it is not held."""
        if self._close is not None:
            self._close()
            self._close = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _refusal(self, content: bytes) -> str:
        try:
            owner = json.loads(content)
            holder = f"process {owner['pid']} on host {owner['host']}"
        except (ValueError, TypeError, KeyError):
            holder = "another process"  # it has the lock but has not yet written its name
        return (
            f"folder {self.path.parent} is in use by {holder}; wait for it, stop it, "
            "or choose another folder"
        )


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Create `folder` if needed and prove that a file can be written; else raise `ConfigError`."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"folder {os.fspath(folder)} is not writable ({error.strerror}); "
            "choose another folder or free its disk"
        ) from error
