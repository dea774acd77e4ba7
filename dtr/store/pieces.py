"""A large transfer as pieces that a few threads move at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice

from dtr.store.base import Progress

__all__ = ["Piece", "cut", "move"]

Work = Callable[["Piece", threading.Event], None]
_TICK_S = 1.0  # how long the caller's thread waits before it reports progress again, so that it can also cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes [start, end) of the transfer; ``number`` counts from 1, as S3's parts do."""

    number: int
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def cut(size_bytes: int, piece_bytes: int) -> Iterator[Piece]:
    """Cut [0, size_bytes) into pieces of ``piece_bytes``, the last one shorter; nothing gives no piece."""
    for number, start in enumerate(range(0, size_bytes, piece_bytes), start=1):
        yield Piece(number=number, start=start, end=min(start + piece_bytes, size_bytes))


def move(work: Work, pieces: Iterator[Piece], *, threads: int, progress: Progress | None = None) -> None:
    """Call ``work`` for every piece, at most ``threads`` at a time; return when all are done.

    The first error (of a piece, or of ``progress``, which is called in this thread) stops the rest and is raised once the pieces
    under way have ended; ``work`` gets an event that is set then, so that it need not try again. A single thread works in the
    caller's, without a pool.
    """
    done_bytes, over = 0, threading.Event()
    if threads == 1:
        for piece in pieces:
            work(piece, over)
            done_bytes += piece.size_bytes
            if progress:
                progress(done_bytes)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="dtr-store") as pool:  # leaving it waits for the pieces under way
        running: dict[Future[None], Piece] = {pool.submit(work, piece, over): piece for piece in islice(pieces, threads)}
        try:
            while running:
                for future in wait(running, timeout=_TICK_S, return_when=FIRST_COMPLETED).done:
                    piece = running.pop(future)
                    future.result()
                    done_bytes += piece.size_bytes
                    running.update((pool.submit(work, following, over), following) for following in islice(pieces, 1))
                if progress:
                    progress(done_bytes)
        finally:
            over.set()
