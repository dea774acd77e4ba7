"""Items made by a thread ahead of who takes them: so many, and so many bytes of them, and no more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

__all__ = ["ReadAhead"]

T = TypeVar("T")


def _weightless(_: object) -> int:
    return 0


class ReadAhead(Generic[T]):
    """Drives a generator in a thread. The thread begins at the first `take`, ends with the generator or with `close`, and closes it.

    Args:
        items: made in the thread; what it raises is raised by the `take` that comes to it.
        ahead: items that wait at most; one more may be in the making.
        name: of the thread.
        stop: set by `close`, for a generator that waits.
        weigh: bytes of an item.
        ahead_bytes: that wait at most; one item may wait however large.
    """

    def __init__(
        self, items: Generator[T], *, ahead: int, name: str, stop: threading.Event, weigh: Callable[[T], int] = _weightless,
        ahead_bytes: int = 1,
    ) -> None:  # fmt: skip
        self._items, self._ahead, self._stop = items, ahead, stop
        self._weigh, self._ahead_bytes, self._bytes = weigh, ahead_bytes, 0
        self._ready: deque[tuple[T, int]] = deque()
        self._changed = threading.Condition()
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = False

    def take(self, check: Callable[[], None], look_s: float = 0.2) -> T:
        """The next item; waits for it, and calls ``check`` each ``look_s`` seconds meanwhile.

        Raises StopIteration at the end, and whatever the generator or ``check`` raised.
        """
        with self._changed:
            if not self._started and not self._over:
                self._started = True
                self._thread.start()
            while not self._ready and not self._over:
                if not self._changed.wait(look_s):
                    check()
            if self._ready:
                item, weight = self._ready.popleft()
                self._bytes -= weight
                if len(self._ready) <= self._ahead // 2:  # it makes several in a row: to wake it for each would cost most
                    self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    @property
    def waiting(self) -> tuple[int, int]:
        """Items that wait, and their bytes."""
        return len(self._ready), self._bytes

    def close(self) -> None:
        """Have the thread end; does not wait for it. What was made ahead is dropped."""
        with self._changed:
            self._stop.set()
            self._over = True
            self._ready.clear()
            self._bytes = 0
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; whether it has."""
        if self._started:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for item in self._items:
                weight = self._weigh(item)
                with self._changed:
                    self._changed.wait_for(lambda weight=weight: self._over or self._has_room(weight))  # type: ignore[misc]
                    if self._over:
                        return
                    self._ready.append((item, weight))
                    self._bytes += weight
                    self._changed.notify_all()
                del item  # what was taken is its taker's alone
        except BaseException as exc:  # it belongs to who takes
            self._error = exc
        finally:
            self._items.close()
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _has_room(self, weight: int) -> bool:
        return not self._ready or (len(self._ready) < self._ahead and self._bytes + weight <= self._ahead_bytes)
