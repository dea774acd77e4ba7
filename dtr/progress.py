"""What a trainer is doing, on one page of memory that its launcher reads without asking it.

A trainer that holds the GIL in C code still shows how far it was. The page is a file shared by mmap; a writer counts up before and
after, so that a reader notices a page caught in the middle.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["Progress", "ProgressPage", "read_page"]

_LAYOUT: Final = struct.Struct("<8sQqdd32sQ")
_MAGIC: Final = b"DTRPAGE1"
PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The newest report: ``step`` is -1 before the first; ``at`` is CLOCK_MONOTONIC seconds of this host; ``loss`` is NaN if unknown.

    ``stalled`` is why its launcher takes it for one that does not move any more, else empty.
    """

    step: int
    phase: str
    at: float
    loss: float = math.nan
    stalled: str = ""


class ProgressPage:
    """The trainer's side. Without a path it is plain memory."""

    __slots__ = ("_counter", "_last", "_map", "path")

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._counter = 0
        self._last = (-1, "starting", math.nan)
        if path is None:
            self._map = mmap.mmap(-1, PAGE_BYTES)
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, PAGE_BYTES)
                self._map = mmap.mmap(descriptor, PAGE_BYTES)
            finally:
                os.close(descriptor)
        self.write(-1, "starting")

    def write(self, step: int, phase: str, loss: float = math.nan) -> None:
        """Report; costs about a microsecond."""
        self._last = (step, phase, loss)
        self._put(step, phase, loss)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show ``what`` as the phase meanwhile: a process that waits for a hung one is not stalled itself."""
        step, _, loss = self._last
        self._put(step, what, loss)
        try:
            yield
        finally:
            self._put(*self._last)

    def _put(self, step: int, phase: str, loss: float) -> None:
        self._counter += 1
        word = phase.encode()[:32]
        self._map[: _LAYOUT.size] = _LAYOUT.pack(_MAGIC, self._counter, step, time.monotonic(), loss, word, self._counter)

    def read(self) -> Progress:
        """The newest report."""
        found = _parse(self._map[: _LAYOUT.size])
        if found is None:
            raise ValueError("the page's own writer cannot find it torn")
        return found

    def close(self) -> None:
        """Unmap, and remove the file."""
        self._map.close()
        if self.path is not None:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass  # the launcher cleaned up first


def _parse(raw: bytes) -> Progress | None:
    magic, before, step, at, loss, phase, after = _LAYOUT.unpack(raw)
    if magic != _MAGIC or before != after:
        return None
    return Progress(step=step, phase=phase.rstrip(b"\0").decode(errors="replace"), at=at, loss=loss)


def read_page(path: str) -> Progress | None:
    """The launcher's side: the newest report, or None if there is no page or it is being written at this moment."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_LAYOUT.size)
    except OSError:
        return None
    return _parse(raw) if len(raw) == _LAYOUT.size else None
