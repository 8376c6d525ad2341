# SPDX-License-Identifier: Apache-2.0
"""`python -m train.sweep_child PARENT CPUS COMMAND...`: become COMMAND, bound to a parent process.

On Linux the command gets SIGTERM when the process PARENT dies, however it dies, so a killed sweep
leaves no job behind: each saves and ends. CPUS ("" or "0,1") are the cores it may use.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_EXIT_PREEMPTED = 75  # that of sqzjax.cli, whose import would delay every job


def main(parent: str, cpus: str, *command: str) -> None:
    """Replace this process by `command`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before the line above
            sys.exit(_EXIT_PREEMPTED)
        if cpus:
            os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
