"""Items made by a thread ahead of who takes them: so many and no more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["ReadAhead"]

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Drives an iterator in a thread. The thread begins at the first `take`, and ends with the iterator or with `close`.

    Args:
        items: made in the thread; what it raises is raised by the `take` that comes to it.
        ahead: items that wait at most; one more may be in the making.
        name: of the thread.
        stop: set by `close`, for an iterator that waits.
    """

    def __init__(self, items: Iterator[T], *, ahead: int, name: str, stop: threading.Event) -> None:
        self._items, self._ahead, self._stop = items, ahead, stop
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = False

    def take(self, check: Callable[[], None], look_s: float = 0.2) -> T:
        """The next item; waits for it, and calls ``check`` each ``look_s`` seconds meanwhile.

        Raises StopIteration at the end, and whatever the iterator or ``check`` raised.
        """
        with self._changed:
            if not self._started:
                self._started = True
                self._thread.start()
            while not self._ready and not self._over:
                if not self._changed.wait(look_s):
                    check()
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Have the thread end; does not wait for it. What was made ahead is dropped."""
        with self._changed:
            self._stop.set()
            self._over = True
            self._ready.clear()
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; whether it has."""
        if self._started:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._ahead or self._over)
                    if self._over:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as exc:  # it belongs to who takes
            self._error = exc
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()
