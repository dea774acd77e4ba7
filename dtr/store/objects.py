"""What the stores of all object services have in common: S3, Google Cloud Storage, Azure Blob Storage.

Small objects are one conditional PUT; what a large one is, each service says. A read is cut into ranges that a few threads ask for.
"""

from __future__ import annotations

import abc
import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Protocol

from dtr.errors import IntegrityError, InvalidInput, NotFound, StoreRefused, StoreUnavailable
from dtr.store.base import Progress, Source, Store, as_bytes, check_key, check_range, check_size, open_source
from dtr.store.pieces import Piece, cut, go_on, move, piece_bytes
from dtr.store.resume import Resume

__all__ = ["ObjectStore"]

_READ_BYTES: Final = 8 << 20
_READ_THREADS: Final = 8


class Location(Protocol):
    """A folder in a bucket."""

    @property
    def url(self) -> str:
        """Without credentials."""


class Service(Protocol):
    """What was found out about a service. ``probed``: it honours put-if-absent; ``reached``: it answered once."""

    probed: bool
    reached: bool

    def close(self) -> None:
        """Close idle connections."""


class ObjectStore(Store):
    """Objects in a bucket; a subclass sends the requests.

    Args:
        location: of this store.
        service: shared with its children.
        largest_bytes: that the service takes as one object.
    """

    def __init__(self, location: Location, service: Service, *, largest_bytes: int) -> None:
        self._location, self._service, self._largest_bytes = location, service, largest_bytes

    @property
    def url(self) -> str:
        return self._location.url

    def close(self) -> None:
        self._service.close()

    # --- what a subclass sends ---

    @abc.abstractmethod
    def _put(
        self,
        key: str,
        content: memoryview,
        *,
        if_absent: bool,
        resend: bool = False,
        resume: Resume | None = None,
        before_retry: Callable[[], None] | None = None,
    ) -> None:
        """Put a small object in one request. ``resend``: it may be sent again also where it may have had its effect."""

    @abc.abstractmethod
    def _put_large(self, key: str, content: memoryview, if_absent: bool, progress: Progress | None, resume: Resume | None) -> None:
        """Put what is too large for one request; the stored size is checked when it returns."""

    @abc.abstractmethod
    def _ranged(self, key: str, start: int, end: int, before_retry: Callable[[], None] | None = None) -> bytes | memoryview:
        """A range that is not empty; StoreRefused with status 416 from the object's end on."""

    @abc.abstractmethod
    def _head(self, key: str) -> tuple[int, str]:
        """Size and tag; NotFound if there is no object, or no bucket."""

    @abc.abstractmethod
    def _get_absent(self) -> None:
        """Ask for an object that is never there, in a way that tells a missing bucket from a missing object."""

    # --- writing ---

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        content, key = as_bytes(data), check_key(key)
        if if_absent:
            self.probe()
        self._put(key, content, if_absent=if_absent)

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
        check_key(key)
        if size_bytes > self._largest_bytes:
            raise InvalidInput(
                f"size_bytes must be at most {self._largest_bytes >> 40} TiB, the service's largest object, got {size_bytes}",
                field="size_bytes",
            )
        with open_source(source) as fd:
            check_size(size_bytes, offset, os.fstat(fd).st_size)
            if if_absent:
                self.probe()
            with _mapped(fd, offset, size_bytes) as content:
                if size_bytes <= piece_bytes(size_bytes):
                    self._put_whole(key, content, if_absent, progress, resume)
                else:
                    self._put_large(key, content, if_absent, progress, resume)

    def _put_whole(self, key: str, content: memoryview, if_absent: bool, progress: Progress | None, resume: Resume | None) -> None:
        before_retry = None if progress is None else partial(progress, len(content))
        if before_retry is not None:
            before_retry()  # before it is visible, so that it can still be cancelled
        self._put(key, content, if_absent=if_absent, resume=resume, before_retry=before_retry)
        self._check_size(key, len(content))

    def _check_size(self, key: str, size_bytes: int) -> None:
        if (stored := self._stored_bytes(key)) != size_bytes:
            raise IntegrityError(f"{self.url} holds {stored} bytes of {key}, {size_bytes} were sent", key=key)

    def _stored_bytes(self, key: str) -> int:
        """The service has acknowledged the object, so failing to see it now is not the same as a failed write."""
        try:
            return self.size(key)
        except NotFound as exc:
            raise StoreUnavailable(f"{self.url}: {key} was stored and is gone", key=key, unknown=True) from exc
        except StoreUnavailable as exc:
            exc.facts["unknown"] = True
            raise

    # --- reading ---

    def get_range(self, key: str, start: int, end: int) -> bytes:
        check_range(start, end)
        if start == end:  # there is no empty range
            self.size(key)
            return b""
        try:
            return bytes(self._ranged(check_key(key), start, end))
        except StoreRefused as exc:
            if exc.facts.get("status") == 416:  # from the end of the object on
                return b""
            raise

    def read_into(self, key: str, buffer: memoryview | bytearray, offset: int = 0) -> int:
        view = as_bytes(buffer)
        check_range(offset, offset + len(view))
        if len(view) <= _READ_BYTES:  # its answer tells where the object ends, too
            content = self.get_range(key, offset, offset + len(view))
            view[: len(content)] = content
            return len(content)
        size_bytes = max(0, min(len(view), self.size(key) - offset))

        def read(piece: Piece, over: threading.Event) -> None:
            start = offset + piece.start
            content = self._ranged(key, start, start + piece.size_bytes, before_retry=partial(go_on, over))
            if len(content) != piece.size_bytes:
                raise IntegrityError(f"{key} became shorter while it was read", key=key)
            view[piece.start : piece.end] = content

        move(read, cut(size_bytes, _READ_BYTES), threads=_READ_THREADS)
        return size_bytes

    def stat(self, key: str) -> tuple[int, str]:
        try:
            return self._head(check_key(key))
        except NotFound:
            self._check_bucket()
            raise

    def _check_bucket(self) -> None:
        """The answer to HEAD has no text, so that a missing bucket looks like a missing object: ask once, another way."""
        if not self._service.reached:
            with contextlib.suppress(NotFound):
                self._get_absent()
            self._service.reached = True


@contextlib.contextmanager
def _mapped(fd: int, offset: int, size_bytes: int) -> Iterator[memoryview]:
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
