"""A file, or a range of one, as memory that is not read before it is sent."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

__all__ = ["mapped"]


@contextlib.contextmanager
def mapped(fd: int, offset: int, size_bytes: int) -> Iterator[memoryview]:
    """The bytes of a file as memory, not read before they are sent."""
    if not size_bytes:
        yield memoryview(b"")
        return
    mapping = mmap.mmap(fd, offset + size_bytes, prot=mmap.PROT_READ)
    try:
        yield memoryview(mapping)[offset:]
    finally:
        with contextlib.suppress(BufferError):  # an error's traceback still holds a view: then it goes with that
            mapping.close()
