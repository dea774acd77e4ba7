"""Local copies of files that cannot be read where they are: compressed ones, and those in a store.

Guarantees: a copy is whole or not there, and holds what its file held with the stamp that it was asked for with; a file is fetched once per
host, however many processes want it at once; all copies together stay within their budget (`dtr.datasets.sources.cache`); memory is
bounded, whatever a compressed file unpacks to.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from io import BufferedReader
from typing import Final, Protocol, Self

import zstandard

from dtr.config import Settings
from dtr.datasets.sources.cache import Cache, Draft
from dtr.errors import DatasetChanged, DatasetMismatch, IntegrityError, NotFound
from dtr.store import Store, open_store

__all__ = ["Copies", "Stamp", "compression_of", "copies", "difference", "first_bytes", "is_remote", "remote_store", "stamp_of"]

_COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_CHUNK_BYTES: Final = 8 << 20
_PACKED_BYTES: Final = 4 << 10  # given to zstd at once, which makes up to 32,768 times as much of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What tells one content of a file from another without reading it: ``mtime_ns`` on disk, ``tag`` (an ETag) in a store."""

    size_bytes: int
    mtime_ns: int = 0
    tag: str = ""


def compression_of(name: str) -> str:
    """``gzip``, ``zstd``, or '' for a file that is read as it is."""
    return _COMPRESSIONS.get(os.path.splitext(name)[1].lower(), "")


def is_remote(path: str) -> bool:
    """Whether it is the URL of something in a store."""
    return "://" in path


@cache
def remote_store(url: str) -> Store:
    """The store at a URL, opened once per process; a forked child may use it."""
    return open_store(url)


@cache
def copies() -> Copies:
    """Those of this host, as the environment's ``data_cache`` and ``data_cache_bytes`` say."""
    return Copies.of(Settings.load())


def stamp_of(folder: str, file: str) -> Stamp:
    """The file's stamp as of now. Raises OSError, or of a store NotFound and its other errors."""
    if is_remote(folder):
        size_bytes, tag = remote_store(folder).stat(file)
        return Stamp(size_bytes=size_bytes, tag=tag)
    facts = os.stat(os.path.join(folder, file))
    return Stamp(size_bytes=facts.st_size, mtime_ns=facts.st_mtime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """A folder of copies and how many bytes it may hold."""

    folder: str
    budget_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As the settings ``data_cache`` and ``data_cache_bytes`` say."""
        return cls(folder=settings.data_cache, budget_bytes=settings.data_cache_bytes)

    def open(self, folder: str, file: str, stamp: Stamp) -> BufferedReader:
        """The plain content of ``file`` in ``folder``, which is a path or a store's URL, opened for reading.

        Args:
            folder, file: where it is.
            stamp: what it had when it was registered: another content under the same name is another copy.

        Raises:
            DatasetChanged: it is gone, or has another stamp by now; names the file.
            DatasetMismatch: it is damaged.
            StoreUnavailable, StoreRefused: of the store.
            ConfigError, FolderFull, DataUnavailable: of the folder of copies, or of this host.
        """
        source = _source(folder, file)
        key = hashlib.sha256(f"{source}\0{stamp.size_bytes}\0{stamp.mtime_ns}\0{stamp.tag}".encode()).hexdigest()[:40]
        held = Cache(folder=self.folder, budget_bytes=self.budget_bytes)
        whole_bytes = None if compression_of(file) else stamp.size_bytes
        return held.open(key, partial(_copy, folder, file, stamp), source=source, size_bytes=whole_bytes)


def first_bytes(folder: str, file: str, stamp: Stamp, count: int) -> bytes:
    """How the plain content begins, without a copy of it: at most ``count`` bytes. Raises as `Copies.open`."""
    with _opened(folder, file, stamp, at_most=64 << 10) as packed:
        found = b""
        for chunk in _plain(packed, file, _source(folder, file)):
            found += chunk
            if len(found) >= count:
                break
    return found[:count]


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def _copy(folder: str, file: str, stamp: Stamp, draft: Draft) -> None:
    source = _source(folder, file)
    _check(folder, file, stamp)
    if not compression_of(file):
        draft.reserve(stamp.size_bytes)
    with _opened(folder, file, stamp) as packed:
        for chunk in _plain(packed, file, source):
            draft.write(chunk)
    _check(folder, file, stamp)  # it may have been written meanwhile


def _source(folder: str, file: str) -> str:
    """The file's name for people: no query."""
    return f"{folder.partition('?')[0].rstrip('/') if is_remote(folder) else folder.rstrip('/')}/{file}"


def _check(folder: str, file: str, stamp: Stamp) -> None:
    source = _source(folder, file)
    try:
        now = stamp_of(folder, file)
    except (NotFound, FileNotFoundError) as exc:
        raise DatasetChanged(f"{source} is gone; put it back, or register the data set again", file=source) from exc
    except OSError as exc:
        raise DatasetMismatch(f"{source} cannot be read: {exc.strerror}", file=source) from exc
    if now != stamp:
        raise DatasetChanged(
            f"{source} changed since it was registered: {difference(stamp, now)}; register the data set again, or put the file back",
            file=source,
        )


def difference(before: Stamp, now: Stamp) -> str:
    """How two stamps of one file differ."""
    if now.size_bytes != before.size_bytes:
        return f"it had {before.size_bytes:,} bytes and has {now.size_bytes:,}"
    if now.tag != before.tag:
        return f"it had the tag {before.tag!r} and has {now.tag!r}"
    return f"it was written at {now.mtime_ns} ns, and at {before.mtime_ns} ns then"


def _opened(folder: str, file: str, stamp: Stamp, at_most: int | None = None) -> _Remote | BufferedReader:
    if is_remote(folder):
        return _Remote(remote_store(folder), file, stamp.size_bytes if at_most is None else min(at_most, stamp.size_bytes))
    try:
        return open(os.path.join(folder, file), "rb")
    except OSError as exc:
        source = _source(folder, file)
        raise DatasetMismatch(f"{source} cannot be read: {exc.strerror}", file=source) from exc


class _Remote:
    """The first ``size_bytes`` of an object, read from its beginning on."""

    def __init__(self, store: Store, key: str, size_bytes: int) -> None:
        self._store, self._key, self._left, self._at = store, key, size_bytes, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is held open."""

    def read(self, size: int = -1, /) -> bytes:
        want = min(self._left, _CHUNK_BYTES if size < 0 else size)
        if not want:
            return b""
        buffer = bytearray(want)
        try:
            count = self._store.read_into(self._key, buffer, self._at)
        except NotFound as exc:
            raise DatasetChanged(f"{self._key} is gone", file=self._key) from exc
        except IntegrityError as exc:
            raise DatasetChanged(f"{self._key} changed while it was read: {exc.message}", file=self._key) from exc
        if not count:
            raise DatasetChanged(f"{self._key} ends after {self._at:,} bytes: it changed", file=self._key)
        self._at, self._left = self._at + count, self._left - count
        return bytes(buffer[:count])


def _plain(packed: _Readable, file: str, source: str) -> Iterator[bytes]:
    """The content in pieces of at most 128 MiB, usually far less, whatever it unpacks to."""
    how = compression_of(file)
    unpack = {"gzip": _gunzipped, "zstd": _unzstd, "": _as_it_is}[how]
    try:
        yield from unpack(packed)
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as exc:
        raise DatasetMismatch(f"{source} is no whole {how} file: {exc}", file=source) from exc
    except OSError as exc:
        raise DatasetMismatch(f"{source} cannot be read: {exc.strerror or exc}", file=source) from exc


def _as_it_is(packed: _Readable) -> Iterator[bytes]:
    while chunk := packed.read(_CHUNK_BYTES):
        yield chunk


def _gunzipped(packed: _Readable) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=packed, mode="rb") as reader:  # type: ignore[call-overload] # it needs nothing but read()
        while chunk := reader.read(_CHUNK_BYTES):
            yield chunk


def _unzstd(packed: _Readable) -> Iterator[bytes]:
    """Frame after frame. Not by zstandard's own reader: it takes a frame that was cut off for a whole one."""
    decompressor = zstandard.ZstdDecompressor()
    frame, begun = decompressor.decompressobj(), False
    while read := packed.read(_CHUNK_BYTES):
        for at in range(0, len(read), _PACKED_BYTES):
            chunk = read[at : at + _PACKED_BYTES]
            while chunk:
                yield frame.decompress(chunk)
                begun, chunk = True, b""
                if frame.eof:
                    chunk, frame, begun = frame.unused_data, decompressor.decompressobj(), False
    if begun:
        raise EOFError("it ends within a frame")
