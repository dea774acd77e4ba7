"""A large S3 object on its way: parts that a few threads send, and one completion, conditional, that makes it visible.

With a ``Resume`` the upload outlives its process: it is on record before the first part, and whoever goes on asks the service which
parts it has. It is aborted by whoever finds it useless: its object is there already, or its parts make no whole.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final

from dtr.errors import AlreadyExists, DtrError, IntegrityError, NotFound, StoreRefused
from dtr.failpoints import failpoint
from dtr.store.base import Progress
from dtr.store.crc import combined, crc_of
from dtr.store.pieces import Piece, cut, go_on, move, piece_bytes
from dtr.store.resume import Resume, Sent

__all__ = ["checksum", "condition", "put_parts"]

_log = logging.getLogger(__name__)
_THREADS: Final = 4
_NOT_LISTED: Final = {403, 405, 501}  # the service does not say which parts it has: what is on record counts
_NO_WHOLE: Final = {"InvalidPart", "InvalidPartOrder", "EntityTooSmall"}

Send = Callable[..., dict[str, Any]]


def condition(if_absent: bool) -> dict[str, Any]:
    """The header that makes a write conditional."""
    return {"IfNoneMatch": "*"} if if_absent else {}


def checksum(crc: int, *, used: bool) -> dict[str, Any]:
    """The header that the service compares with what arrives, where such headers are used."""
    return {"ChecksumCRC64NVME": base64.b64encode(crc.to_bytes(8, "big")).decode()} if used else {}


def put_parts(
    send: Send,
    key: str,
    content: memoryview,
    *,
    if_absent: bool,
    checksums: bool,
    progress: Progress | None,
    resume: Resume | None,
    others: Callable[[], Iterable[str]],
) -> dict[str, Any]:
    """Store ``content`` under ``key``; returns the answer to the completion, and what was asked for, as ``Asked``.

    Args:
        send: one request for this store; see ``Requests.send``.
        key: of the object.
        content: more than one piece.
        if_absent: AlreadyExists rather than replace.
        checksums: whether payloads carry a CRC64NVME.
        progress, resume: see ``Store.put_file``.
        others: the ids of all open uploads of this key.
    """
    return _Upload(send, key, content, checksums=checksums, resume=resume).run(if_absent=if_absent, progress=progress, others=others)


class _Upload:
    """One multipart upload, begun here or by an earlier process."""

    def __init__(self, send: Send, key: str, content: memoryview, *, checksums: bool, resume: Resume | None) -> None:
        self._send, self._key, self._content, self._checksums, self._resume = send, key, content, checksums, resume
        self._pieces = {piece.number: piece for piece in cut(len(content), piece_bytes(len(content)))}
        self._sent: dict[int, Sent] = {}
        self._id = ""

    def run(self, *, if_absent: bool, progress: Progress | None, others: Callable[[], Iterable[str]]) -> dict[str, Any]:
        if not self._found():
            self._create(others if if_absent else tuple)
        done_bytes = sum(self._pieces[number].size_bytes for number in self._sent)
        tell = (lambda count: progress(done_bytes + count)) if progress else None
        try:
            failpoint("store.s3.after_create")
            if tell and done_bytes:
                tell(0)
            missing = (piece for number, piece in self._pieces.items() if number not in self._sent)
            move(self._send_piece, missing, threads=_THREADS, progress=tell, ramp=True)
            failpoint("store.s3.before_complete")
            answer = self._complete(if_absent=if_absent)
        except BaseException as exc:
            if self._is_useless(exc):
                self._abort(self._id)
            raise
        failpoint("store.s3.after_complete")
        return answer

    # --- the upload ---

    def _create(self, others: Callable[[], Iterable[str]]) -> None:
        declared = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"} if self._checksums else {}
        created = self._send("CreateMultipartUpload", self._key, **declared)
        self._id = created["UploadId"]
        if created["Attempts"] > 1:  # an answer was lost: the upload that it named is nobody's
            self._abort_others(others)
        failpoint("store.s3.before_record")
        if self._resume:
            try:
                self._resume.begin(self._id)
            except BaseException:
                self._abort(self._id)
                raise

    def _found(self) -> bool:
        """Whether there is an earlier process's upload to go on with; takes its parts over."""
        if self._resume is None or not self._resume.upload:
            return False
        self._id = self._resume.upload
        try:
            there = [*self._listed()]
        except NotFound:  # aborted by somebody: begin anew
            return False
        except StoreRefused as exc:
            if exc.facts.get("status") not in _NOT_LISTED:
                raise
            _log.info("%s: going on by our own record of the parts sent: %s", self._key, exc)
            there = [*self._resume.sent.values()]
        self._sent = {sent.number: sent for sent in there}
        self._resume.begin(self._id, there)
        _log.info("%s: %d of %d pieces were sent before", self._key, len(there), len(self._pieces))
        return True

    def _listed(self) -> Iterator[Sent]:
        """The pieces that the service has: of the right size, and with our bytes' checksum where it says one."""
        for part in self._parts():
            piece = self._pieces.get(part["PartNumber"])
            if piece is None or part["Size"] != piece.size_bytes:
                continue
            crc = self._crc(piece, part["ETag"])
            if part.get("ChecksumCRC64NVME") in {None, *checksum(crc, used=True).values()}:
                yield Sent(number=piece.number, crc=crc, tag=part["ETag"])

    def _parts(self) -> Iterator[dict[str, Any]]:
        after: dict[str, Any] = {}
        while True:
            page = self._send("ListParts", self._key, UploadId=self._id, **after)
            yield from page.get("Parts", ())
            if not page.get("IsTruncated"):
                return
            after = {"PartNumberMarker": int(page["NextPartNumberMarker"])}

    def _crc(self, piece: Piece, tag: str) -> int:
        """Computed when the piece was sent, and on record with the service's answer; else once more."""
        noted = self._resume.sent.get(piece.number) if self._resume else None
        return noted.crc if noted and noted.tag == tag else crc_of(self._content[piece.start : piece.end])

    def _is_useless(self, exc: BaseException) -> bool:
        """Whether nobody will want the upload after this error.

        A completion whose answer was lost may have been done: then there is nothing to abort, and somebody looks.
        """
        if getattr(exc, "unknown", False):
            return False
        no_whole = isinstance(exc, AlreadyExists | IntegrityError) or getattr(exc, "code", "") in _NO_WHOLE
        return self._resume is None or no_whole

    def _abort(self, upload_id: str) -> None:
        try:
            self._send("AbortMultipartUpload", self._key, UploadId=upload_id)
        except NotFound:
            pass  # gone already
        except DtrError as exc:
            _log.warning("upload of %s stays open until abort_uploads: %s", self._key, exc, extra={"key": self._key})

    def _abort_others(self, others: Callable[[], Iterable[str]]) -> None:
        try:
            lost = [upload_id for upload_id in others() if upload_id != self._id]
        except DtrError as exc:
            _log.warning("an upload of %s may stay open until abort_uploads: %s", self._key, exc, extra={"key": self._key})
            return
        for upload_id in lost:
            self._abort(upload_id)

    # --- its pieces ---

    def _send_piece(self, piece: Piece, over: threading.Event) -> None:
        body = self._content[piece.start : piece.end]
        crc = crc_of(body)
        options = {"UploadId": self._id, "PartNumber": piece.number, **checksum(crc, used=self._checksums)}
        etag = self._send("UploadPart", self._key, content=body, before_retry=partial(go_on, over), **options)["ETag"]
        sent = self._sent[piece.number] = Sent(number=piece.number, crc=crc, tag=etag)
        if self._resume:
            self._resume.done(sent)

    def _complete(self, *, if_absent: bool) -> dict[str, Any]:
        options = condition(if_absent)
        parts = [self._sent[number] for number in sorted(self._sent)]
        if self._checksums:
            whole = combined((sent.crc, self._pieces[sent.number].size_bytes) for sent in parts)
            options |= {**checksum(whole, used=True), "ChecksumType": "FULL_OBJECT"}
        named = [{"PartNumber": sent.number, "ETag": sent.tag, **checksum(sent.crc, used=self._checksums)} for sent in parts]
        # Not to be sent again even without a condition: a second completion would meet the end of the first.
        answer = self._send(
            "CompleteMultipartUpload", self._key, conditional=True, UploadId=self._id, MultipartUpload={"Parts": named}, **options
        )
        return {**answer, "Asked": options}
