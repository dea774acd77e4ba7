"""Bytes from one file to the end of another: as a shared extent where the file system can do that, else through the processor's cache.

Each slice is read, its checksum taken and written while it lies in the cache: one pass over memory instead of three. The kernel is told
to begin writing to the disk at once, so that the sync at the end waits for the last slices alone, and so that a large object does not
fill the machine's memory with dirty pages.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Any, Final

from dtr.store.crc import crc_of

__all__ = ["Copier", "crc_of_range"]

_SLICE_BYTES: Final = 256 << 10  # well within the second-level cache
_WRITE_OUT_BYTES: Final = 8 << 20
_SYNC_FILE_RANGE_WRITE: Final = 2
_CANNOT_SHARE: Final = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY, errno.EPERM}


def crc_of_range(fd: int, start: int, end: int) -> int | None:
    """The CRC64NVME of bytes [start, end) of a file; None if it ends before."""
    crc, at = 0, start
    for content in _slices(fd, start, end):
        crc, at = crc_of(content, crc), at + len(content)
    return crc if at == end else None


class Copier:
    """Copies from ``source`` (from ``offset`` on) to the end of ``target``; both are descriptors, and stay the caller's.

    Not for use by two threads at once.
    """

    def __init__(self, source: int, offset: int, target: int) -> None:
        self._source, self._offset, self._target = source, offset, target
        # Between two file systems the kernel only copies as well, and then a second pass is needed for the checksum.
        self._shares = os.fstat(source).st_dev == os.fstat(target).st_dev
        self._written = self._told = os.lseek(target, 0, os.SEEK_END)

    def append(self, start: int, end: int, crc: int | None = None) -> tuple[int, int | None]:
        """Copy bytes [start, end) of the source; returns how many there were, and ``crc`` continued by them (None: not asked for)."""
        count = self._share(start, end) if self._shares else 0
        shared = bool(count)
        if crc is not None or not shared:
            for content in _slices(self._source, self._offset + start, self._offset + (start + count if shared else end)):
                crc = crc if crc is None else crc_of(content, crc)
                if not shared:
                    self._write(content)
                    count += len(content)
        self._written += count
        self._write_out()
        return count, crc

    def _share(self, start: int, end: int) -> int:
        try:
            return os.copy_file_range(self._source, self._target, end - start, offset_src=self._offset + start)
        except OSError as exc:
            if exc.errno not in _CANNOT_SHARE:
                raise
            self._shares = False
            return 0

    def _write(self, content: memoryview) -> None:
        while content:
            content = content[os.write(self._target, content) :]

    def _write_out(self) -> None:
        """Ask the kernel to begin writing what is new: a wish, so a file system that cannot is none the worse."""
        if self._written - self._told >= _WRITE_OUT_BYTES:
            _sync_file_range(self._target, self._told, self._written - self._told)
            self._told = self._written


def _slices(fd: int, start: int, end: int) -> Iterator[memoryview]:
    """The bytes [start, end) of a file, each slice valid until the next; ends early where the file does."""
    view = memoryview(bytearray(min(_SLICE_BYTES, max(end - start, 0))))
    while start < end:
        count = os.preadv(fd, [view[: end - start]], start)
        if not count:
            return
        yield view[:count]
        start += count


def _sync_file_range(fd: int, offset: int, count: int) -> None:
    call: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
