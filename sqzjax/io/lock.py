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
import time
import weakref
from pathlib import Path

from sqzjax.errors import CheckpointError, ConfigError

NAME = ".lock"
_PATIENCE = 20  # readings of the name in the lock file


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

    def acquire(self) -> "WorkdirLock":
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
            busy = isinstance(error, BlockingIOError)
            holder = _holder(descriptor) if busy else ""
            os.close(descriptor)
            if busy:
                raise CheckpointError(
                    f"folder {self.path.parent} is in use by {holder}; wait for it, stop it, "
                    "or choose another folder"
                ) from None
            raise CheckpointError(
                f"cannot lock {self.path} ({error.strerror}); it needs space and `flock`"
            ) from error
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        return self

    def release(self) -> None:
        """Give the lock up; harmless when it is not held."""
        if self._close is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # also for copies in forked processes
            self._close()
            self._close = None

    def __enter__(self) -> "WorkdirLock":
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _holder(descriptor: int) -> str:
    """Return who has the lock; whoever took it a moment ago may still be writing its name."""
    for _ in range(_PATIENCE):
        time.sleep(0.05)
        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
            return f"process {owner['pid']} on host {owner['host']}"
        except (ValueError, TypeError, KeyError):
            continue
    return "another process"


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
