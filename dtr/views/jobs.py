"""Which jobs a server knows, and which of them is meant when nobody said so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtr.errors import InvalidInput, StateCorrupt
from dtr.state.job import JobState
from dtr.state.keys import JOBS, Keys
from dtr.views.reading import reading

__all__ = ["JobSummary", "choose", "pick", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSummary:
    """One job of a server. ``alive`` counts members within their deadline, ``overdue`` those beyond it."""

    job: str
    alive: int
    overdue: int
    phase: str
    run: str  # empty between runs
    latest: str  # RUN/STEP of the newest commit, empty if there is none
    opened_ago_s: float  # since a process last found or created its state


def read(state: JobState) -> tuple[JobSummary, ...]:
    """Every job that ``dtr:jobs`` lists: those alive first, then the one that was opened last. ``state`` may be of any job.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    with reading(state):
        listed: list[tuple[str, float]] = state.redis.zrange(JOBS, 0, -1, withscores=True)
        now_ms = state.server_now_ms()
        pipeline = state.redis.pipeline(transaction=False)
        for job, _ in listed:
            keys = _keys(job)
            pipeline.zcount(keys.members, now_ms, "+inf")
            pipeline.zcard(keys.members)
            pipeline.hmget(keys.meta, ["phase", "run", "latest"])
        replies = pipeline.execute()
    found = [
        JobSummary(
            job=job, alive=alive, overdue=members - alive, phase=phase or "", run=run or "", latest=latest or "",
            opened_ago_s=max(0.0, (now_ms - opened_at) / 1000),
        )
        for (job, opened_at), alive, members, (phase, run, latest) in zip(listed, replies[::3], replies[1::3], replies[2::3], strict=True)
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda found: (found.alive == 0, found.opened_ago_s, found.job)))


def choose(jobs: Sequence[JobSummary]) -> str | None:
    """The job that is meant when none was chosen: the only one alive, or the only one there is; None if that is not clear."""
    alive = [found.job for found in jobs if found.alive]
    if len(alive) == 1:
        return alive[0]
    return jobs[0].job if len(jobs) == 1 else None


def pick(listed: Sequence[JobSummary], job: str, *, asked: bool) -> tuple[str | None, str]:
    """The job to show and why: ``job`` if somebody asked for it, or if the server knows none; None if several could be meant."""
    if asked:
        return job, "as asked"
    found = choose(listed)
    if found is not None:
        return found, "the only one" if len(listed) == 1 else "the only one alive"
    return (None, "") if listed else (job, "the default; this server has no job yet")


def _keys(job: str) -> Keys:
    try:
        return Keys(job)
    except InvalidInput as exc:
        raise StateCorrupt(f"{JOBS} lists what is no job: {exc.message}") from exc
