"""A claim on a part while its bytes are on their way: kept up by a thread, paced, and with a record for whoever must finish it.

    transfer_begin   the store's name for the upload, under this claim: before the first byte
    transfer_note    the pieces that the store has acknowledged: soon after each
    part_renew       the lease, and how far it is

Only the claim's holder writes any of it. One who was stopped meanwhile is refused, and ends at its next piece; what it sent under the
same nonce are the same bytes, so they harm nobody. The one caller of the ``transfer_*`` scripts.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Final, Self

from dtr.checkpoint import parts
from dtr.checkpoint.parts import Claim
from dtr.checkpoint.uploading.bandwidth import Bandwidth
from dtr.errors import DtrError
from dtr.failpoints import failpoint
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.store.resume import Resume, Sent

__all__ = ["Lease", "LeaseLost", "Stopping", "begin", "note", "sent_before"]

log = logging.getLogger(__name__)

_KEPT_FOR_MS: Final = 24 * 3600 * 1000
_NOTE_EVERY_S: Final = 0.25
_NOTED_AT_ONCE: Final = 500  # pieces in one call: Lua's unpack is bounded
_TOGETHER: Final = 2  # arguments of a piece

Part = tuple[str, int, int]  # run, step, rank


class Stopping(Exception):
    """The worker is being shut down: give the claim back."""


class LeaseLost(Exception):
    """Another uploader has this part, or the checkpoint is over."""


def begin(state: JobState, part: Part, *, token: str, nonce: str, upload: str) -> bool:
    """Put an upload on record; False: the claim is another's by now, or the checkpoint is over."""
    run, step, rank = part
    keys = [state.keys.ckpt(run, step), state.keys.parts(run, step), state.keys.transfer(run, step, rank)]
    return bool(int(state.call("transfer_begin", keys, [rank, token, nonce, upload, _KEPT_FOR_MS])))


def note(state: JobState, part: Part, *, token: str, upload: str, pieces: Iterable[Sent]) -> bool:
    """Put pieces on record; False as for ``begin``, or the upload is not the one on record."""
    run, step, rank = part
    facts = [fact for sent in pieces for fact in (sent.number, f"{sent.crc:016x} {sent.tag}")]
    keys = [state.keys.parts(run, step), state.keys.transfer(run, step, rank)]
    held = True
    for start in range(0, len(facts), _TOGETHER * _NOTED_AT_ONCE):
        some = facts[start : start + _TOGETHER * _NOTED_AT_ONCE]
        held = held and bool(int(state.call("transfer_note", keys, [rank, token, upload, _KEPT_FOR_MS, *some])))
    return held


def sent_before(state: JobState, part: Part, nonce: str) -> tuple[str, dict[int, Sent]]:
    """The upload on record under this nonce, and its pieces; '' and none if there is none to go on with."""
    with translate(state.url):
        held = state.redis.hgetall(state.keys.transfer(*part))
    if held.pop("nonce", "") != nonce:
        return "", {}
    return held.pop("upload", ""), _pieces(held)


def _pieces(fields: Mapping[str, str]) -> dict[int, Sent]:
    """What is no piece is left out: it is then sent again."""
    found = {}
    for number, fact in fields.items():
        crc, _, tag = fact.partition(" ")
        with contextlib.suppress(ValueError):
            found[int(number)] = Sent(number=int(number), crc=int(crc, 16), tag=tag)
    return found


class Lease(Resume):
    """The claim while the block runs.

    ``progress`` is called between two pieces, in the uploading thread, and ends the upload when the claim is lost or the worker stops.

    Args:
        state: of the job.
        part: run, step and rank.
        token: of the claim.
        claim: the answer to it.
        lease_s: renewed at a third of it.
        bandwidth: the host's cap; None: as fast as it goes.
        stopping: whether the worker is being shut down.
    """

    def __init__(
        self,
        state: JobState,
        part: Part,
        token: str,
        claim: Claim,
        *,
        lease_s: float,
        bandwidth: Bandwidth | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._state, self._part, self._token, self._nonce = state, part, token, claim.nonce
        self._lease_s, self._bandwidth, self._stopping = lease_s, bandwidth, stopping
        self.upload, self.sent = "", {}
        self._begun, self._resuming = False, False
        self._fresh: list[Sent] = []
        self._done_bytes, self._paid_bytes, self._paid_at_s = 0, 0, time.monotonic()
        self._over, self._news, self._lost = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._keep, name="dtr-lease", daemon=True)

    # --- the upload's side ---

    def begin(self, upload: str, there: Iterable[Sent] = ()) -> None:
        if not begin(self._state, self._part, token=self._token, nonce=self._nonce, upload=upload):
            raise LeaseLost
        self.upload, self._begun = upload, True
        there = [*there]
        self._fresh += [sent for sent in there if self.sent.get(sent.number) != sent]
        self._resuming = bool(there)
        self._news.set()

    def done(self, piece: Sent) -> None:
        self._fresh.append(piece)
        self._news.set()

    def spare(self, done_bytes: int) -> None:
        """So many bytes need not be sent, so they are not paid for: the store has them from before.

        Told at once: an attempt that finds more there than any before it follows one that got further, whenever that died.
        """
        self._done_bytes = self._paid_bytes = done_bytes
        self._resuming = False
        with contextlib.suppress(DtrError):  # the thread tells it later
            self._lost = not self._renewed() or self._lost

    def progress(self, done_bytes: int) -> None:
        """So many bytes are in the store. Returns when more may be sent."""
        if self._done_bytes == 0:
            failpoint("upload.mid_put")
        self._done_bytes = done_bytes
        self._news.set()  # people watch it move
        if self._resuming:
            self.spare(done_bytes)
        until_s = self._pay()
        while True:
            if self._lost:
                raise LeaseLost
            if self._stopping():
                raise Stopping
            ahead_s = until_s - time.monotonic()
            if ahead_s <= 0:
                return
            time.sleep(min(ahead_s, 0.2))

    def _pay(self) -> float:
        if self._bandwidth is None or self._done_bytes <= self._paid_bytes:
            return 0.0
        until_s = self._bandwidth.pay(self._done_bytes - self._paid_bytes, self._paid_at_s)
        self._paid_bytes, self._paid_at_s = self._done_bytes, max(until_s, time.monotonic())
        return until_s

    # --- the thread's side ---

    def _keep(self) -> None:
        trouble, renew_at_s = "", time.monotonic() + self._lease_s / 3
        while not self._over.is_set():
            self._news.wait(max(0.0, renew_at_s - time.monotonic()))
            self._news.clear()
            if self._over.is_set():
                return
            try:
                held = self._tell()
            except DtrError as exc:  # nobody can take the part while nobody reaches Redis; afterwards the token keeps us apart
                if str(exc) != trouble:
                    log.warning("run %s step %d rank %d: its lease is not renewed: %s", *self._part, exc)
                trouble, pause_s = str(exc), min(self._lease_s / 3, 1.0)
            else:
                trouble, pause_s = "", _NOTE_EVERY_S
                if not held:
                    self._lost = True
                    return
            renew_at_s = time.monotonic() + self._lease_s / 3
            self._over.wait(min(pause_s, self._lease_s / 6))

    def _tell(self) -> bool:
        """Say what was sent, then how far that is; False: the claim is lost."""
        if self._begun and (some := self._fresh[:]):
            note(self._state, self._part, token=self._token, upload=self.upload, pieces=some)
            del self._fresh[: len(some)]
        return self._renewed()

    def _renewed(self) -> bool:
        return parts.renew(self._state, *self._part, token=self._token, lease_ms=int(self._lease_s * 1000), progress_bytes=self._done_bytes)

    def __enter__(self) -> Self:
        self.upload, self.sent = sent_before(self._state, self._part, self._nonce)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._news.set()
        self._thread.join()
