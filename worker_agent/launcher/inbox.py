"""How other threads reach the launcher's loop."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Inbox"]


class Inbox:
    """Calls that other threads want the loop to make, behind a descriptor that becomes readable."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._wake: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        if self._wake is None:
            raise ValueError("the inbox is closed")
        return self._wake

    def post(self, call: Callable[[], None]) -> None:
        """Have the loop make this call; from any thread. Nothing happens once the inbox is closed."""
        with self._lock:
            if self._wake is not None:
                self._calls.append(call)
                os.eventfd_write(self._wake, 1)

    def serve(self) -> None:
        """Make the calls that have come; in the loop's thread."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fileno())
        while self._calls:
            self._calls.popleft()()

    def close(self) -> None:
        with self._lock:
            wake, self._wake = self._wake, None
        if wake is not None:
            os.close(wake)
