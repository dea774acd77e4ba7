"""Runs a command that ends when its parent does: ``python -I -S tether.py PARENT_PID COMMAND...``.

Guarantee: from the moment COMMAND runs, the kernel sends it SIGTERM when the thread that started it ends, however that happens.
It is a file of its own and imports nothing of dtr, because it stands between a fork and an exec and so has to start fast; doing
the same in ``preexec_fn`` would run Python in a forked copy of a process that may have threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Tie this process to its parent and become the command."""
    parent, command = int(argv[0]), argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        print(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return 126
    if os.getppid() != parent:  # it ended before the call above took effect
        return 0
    try:
        os.execv(command[0], command)  # noqa: S606 - no shell is wanted
    except OSError as exc:
        print(f"{command[0]} cannot be started: {exc}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
