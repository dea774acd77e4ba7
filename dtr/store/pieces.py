"""A large transfer as pieces that a few threads move at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from dtr.store.base import Progress

__all__ = ["OverError", "Piece", "cut", "go_on", "move", "piece_bytes"]

Work = Callable[["Piece", threading.Event], None]
_SMALLEST_BYTES: Final = 16 << 20
_MOST_PIECES: Final = 9_000  # S3 allows 10,000 parts
_TICK_S = 1.0  # how long the caller's thread waits before it reports progress again, so that it can also cancel


class OverError(Exception):
    """Another piece failed, or the caller cancelled: no more is sent. Never leaves the store."""


def go_on(over: threading.Event) -> None:
    """Raise if this piece is not wanted any more; asked before each new attempt."""
    if over.is_set():
        raise OverError


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes [start, end) of the transfer; ``number`` counts from 1, as S3's parts do."""

    number: int
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def piece_bytes(size_bytes: int) -> int:
    """The size of the pieces of an object: 16 MiB, or the whole MiB from which 9,000 pieces suffice.

    The same in every store, so that a piece's checksum is computed once, and is that of S3's part as well as that of the manifest.
    """
    needed = -(-size_bytes // _MOST_PIECES)
    return max(_SMALLEST_BYTES, -(-needed >> 20) << 20)


def cut(size_bytes: int, piece_bytes: int) -> Iterator[Piece]:
    """Cut [0, size_bytes) into pieces of ``piece_bytes``, the last one shorter; nothing gives no piece."""
    for number, start in enumerate(range(0, size_bytes, piece_bytes), start=1):
        yield Piece(number=number, start=start, end=min(start + piece_bytes, size_bytes))


def move(work: Work, pieces: Iterator[Piece], *, threads: int, progress: Progress | None = None, ramp: bool = False) -> None:
    """Call ``work`` for every piece, at most ``threads`` at a time; return when all are done.

    The first error (of a piece, or of ``progress``, which is called in this thread) stops the rest and is raised once the pieces
    under way have ended; ``work`` gets an event that is set then, so that it need not try again. A single thread works in the
    caller's, without a pool. ``ramp``: begin with one piece, and allow one more with each that is done: so that a sender that is killed
    again and again has soon done one each time, where several at once would all be in the middle.
    """
    if threads == 1:
        _move_here(work, pieces, threading.Event(), progress)
        return
    moving = _Moving(work, pieces, 1 if ramp else threads)
    helpers = [threading.Thread(target=moving.run, name=f"dtr-store-{n}") for n in range(threads)]
    try:
        for helper in helpers:
            helper.start()
        moving.begin()
        if progress:
            for done_bytes in moving.news():
                progress(done_bytes)
        for helper in helpers:
            helper.join()
    finally:
        moving.over.set()
        moving.begin()
        for helper in helpers:
            if helper.ident is not None:
                helper.join()
    error, moving.error = moving.error, None  # its frames would hold what holds it, and the memory of its piece
    if error is not None:
        try:
            raise error
        finally:
            del error


class _Moving:
    """Pieces that threads take one after the other, each when it is done with its last: the caller's thread need not feed them."""

    def __init__(self, work: Work, pieces: Iterator[Piece], window: int) -> None:
        self.over = threading.Event()
        self.error: BaseException | None = None
        self._work, self._pieces, self._window = work, pieces, window
        self._changed = threading.Condition()
        self._started = threading.Event()
        self._running, self._done_bytes, self._left = 0, 0, True

    def begin(self) -> None:
        """All threads are there. While some work, starting another would wait for a processor."""
        self._started.set()

    def run(self) -> None:
        """Work until no piece is left or it is over; what each thread does."""
        self._started.wait()
        try:
            while (piece := self._next()) is not None:
                self._work(piece, self.over)
                self._done(piece)
        except BaseException as exc:  # it is raised in the caller's thread
            with self._changed:
                self.error = self.error or exc
                self.over.set()
                self._changed.notify_all()

    def _next(self) -> Piece | None:
        with self._changed:
            while self._left and self._running >= self._window and not self.over.is_set():
                self._changed.wait(_TICK_S)
            if self.over.is_set() or not self._left:
                return None
            piece = next(self._pieces, None)
            if piece is None:
                self._left = False
                self._changed.notify_all()
            else:
                self._running += 1
            return piece

    def _done(self, piece: Piece) -> None:
        with self._changed:
            self._running -= 1
            self._done_bytes += piece.size_bytes
            self._window += 1
            self._changed.notify_all()

    def news(self) -> Iterator[int]:
        """The bytes that are done, with each piece and at least once a tick, until all are or one failed."""
        told = 0
        while True:
            with self._changed:
                if told == self._done_bytes and self._is_under_way():
                    self._changed.wait(_TICK_S)
                if told == self._done_bytes and not self._is_under_way():
                    return
                told = self._done_bytes
            yield told

    def _is_under_way(self) -> bool:
        return not self.over.is_set() and (self._left or self._running > 0)


def _move_here(work: Work, pieces: Iterator[Piece], over: threading.Event, progress: Progress | None) -> None:
    done_bytes = 0
    for piece in pieces:
        work(piece, over)
        done_bytes += piece.size_bytes
        if progress:
            progress(done_bytes)
