"""A store in Google Cloud Storage or Azure Blob Storage, through obstore.

Small objects are one PUT, conditional where asked (generation 0 in Google's, ``If-None-Match: *`` in Azure's). Neither service takes a
condition for all that is sent in pieces, so a large object goes to a temporary name in pieces and from there to its own name by a
copy inside the service, which does take one. What a killed writer leaves is that temporary object (``abort_uploads`` removes it) or an
unfinished upload, which obstore cannot list: Azure drops those after a week; give a Google bucket the lifecycle rule
AbortIncompleteMultipartUpload.

The service checks no checksum of ours, since obstore cannot send one: TLS guards the way, and the manifest's checksum what is read.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from dtr.clock import SYSTEM, Clock
from dtr.errors import (
    AlreadyExists,
    ConditionalPutUnsupported,
    DtrError,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)
from dtr.failpoints import failpoint
from dtr.store.base import (
    RESERVED,
    Progress,
    check_key,
    check_prefix,
    is_key,
)
from dtr.store.cloud_location import CloudLocation
from dtr.store.cloud_pieces import PIECES_AT_ONCE, Pieces, is_temporary, temporary_name, watch
from dtr.store.cloud_requests import Act, Answer, CloudRequests
from dtr.store.objects import ObjectStore
from dtr.store.resume import Resume

__all__ = ["CloudStore"]

_log = logging.getLogger(__name__)
_LARGEST_BYTES: Final = {"gs": 5 << 40, "az": 190 << 40}
_Entries = list[tuple[str, datetime]]
_COPY_WITHIN_S: Final = 600.0
_WHY: Final = "two writers could both commit one checkpoint; use a service that honours it"


class CloudStore(ObjectStore):
    """Objects in a bucket or container. Each process makes its own connections, a forked child as well."""

    def __init__(self, location: CloudLocation, *, clock: Clock = SYSTEM, requests: CloudRequests | None = None) -> None:
        self._at, self._requests = location, requests or CloudRequests(location, clock=clock)
        super().__init__(location, self._requests, largest_bytes=_LARGEST_BYTES[location.service])

    def child(self, prefix: str) -> CloudStore:
        return CloudStore(replace(self._at, prefix=self._at.key(check_key(prefix, "prefix"))), requests=self._requests)

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
        mode, path = "create" if if_absent else "overwrite", self._at.key(key)

        def act(obstore: Any, client: Any) -> None:
            obstore.put(client, path, content, mode=mode, use_multipart=False)

        failpoint("store.cloud.before_put")
        self._call("put", key, act, conditional=if_absent and not resend, before_retry=before_retry)
        failpoint("store.cloud.after_put")

    def _put_large(self, key: str, content: memoryview, if_absent: bool, progress: Progress | None, resume: Resume | None) -> None:
        """Obstore cannot go on with an upload of another process, so ``resume`` has no effect."""
        if if_absent:
            with contextlib.suppress(NotFound):  # the copy decides; this spares sending all for nothing
                self.size(key)
                raise AlreadyExists(f"{self.url} holds {key} already", key=key, maybe_ours=False)
        temporary = temporary_name(key)
        try:
            self._send_pieces(key, temporary, content, progress)
            failpoint("store.cloud.before_copy")
            self._copy(temporary, key, if_absent=if_absent)
            failpoint("store.cloud.after_copy")
            self._wait_for_copy(key, len(content))
        except BaseException as exc:
            # A copy whose answer was lost may still be under way: then its source stays for it, until abort_uploads.
            if not getattr(exc, "unknown", False):
                self._discard(temporary)
            raise
        self._discard(temporary)

    def _send_pieces(self, key: str, temporary: str, content: memoryview, progress: Progress | None) -> None:
        """Send all pieces from a thread; this one reports, once per piece and second at least, and gives up when told to."""
        pieces, path = Pieces(content), self._at.key(temporary)

        def act(obstore: Any, client: Any) -> None:
            obstore.put(client, path, pieces, use_multipart=True, chunk_size=pieces.piece_bytes, max_concurrency=PIECES_AT_ONCE)

        with ThreadPoolExecutor(1, thread_name_prefix="dtr-store") as pool:  # leaving it waits for the pieces under way
            sent = pool.submit(self._call, "put_parts", key, act, pieces=True)
            sent.add_done_callback(lambda _: pieces.moved.set())
            try:
                watch(key, pieces, sent.done, progress, self._requests.clock)
            finally:
                pieces.over.set()
            try:
                sent.result()
            except StoreUnavailable as exc:
                if not self._has_arrived(temporary, len(content)):
                    exc.facts["unknown"] = False  # whatever was done, it was not done to this key
                    raise
                _log.info("%s is complete in spite of: %s", temporary, exc)
        if progress:
            progress(len(content))

    def _has_arrived(self, temporary: str, size_bytes: int) -> bool:
        """Whether only the last answer was lost: nobody else writes that name, so an object of this size is ours."""
        with contextlib.suppress(DtrError):
            return self._head(temporary)[0] == size_bytes
        return False

    def _copy(self, temporary: str, key: str, *, if_absent: bool) -> None:
        source, target = self._at.key(temporary), self._at.key(key)

        def act(obstore: Any, client: Any) -> None:
            obstore.copy(client, source, target, overwrite=not if_absent)

        self._call("copy", key, act, conditional=if_absent)

    def _wait_for_copy(self, key: str, size_bytes: int) -> None:
        """Return when the object is whole. A copy inside one account is done at once, but Azure does not promise it: until
        then the object is empty, or not to be read.
        """
        clock = self._requests.clock
        deadline, pause_s = clock.monotonic() + _COPY_WITHIN_S, 0.05
        while not self._is_copied(key, size_bytes):
            if clock.monotonic() > deadline:
                raise StoreUnavailable(f"{self.url}: the service has not finished copying {key} to its name", key=key, unknown=True)
            clock.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)

    def _is_copied(self, key: str, size_bytes: int) -> bool:
        if self._at.service == "gs":  # there a copy is atomic
            self._check_size(key, size_bytes)
            return True
        if self._stored_bytes(key) == 0:
            return False
        self._check_size(key, size_bytes)
        try:
            return len(self.get_range(key, size_bytes - 1, size_bytes)) == 1
        except StoreRefused as exc:
            if exc.facts.get("code") in {"PendingCopyOperation", "NoPendingCopyOperation"}:
                return False
            raise

    def _discard(self, temporary: str) -> None:
        try:
            self._delete(temporary)
        except DtrError as exc:
            _log.warning("%s stays until abort_uploads: %s", temporary, exc, extra={"key": temporary})

    # --- reading ---

    def get(self, key: str) -> bytes:
        path = self._at.key(check_key(key))
        return self._call("get", key, lambda obstore, client: bytes(obstore.get(client, path).bytes()))

    def _ranged(self, key: str, start: int, end: int, before_retry: Callable[[], None] | None = None) -> memoryview:
        path = self._at.key(key)

        def act(obstore: Any, client: Any) -> memoryview:
            return memoryview(obstore.get_range(client, path, start=start, end=end))

        return self._call("get", key, act, before_retry=before_retry)

    def _head(self, key: str) -> tuple[int, str]:
        head = self._facts(key)
        return int(head["size"]), str(head["e_tag"] or head["last_modified"]).strip('"')

    def _facts(self, name: str) -> Any:
        path = self._at.key(name)
        return self._call("head", name, lambda obstore, client: obstore.head(client, path))

    def _get_absent(self) -> None:
        absent = self._at.key(f"{RESERVED}absent")
        self._call("get", "", lambda obstore, client: obstore.get(client, absent))

    def list(self, prefix: str = "") -> Iterator[str]:
        found = (key for key, _ in self._below(check_prefix(prefix)))
        yield from sorted(key for key in found if is_key(key))

    def _below(self, prefix: str, *, deep: bool = True) -> _Entries:
        """All names in a folder, ours among them, each with the time of its last change."""
        folder = self._at.key(prefix).rstrip("/") or None
        cut_off = len(self._at.key("")) if self._at.prefix else 0

        def act(obstore: Any, client: Any) -> _Entries:
            if not deep:
                entries = obstore.list_with_delimiter(client, folder)["objects"]
            else:
                entries = [entry for page in obstore.list(client, folder) for entry in page]
            return [(entry["path"][cut_off:], entry["last_modified"]) for entry in entries]

        return self._call("list", "", act)

    # --- the rest ---

    def delete(self, key: str) -> None:
        self._delete(check_key(key))

    def _delete(self, name: str) -> None:
        path = self._at.key(name)
        with contextlib.suppress(NotFound):
            self._call("delete", name, lambda obstore, client: obstore.delete(client, path))

    def probe(self) -> None:
        if self._requests.probed:
            return
        base = CloudStore(self._requests.base, requests=self._requests)
        key = f"{RESERVED}probe-{secrets.token_hex(6)}"
        content = memoryview(b"dtr asks whether put-if-absent works here; safe to delete\n")
        try:
            with contextlib.suppress(AlreadyExists):  # the first answer was lost
                base._put(key, content, if_absent=True, resend=True)
            honoured = base._is_refused(lambda: base._put(key, content, if_absent=True, resend=True))
            honoured = honoured and base._is_refused(lambda: base._copy(key, key, if_absent=True))
        except StoreRefused as exc:
            if exc.facts.get("status") != 501:
                raise
            raise ConditionalPutUnsupported(f"{self.url} does not implement put-if-absent: {_WHY}", unknown=False) from exc
        finally:
            with contextlib.suppress(DtrError):
                base._delete(key)
        if not honoured:
            raise ConditionalPutUnsupported(f"{self.url} ignores put-if-absent: {_WHY}", unknown=False)
        self._requests.probed = True

    @staticmethod
    def _is_refused(write: Callable[[], None]) -> bool:
        try:
            write()
        except AlreadyExists:
            return True
        return False

    def abort_uploads(self, prefix: str = "", *, older_than_s: float = 0.0) -> int:
        prefix = check_prefix(prefix)
        parent, _, own = prefix.rpartition("/")
        left = [entry for entry in self._below(prefix) if is_temporary(entry[0])]
        if prefix:
            left += [entry for entry in self._below(parent, deep=False) if is_temporary(entry[0], of=own)]
        if left and older_than_s > 0:
            now = self._server_time()
            left = [entry for entry in left if (now - entry[1]).total_seconds() >= older_than_s]
        for name, _ in left:
            self._delete(name)
        return len(left)

    def _server_time(self) -> datetime:
        """The service's own clock, so that ours does not decide how old an object is."""
        name = f"{RESERVED}clock-{secrets.token_hex(6)}"
        self._put(name, memoryview(b""), if_absent=False)
        try:
            return self._facts(name)["last_modified"]  # type: ignore[no-any-return]
        finally:
            self._discard(name)

    def _call(self, operation: str, key: str, act: Act[Answer], **options: Any) -> Answer:
        return self._requests.call(operation, self._at, key, act, **options)
