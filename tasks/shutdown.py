"""The end of a worker: uploads get a little time, then give their parts back, then whatever hangs is killed.

The main process writes a deadline into a page of memory that its pool processes share, because a signal would end them at once.
Nothing is lost by any of it: a part that was given back, or whose process was killed, is claimed by the next uploader.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterable

__all__ = ["begin", "is_orphan", "is_over", "owner_pid", "share", "watch"]

log = logging.getLogger(__name__)

_page: mmap.mmap | None = None
_owner_pid = 0
_watching = False


def share() -> None:
    """Make the page, before the pool forks."""
    global _page, _owner_pid
    if _page is None:
        _page, _owner_pid = mmap.mmap(-1, mmap.PAGESIZE), os.getpid()


def owner_pid() -> int:
    """The worker's main process; 0 outside a worker."""
    return _owner_pid


def is_orphan() -> bool:
    """Whether this process of the pool has lost its worker."""
    return _owner_pid not in {0, os.getpid(), os.getppid()}


def begin(drain_s: float) -> None:
    """Let uploads go on for ``drain_s``; a second call does not prolong that."""
    if _page is not None and struct.unpack_from("d", _page)[0] == 0.0:
        struct.pack_into("d", _page, 0, time.monotonic() + drain_s)


def is_over() -> bool:
    """Whether uploads must stop; asked between two pieces, in any process of this worker."""
    if _page is None:
        return False
    deadline: float = struct.unpack_from("d", _page)[0]
    return deadline != 0.0 and time.monotonic() >= deadline


def watch(children: Callable[[], Iterable[int]], *, kill_s: float) -> None:
    """Kill what has not ended ``kill_s`` from now: the pool first, then this process. Once is enough."""
    global _watching
    if _watching:
        return
    _watching = True

    def kill() -> None:
        time.sleep(kill_s)
        log.error("uploads that hang are killed after %.0f s; others will resume them", kill_s)
        for pid in children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=kill, name="dtr-shutdown", daemon=True).start()
