"""How little a pool process may get in the way of the trainers that it works beside."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Final

__all__ = ["give_way"]

log = logging.getLogger(__name__)

_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}  # the C library has no wrapper
_WHO_PROCESS: Final = 1
_IDLE: Final = 3 << 13


def give_way(nice: int) -> None:
    """Lower this process's priority by ``nice`` (0 to 19), and with any of it use the disk only when nobody else does.

    At 19 a process on busy cores gets a seventieth of what a trainer gets there (at 10 a tenth, which a loop of one thread beside two
    busy uploads can feel), and all that is left over. Where Linux first shares the processor out among sessions ("autogroup"), nice
    counts inside a session only, so a worker that leads its own lowers that as well. What the system does not permit or know is left as
    it is: an upload that is not polite is better than none.
    """
    if not nice:
        return
    try:
        os.nice(nice)
    except OSError as exc:
        log.info("the upload keeps its priority: %s", exc)
    if os.getsid(0) in {os.getpid(), os.getppid()}:  # this worker's own session: no trainer and no shell is in it
        _lower_session(nice)
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None and ctypes.CDLL(None, use_errno=True).syscall(number, _WHO_PROCESS, 0, _IDLE) != 0:
        log.info("the upload keeps its priority at the disk: %s", os.strerror(ctypes.get_errno()))


def _lower_session(nice: int) -> None:
    try:
        with open("/proc/self/autogroup", "w", encoding="ascii") as group:
            group.write(str(nice))
    except OSError as exc:  # a kernel without it, or a container that may not write there
        log.info("the upload's session keeps its priority: %s", exc)
