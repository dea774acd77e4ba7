"""A store in a folder: a local disk, or a network file system that several hosts mount."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from dtr.errors import (
    AlreadyExists,
    ConditionalPutUnsupported,
    DtrError,
    IntegrityError,
    InvalidInput,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)
from dtr.failpoints import failpoint
from dtr.store.base import (
    PIECE_BYTES,
    Progress,
    Source,
    Store,
    as_bytes,
    check_key,
    check_prefix,
    check_range,
    check_size,
    is_key,
    open_source,
)
from dtr.store.copying import Copier, crc_of_range
from dtr.store.durable import TEMPORARY, Draft, Folders, is_abandoned, link_absent, publish, refuse_existing, temporary
from dtr.store.pieces import Piece, cut, move, piece_bytes
from dtr.store.resume import Resume, Sent

__all__ = ["LocalStore"]

_READ_PIECE_BYTES: Final = 32 << 20
_READ_THREADS: Final = 4
_PASSES_BY_ITSELF: Final = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EMFILE, errno.ENFILE,
    errno.ENOMEM, errno.ENOENT, errno.ENOLCK, errno.EREMOTEIO, errno.EHOSTDOWN, errno.ENOTCONN, errno.EINTR, None,
}  # fmt: skip
_ABSENT: Final = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(slots=True, kw_only=True)
class _Shared:
    """What a store and its children have in common."""

    base: str
    folders: Folders
    probed: bool = False


class LocalStore(Store):
    """Objects are plain files below ``root``, with mode 0644 less the umask; folders are made when needed and removed when empty."""

    def __init__(self, root: str, *, shared: _Shared | None = None) -> None:
        self._root = os.path.abspath(root)
        self._shared = shared or _Shared(base=self._root, folders=Folders(self._root))

    @property
    def url(self) -> str:
        return "file://" + quote(os.fsencode(self._root))

    @property
    def reads_at_once(self) -> int:
        """Threads that read from a folder need a processor each for most of the time: more of them wait for one another."""
        return min(super().reads_at_once, 2 * (os.cpu_count() or 1))

    def child(self, prefix: str) -> LocalStore:
        return LocalStore(os.path.join(self._root, check_key(prefix, "prefix")), shared=self._shared)

    def _path(self, key: str) -> str:
        return os.path.join(self._root, check_key(key))

    # --- writing ---

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        content, target = as_bytes(data), self._path(key)
        with (
            self._writing(key, target, len(content), if_absent=if_absent) as draft,
            self._translated("write", key, needed_bytes=len(content), draft=draft),
        ):
            rest = content
            while rest:
                rest = rest[os.write(draft.fd, rest) :]

    def put_file(
        self,
        key: str,
        source: Source,
        size_bytes: int,
        *,
        if_absent: bool = True,
        progress: Progress | None = None,
        offset: int = 0,
        resume: Resume | None = None,
    ) -> None:
        target = self._path(key)
        if if_absent:
            with self._committing(key):
                refuse_existing(target)
        with open_source(source) as source_fd:
            check_size(size_bytes, offset, os.fstat(source_fd).st_size)
            earlier = resume.upload if resume else ""
            with self._writing(key, target, size_bytes, if_absent=if_absent, earlier=earlier) as draft:
                self._copy(key, (source_fd, offset), draft, size_bytes, progress or (lambda _: None), resume)

    def _copy(self, key: str, source: tuple[int, int], draft: Draft, size_bytes: int, progress: Progress, resume: Resume | None) -> None:
        pieces = [*cut(size_bytes, piece_bytes(size_bytes))]
        lasting = resume is not None and len(pieces) > 1  # less than that is not worth a record
        there = self._go_on(key, source, draft, pieces, resume) if resume and lasting else 0
        with self._translated("write", key):
            copier = Copier(*source, draft.fd)
        done = pieces[there - 1].end if there else 0
        if done or not size_bytes:
            progress(done)
        for piece in pieces[there:]:
            crc = 0 if resume else None
            while done < piece.end:
                with self._translated("write", key, needed_bytes=size_bytes, draft=draft):
                    count, crc = copier.append(done, min(done + PIECE_BYTES, piece.end), crc)
                if not count:
                    raise IntegrityError(f"the file to be stored as {key} ended after {done} of {size_bytes} bytes", key=key)
                done += count
                if resume and crc is not None and done == piece.end:
                    resume.done(Sent(number=piece.number, crc=crc))
                draft.keep = lasting  # whoever stops us here lets another go on
                progress(done)
                draft.keep = False

    def _go_on(self, key: str, source: tuple[int, int], draft: Draft, pieces: list[Piece], resume: Resume) -> int:
        """Keep the pieces of an earlier writer that are what ours would be, which is read back, not believed; returns how many."""
        there: list[Sent] = []
        with self._translated("write", key):
            for piece in pieces:
                crc = crc_of_range(draft.fd, piece.start, piece.end)
                noted = resume.sent.get(piece.number)
                if crc is None or crc != (noted.crc if noted else crc_of_range(source[0], source[1] + piece.start, source[1] + piece.end)):
                    break
                there.append(Sent(number=piece.number, crc=crc))
            os.ftruncate(draft.fd, pieces[len(there) - 1].end if there else 0)
        resume.begin(draft.name, there)
        return len(there)

    @contextlib.contextmanager
    def _writing(self, key: str, target: str, size_bytes: int, *, if_absent: bool, earlier: str = "") -> Iterator[Draft]:
        """The file to write the object to; when the block ends well, the object is there, whole and durable."""
        folder, name = os.path.split(target)
        with contextlib.ExitStack() as stack:
            with self._translated("write", key, needed_bytes=size_bytes):
                draft = stack.enter_context(temporary(folder, name, self._shared.folders.ensure, earlier=earlier))
            failpoint("store.local.before_write")
            yield draft
            with self._translated("write", key, needed_bytes=size_bytes, draft=draft):
                if (written := os.fstat(draft.fd).st_size) != size_bytes:
                    raise IntegrityError(f"{key}: {written} bytes were written instead of {size_bytes}", key=key)
                os.fsync(draft.fd)
            with self._committing(key):
                publish(draft.fd, draft.path, target, if_absent=if_absent)

    @contextlib.contextmanager
    def _committing(self, key: str) -> Iterator[None]:
        with self._translated("commit", key, unknown=True):
            try:
                yield
            except AlreadyExists as exc:
                exc.facts["key"] = key
                raise

    # --- reading ---

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[int]:
        path = self._path(key)
        with self._translated("read", key):
            try:
                fd = os.open(path, os.O_RDONLY)
            except _ABSENT as exc:
                raise self._not_found(key) from exc
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise self._not_found(key)
                yield fd
            finally:
                os.close(fd)

    def _not_found(self, key: str) -> NotFound:
        return NotFound(f"{self.url} holds no object {key}", key=key)

    def get(self, key: str) -> bytes:
        with self._reading(key) as fd:
            return _read(fd, 0, os.fstat(fd).st_size)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        check_range(start, end)
        with self._reading(key) as fd:
            return _read(fd, start, min(end, os.fstat(fd).st_size))

    def read_into(self, key: str, buffer: memoryview | bytearray, offset: int = 0) -> int:
        view = as_bytes(buffer)
        check_range(offset, offset + len(view))
        with self._reading(key) as fd:
            size_bytes = max(0, min(len(view), os.fstat(fd).st_size - offset))

            def read(piece: Piece, over: threading.Event) -> None:
                _read_exactly(fd, offset + piece.start, view[piece.start : piece.end], key)

            threads = min(_READ_THREADS, os.cpu_count() or 1) if size_bytes > _READ_PIECE_BYTES else 1
            move(read, cut(size_bytes, _READ_PIECE_BYTES), threads=threads)
        return size_bytes

    def stat(self, key: str) -> tuple[int, str]:
        with self._reading(key) as fd:
            facts = os.fstat(fd)
            return facts.st_size, str(facts.st_mtime_ns)

    def list(self, prefix: str = "") -> Iterator[str]:
        prefix = check_prefix(prefix)
        yield from self._below(os.path.join(self._root, prefix), f"{prefix}/" if prefix else "")

    def _below(self, folder: str, prefix: str) -> Iterator[str]:
        """In the order of whole keys: ``a-b`` before ``a/b``, so a folder sorts as its name and a slash."""
        for name, is_folder in sorted(self._entries(folder)):
            key = prefix + name
            if not is_key(key.removesuffix("/")):
                continue  # not ours: it could be listed, but not be read
            if is_folder:
                yield from self._below(os.path.join(folder, name), key)
            else:
                yield key

    def _entries(self, folder: str) -> Iterator[tuple[str, bool]]:
        with self._translated("list", folder):
            try:
                with os.scandir(folder) as entries:
                    found = [
                        (f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name, entry.is_dir(follow_symlinks=False))
                        for entry in entries
                        if entry.is_dir(follow_symlinks=False) or entry.is_file()
                    ]
            except (FileNotFoundError, NotADirectoryError):
                found = []
        return iter(found)

    # --- the rest ---

    def delete(self, key: str) -> None:
        """Not synced: what a power cut brings back is garbage that is deleted again."""
        path = self._path(key)
        with self._translated("delete", key):
            try:
                os.unlink(path)
            except _ABSENT:
                return
        self._remove_empty(os.path.dirname(path))

    def _remove_empty(self, folder: str) -> None:
        """Folders are no objects: those that a deletion leaves empty go, as they would on S3. A writer makes them again."""
        while folder.startswith(self._shared.base + os.sep):
            try:
                os.rmdir(folder)
            except OSError:
                return  # not empty, or not ours to remove
            self._shared.folders.forget(folder)
            folder = os.path.dirname(folder)

    def probe(self) -> None:
        if self._shared.probed:
            return
        with self._translated("probe", "", unknown=False), contextlib.ExitStack() as stack:
            first, second = (stack.enter_context(temporary(self._root, "probe", self._shared.folders.ensure)).path for _ in range(2))
            target = f"{first}-linked"
            stack.callback(_unlink, target)
            link_absent(first, target)
            try:
                link_absent(second, target)
            except AlreadyExists:
                self._shared.probed = True
                return
        raise ConditionalPutUnsupported(f"{self.url}: link(2) replaced an existing file, so this file system cannot hold checkpoints")

    def abort_uploads(self, prefix: str = "", *, older_than_s: float = 0.0) -> int:
        prefix = check_prefix(prefix)
        root = os.path.join(self._root, prefix)
        count = 0
        with self._translated("clean", prefix):
            candidates = [path for folder, _, names in os.walk(root) for name in names if (path := _temporary_in(folder, name))]
            parent, own = os.path.split(root)
            if prefix and os.path.isdir(parent):
                candidates += [path for name in os.listdir(parent) if name.endswith(f"~{own}") and (path := _temporary_in(parent, name))]
            for path in candidates:
                with is_abandoned(path) as abandoned, contextlib.suppress(FileNotFoundError):
                    if abandoned and os.stat(path).st_mtime <= time.time() - older_than_s:
                        os.unlink(path)
                        count += 1
        return count

    def close(self) -> None:
        """Nothing is kept open."""

    @contextlib.contextmanager
    def _translated(
        self, operation: str, key: str, *, unknown: bool = False, needed_bytes: int | None = None, draft: Draft | None = None
    ) -> Iterator[None]:
        try:
            yield
        except DtrError:
            raise
        except OSError as exc:
            raise self._typed(exc, operation, key, unknown, needed_bytes, draft) from exc

    def _typed(self, exc: OSError, operation: str, key: str, unknown: bool, needed_bytes: int | None, draft: Draft | None) -> DtrError:
        what = f"cannot {operation} {key or 'here'} in {self.url}: {exc.strerror or exc}"
        facts = {"operation": operation, "key": key, "errno": exc.errno, "unknown": unknown}
        if exc.errno == errno.ENAMETOOLONG:
            return InvalidInput(f"{what}: the folder and the key together are longer than the system allows", **facts)
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            needed = f"{needed_bytes} bytes are needed, " if needed_bytes is not None else ""
            # What the draft has taken is free again, and was before: that is the number to hold against the needed ones.
            free_bytes = _free_bytes(self._root) + (os.fstat(draft.fd).st_blocks * 512 if draft is not None else 0)
            return StoreUnavailable(f"{what}: {needed}{free_bytes} bytes are free", **facts)
        if exc.errno in _PASSES_BY_ITSELF:
            return StoreUnavailable(what, **facts)
        hint = "" if exc.errno not in {errno.ENOTDIR, errno.EEXIST} else ": a file stands where a folder is needed"
        return StoreRefused(what + hint, **facts)


def _temporary_in(folder: str, name: str) -> str | None:
    return os.path.join(folder, name) if name.startswith(TEMPORARY) else None


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _free_bytes(path: str) -> int:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize


def _read(fd: int, start: int, end: int) -> bytes:
    pieces = []
    while start < end and (data := os.pread(fd, end - start, start)):
        pieces.append(data)
        start += len(data)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_exactly(fd: int, start: int, view: memoryview, key: str) -> None:
    while view:
        count = os.preadv(fd, [view], start)
        if not count:
            raise IntegrityError(f"{key} became shorter while it was read", key=key)
        view, start = view[count:], start + count
