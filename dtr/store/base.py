"""The contract of a checkpoint store, written once; every backend runs the same conformance suite (tests/contract).

A store maps keys to immutable-by-convention objects. What every backend guarantees:

* ``put`` and ``put_file`` are atomic: a reader sees the old object, the new one or none, never a part of one. When they return, the
  object survives a crash of the machine (local) or is acknowledged by the service (S3, Google, Azure).
* put-if-absent is honoured or refused, never ignored: of all concurrent calls for one key exactly one returns, whatever else happens.
  A call that raises ``AlreadyExists`` may have lost against an earlier send of itself: read the object and compare. That object is as
  durable then as if the call had put it, though its own writer may have died before it was.
* a failed write has either no effect (``error.unknown`` is False) or an effect that the caller must look up (``unknown`` is True). What
  reading finds then may not last: only a put-if-absent that returns or raises ``AlreadyExists`` says that it does.
* ``delete`` of what is absent succeeds; ``list`` is recursive and sorted by code point; ranges are [start, end) as in slices.

Every failure is a ``DtrError``: ``NotFound``, ``AlreadyExists``, ``InvalidInput`` (key, size), ``StoreUnavailable`` (may pass by
itself), ``StoreRefused`` (will not: somebody has to act), ``ConditionalPutUnsupported``, ``IntegrityError``.
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from dtr.errors import InvalidInput
from dtr.store.resume import Resume

__all__ = [
    "PIECE_BYTES",
    "RESERVED",
    "Progress",
    "Source",
    "Store",
    "as_bytes",
    "check_key",
    "check_prefix",
    "check_range",
    "check_size",
    "is_key",
    "open_source",
]

Progress = Callable[[int], None]  # gets the bytes done so far; what it raises cancels the transfer and is passed on
Source = str | os.PathLike[str] | int  # a path, or a file descriptor whose position is neither used nor moved

PIECE_BYTES: Final = 8 << 20  # a local transfer reports progress at least this often
RESERVED: Final = ".dtr-"  # names that a store uses for itself: never listed, refused as keys
_SEGMENT_BYTES: Final = 200  # leaves room for a temporary file's prefix within the 255 of a file name
_KEY_BYTES: Final = 900  # S3 allows 1,024, the store's own prefix included


def check_key(value: Any, field: str = "key") -> str:
    """A key: names joined by ``/``, relative, without ``.`` and ``..``, control characters, and names that begin with ``.dtr-``."""
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"{field} must be a relative path like 'runs/0001/manifest.json', got {value!r}", field=field)
    try:
        too_long = len(value.encode()) > _KEY_BYTES
    except UnicodeEncodeError as exc:
        raise InvalidInput(f"{field} must be encodable as UTF-8, got {value!r}", field=field) from exc
    if too_long:
        raise InvalidInput(f"{field} must have at most {_KEY_BYTES} bytes, got {len(value)}: {value[:60]!r}...", field=field)
    for name in value.split("/"):
        _check_name(name, value, field)
    return value


def _check_name(name: str, key: str, field: str) -> None:
    if name in {"", ".", ".."}:
        wrong = "an absolute path or an empty, '.' or '..' name"
    elif any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in name):
        wrong = "a control character"
    elif len(name.encode()) > _SEGMENT_BYTES:
        wrong = f"a name of more than {_SEGMENT_BYTES} bytes"
    elif name.startswith(RESERVED):
        wrong = f"a name that begins with {RESERVED!r}, which the store keeps for itself"
    else:
        return
    raise InvalidInput(f"{field} must be a plain relative path, got {wrong} in {key[:120]!r}", field=field)


def is_key(value: str) -> bool:
    """Whether a name found in a folder or bucket can be one of our objects."""
    try:
        check_key(value)
    except InvalidInput:
        return False
    return True


def check_prefix(value: Any) -> str:
    """A folder of keys: ``""`` for all, else a key with or without a final ``/``; returned without it."""
    if value == "":
        return ""
    return check_key(value.removesuffix("/") if isinstance(value, str) else value, "prefix")


def as_bytes(data: Any) -> memoryview:
    """The bytes of any contiguous buffer, not copied."""
    try:
        return memoryview(data).cast("B")
    except TypeError as exc:
        raise InvalidInput(f"data must be bytes or another contiguous buffer, got {type(data).__name__}", field="data") from exc


class Store(abc.ABC):
    """One place that keeps checkpoints. Thread-safe; usable after ``fork`` in the child as well. See the module for the contract."""

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """What ``open_store`` needs to open this very place in another process. Holds no secrets."""

    @property
    def reads_at_once(self) -> int:
        """How many threads a large object is best read with: as many as keep a service busy, which answers each request after a while."""
        return 8

    @abc.abstractmethod
    def child(self, prefix: str) -> Store:
        """The same store seen from the folder ``prefix``; connections and what ``probe`` found are shared."""

    @abc.abstractmethod
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """Store ``data`` atomically and durably, for small objects. ``if_absent``: raise ``AlreadyExists`` rather than replace."""

    @abc.abstractmethod
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
        """Store ``size_bytes`` of a file, from ``offset`` on, atomically and durably; the stored size is checked before it returns.

        ``progress`` is called in this thread with the bytes done so far: local, about every 8 MiB; elsewhere, after each part and at least
        once a second. The last call has all bytes. What it raises cancels the transfer: nothing stays behind, and it is passed on.

        ``resume``: go on with what an earlier call for the same bytes and key left, and leave what is sent for a later one when this
        call is cancelled or its process killed. A store that cannot resume sends everything, and leaves nothing.
        """

    @abc.abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object; ``NotFound`` if there is none."""

    @abc.abstractmethod
    def get_range(self, key: str, start: int, end: int) -> bytes:
        """``get(key)[start:end]`` for 0 <= start <= end, reading only that: shorter where the object ends."""

    @abc.abstractmethod
    def read_into(self, key: str, buffer: memoryview | bytearray, offset: int = 0) -> int:
        """Fill ``buffer`` with the object's bytes from ``offset`` on, in parallel pieces.

        Returns how many there were: fewer than the buffer holds only where the object ends.
        """

    @abc.abstractmethod
    def stat(self, key: str) -> tuple[int, str]:
        """(size in bytes, tag) of the object; ``NotFound`` if there is none.

        The tag is another text once the object was written anew with other bytes: an ETag; of a folder, the time of modification.
        """

    def size(self, key: str) -> int:
        """The object's size in bytes; ``NotFound`` if there is none."""
        return self.stat(key)[0]

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys in the folder ``prefix`` and below, sorted, as full keys of this store; an absent folder has none."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; success if there is none."""

    @abc.abstractmethod
    def probe(self) -> None:
        """Raise ``ConditionalPutUnsupported`` unless put-if-absent works here, and any other error that a first write would meet.

        The answer is kept for the life of this object and its children.
        """

    @abc.abstractmethod
    def abort_uploads(self, prefix: str = "", *, older_than_s: float = 0.0) -> int:
        """Discard what interrupted writers left under the key or folder ``prefix``, and return how many there were.

        Local: temporary files whose writer is gone; one that is still being written is kept. S3: every multipart upload there that
        began ``older_than_s`` ago or earlier, running ones included, so name only keys that nobody writes any more. Google and Azure:
        every temporary object there, likewise.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close idle connections; the store remains usable and opens new ones when needed."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def check_range(start: int, end: int) -> None:
    """Refuse what is no range [start, end) of an object."""
    if not 0 <= start <= end:
        raise InvalidInput(f"a range needs 0 <= start <= end, got [{start}, {end})", field="start")


def check_size(size_bytes: int, offset: int, available_bytes: int) -> None:
    """Refuse a piece of a file that the file does not have."""
    if size_bytes < 0 or offset < 0:
        raise InvalidInput(f"size_bytes and offset must be 0 or more, got {size_bytes} and {offset}", field="size_bytes")
    if offset + size_bytes > available_bytes:
        raise InvalidInput(
            f"size_bytes {size_bytes} from offset {offset} is more than the file has: {available_bytes} bytes", field="size_bytes"
        )


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[int]:
    """The descriptor of a file to be stored: the caller's own, or one that is opened here and closed at the end."""
    if isinstance(source, int):
        yield source
        return
    try:
        fd = os.open(source, os.O_RDONLY)
    except OSError as exc:
        raise InvalidInput(f"source cannot be read: {exc.strerror}: {os.fspath(source)!r}", field="source") from exc
    try:
        yield fd
    finally:
        os.close(fd)
