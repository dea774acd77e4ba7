"""Local copies of files that cannot be read where they are: compressed ones, and those in a store.

Guarantees: a copy is whole or not there (a temporary file, renamed); a file is fetched once per host, however many processes want it at
once; the folder stays within its budget, the copies that were not used for longest going first; whoever reads a copy that is removed
meanwhile reads on, since its file is open.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import BufferedReader, BufferedWriter
from typing import Final

import zstandard

from dtr.config import Settings
from dtr.errors import DatasetMismatch, NotFound
from dtr.store import Store, open_store

__all__ = ["Copies", "compression_of", "copies", "is_remote", "remote_store"]

_COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_CHUNK_BYTES: Final = 8 << 20


def compression_of(name: str) -> str:
    """``gzip``, ``zstd``, or '' for a file that is read as it is."""
    return _COMPRESSIONS.get(os.path.splitext(name)[1].lower(), "")


def is_remote(path: str) -> bool:
    """Whether it is the URL of something in a store."""
    return "://" in path


@cache
def remote_store(url: str) -> Store:
    """The store at a URL, opened once per process."""
    return open_store(url)


@cache
def copies() -> Copies:
    """Those of this host, as the settings ``data_cache`` and ``data_cache_bytes`` say."""
    settings = Settings.load()
    return Copies(folder=settings.data_cache, budget_bytes=settings.data_cache_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """A folder of copies and how many bytes it may hold. One file may exceed that: it is then the only one."""

    folder: str
    budget_bytes: int

    def open(self, folder: str, file: str, *, size_bytes: int, mtime_ns: int) -> BufferedReader:
        """The plain content of ``file`` in ``folder``, which is a path or a store's URL, opened for reading.

        Args:
            folder, file: where it is.
            size_bytes, mtime_ns: what it had when it was registered: another content under the same name is another copy.

        Raises:
            DatasetMismatch: it is damaged, gone, or has another size by now; names the file.
        """
        source = f"{folder.rstrip('/')}/{file}"
        key = hashlib.sha256(f"{source}\0{size_bytes}\0{mtime_ns}".encode()).hexdigest()[:40]
        target = f"{self.folder}/{key}"
        found = _opened(target)
        if found is not None:
            return found
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        with _locked(f"{self.folder}/{key[:2]}.lock"):
            found = _opened(target)
            if found is None:
                self._make(folder, file, source, target, size_bytes)
                found = _opened(target)
        if found is None:
            raise DatasetMismatch(f"{target}, the local copy of {source}, was removed while it was made", file=source)
        return found

    def _make(self, folder: str, file: str, source: str, target: str, size_bytes: int) -> None:
        temporary = f"{target}.{secrets.token_hex(4)}.tmp"
        try:
            if is_remote(folder):
                _fetch(remote_store(folder), file, temporary, size_bytes, source)
            if compression_of(file):
                _decompress(temporary if is_remote(folder) else source, file, f"{temporary}.plain", source)
                os.replace(f"{temporary}.plain", temporary)
            os.replace(temporary, target)
        except OSError as exc:
            raise DatasetMismatch(f"{source} cannot be copied to {self.folder}: {exc.strerror or exc}", file=source) from exc
        finally:
            for left in (temporary, f"{temporary}.plain"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left)
        self._evict(keep=target)

    def _evict(self, keep: str) -> None:
        """Bring the folder within its budget; other processes may do the same at once."""
        held = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    held.append((facts.st_atime_ns, facts.st_blocks * 512, entry.path))
        left = sum(size for _, size, _ in held) - self.budget_bytes
        for _, size, path in sorted(held):
            if left <= 0:
                return
            if path != keep and "." not in os.path.basename(path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                left -= size


def _opened(target: str) -> BufferedReader | None:
    """The copy, marked as used just now: a folder may be mounted without access times."""
    try:
        file = open(target, "rb")  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        return None
    facts = os.fstat(file.fileno())
    with contextlib.suppress(OSError):  # another user's copy is as good
        os.utime(target, ns=(max(facts.st_atime_ns, time.time_ns()), facts.st_mtime_ns))
    return file


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """One process at a time makes a copy; the lock dies with its holder. Its file stays, for it is shared by many copies."""
    with open(path, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # by name: a child that was forked meanwhile holds the same lock


def _fetch(store: Store, key: str, target: str, size_bytes: int, source: str) -> None:
    try:
        there = store.size(key)
        if there != size_bytes:
            raise DatasetMismatch(f"{source} changed since it was registered: it had {size_bytes:,} bytes and has {there:,}", file=source)
        buffer = memoryview(bytearray(min(_CHUNK_BYTES * 4, max(size_bytes, 1))))
        with open(target, "wb") as file:
            at = 0
            while at < size_bytes:
                count = store.read_into(key, buffer[: min(len(buffer), size_bytes - at)], at)
                if not count:
                    raise DatasetMismatch(f"{source} ended after {at:,} of {size_bytes:,} bytes", file=source)
                file.write(buffer[:count])
                at += count
    except NotFound as exc:
        raise DatasetMismatch(f"{source} is gone", file=source) from exc


def _decompress(path: str, name: str, target: str, source: str) -> None:
    how = compression_of(name)
    try:
        with open(path, "rb") as packed, open(target, "wb") as plain:
            (_gunzip if how == "gzip" else _unzstd)(packed, plain)
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as exc:
        raise DatasetMismatch(f"{source} is no whole {how} file: {exc}", file=source) from exc


def _gunzip(packed: BufferedReader, plain: BufferedWriter) -> None:
    with gzip.GzipFile(fileobj=packed) as reader:
        shutil.copyfileobj(reader, plain, _CHUNK_BYTES)


def _unzstd(packed: BufferedReader, plain: BufferedWriter) -> None:
    """Frame after frame. Not by zstandard's own reader: it takes a frame that was cut off for a whole one."""
    decompressor = zstandard.ZstdDecompressor()
    frame, begun = decompressor.decompressobj(), False
    while chunk := packed.read(_CHUNK_BYTES):
        while chunk:
            plain.write(frame.decompress(chunk))
            begun, chunk = True, b""
            if frame.eof:
                chunk, frame, begun = frame.unused_data, decompressor.decompressobj(), False
    if begun:
        raise EOFError("it ends within a frame")
