"""Who belongs to a job, who left it, and in what condition each is, by the server's own clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dtr.errors import StateCorrupt
from dtr.membership import MemberView, members
from dtr.state.job import JobState
from dtr.views.reading import Fields, reading, whole

__all__ = ["DepartedView", "WorkerView", "WorkersView", "condition", "describe", "describe_departed", "read"]

STALLED: Final = "stalled"  # the phase that a launcher reports for a trainer that no longer moves


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A member. ``rank`` is its seat in the newest run, None for a newcomer; ``deadline_s`` from now, negative when it has passed.

    ``condition`` is ``alive``; ``late`` (more than half of its time to live has passed without a beat); ``stalled`` (its launcher
    beats, the trainer does not move); or ``overdue`` (its deadline has passed; the next beat of anyone records its death).
    """

    worker: str
    rank: int | None
    condition: str
    host: str
    pid: int | None
    address: str
    step: int | None
    loss: float | None
    phase: str
    idle_s: float | None
    late_ms: int | None
    beat_age_s: float | None
    deadline_s: float
    incarnation: str
    forming: bool  # has arrived for the next run
    stalled: str = ""  # why its launcher takes it for stalled


@dataclass(frozen=True, slots=True, kw_only=True)
class DepartedView:
    """A registration that ended. ``rank`` as for a member; ``returned`` if the worker has registered anew since."""

    worker: str
    rank: int | None
    reason: str
    ago_s: float
    incarnation: str
    returned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersView:
    """Everybody; members in order of rank, then newcomers by name; the departed, the newest first."""

    job: str
    run: str  # empty between runs
    last_run: str
    generation: int
    workers: tuple[WorkerView, ...]
    departed: tuple[DepartedView, ...]


def read(state: JobState) -> WorkersView:
    """All members and departed of a job; empty if there is no such job.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    keys = state.keys
    with reading(state):
        pipeline = state.redis.pipeline()
        pipeline.hgetall(keys.meta)
        pipeline.hgetall(keys.departed)
        pipeline.hgetall(keys.roster)
        pipeline.hgetall(keys.forming)
        meta, departed, roster, forming = pipeline.execute()
        present = members(state)
        now_ms = state.server_now_ms()
    fields = Fields(keys.meta, meta)
    run = fields.text("run") or fields.text("last_run")
    with reading(state):
        record = state.redis.hgetall(keys.run(run)) if run else {}
    return WorkersView(
        job=state.job,
        run=fields.text("run"),
        last_run=fields.text("last_run"),
        generation=fields.integer("generation"),
        workers=describe(present, now_ms=now_ms, prefix=keys.worker(""), roster=roster, record=record, forming=forming),
        departed=describe_departed(departed, now_ms=now_ms, key=keys.departed, roster=roster, present={m.worker_id for m in present}),
    )


def describe(
    present: list[MemberView],
    *,
    now_ms: int,
    prefix: str,
    roster: Mapping[str, str],
    record: Mapping[str, str],
    forming: Mapping[str, str],
) -> tuple[WorkerView, ...]:
    """Members as people want to see them, in order of rank.

    Where the hash of an overdue member has expired, the ``record`` of the newest run still tells its host. ``prefix`` is that of the
    keys of the hashes.
    """
    found = []
    for member in present:
        fields = Fields(prefix + member.worker_id, member.fields)
        beat_at = fields.number("beat_at")
        age_ms = None if beat_at is None else max(0, now_ms - beat_at)
        incarnation = fields.text("incarnation")
        phase = fields.text("phase")
        found.append(
            WorkerView(
                worker=member.worker_id,
                rank=_rank(roster, member.worker_id, incarnation or None),
                condition=condition(deadline_ms=member.deadline_ms, age_ms=age_ms, phase=phase),
                host=fields.text("host", _host(record, member.worker_id)),
                pid=fields.number("pid"),
                address=fields.text("address"),
                step=fields.number("step"),
                loss=fields.decimal("loss"),
                phase=phase,
                idle_s=fields.decimal("idle_s"),
                late_ms=fields.number("late_ms"),
                beat_age_s=None if age_ms is None else age_ms / 1000,
                deadline_s=member.deadline_ms / 1000,
                incarnation=incarnation,
                stalled=fields.text("stalled"),
                forming=forming.get(member.worker_id, "").partition(" ")[0] == incarnation != "",
            )
        )
    return tuple(sorted(found, key=lambda worker: (worker.rank is None, worker.rank or 0, worker.worker)))


def condition(*, deadline_ms: int, age_ms: int | None, phase: str) -> str:
    """The one word for a member: its deadline counts first, then what its launcher says, then how late its beat is."""
    if deadline_ms < 0:
        return "overdue"
    if phase.startswith(STALLED):
        return "stalled"
    return "late" if age_ms is not None and age_ms > deadline_ms else "alive"


def describe_departed(
    departed: Mapping[str, str], *, now_ms: int, key: str, roster: Mapping[str, str], present: set[str]
) -> tuple[DepartedView, ...]:
    """The newest departure of each worker, the newest first."""
    found = []
    for worker, text in departed.items():
        incarnation, at, reason = [*text.split(" ", 2), "", ""][:3]
        left_at = whole(at, key, worker)
        if left_at is None:
            raise StateCorrupt(f"{key}: field {worker} must be 'incarnation time reason', got {text[:60]!r}")
        found.append(
            DepartedView(
                worker=worker,
                rank=_rank(roster, worker, incarnation),
                reason=reason,
                ago_s=max(0, now_ms - left_at) / 1000,
                incarnation=incarnation,
                returned=worker in present,
            )
        )
    return tuple(sorted(found, key=lambda gone: (gone.ago_s, gone.worker)))


def _host(record: Mapping[str, str], worker: str) -> str:
    return [*record.get(f"member:{worker}", "").split(" "), "", ""][2]


def _rank(roster: Mapping[str, str], worker: str, incarnation: str | None) -> int | None:
    """The seat of this registration; None if it has none. A hash that expired does not tell its incarnation: the seat is its worker's."""
    rank, _, holder = roster.get(worker, "").partition(" ")
    return int(rank) if rank.isdigit() and incarnation in {None, holder} else None
