"""Reserve a slot's bytes and keep them mapped: no page of a slot in use is ever missing, and none of a warm one is touched first.

A file that was merely lengthened has holes, and a write into a hole of a full tmpfs kills the process (SIGBUS). So a slot is
lengthened to claim its share of the budget, then allocated, and counts as reserved only when every block of it is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dtr.checkpoint.staging.device import Devices
from dtr.checkpoint.staging.locks import Hold, try_lock
from dtr.checkpoint.staging.slots import SlotFiles, slots_in, worker_folders
from dtr.checkpoint.staging.space import space_of
from dtr.errors import StagingFull
from dtr.failpoints import failpoint

__all__ = ["Stopped", "WarmMaps", "grow", "is_reserved", "mapped_here"]

BUDGET_LOCK: Final = ".budget.lock"
_CHUNK_BYTES: Final = 64 << 20  # one fallocate; a signal during it undoes and repeats it, so it is not the whole slot at once
_TOUCH_BYTES: Final = 2 << 20  # the kernel keeps the address space locked meanwhile: a trainer that allocates must not notice
_FAULTING_THREADS: Final = 4
_SPARE_BYTES: Final = 64 << 10  # for the record, and the record that replaces it
_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14
_BUDGET_WAIT_S: Final = 10.0


def is_reserved(path: str, size_bytes: int) -> bool:
    """Whether the file has exactly this size and a block for every byte of it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return False
    return status.st_size == size_bytes and status.st_blocks * 512 >= size_bytes


class Stopped(Exception):
    """The allocation was called off."""


def grow(path: str, size_bytes: int, *, root: str, budget_bytes: int | None, stop: Callable[[], bool] = lambda: False) -> None:
    """Bring the file to exactly this size with every byte allocated; a file that cannot grow is left as it was.

    Args:
        path: the data file, made if absent; the caller holds its slot exclusively.
        size_bytes: what it shall have.
        root: the folder whose slots the budget bounds.
        budget_bytes: upper bound of all slots under ``root``; None: none.
        stop: asked now and then; True calls it off.

    Raises:
        StagingFull: with ``needed_bytes``, ``free_bytes`` and ``budget_bytes``.
        Stopped: ``stop`` said so.
    """
    descriptor = _open(path)
    try:
        before = os.fstat(descriptor).st_size
        if before > size_bytes:
            os.ftruncate(descriptor, size_bytes)
        try:
            _claim(descriptor, path, size_bytes, root, budget_bytes)
            failpoint("stage.after_claim")
            _allocate(descriptor, path, size_bytes, stop)
        except BaseException:
            if before:
                os.ftruncate(descriptor, min(before, size_bytes))
            else:
                os.unlink(path)
            raise
    finally:
        os.close(descriptor)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        if exc.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise StagingFull(f"no file can be made in the staging folder: {path}: {exc.strerror}", needed_bytes=0, free_bytes=0) from exc


def _claim(descriptor: int, path: str, size_bytes: int, root: str, budget_bytes: int | None) -> None:
    """Lengthen the file under the folder's budget: two trainers that grow at once see each other's claim."""
    status = os.fstat(descriptor)
    needed = max(size_bytes - status.st_blocks * 512, 0)
    free = space_of(os.path.dirname(path)).free_bytes
    if needed and needed + _SPARE_BYTES > free:
        raise StagingFull(
            f"a staging slot of {size_bytes} bytes does not fit into {os.path.dirname(path)}: it needs {needed} bytes more and "
            f"{free} are free (of the file system and of memory)",
            needed_bytes=needed, free_bytes=free, budget_bytes=budget_bytes,
        )  # fmt: skip
    if budget_bytes is None or size_bytes <= status.st_size:
        os.ftruncate(descriptor, size_bytes)
        return
    with _budget(root):
        used = sum(files.size_bytes() for folder in worker_folders(root) for files in slots_in(folder)) - status.st_size
        if used + size_bytes > budget_bytes:
            raise StagingFull(
                f"a staging slot of {size_bytes} bytes does not fit into the budget of {root}: the other slots have {used} of "
                f"{budget_bytes} bytes; raise staging_budget_bytes, or use fewer slots",
                needed_bytes=size_bytes, free_bytes=max(budget_bytes - used, 0), budget_bytes=budget_bytes,
            )  # fmt: skip
        os.ftruncate(descriptor, size_bytes)


@contextlib.contextmanager
def _budget(root: str) -> Iterator[None]:
    hold: Hold | None = None
    deadline = time.monotonic() + _BUDGET_WAIT_S
    while hold is None:
        hold = try_lock(f"{root}/{BUDGET_LOCK}")
        if hold is None:
            if time.monotonic() > deadline:  # its holder is stopped: a budget that is exceeded for once beats a trainer that hangs
                yield
                return
            time.sleep(0.002)
    with hold:
        yield


def _allocate(descriptor: int, path: str, size_bytes: int, stop: Callable[[], bool]) -> None:
    if os.fstat(descriptor).st_blocks * 512 >= size_bytes:
        return
    try:
        for start in range(0, size_bytes, _CHUNK_BYTES):
            if stop():
                raise Stopped
            os.posix_fallocate(descriptor, start, min(_CHUNK_BYTES, size_bytes - start))
    except OSError as exc:
        if exc.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        free = space_of(os.path.dirname(path)).free_bytes
        raise StagingFull(
            f"a staging slot of {size_bytes} bytes does not fit into {os.path.dirname(path)}: {exc.strerror} ({free} bytes are free)",
            needed_bytes=size_bytes, free_bytes=free,
        ) from exc  # fmt: skip


_living: Final[weakref.WeakSet[WarmMaps]] = weakref.WeakSet()


@dataclass(slots=True)
class _Map:
    mapping: mmap.mmap
    inode: tuple[int, int]
    size_bytes: int
    pinned_at: int | None = None  # address under which the devices know it
    refused: bool = False  # the devices won't have it


def mapped_here(path: str, size_bytes: int) -> memoryview | None:
    """The bytes of a slot as this process has them mapped, if it is the one that filled it: so no page of them is met anew.

    The caller holds the slot's lock, and lets go of the view before that.
    """
    return next((view for maps in list(_living) if (view := maps.view(path, size_bytes)) is not None), None)


class WarmMaps:
    """The slots that this process has mapped, kept over saves: mapping anew would fault on each page again."""

    def __init__(self) -> None:
        self._maps: dict[str, _Map] = {}
        self._mutex = threading.RLock()
        _living.add(self)
        self._devices: Devices | None = None

    @contextlib.contextmanager
    def buffer(self, files: SlotFiles, size_bytes: int, *, pin: Devices | None = None) -> Iterator[memoryview]:
        """The slot's bytes, writable and every page of them there; the caller holds the slot exclusively and has reserved them.

        Args:
            files: of the slot.
            size_bytes: of its data file.
            pin: devices that will copy into it: from now on the memory of every slot is made known to them.
        """
        self._devices = pin or self._devices
        with memoryview(self._map(files, size_bytes, threads=min(_FAULTING_THREADS, os.cpu_count() or 1))) as view:
            yield view

    def warm(self, files: SlotFiles, size_bytes: int, *, stop: Callable[[], bool]) -> None:
        """Map a slot ahead of its use, in this thread alone, until ``stop()``; not a byte of it changes."""
        self._map(files, size_bytes, threads=1, stop=stop)

    def view(self, path: str, size_bytes: int) -> memoryview | None:
        """See :func:`mapped_here`."""
        with self._mutex:
            held = self._maps.get(path)
            if held is None or held.size_bytes < size_bytes:
                return None
            status = os.stat(path)
            return memoryview(held.mapping)[:size_bytes].toreadonly() if held.inode == (status.st_dev, status.st_ino) else None

    def drop(self, files: SlotFiles) -> None:
        """Unmap a slot whose file is about to go."""
        with self._mutex:
            held = self._maps.pop(files.data, None)
            if held is not None:
                self._unpin(held)
                _close(held.mapping)

    def close(self) -> None:
        with self._mutex:
            maps, self._maps = list(self._maps.values()), {}
            for held in maps:
                self._unpin(held)
                _close(held.mapping)

    def _map(self, files: SlotFiles, size_bytes: int, *, threads: int, stop: Callable[[], bool] = lambda: False) -> mmap.mmap:
        status = os.stat(files.data)
        inode = (status.st_dev, status.st_ino)
        with self._mutex:
            held = self._maps.get(files.data)
        if held is None or held.inode != inode or not self._resize(held, size_bytes, threads, stop):
            self.drop(files)
            mapping = _mapped(files, size_bytes)
            _populate(mapping, 0, size_bytes, threads, stop)
            held = _Map(mapping, inode, size_bytes)
            with self._mutex:
                self._maps[files.data] = held
        self._pin(held)
        return held.mapping

    def _resize(self, held: _Map, size_bytes: int, threads: int, stop: Callable[[], bool]) -> bool:
        """Follow a file that has another size by now; the pages that stay are not touched anew. False if that cannot be."""
        if held.size_bytes == size_bytes:
            return True
        with self._mutex:
            self._unpin(held)
        try:
            held.mapping.resize(size_bytes)  # its own ftruncate finds the file at this size
        except (BufferError, OSError, ValueError):  # a view that some traceback holds, or no room at this address
            return False
        before, held.size_bytes = held.size_bytes, size_bytes
        _populate(held.mapping, before // mmap.PAGESIZE * mmap.PAGESIZE, size_bytes, threads, stop)
        return True

    def _pin(self, held: _Map) -> None:
        with self._mutex:
            if self._devices is None or held.pinned_at is not None or held.refused or not held.size_bytes:
                return
            address = np.frombuffer(held.mapping, np.uint8).ctypes.data
            held.refused = not self._devices.pin(address, held.size_bytes)
            held.pinned_at = None if held.refused else address

    def _unpin(self, held: _Map) -> None:
        if held.pinned_at is not None and self._devices is not None:
            self._devices.unpin(held.pinned_at)
        held.pinned_at, held.refused = None, False


def _mapped(files: SlotFiles, size_bytes: int) -> mmap.mmap:
    descriptor = os.open(files.data, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return mmap.mmap(descriptor, size_bytes)
    except OSError as exc:
        if exc.errno != errno.ENOMEM:
            raise
        raise StagingFull(
            f"a staging slot of {size_bytes} bytes cannot be mapped: the address space of this process is limited (ulimit -v)",
            needed_bytes=size_bytes, free_bytes=0,
        ) from exc  # fmt: skip
    finally:
        os.close(descriptor)


def _close(mapping: mmap.mmap) -> None:
    with contextlib.suppress(BufferError):  # a view that some traceback still holds; the last one to go unmaps it
        mapping.close()


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _populate(mapping: mmap.mmap, start: int, end: int, threads: int, stop: Callable[[], bool]) -> None:
    """Touch the pages from ``start`` on at once instead of one fault at a time; several threads fault faster than one."""
    if start >= end:
        return
    whole = np.frombuffer(mapping, dtype=np.uint8)

    def touch(at: int) -> None:
        if stop():
            return
        length = min(_TOUCH_BYTES, end - at)
        if _libc().madvise(ctypes.c_void_p(whole.ctypes.data + at), ctypes.c_size_t(length), _POPULATE_WRITE) != 0:
            pages = whole[at : at + length : mmap.PAGESIZE]
            np.bitwise_or(pages, 0, out=pages)  # an older kernel: write the first byte of each page as it is

    starts = range(start, end, _TOUCH_BYTES)
    if threads > 1 and len(starts) > 1:
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(threads, thread_name_prefix="dtr-touch") as pool:
            list(pool.map(touch, starts))
            return
    for at in starts:  # also if no thread can be had
        touch(at)
