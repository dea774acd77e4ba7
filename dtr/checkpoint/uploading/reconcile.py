"""One look of an uploader at its host's slots and at the checkpoints that are open: what must be woken, told, aborted or freed.

It makes the queue a matter of speed alone: whatever message was lost, whoever died, the next look finds the slot or the checkpoint and
goes on. What to do about one part is decided by ``judge``, a pure function; this module asks Redis and the slots, and acts. It reads no
store and no bytes, so it is quick, and may run beside a pool that forks.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from dtr.checkpoint import handover, parts
from dtr.checkpoint.parts import CheckpointView, PartView
from dtr.checkpoint.staging.locks import is_held
from dtr.checkpoint.staging.reclaim import reclaim
from dtr.checkpoint.staging.slots import OWNER_LOCK, Found, fallback, finish, scan, scan_job
from dtr.checkpoint.uploading.departures import gone_for_s, is_overtaken, why_gone
from dtr.checkpoint.uploading.upload import register_slot
from dtr.clock import SYSTEM, Clock
from dtr.errors import CheckpointError, InvalidInput, Recovering, RunUnknown, StateCorrupt, StateLost, Unavailable
from dtr.names import job_name
from dtr.runs import Member, read_run
from dtr.state.client import connect, translate
from dtr.state.job import JobState
from dtr.state.keys import JOBS, uploader

__all__ = ["Look", "Reconciler", "Wake", "judge"]

log = logging.getLogger(__name__)

_DECIDED: Final = {"COMMITTED": "committed", "ABORTED": "aborted", "ABANDONED": "abandoned"}
_SETTLE_AFTER_MS: Final = 1_000  # whoever sealed it is about to decide it
_OTHERS_SETTLE_AFTER_S: Final = 10.0  # hosts that hold no part of it come in only if the others do not
_HOST_GONE_AFTER_S: Final = 30.0
_UNKNOWN_FOR_S: Final = 3600.0
_SHARE_WITHIN_S: Final = 3.0
_COPY_WITHIN_S: Final = 30.0  # what a trainer that departed in mid-copy may take to complete it, or to die
_COMPARE_FOR_S: Final = 30.0  # how long a step that was saved twice may be compared by its living trainer

Act = Literal["wait", "register", "upload", "lose"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wake:
    """A message worth sending: upload this rank's part, or, without a rank, settle the checkpoint."""

    job: str
    run: str
    step: int
    rank: int | None = None


@dataclass(slots=True, kw_only=True)
class Look:
    """What one look found. ``unclaimed_s``: how long a part has been worth a message, the longest, and no process took it up."""

    slots: int = 0
    staged: int = 0
    staged_bytes: int = 0
    open_checkpoints: int = 0
    reclaimed_bytes: int = 0
    unclaimed_s: float = 0.0
    wakes: list[Wake] = field(default_factory=list)
    collects: list[str] = field(default_factory=list)  # jobs of which retention should look again


def judge(part: PartView | None, slot: str, gone: str, now_ms: int, *, stuck: bool = False) -> tuple[Act, str]:
    """What this host's uploader does about one of its ranks' parts of a checkpoint that is WRITING.

    Args:
        part: as Redis knows it; None: it has not heard of it.
        slot: what the host's slots hold of it: STAGED, COPYING, or '' for nothing.
        gone: why nobody can stage it any more; '' if its member may still.
        now_ms: the server's clock.
        stuck: a copy that is still under way, of a member that is gone, is not waited for any more.

    Returns:
        The act, and the reason of a ``lose``.
    """
    if part is None or not part.state:
        if slot == "STAGED":
            return "register", ""
        if not gone or (slot == "COPYING" and not stuck):
            return "wait", ""
        return "lose", gone
    if part.state == "done" or part.lease_until_ms > now_ms:
        return "wait", ""
    if slot != "STAGED":
        return "lose", "its staged bytes are gone from its host"
    return ("upload" if part.retry_at_ms <= now_ms else "wait"), ""


class Reconciler:
    """Looks again and again; remembers only what makes it patient. Not for use by two threads at once.

    Args:
        redis_url: the coordinator.
        staging: this host's staging folder.
        host: its id.
        collect_interval_s: how often each job is collected, by whichever host comes first.
        copy_within_s: what a member may take to complete its copy after its departure. Then its part is lost, and the slot stays its.
    """

    def __init__(
        self,
        *,
        redis_url: str,
        staging: str,
        host: str,
        collect_interval_s: float = 300.0,
        copy_within_s: float = _COPY_WITHIN_S,
        clock: Clock = SYSTEM,
    ) -> None:
        self.redis_url, self.staging, self.host, self._clock = redis_url, staging, host, clock
        self._redis = connect(redis_url, name="dtr-reconcile", max_connections=4)
        self._rosters: dict[tuple[str, str], dict[int, tuple[str, Member]]] = {}
        self._since: dict[tuple[str, ...], float] = {}
        self._seen: set[tuple[str, ...]] = set()
        self._away_since: dict[str, float] = {}
        self._collect_interval_s, self._copy_within_s = collect_interval_s, copy_within_s
        self._collected_s: dict[str, float] = {}

    def look(self) -> Look:
        """Look once at everything; afterwards ``wakes`` says which messages are worth sending.

        Raises:
            CoordinatorUnavailable: Redis is away; torn slots were reclaimed all the same.
        """
        found = Look(reclaimed_bytes=reclaim(self.staging))
        slots = scan(self.staging)
        staged = [slot for slot in slots if slot.kind == "STAGED"]
        found.slots, found.staged = len(slots), len(staged)
        found.staged_bytes = sum(slot.record.size_bytes for slot in staged if slot.record is not None)
        self._seen = set()
        elsewhere = fallback(self.staging)
        if elsewhere and not os.path.isdir(elsewhere):
            self._once(("fallback",), f"trainers of this host stage in {elsewhere}, which this uploader does not see: share that folder")
        for slot in slots:
            if slot.kind == "FOREIGN":
                self._once(("foreign", slot.files.data), f"slot {slot.files.data} belongs to another version or user, and is left alone")
        jobs = self._jobs()
        found.collects = [job for job in sorted(jobs) if self._collects(job)]
        for job in sorted(jobs | {slot.record.job for slot in staged if slot.record is not None}):
            state = JobState(self.redis_url, job, client=self._redis)
            try:
                self._look_at_job(state, [slot for slot in staged if slot.record is not None and slot.record.job == job], found)
            except (StateLost, Recovering) as exc:
                # Redis lost this job, or is being filled. The upload of a slot fills it from the store, in a process of its own.
                log.info("job %s: %s", job, exc)
                found.wakes += [wake for slot in staged if (wake := self._wake_of(slot, job)) is not None]
            except Unavailable:
                raise
            except Exception as exc:  # whatever is wrong with one job, the others are looked at
                self._once(("job", job, str(exc)), f"job {job} cannot be looked at: {type(exc).__name__}: {exc}")
        self._since = {key: since for key, since in self._since.items() if key in self._seen}
        return found

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    # --- one job ---

    def _jobs(self) -> set[str]:
        with translate(self.redis_url):
            known: Iterable[str] = self._redis.zrange(JOBS, 0, -1)  # type: ignore[assignment]  # redis-py types it for asyncio as well
        jobs = set()
        for job in known:
            try:
                jobs.add(job_name(job))
            except InvalidInput:
                log.debug("%s lists %r, which is no job", JOBS, job)
        return jobs

    def _collects(self, job: str) -> bool:
        """Whether it is time to collect a job; the first time somewhere within the interval, so that hosts do not ask all at once."""
        now_s = self._clock.monotonic()
        last_s = self._collected_s.setdefault(job, now_s - random.random() * self._collect_interval_s)
        if now_s - last_s < self._collect_interval_s:
            return False
        self._collected_s[job] = now_s
        return True

    def _look_at_job(self, state: JobState, staged: list[Found], found: Look) -> None:
        opened = parts.open_checkpoints(state)
        found.open_checkpoints += len(opened)
        for run, step in opened:
            mine = [slot for slot in staged if slot.record is not None and (slot.record.run, slot.record.step) == (run, step)]
            try:
                self._look_at_open(state, run, step, mine, found)
            except StateCorrupt as exc:
                self._once(("corrupt", state.job, run, str(step)), str(exc))
        for slot in staged:
            if slot.record is None or (slot.record.run, slot.record.step) in opened:
                continue
            try:
                self._look_at_slot(state, slot, found)
            except StateCorrupt as exc:
                self._once(("corrupt", state.job, slot.record.run, str(slot.record.step)), str(exc))

    def _look_at_open(self, state: JobState, run: str, step: int, mine: list[Found], found: Look) -> None:
        roster = self._roster(state, run)
        ours = sorted({rank for rank, (_, member) in roster.items() if member.host == self.host} | {_rank(slot) for slot in mine})
        view = parts.read(state, run, step, ranks=ours)
        if view is None:
            return
        if view.state in {"SEALED", "ABORTING"}:
            waited_s = self._waited_s(("settle", state.job, run, str(step)))
            fresh = view.state == "SEALED" and view.now_ms - view.sealed_at_ms < _SETTLE_AFTER_MS
            if (ours and not fresh) or waited_s > _OTHERS_SETTLE_AFTER_S:
                found.wakes.append(Wake(job=state.job, run=run, step=step))
            return
        if view.state != "WRITING":
            return
        for rank in ours:
            if rank in view.expected_ranks:
                self._look_at_part(state, view, rank, mine, roster, found)
        self._look_at_shares(state, view, ours, roster)
        self._look_at_other_hosts(state, view, roster)

    def _look_at_part(
        self, state: JobState, view: CheckpointView, rank: int, mine: list[Found], roster: dict[int, tuple[str, Member]], found: Look
    ) -> None:
        part = view.parts.get(rank)
        slot = _slot_of(mine, rank, part)
        gone = "" if part is not None and part.state else self._gone(state, view.run, rank, roster)
        act, reason = judge(part, slot.kind if slot else "", gone, view.now_ms)
        if act == "lose":  # the look at the slots is older than what Redis said: look once more before it counts
            mine = [s for s in scan_job(self.staging, state.job) if s.record and (s.record.run, s.record.step) == (view.run, view.step)]
            slot = _slot_of(mine, rank, part)
            stuck = slot is not None and slot.kind == "COPYING" and self._is_stuck(state, view, rank, roster)
            act, reason = judge(part, slot.kind if slot else "", gone, view.now_ms, stuck=stuck)
        if act == "register" and slot is not None:
            self._register(state, slot, found)
        elif act == "upload":
            found.wakes.append(Wake(job=state.job, run=view.run, step=view.step, rank=rank))
            waited_s = self._waited_s(("unclaimed", state.job, view.run, str(view.step), str(rank)))
            found.unclaimed_s = max(found.unclaimed_s, waited_s)
        elif act == "lose":
            self._lose(state, view, rank, part, reason)

    def _look_at_shares(self, state: JobState, view: CheckpointView, ours: list[int], roster: dict[int, tuple[str, Member]]) -> None:
        """Ranks that have no part, and died before they told their share of the data state: nobody else knows it."""
        others = [rank for rank in ours if rank not in view.expected_ranks]
        if not others or not handover.is_needed(state, view.run):
            return
        for rank in handover.missing(state, view.run, view.step, view.world_size):
            gone = self._gone(state, view.run, rank, roster) if rank in others else ""
            # A living member still tells it after its run has ended; what a dead one has sent may be on its way.
            if gone and self._waited_s(("share", state.job, view.run, str(view.step), str(rank))) > _SHARE_WITHIN_S:
                self._lose(state, view, rank, None, f"{gone}, and with it its share of the data state")

    def _look_at_other_hosts(self, state: JobState, view: CheckpointView, roster: dict[int, tuple[str, Member]]) -> None:
        """Parts of a host where nobody uploads any more: aborted once their members are gone as well. One host in turn does it."""
        others = {member.host for _, member in roster.values()} - {self.host}
        if not others or random.random() > 2.0 / len(others):
            return
        with translate(state.url):
            pipeline = state.redis.pipeline(transaction=False)
            for host in sorted(others):
                pipeline.exists(uploader(host))
            present = dict(zip(sorted(others), pipeline.execute(), strict=True))
        away = {host for host, there in present.items() if self._is_away(host, there=bool(there))}
        for rank in view.expected_ranks if away else ():
            host = roster[rank][1].host if rank in roster else ""
            if host not in away or not (gone := self._gone(state, view.run, rank, roster)):
                continue
            whole = parts.read(state, view.run, view.step, ranks=[rank])
            part = whole.parts.get(rank) if whole is not None else None
            if part is None or part.state != "done":
                reason = f"{gone}, and its host {host} has had no uploader for {_HOST_GONE_AFTER_S:.0f} s"
                self._lose(state, view, rank, part, reason)

    def _is_away(self, host: str, *, there: bool) -> bool:
        """Whether no uploader was met on a host for so long that none is coming back."""
        if there:
            self._away_since.pop(host, None)
            return False
        return self._clock.monotonic() - self._away_since.setdefault(host, self._clock.monotonic()) > _HOST_GONE_AFTER_S

    def _lose(self, state: JobState, view: CheckpointView, rank: int, part: PartView | None, reason: str) -> None:
        now = parts.lose(state, view.run, view.step, rank, seen=part.state if part is not None else "", reason=f"rank {rank}: {reason}")
        log.warning("job %s run %s step %d is %s: rank %d: %s", state.job, view.run, view.step, now, rank, reason)

    # --- slots ---

    def _look_at_slot(self, state: JobState, slot: Found, found: Look) -> None:
        """A complete slot whose checkpoint is not open: decided, or never begun."""
        record = slot.record
        if record is None:
            return
        view = parts.read(state, record.run, record.step, ranks=[record.rank])
        if view is None:
            self._register(state, slot, found)
        elif view.state in _DECIDED and self._may_go(slot, view.parts.get(record.rank)):
            finish(slot, _DECIDED[view.state], view.reason)

    def _may_go(self, slot: Found, part: PartView | None) -> bool:
        """Whether a decided slot is nobody's any more: a second save of the same step is first compared by its own trainer."""
        record = slot.record
        if record is None or part is None or part.save in {"", record.save}:
            return True
        return not is_held(f"{slot.files.folder}/{OWNER_LOCK}") or self._waited_s(("compare", record.save)) > _COMPARE_FOR_S

    def _register(self, state: JobState, slot: Found, found: Look) -> None:
        """Tell Redis of a slot that it does not know; what it cannot take yet is looked at again, what it never will is freed."""
        record = slot.record
        if record is None:
            return
        key = ("register", record.save)
        try:
            register_slot(state, record)
            found.wakes.append(Wake(job=record.job, run=record.run, step=record.step, rank=record.rank))
        except RunUnknown as exc:  # the store may know it: only an upload process asks there
            self._once(key, f"job {record.job} run {record.run} step {record.step} rank {record.rank}: {exc}")
            if self._waited_s(key) > _UNKNOWN_FOR_S and not is_held(f"{slot.files.folder}/{OWNER_LOCK}"):
                log.error("run %s of job %s is known to nobody: a part that it staged is given up", record.run, record.job)
                finish(slot, "refused", str(exc))
            elif (wake := self._wake_of(slot, record.job)) is not None:
                found.wakes.append(wake)
        except CheckpointError as exc:
            if exc.facts.get("code") == "CKPT_STATE" and not is_overtaken(state, record.run):
                self._once(key, f"job {record.job} run {record.run} step {record.step} rank {record.rank} stays staged: {exc}")
                return
            log.warning("job %s run %s step %d rank %d is given up: %s", record.job, record.run, record.step, record.rank, exc)
            finish(slot, "refused", str(exc))

    def _wake_of(self, slot: Found, job: str) -> Wake | None:
        """A wake for a slot of a job that Redis does not know, ever less often."""
        record = slot.record
        if record is None or record.job != job:
            return None
        waited_s = self._waited_s(("wake", record.save))
        if random.random() > 2.0 / (2.0 + waited_s / 10):
            return None
        return Wake(job=job, run=record.run, step=record.step, rank=record.rank)

    # --- members ---

    def _gone(self, state: JobState, run: str, rank: int, roster: dict[int, tuple[str, Member]]) -> str:
        """Why the member that was ``rank`` of ``run`` will stage nothing more under it; '' if it may."""
        return why_gone(state, run, *roster[rank]) if rank in roster else ""

    def _is_stuck(self, state: JobState, view: CheckpointView, rank: int, roster: dict[int, tuple[str, Member]]) -> bool:
        """Whether a copy that is still under way is too late: the lineage has left its step, or its member departed long ago.

        The trainer is stopped, or hangs. Its slot is nobody else's while it lives, and what it stages if it goes on will be refused.
        """
        if rank not in roster:
            return False
        gone_s = gone_for_s(state, view.run, view.step, *roster[rank])
        if gone_s is None:
            gone_s = self._waited_s(("copying", state.job, view.run, str(view.step), str(rank)))
        return gone_s > self._copy_within_s

    def _roster(self, state: JobState, run: str) -> dict[int, tuple[str, Member]]:
        key = (state.job, run)
        if key not in self._rosters:
            try:
                known = read_run(state, run)
            except StateCorrupt:
                return {}
            if len(self._rosters) >= 64:
                self._rosters.clear()
            self._rosters[key] = {member.rank: (worker, member) for worker, member in known.roster.items()}
        return self._rosters[key]

    # --- patience ---

    def _waited_s(self, key: tuple[str, ...]) -> float:
        """Seconds since the first of an unbroken row of looks that asked this."""
        self._seen.add(key)
        return self._clock.monotonic() - self._since.setdefault(key, self._clock.monotonic())

    def _once(self, key: tuple[str, ...], message: str) -> None:
        """Log a reason when it appears, not at every look."""
        if key not in self._since:
            log.warning("%s", message)
        self._waited_s(key)


def _rank(slot: Found) -> int:
    return slot.record.rank if slot.record is not None else -1


def _slot_of(mine: list[Found], rank: int, part: PartView | None) -> Found | None:
    """The slot that holds a rank's part: the save that Redis counts or, if it counts none, the first that was staged."""
    wanted = part.save if part is not None else ""
    held = [(s.kind != "STAGED", s.record.staged_at, s) for s in mine if s.record is not None and s.record.rank == rank]
    held = [(late, at, s) for late, at, s in held if s.kind in {"STAGED", "COPYING"} and s.record and wanted in {"", s.record.save}]
    return min(held, key=lambda found: found[:2])[2] if held else None
