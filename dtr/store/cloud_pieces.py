"""A large object on its way to a cloud: its pieces, how far they are, and the temporary name that they go to."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from typing import Final

from dtr.clock import Clock
from dtr.store.base import RESERVED, Progress
from dtr.store.pieces import go_on, piece_bytes

__all__ = ["PIECES_AT_ONCE", "Pieces", "is_temporary", "temporary_name", "watch"]

_log = logging.getLogger(__name__)
PIECES_AT_ONCE: Final = 4
_TEMPORARY: Final = f"{RESERVED}tmp-"
_TICK_S: Final = 1.0
_STALLED_S: Final = 30.0


class Pieces:
    """The pieces of a large object as obstore asks for them, not copied, and how far it must have come to ask for more.

    ``moved`` is set when that changes; when ``over`` is set, the next request for a piece ends the transfer.
    """

    def __init__(self, content: memoryview) -> None:
        self.piece_bytes = piece_bytes(len(content))
        self.moved, self.over = threading.Event(), threading.Event()
        self._content, self._given = content, 0

    @property
    def done_bytes(self) -> int:
        """What is done for certain: obstore asks for one more only when at most so many are under way."""
        return max(0, self._given - PIECES_AT_ONCE - 1) * self.piece_bytes

    def __iter__(self) -> Pieces:
        return self

    def __next__(self) -> memoryview:
        go_on(self.over)
        start = self._given * self.piece_bytes
        if start >= len(self._content):
            raise StopIteration
        self._given += 1
        self.moved.set()
        return self._content[start : start + self.piece_bytes]


def watch(key: str, pieces: Pieces, is_over: Callable[[], bool], progress: Progress | None, clock: Clock) -> None:
    """Return when ``is_over``; report each piece, and at least once a second. A transfer that stands still is logged."""
    done, since = 0, clock.monotonic()
    while not is_over():
        pieces.moved.wait(_TICK_S)
        pieces.moved.clear()
        if pieces.done_bytes != done:
            done, since = pieces.done_bytes, clock.monotonic()
        elif clock.monotonic() - since > _STALLED_S:
            _log.warning("no piece of %s was completed for %.0f s; still trying", key, _STALLED_S, extra={"key": key})
            since = clock.monotonic()
        if progress:
            progress(done)


def temporary_name(key: str) -> str:
    """A name of its own for each writer, in the key's folder, that ``list`` does not show."""
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}{_TEMPORARY}{secrets.token_hex(6)}~{name}"


def is_temporary(name: str, *, of: str = "") -> bool:
    """Whether an object's name is such a one: of any key, or of those whose last part is ``of``."""
    last = name.rpartition("/")[2]
    return last.startswith(_TEMPORARY) and last.endswith(f"~{of}" if of else "")
