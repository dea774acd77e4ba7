"""A folder of copies that several processes fill at once and that never holds more than its budget.

    KEY             a copy, whole
    KEY.RANDOM.tmp  a copy in the making, as long as the room taken for it; its maker holds its lock
    XX.lock         held by who makes a copy whose key begins with XX: others wait and find it made
    makers.lock     shared by all makers; held alone by one whose copy needs the room that the others' take
    door.lock       held by who waits to be alone, so that nobody begins meanwhile
    room.lock       held while room is counted and taken, and while a copy gets its name

Guarantees: copies and what is in the making stay within the budget, whoever is killed when: room is taken before it is written to. A maker
that was killed lets go of its locks, and whoever next takes room sweeps what it left. Nobody waits for a lock whose holder makes no
progress, as one that was stopped: a copy is then made twice, which costs time only. The copies not used for longest go first; who reads one
that goes reads on, since its file is open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Final, Self

from dtr.errors import ConfigError, DataUnavailable, DtrError, FolderFull

__all__ = ["EXHAUSTED", "Cache", "NoRoom"]

EXHAUSTED: Final = {
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.ENOMEM: "memory",
}  # of the host, not of a file
BUFFER_BYTES: Final = 8 << 20
POLL_S: Final = (0.001, 0.05)
STALLED_S: Final = 30.0
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(Exception):
    """The copies in the making leave no room for one more; ``needed_bytes`` is what it takes at least."""

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(needed_bytes)
        self.needed_bytes = needed_bytes


Make = Callable[["Draft"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The folder, and how many bytes it may hold."""

    folder: str
    budget_bytes: int

    def open(self, key: str, make: Make, *, source: str, size_bytes: int | None = None) -> BufferedReader:
        """The copy under ``key``, made by ``make`` if there is none.

        Args:
            key: 40 hexadecimal digits.
            make: writes the content into the draft that it is given; may be called again, with an empty one.
            source: what is copied, for messages.
            size_bytes: of the copy, if that is known: one of another size is made again.

        Raises:
            ConfigError: the folder cannot be used, or the copy is larger than the budget; names the setting.
            FolderFull: the disk has no room.
            DataUnavailable: the disk fails, or other makers do not let go.
        """
        with self.explained(source):
            found = self._found(key, source, size_bytes)
            if found is not None:
                return found
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            with self.locked(f"{key[:2]}.lock", fcntl.LOCK_EX, making=key[:2]):
                return self._found(key, source, size_bytes) or self._made(key, make, source)

    def _made(self, key: str, make: Make, source: str) -> BufferedReader:
        try:
            with self.locked("door.lock", fcntl.LOCK_SH):
                makers = self._lock("makers.lock", fcntl.LOCK_SH, making="")
            with makers:
                return self._written(key, make, source)
        except NoRoom as exc:
            needed_bytes = exc.needed_bytes
        if needed_bytes <= self.budget_bytes:
            try:
                with self.locked("door.lock", fcntl.LOCK_EX), self.locked("makers.lock", fcntl.LOCK_EX):
                    return self._written(key, make, source)
            except NoRoom as exc:
                needed_bytes = exc.needed_bytes
        if needed_bytes <= self.budget_bytes:
            raise DataUnavailable(f"{source} cannot be copied to {self.folder}: a process that makes another copy there has stopped")
        raise ConfigError(
            f"data_cache_bytes: the copy of {source} takes {needed_bytes:,} bytes or more, and {self.budget_bytes:,} is what the copies in "
            f"{self.folder} may take: raise DTR_DATA_CACHE_BYTES, or write smaller files",
            field="data_cache_bytes",
        )

    def _written(self, key: str, make: Make, source: str) -> BufferedReader:
        with Draft(self, key, source) as draft:
            make(draft)
            return draft.publish()

    def _found(self, key: str, source: str, size_bytes: int | None) -> BufferedReader | None:
        """The copy, marked as used just now: a folder may be mounted without access times."""
        path = f"{self.folder}/{key}"
        try:
            file = _reader(path, source)
        except FileNotFoundError:
            return None
        facts = os.fstat(file.fileno())
        if size_bytes not in (None, facts.st_size):
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return None
        with contextlib.suppress(OSError):  # another user's copy is as good
            os.utime(path, ns=(max(facts.st_atime_ns, time.time_ns()), facts.st_mtime_ns))
        return file

    # --- room -------------------------------------------------------------------------------------------------------

    def take(self, draft: Draft, size_bytes: int) -> None:
        """Make room for a draft of ``size_bytes``, by removing copies; raises NoRoom if that is not enough."""
        with self.locked("room.lock", fcntl.LOCK_EX):
            copies, others_bytes = self._held(draft.path)
            if others_bytes + size_bytes > self.budget_bytes:
                raise NoRoom(size_bytes)
            left = others_bytes + size_bytes + sum(size for _, size, _ in copies) - self.budget_bytes
            for _, size, path in sorted(copies):
                if left <= 0:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                left -= size
            with self.explained(draft.source):
                os.ftruncate(draft.fd, size_bytes)

    def _held(self, own: str) -> tuple[list[tuple[int, int, str]], int]:
        """((time of use, size, path) of each copy, bytes that others' drafts take). Drafts of the dead are removed."""
        copies, others_bytes = list[tuple[int, int, str]](), 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    if "." not in entry.name:
                        copies.append((facts.st_atime_ns, facts.st_size, entry.path))
                    elif entry.name.endswith(".tmp") and entry.path != own and not _swept(entry.path):
                        others_bytes += facts.st_size
        return copies, others_bytes

    # --- locks ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self, name: str, how: int, *, making: str = "") -> Iterator[None]:
        with self._lock(name, how, making=making):
            yield

    def _lock(self, name: str, how: int, *, making: str) -> Lock:
        """A lock of the folder, waited for as long as the drafts whose names begin with ``making`` grow; then gone without."""
        lock = Lock(f"{self.folder}/{name}")
        try:
            seen, since, (pause_s, longest_s) = self._progress(making), time.monotonic(), POLL_S
            while not lock.acquired(how):
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, longest_s)
                now = self._progress(making)
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > STALLED_S:
                    break
        except BaseException:
            lock.close()
            raise
        return lock

    def _progress(self, making: str) -> list[tuple[str, int]]:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".tmp") and entry.name.startswith(making):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.name, entry.stat(follow_symlinks=False).st_mtime_ns))
        return sorted(found)

    @contextlib.contextmanager
    def explained(self, source: str) -> Iterator[None]:
        """What the folder of copies did wrong is no fault of the file that was to be copied."""
        try:
            yield
        except DtrError:
            raise
        except OSError as exc:
            raise self._failed(exc, source) from exc

    def _failed(self, exc: OSError, source: str) -> DtrError:
        why = exc.strerror or str(exc)
        if exc.errno in _FULL:
            free_bytes = _free_bytes(self.folder)
            return FolderFull(
                f"data_cache: {self.folder} has no room for the copy of {source}: {why}, {free_bytes:,} bytes are free; make room, or set "
                "DTR_DATA_CACHE to a folder elsewhere",
                folder=self.folder,
            )
        if exc.errno in EXHAUSTED:
            return DataUnavailable(f"{source} cannot be copied to {self.folder}: this process is out of {EXHAUSTED[exc.errno]} ({why})")
        if exc.errno == errno.EIO:
            return DataUnavailable(f"{source} cannot be copied to {self.folder}: {why}; set DTR_DATA_CACHE to a folder on another disk")
        return ConfigError(f"data_cache: copies cannot be kept in {self.folder}: {why}; set DTR_DATA_CACHE to another", field="data_cache")


class Draft:
    """A copy in the making; takes room as it grows, and is removed unless it is published."""

    def __init__(self, cache: Cache, key: str, source: str) -> None:
        self.path, self._target = f"{cache.folder}/{key}.{secrets.token_hex(4)}.tmp", f"{cache.folder}/{key}"
        self._cache, self.source, self._held = cache, source, bytearray()
        with cache.locked("room.lock", fcntl.LOCK_EX):  # or it would look left over before its lock is held
            self.fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
        self._taken_bytes = self._at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        fcntl.flock(self.fd, fcntl.LOCK_UN)  # by name: a child that was forked meanwhile holds the same lock
        os.close(self.fd)

    def reserve(self, size_bytes: int) -> None:
        """Take room for that much at once, where it is known how much it will be."""
        self._cache.take(self, size_bytes)
        self._taken_bytes = size_bytes

    def write(self, content: bytes | memoryview) -> None:
        """Add to it; raises NoRoom."""
        self._held += content
        if len(self._held) >= BUFFER_BYTES:
            self._drain()

    def publish(self) -> BufferedReader:
        """Flush it to disk, so that it is whole also after a power cut, and give it its name; the copy, opened for reading."""
        with self._cache.explained(self.source):
            self._drain()
            os.ftruncate(self.fd, self._at)
            os.fsync(self.fd)
            found = _reader(self.path, self.source)  # before it has the name under which it may be removed
            try:
                with self._cache.locked("room.lock", fcntl.LOCK_EX):  # or who counts might see it under both names
                    os.replace(self.path, self._target)
            except BaseException:
                found.close()
                raise
        return found

    def _drain(self) -> None:
        content, self._held = memoryview(self._held), bytearray()
        if self._at + len(content) > self._taken_bytes:
            self.reserve(self._at + len(content))
        with self._cache.explained(self.source):
            while content:
                done = os.pwrite(self.fd, content, self._at)
                self._at, content = self._at + done, content[done:]


class Lock:
    """A lock file, opened. It stays, for others wait for it; the lock goes with its holder."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def acquired(self, how: int) -> bool:
        """Whether the lock is held now; does not wait."""
        try:
            fcntl.flock(self._fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let go of it."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # by name, as above
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _reader(path: str, source: str) -> BufferedReader:
    """The copy, opened; its ``name``, which messages show, is that of what it is a copy of."""
    raw = io.FileIO(path)
    raw.name = source
    return BufferedReader(raw)


def _swept(path: str) -> bool:
    """Whether it was left over by a maker that is gone, and is removed now. Under the lock of the room only."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _free_bytes(folder: str) -> int:
    try:
        facts = os.statvfs(folder)
    except OSError:
        return 0
    return facts.f_bavail * facts.f_frsize
