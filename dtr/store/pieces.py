"""A large transfer as pieces that a few threads move at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
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
    over, all_there = threading.Event(), threading.Event()
    if threads == 1:
        _move_here(work, pieces, over, progress)
        return

    def begin(piece: Piece) -> None:
        all_there.wait()  # while some work, starting another thread waits for a processor
        go_on(over)
        work(piece, over)

    most = threads if ramp else 2 * threads  # as many again lie ready: a thread that is done need not wait for the caller's
    done_bytes, window = 0, 1 if ramp else most
    with ThreadPoolExecutor(threads, thread_name_prefix="dtr-store") as pool:  # leaving it waits for the pieces under way
        running: dict[Future[None], Piece] = {}
        try:
            running.update((pool.submit(begin, piece), piece) for piece in islice(pieces, window))
            all_there.set()
            while running:
                for future in wait(running, timeout=_TICK_S, return_when=FIRST_COMPLETED).done:
                    piece = running.pop(future)
                    future.result()
                    done_bytes += piece.size_bytes
                    window = min(most, window + 1)
                if progress:
                    progress(done_bytes)
                running.update((pool.submit(begin, following), following) for following in islice(pieces, window - len(running)))
        finally:
            over.set()
            all_there.set()


def _move_here(work: Work, pieces: Iterator[Piece], over: threading.Event, progress: Progress | None) -> None:
    done_bytes = 0
    for piece in pieces:
        work(piece, over)
        done_bytes += piece.size_bytes
        if progress:
            progress(done_bytes)
