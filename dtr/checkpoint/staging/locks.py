"""Locks between processes on one host, that die with their holder.

A lock file is held under POSIX record locks (``lockf``): not inherited by a fork, kept while the holder is stopped, released by the
kernel when it dies. These locks belong to a process, which has two consequences that this module takes away: closing *any* descriptor
of the file drops the lock, so one table (by inode) keeps each file open once and closes it when nobody holds it; and two threads of a
process do not exclude each other, so the table counts holders itself. Nothing here waits: a lock is had at once or not at all.

A lock file may be deleted by whoever holds it exclusively. A lock counts only if, once taken, the path still names the locked file.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from types import TracebackType
from typing import Final, Self

__all__ = ["Hold", "is_held", "try_lock"]

_MODE: Final = 0o600
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_FLOCK: Final = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, len, pid

_Inode = tuple[int, int]
_mutex = threading.Lock()
_table: dict[_Inode, _Entry] = {}


class _Entry:
    """One open lock file and who holds it in this process: -1 exclusively, n > 0 shared by n."""

    __slots__ = ("descriptor", "holders", "inode")

    def __init__(self, inode: _Inode, descriptor: int, holders: int) -> None:
        self.inode, self.descriptor, self.holders = inode, descriptor, holders


class Hold:
    """A lock that is held until ``release()`` or the end of a ``with`` block; releasing twice, or in a forked child, does nothing."""

    __slots__ = ("_entry", "_pid", "shared")

    def __init__(self, entry: _Entry, *, shared: bool) -> None:
        self._entry: _Entry | None = entry
        self._pid = os.getpid()
        self.shared = shared

    def release(self) -> None:
        entry, self._entry = self._entry, None
        if entry is None or self._pid != os.getpid():
            return
        with _mutex:
            entry.holders += -1 if self.shared else 1
            if entry.holders == 0:
                _table.pop(entry.inode, None)
                os.close(entry.descriptor)  # drops the lock: nothing else in this process has the file open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def try_lock(path: str, *, shared: bool = False) -> Hold | None:
    """Take the lock of the file ``path``, made if absent, or return None if another process or thread holds it in a way that excludes.

    Raises:
        OSError: the file cannot be made or opened (its folder is gone, no permission, no inode left).
    """
    with _mutex:
        while True:
            entry = _table.get(inode) if (inode := _inode_of(path)) is not None else None
            if entry is not None:  # held in this process: opening the file again, then closing it, would drop that lock
                if not shared or entry.holders < 0:
                    return None
                entry.holders += 1
                return Hold(entry, shared=True)
            descriptor = os.open(path, _FLAGS | os.O_CREAT, _MODE)
            if not _lock(descriptor, shared=shared):
                os.close(descriptor)
                return None
            inode = _identity(os.fstat(descriptor))
            if _inode_of(path) == inode:
                entry = _table[inode] = _Entry(inode, descriptor, 1 if shared else -1)
                return Hold(entry, shared=shared)
            os.close(descriptor)  # deleted by its holder between our open and our lock: try the one that is there now


def is_held(path: str) -> bool:
    """Whether any process holds the lock now. Takes nothing, so that asking never makes the owner's own attempt fail."""
    with _mutex:
        if _inode_of(path) in _table:
            return True
        try:
            descriptor = os.open(path, _FLAGS)
        except FileNotFoundError:
            return False
        try:
            question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, question)
            return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, *, shared: bool) -> bool:
    try:
        fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN, or EACCES on some file systems: another process holds it
        return False
    except BaseException:
        os.close(descriptor)
        raise
    return True


def _identity(status: os.stat_result) -> _Inode:
    return status.st_dev, status.st_ino


def _inode_of(path: str) -> _Inode | None:
    try:
        return _identity(os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _forget_in_child() -> None:
    """A forked child holds none of its parent's locks, and closing its copies of their descriptors touches only its own."""
    global _mutex
    _mutex = threading.Lock()
    for entry in _table.values():
        os.close(entry.descriptor)
    _table.clear()


os.register_at_fork(after_in_child=_forget_in_child)
