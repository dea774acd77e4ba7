"""A store in an S3 bucket: AWS, or any service with its interface that honours ``If-None-Match: *``.

Small objects are one PUT; larger ones are parts that a few threads send at once, made visible by one conditional completion. The
payload is not signed but carries its CRC64NVME, which costs a tenth of SHA-256 and is checked and kept by the server.
"""

from __future__ import annotations

import contextlib
import email.utils
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from dtr.clock import SYSTEM, Clock
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
    RESERVED,
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
from dtr.store.crc import crc_of
from dtr.store.pieces import Piece, cut, go_on, move, piece_bytes
from dtr.store.resume import Resume, Sent
from dtr.store.s3_location import S3Location
from dtr.store.s3_multipart import checksum, condition, put_parts
from dtr.store.s3_parts import mapped
from dtr.store.s3_requests import Requests

__all__ = ["S3Store"]

_log = logging.getLogger(__name__)
_LARGEST_BYTES: Final = 5 << 40
_READ_BYTES: Final = 8 << 20
_READ_THREADS: Final = 8


class S3Store(Store):
    """Objects in a bucket. Requests are made by the process that calls: a client made before a fork is not used after it."""

    def __init__(self, location: S3Location, *, clock: Clock = SYSTEM, requests: Requests | None = None) -> None:
        self._at = location
        self._requests = requests or Requests(location, clock=clock)

    @property
    def url(self) -> str:
        return self._at.url

    def child(self, prefix: str) -> S3Store:
        return S3Store(replace(self._at, prefix=self._at.key(check_key(prefix, "prefix"))), requests=self._requests)

    # --- writing ---

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        content, key = as_bytes(data), check_key(key)
        if if_absent:
            self.probe()
        self._put(key, content, if_absent=if_absent)

    def _put(
        self,
        key: str,
        content: memoryview,
        *,
        if_absent: bool,
        resend: bool = False,
        crc: int | None = None,
        before_retry: Callable[[], None] | None = None,
    ) -> None:
        failpoint("store.s3.before_put")
        options = {**condition(if_absent), **checksum(crc_of(content) if crc is None else crc, used=self._requests.checksums)}
        conditional = if_absent and not resend
        answer = self._send("PutObject", key, conditional=conditional, content=content, before_retry=before_retry, **options)
        failpoint("store.s3.after_put")
        self._check_answer(key, answer, options)

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
        if size_bytes > _LARGEST_BYTES:
            raise InvalidInput(f"size_bytes must be at most 5 TiB, S3's largest object, got {size_bytes}", field="size_bytes")
        with open_source(source) as fd:
            check_size(size_bytes, offset, os.fstat(fd).st_size)
            if if_absent:
                self.probe()
            with mapped(fd, offset, size_bytes) as content:
                if size_bytes <= piece_bytes(size_bytes):
                    self._put_whole(key, content, if_absent, progress, resume)
                else:
                    self._put_parts(key, content, if_absent, progress, resume)
        self._check_size(key, size_bytes)

    def _put_whole(self, key: str, content: memoryview, if_absent: bool, progress: Progress | None, resume: Resume | None) -> None:
        if progress:
            progress(len(content))  # before it is visible, so that it can still be cancelled
        crc = crc_of(content)
        self._put(key, content, if_absent=if_absent, crc=crc, before_retry=partial(progress, len(content)) if progress else None)
        if resume:
            resume.done(Sent(number=1, crc=crc))

    def _check_size(self, key: str, size_bytes: int) -> None:
        """The service has acknowledged the object, so failing to see it now is not the same as a failed write."""
        try:
            stored = self.size(key)
        except NotFound as exc:
            raise StoreUnavailable(f"{self.url}: {key} was stored and is gone", key=key, unknown=True) from exc
        except StoreUnavailable as exc:
            exc.facts["unknown"] = True
            raise
        if stored != size_bytes:
            raise IntegrityError(f"{self.url} holds {stored} bytes of {key}, {size_bytes} were sent", key=key)

    def _put_parts(self, key: str, content: memoryview, if_absent: bool, progress: Progress | None, resume: Resume | None) -> None:
        if if_absent and (resume is None or resume.upload):  # else the key is new: only uploads on record write to it
            with contextlib.suppress(NotFound):  # the completion decides; this spares sending all for nothing
                self.size(key)
                raise AlreadyExists(f"{self.url} holds {key} already", key=key, maybe_ours=False)
        answer = put_parts(
            self._send,
            key,
            content,
            if_absent=if_absent,
            checksums=self._requests.checksums,
            progress=progress,
            resume=resume,
            others=lambda: [upload_id for found, upload_id in self._open_uploads(key, 0.0) if found == key],
        )
        self._check_answer(key, answer, answer["Asked"])

    def _check_answer(self, key: str, answer: dict[str, Any], sent: dict[str, Any]) -> None:
        ours, theirs = sent.get("ChecksumCRC64NVME"), answer.get("ChecksumCRC64NVME")
        if ours and theirs and ours != theirs and answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            raise IntegrityError(f"{self.url} stored {key} with checksum {theirs}, {ours} was sent", key=key)

    # --- reading ---

    def get(self, key: str) -> bytes:
        content: bytes = self._send("GetObject", check_key(key), read=True)["Content"]
        return content

    def get_range(self, key: str, start: int, end: int) -> bytes:
        check_range(start, end)
        if start == end:  # S3 has no empty range
            self.size(key)
            return b""
        try:
            return self._ranged(key, start, end)
        except StoreRefused as exc:
            if exc.facts.get("status") == 416:  # from the end of the object on
                return b""
            raise

    def _ranged(self, key: str, start: int, end: int, before_retry: Callable[[], None] | None = None) -> bytes:
        answer = self._send("GetObject", check_key(key), read=True, before_retry=before_retry, Range=f"bytes={start}-{end - 1}")
        content: bytes = answer["Content"]
        return content if "ContentRange" in answer else content[start:end]  # a service that ignores ranges sends all

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

    def size(self, key: str) -> int:
        try:
            size_bytes: int = self._send("HeadObject", check_key(key))["ContentLength"]
        except NotFound:
            self._check_bucket()
            raise
        return size_bytes

    def _check_bucket(self) -> None:
        """The answer to HEAD has no text, so that a missing bucket looks like a missing object: ask once, another way."""
        if not self._requests.reached:
            with contextlib.suppress(NotFound):
                self._send("GetObject", f"{RESERVED}absent", read=True)
            self._requests.reached = True

    def list(self, prefix: str = "") -> Iterator[str]:
        prefix = check_prefix(prefix)
        found = self._names(f"{prefix}/" if prefix else "")
        yield from sorted(found)  # services differ in where they put '/'

    def _names(self, prefix: str) -> Iterator[str]:
        cut_off = len(self._at.key("")) if self._at.prefix else 0
        after: dict[str, Any] = {}
        while True:
            page = self._send("ListObjectsV2", "", Prefix=self._at.key(prefix), **after)
            for entry in page.get("Contents", ()):
                if is_key(key := entry["Key"][cut_off:]):
                    yield key
            if not page.get("IsTruncated"):
                return
            after = {"ContinuationToken": page["NextContinuationToken"]}

    # --- the rest ---

    def delete(self, key: str) -> None:
        self._send("DeleteObject", check_key(key))

    def probe(self) -> None:
        if self._requests.probed:
            return
        base = S3Store(self._requests.base, requests=self._requests)
        key = f"{RESERVED}probe-{secrets.token_hex(6)}"
        content = memoryview(b"dtr asks whether put-if-absent works here; safe to delete\n")
        try:
            base._probe_put(key, content)
            base._put(key, content, if_absent=True, resend=True)
        except AlreadyExists:
            self._requests.probed = True
            return
        finally:
            with contextlib.suppress(DtrError):
                base._send("DeleteObject", key)
        raise ConditionalPutUnsupported(
            f"{self.url} ignores If-None-Match, so two writers could both commit one checkpoint; use a service that honours it",
            unknown=False,
        )

    def _probe_put(self, key: str, content: memoryview) -> None:
        """The first conditional put; finds out whether the service takes our checksum header, too."""
        try:
            self._put(key, content, if_absent=True, resend=True)
        except (StoreRefused, IntegrityError) as exc:
            status = exc.facts.get("status")
            if self._requests.checksums and status in {400, 501}:
                self._probe_without_checksum(key, content, exc)
            elif status == 501:
                raise ConditionalPutUnsupported(
                    f"{self.url} does not implement If-None-Match, so it cannot hold the decision about a checkpoint", unknown=False
                ) from exc
            else:
                raise

    def _probe_without_checksum(self, key: str, content: memoryview, refusal: DtrError) -> None:
        self._requests.checksums = False
        try:
            self._probe_put(key, content)
        except DtrError:
            self._requests.checksums = True  # that was not the reason
            raise
        _log.warning("%s refuses CRC64NVME; payloads are signed instead, which costs CPU: %s", self.url, refusal)

    def abort_uploads(self, prefix: str = "", *, older_than_s: float = 0.0) -> int:
        prefix = check_prefix(prefix)
        count = 0
        for key, upload_id in [*self._open_uploads(prefix, older_than_s)]:
            with contextlib.suppress(NotFound):
                self._send("AbortMultipartUpload", key, UploadId=upload_id)
                count += 1
        return count

    def _open_uploads(self, prefix: str, older_than_s: float) -> Iterator[tuple[str, str]]:
        cut_off = len(self._at.key("")) if self._at.prefix else 0
        after: dict[str, Any] = {}
        while True:
            page = self._send("ListMultipartUploads", "", Prefix=self._at.key(prefix), **after)
            now = _server_time(page)
            for upload in page.get("Uploads", ()):
                key = upload["Key"][cut_off:]
                below = not prefix or key == prefix or key.startswith(f"{prefix}/")
                if below and is_key(key) and (now - upload["Initiated"]).total_seconds() >= older_than_s:
                    yield key, upload["UploadId"]
            if not page.get("IsTruncated"):
                return
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def close(self) -> None:
        self._requests.close()

    def _send(self, operation: str, key: str, **options: Any) -> dict[str, Any]:
        return self._requests.send(operation, self._at, key, **options)


def _server_time(answer: dict[str, Any]) -> datetime:
    """The service's own clock, so that ours does not decide how old an upload is."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return email.utils.parsedate_to_datetime(date) if date else datetime.now(UTC)
