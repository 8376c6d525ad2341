# SPDX-License-Identifier: Apache-2.0
"""Turn SIGTERM and Ctrl-C into a flag that the training loop polls.

Clusters send SIGTERM some seconds before SIGKILL. The loop sees `requested` after the current
step, saves, and exits with code 75. A second signal exits at once, even in the middle of a long
compilation: a thread fed by the interpreter's C-level handler does it, because Python-level
handlers run only between bytecodes of the main thread.
"""

import os
import signal
import socket
import threading
from types import FrameType
from typing import Any

from sqzjax.cli import EXIT_PREEMPTED
from sqzjax.io.lock import check_writable

__all__ = ["EXIT_PREEMPTED", "SIGNALS", "Preemption", "check_writable"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOP = 0  # not a signal number; tells the thread to end


class Preemption:
    """Watch for SIGTERM and SIGINT inside a `with` block of the main thread.

    The first one sets `requested`; the next one ends the process with code 128 + signal number
    (143 for SIGTERM). The previous handlers return when the block ends.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the run is asked to stop, at most `timeout` seconds; return `requested`."""
        return self._event.wait(timeout)

    def __enter__(self) -> "Preemption":
        self._read, self._written = socket.socketpair()
        self._written.setblocking(False)  # required: a full buffer must not block a handler
        self._previous_descriptor = signal.set_wakeup_fd(
            self._written.fileno(), warn_on_full_buffer=False
        )
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        self._written.send(bytes([_STOP]))
        self._thread.join()
        self._read.close()
        self._written.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._event.set()

    def _watch(self) -> None:
        """Read one byte per signal of the process; `_handle` may not have run yet."""
        stopping = False
        while (number := self._read.recv(1)[0]) != _STOP:
            if number not in SIGNALS:
                continue  # somebody else's handler, say SIGCHLD
            if stopping:
                os._exit(128 + number)  # nothing may delay it; checkpoints are safe by design
            stopping = True
            self._event.set()
