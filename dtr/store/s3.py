"""A store in an S3 bucket: AWS, or any service with its interface that honours ``If-None-Match: *``.

Small objects are one PUT; larger ones are parts that a few threads send at once, made visible by one conditional completion. The
payload is not signed but carries its CRC64NVME, which costs a tenth of SHA-256 and is checked and kept by the server.
"""

from __future__ import annotations

import contextlib
import email.utils
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from dtr.clock import SYSTEM, Clock
from dtr.errors import (
    AlreadyExists,
    ConditionalPutUnsupported,
    DtrError,
    IntegrityError,
    NotFound,
    StoreRefused,
)
from dtr.failpoints import failpoint
from dtr.store.base import (
    RESERVED,
    Progress,
    check_key,
    check_prefix,
    is_key,
)
from dtr.store.crc import crc_of
from dtr.store.objects import ObjectStore
from dtr.store.resume import Resume, Sent
from dtr.store.s3_location import S3Location
from dtr.store.s3_multipart import checksum, condition, put_parts
from dtr.store.s3_requests import Requests

__all__ = ["S3Store"]

_log = logging.getLogger(__name__)
_LARGEST_BYTES: Final = 5 << 40


class S3Store(ObjectStore):
    """Objects in a bucket. Requests are made by the process that calls: a client made before a fork is not used after it."""

    def __init__(self, location: S3Location, *, clock: Clock = SYSTEM, requests: Requests | None = None) -> None:
        self._at, self._requests = location, requests or Requests(location, clock=clock)
        super().__init__(location, self._requests, largest_bytes=_LARGEST_BYTES)

    def child(self, prefix: str) -> S3Store:
        return S3Store(replace(self._at, prefix=self._at.key(check_key(prefix, "prefix"))), requests=self._requests)

    # --- writing ---

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
        crc = crc_of(content)
        failpoint("store.s3.before_put")
        options = {**condition(if_absent), **checksum(crc, used=self._requests.checksums)}
        conditional = if_absent and not resend
        answer = self._send("PutObject", key, conditional=conditional, content=content, before_retry=before_retry, **options)
        failpoint("store.s3.after_put")
        self._check_answer(key, answer, options)
        if resume:
            resume.done(Sent(number=1, crc=crc))

    def _put_large(self, key: str, content: memoryview, if_absent: bool, progress: Progress | None, resume: Resume | None) -> None:
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
        self._check_size(key, len(content))

    def _check_answer(self, key: str, answer: dict[str, Any], sent: dict[str, Any]) -> None:
        ours, theirs = sent.get("ChecksumCRC64NVME"), answer.get("ChecksumCRC64NVME")
        if ours and theirs and ours != theirs and answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            raise IntegrityError(f"{self.url} stored {key} with checksum {theirs}, {ours} was sent", key=key)

    # --- reading ---

    def get(self, key: str) -> bytes:
        content: bytes = self._send("GetObject", check_key(key), read=True)["Content"]
        return content

    def _ranged(self, key: str, start: int, end: int, before_retry: Callable[[], None] | None = None) -> bytes:
        answer = self._send("GetObject", key, read=True, before_retry=before_retry, Range=f"bytes={start}-{end - 1}")
        content: bytes = answer["Content"]
        return content if "ContentRange" in answer else content[start:end]  # a service that ignores ranges sends all

    def _head(self, key: str) -> tuple[int, str]:
        answer = self._send("HeadObject", key)
        return answer["ContentLength"], answer.get("ETag", "").strip('"')

    def _get_absent(self) -> None:
        self._send("GetObject", f"{RESERVED}absent", read=True)

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

    def _send(self, operation: str, key: str, **options: Any) -> dict[str, Any]:
        return self._requests.send(operation, self._at, key, **options)


def _server_time(answer: dict[str, Any]) -> datetime:
    """The service's own clock, so that ours does not decide how old an upload is."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return email.utils.parsedate_to_datetime(date) if date else datetime.now(UTC)
