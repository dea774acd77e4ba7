"""The uploader's work on one part: claim it, carry its bytes from the slot to the store, record it, and decide what became complete.

    claim (lease, nonce) -> shared lock on the slot -> put if absent under the nonce's key, piece by piece -> record -> settle -> free slots

Killed between any two lines: the claim's lease lapses, and the next uploader goes on with the pieces that the store has, under the same
nonce, or begins under a new one where there are none; what was put before is then in nobody's manifest, and is deleted when the
checkpoint is decided. Stopped, and continued when everything is over: the slot could not be reused meanwhile, and neither the put, the
record nor the manifest of a late uploader replaces anything.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dtr.checkpoint import handover, parts
from dtr.checkpoint.delta import carrying as delta
from dtr.checkpoint.keeping.collect import collect, collect_due
from dtr.checkpoint.keeping.rebuild import rebuild, rebuild_missing
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.parts import Claim, Fence, Spec, StagedPart
from dtr.checkpoint.staging.slots import Found, SlotRecord, finish, open_for_reading, scan_job
from dtr.checkpoint.uploading.bandwidth import Bandwidth
from dtr.checkpoint.uploading.commit import discard, folder_key, object_key, settle
from dtr.checkpoint.uploading.lease import Lease, LeaseLost, Stopping
from dtr.checkpoint.uploading.transfer import carry
from dtr.errors import (
    CheckpointConflict,
    CheckpointError,
    CoordinatorUnavailable,
    DtrError,
    Recovering,
    RunUnknown,
    SlotUnavailable,
    StateLost,
    StoreUnavailable,
    Unavailable,
)
from dtr.failpoints import failpoint
from dtr.membership import open_state
from dtr.state.client import connect
from dtr.state.job import JobState
from dtr.store import Store, open_store

__all__ = ["Stopping", "Uploader", "register_slot"]

log = logging.getLogger(__name__)

_LONGEST_RETRY_S: Final = 30.0
_RECORD_FOR_S: Final = 300.0  # how long a part that is in the store waits for Redis before it is given up and uploaded anew
_DECIDED: Final = {"COMMITTED": "committed", "ABORTED": "aborted", "ABANDONED": "abandoned"}


def register_slot(state: JobState, record: SlotRecord) -> parts.Placed:
    """Make a complete slot known to Redis, with its share of the data state; see ``parts.register``."""
    who = _hand_over(state, record)
    return parts.register(
        state,
        Spec(
            run=record.run,
            step=record.step,
            world_size=record.world_size,
            store=record.store,
            replicated=record.replicated,
            structure=record.structure,
            writer=record.rank,
        ),
        who,
        StagedPart(size_bytes=record.size_bytes, save=record.save, metrics=record.metrics),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long, how often and how fast. ``mbps``: MB/s of all uploads of this host together; None: as fast as it goes."""

    lease_s: float = 10.0
    max_attempts: int = 5
    mbps: float | None = None
    collect_interval_s: float = 300.0


class Uploader:
    """Carries the parts of one host. Holds connections, so each process makes its own; its threads may share it.

    Args:
        redis_url: the coordinator.
        staging: this host's staging folder.
        host: its id.
        limits: of leases, attempts and bandwidth.
        stopping: asked between pieces; True ends an upload within one piece.
    """

    def __init__(
        self,
        *,
        redis_url: str,
        staging: str,
        host: str,
        limits: Limits = Limits(),
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.redis_url, self.staging, self.host, self.limits = redis_url, staging, host, limits
        self._stopping = stopping
        self._redis = connect(redis_url, name="dtr-upload")
        self._stores: dict[str, Store] = {}
        self._bandwidth = Bandwidth(staging, limits.mbps) if limits.mbps is not None else None

    def upload_part(self, job: str, run: str, step: int, rank: int) -> str:
        """Upload one part, unless somebody else does or did; returns a word about what was found or done.

        CLAIMED becomes the checkpoint's state afterwards; else BUSY, LATER, ELSEWHERE, UNKNOWN (nothing staged here), WAITS (the run's
        base is not on record yet), LOST (others were faster, or the checkpoint is over), RELEASED (an error that is on the part now).
        """
        state, token = self._state(job), f"{self.host}:{os.getpid()}:{secrets.token_hex(4)}"
        try:
            answer = self._claim(state, run, step, rank, token)
        except (StateLost, Recovering) as exc:
            if not self._recover(state, run, step, rank):
                log.info("job %s run %s step %d rank %d is not known: %s", job, run, step, rank, exc)
                return "UNKNOWN"
            answer = self._claim(state, run, step, rank, token)
        if answer.answer == "NONE" and answer.state in {"", "WRITING"}:
            word = self._register(state, job, run, step, rank)
            if word:
                return word
            answer = self._claim(state, run, step, rank, token)
        if answer.answer == "CLAIMED":
            failpoint("upload.after_claim")
            return self._carry(state, run, step, rank, token, answer)
        if answer.answer in {"DONE", "NONE"}:
            return self.settle(job, run, step) or answer.answer
        return answer.answer

    def settle(self, job: str, run: str, step: int) -> str:
        """Decide a checkpoint that is complete or cannot become so, and free this host's slots of it; returns its state."""
        state = self._state(job)
        view = parts.read(state, run, step)
        if view is None:
            return ""
        now = view.state
        if now in {"SEALED", "ABORTING"}:
            now = settle(state, self._store(view.store, job), run, step)
        if now in _DECIDED:
            self.free(job, run, step, _DECIDED[now], view.reason, saves={part.save for part in view.parts.values()})
        if now == "COMMITTED" and view.state != now:
            self._retire(state, self._store(view.store, job))
        return now

    def collect(self, job: str) -> str:
        """Retention beside that after a commit: what has become old or whose readers' grace has passed meanwhile; returns a word."""
        return collect_due(self._state(job), lambda url: self._store(url, job), self.limits.collect_interval_s)

    def free(self, job: str, run: str, step: int, outcome: str, reason: str, *, saves: set[str]) -> None:
        """Finish this host's slots of a decided checkpoint; what is being read just now is left to the reconciler."""
        for found in scan_job(self.staging, job):
            record = found.record
            if found.kind == "STAGED" and record is not None and (record.run, record.step) == (run, step) and record.save in saves:
                finish(found, outcome, reason)

    def _retire(self, state: JobState, store: Store) -> None:
        """Let go of what the new commit made superfluous; what fails here is done after the next one."""
        try:
            collect(store, state)
        except DtrError as exc:
            log.warning("job %s: retention goes on after the next commit: %s", state.job, exc)

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()
        for store in self._stores.values():
            store.close()

    # --- claiming ---

    def _claim(self, state: JobState, run: str, step: int, rank: int, token: str) -> Claim:
        return parts.claim(
            state,
            run,
            step,
            rank,
            host=self.host,
            token=token,
            nonce=secrets.token_hex(4),
            lease_ms=int(self.limits.lease_s * 1000),
            max_attempts=self.limits.max_attempts,
        )

    def _register(self, state: JobState, job: str, run: str, step: int, rank: int) -> str:
        """Tell Redis of the slot that a message names; '' if it knows it now."""
        found = self._slot(job, run, step, rank)
        if found is None or found.record is None:
            return "UNKNOWN"
        try:
            try:
                register_slot(state, found.record)
            except RunUnknown:
                rebuild_missing(state, self._store(found.record.store, job), found.record.store)
                register_slot(state, found.record)
        except (RunUnknown, Recovering) as exc:
            log.warning("run %s step %d rank %d stays staged: %s", run, step, rank, exc)
            return "UNKNOWN"
        except CheckpointError as exc:
            if exc.facts.get("code") == "CKPT_STATE":
                log.info("run %s step %d rank %d waits: %s", run, step, rank, exc)
                return "WAITS"
            log.warning("run %s step %d rank %d is of no use: %s", run, step, rank, exc)
            finish(found, "refused", str(exc))
            return "LOST"
        return ""

    def _recover(self, state: JobState, run: str, step: int, rank: int) -> bool:
        """Redis was emptied, or is being filled: fill it from the store that the slot names, or wait for whoever does; False: no slot."""
        found = self._slot(state.job, run, step, rank)
        if found is None or found.record is None:
            return False
        store_url = found.record.store
        open_state(state, recover=lambda state_id: rebuild(state, store_url, state_id=state_id), timeout_s=20)
        return True

    def _slot(self, job: str, run: str, step: int, rank: int, save: str = "") -> Found | None:
        for found in scan_job(self.staging, job):
            record = found.record
            if found.kind != "STAGED" or record is None or (record.run, record.step, record.rank) != (run, step, rank):
                continue
            if not save or record.save == save:
                return found
        return None

    # --- carrying ---

    def _carry(self, state: JobState, run: str, step: int, rank: int, token: str, claim: Claim) -> str:
        """Upload a claimed part. Whatever ends it is on the part afterwards, for people and for the next uploader."""
        error, retry_s, counts = "", 0.0, False
        try:
            return self._upload(state, run, step, rank, token, claim)
        except Stopping:
            error = "its uploader was shut down"
        except LeaseLost:
            return "LOST"
        except SlotUnavailable as exc:
            error, retry_s = str(exc), 0.5
        except StoreUnavailable as exc:
            error, retry_s = str(exc), self._pause_s(claim.failures)
        except Unavailable as exc:
            error = str(exc)
        except Exception as exc:  # whatever it is, it must neither end the worker nor be tried for ever
            error, retry_s, counts = f"{type(exc).__name__}: {exc}", self._pause_s(claim.failures), True
            log.exception("run %s step %d rank %d: upload failed", run, step, rank)
        log.warning("run %s step %d rank %d: upload ended, next in %.1f s: %s", run, step, rank, retry_s, error)
        try:
            parts.release(state, run, step, rank, token=token, error=error, retry_ms=int(retry_s * 1000), counts=counts)
        except DtrError as exc:
            log.info("the claim lapses by itself, because %s", exc)
        return "RELEASED"

    @staticmethod
    def _pause_s(failures: int) -> float:
        """Full jitter below a bound that doubles: uploaders that a store threw off do not come back together."""
        return random.uniform(0.25, 1.0) * min(0.5 * 2.0 ** min(failures, 10), _LONGEST_RETRY_S)

    def _upload(self, state: JobState, run: str, step: int, rank: int, token: str, claim: Claim) -> str:
        found = self._slot(state.job, run, step, rank, claim.save)
        if found is None:
            parts.lose(state, run, step, rank, seen="staged", reason=f"rank {rank}: its staged bytes are gone from host {self.host}")
            return self.settle(state.job, run, step)
        with open_for_reading(found) as reading:
            store = self._store(reading.record.store, state.job)
            store.probe()
            key = object_key(run, step, rank, reading.record.incarnation, claim.nonce)
            with self._lease(state, (run, step, rank), token, claim) as lease:
                try:
                    facts = delta.carry(store, reading, state=state, nonce=claim.nonce, progress=lease.progress, spare=lease.spare)
                    facts = facts or carry(store, reading, key, resume=lease, progress=lease.progress)
                except LeaseLost:
                    _discard_all(store, run, step, key)
                    raise
            failpoint("upload.after_put")
            now, why = self._record(state, reading.record, facts, claim)
        failpoint("upload.after_part_done")
        if now == "LOST":
            log.warning("run %s step %d rank %d: this upload came too late: %s", run, step, rank, why)
            _discard_all(store, run, step, key)
            return "LOST"
        return self.settle(state.job, run, step)

    def _lease(self, state: JobState, part: tuple[str, int, int], token: str, claim: Claim) -> Lease:
        return Lease(state, part, token, claim, lease_s=self.limits.lease_s, bandwidth=self._bandwidth, stopping=self._stopping)

    def _record(self, state: JobState, record: SlotRecord, facts: PartFacts, claim: Claim) -> tuple[str, str]:
        """Record the part, waiting for a Redis that is away: its bytes are in the store, and sending them again costs more.

        Its share of the data state comes first: its trainer may have died, or be slow, between saying that it has a part and saying that,
        and the part that completes the set must find that shares are needed.
        """
        deadline, pause_s = time.monotonic() + _RECORD_FOR_S, 0.1
        while True:
            try:
                _hand_over(state, record)
                return parts.done(state, record.run, record.step, facts, nonce=claim.nonce)
            except (CheckpointConflict, RunUnknown, StateLost) as exc:
                return "LOST", str(exc)
            except (CoordinatorUnavailable, Recovering):
                if self._stopping() or time.monotonic() > deadline:
                    raise
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 2.0)

    # --- connections ---

    def _state(self, job: str) -> JobState:
        return JobState(self.redis_url, job, client=self._redis)

    def _store(self, url: str, job: str) -> Store:
        if url not in self._stores:
            self._stores[url] = open_store(url)
        return self._stores[url].child(job)


def _hand_over(state: JobState, record: SlotRecord) -> Fence:
    """Tell the share of the data state of a slot, in the name of its trainer; the first that was told counts."""
    who = Fence(rank=record.rank, worker=record.worker, incarnation=record.incarnation, host=record.host)
    handover.hand_over(state, record.run, record.step, who, record.data)
    return who


def _discard_all(store: Store, run: str, step: int, key: str) -> None:
    """Discard what an upload put under its nonce: the part ``key``, or its recipes, each of which else keeps its chunks."""
    stem = key.removesuffix(".safetensors")
    try:
        found = [name for name in store.list(folder_key(run, step)) if name.startswith(stem)]
    except DtrError as exc:
        log.info("whether %s* was put is not known, so it stays for now: %s", stem, exc)
        found = []
    for name in {key, *found}:
        discard(store, run, step, name)
