"""Members of a run as an uploader sees them: whether one may still stage its part, and since when not. Asks Redis, writes nothing."""

from __future__ import annotations

import math

from dtr.membership import why_departed
from dtr.runs import Member
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["gone_for_s", "is_overtaken", "why_gone"]


def why_gone(state: JobState, run: str, worker: str, member: Member) -> str:
    """Why this member of ``run`` will begin to stage nothing more under it; '' if it may."""
    with translate(state.url):
        pipeline = state.redis.pipeline(transaction=True)
        pipeline.hget(state.keys.meta, "run")
        pipeline.hget(state.keys.fences, worker)
        current, incarnation = pipeline.execute()
    if incarnation != member.incarnation:
        why = why_departed(state, worker)
        return f"{worker} departed{f' ({why})' if why else ''} before its part was complete"
    return "" if current == run else f"the run ended before {worker} had staged its part"


def gone_for_s(state: JobState, run: str, step: int, worker: str, member: Member) -> float | None:
    """How long nobody has had to wait for this member's copy of a step any more, in seconds of the server's clock.

    Returns:
        Infinity if the lineage has left the step; 0 while the member lives, though its run may have ended; else the time since its
        departure, or since a later one of the same worker. None: it departed, and Redis does not know when.
    """
    with translate(state.url):
        pipeline = state.redis.pipeline(transaction=True)
        pipeline.hget(state.keys.meta, "last_run")
        pipeline.hget(state.keys.lineage, run)
        pipeline.hget(state.keys.fences, worker)
        pipeline.hget(state.keys.departed, worker)
        pipeline.time()
        last_run, bound, incarnation, departed, (seconds, _) = pipeline.execute()
    if (bound is None and last_run not in {None, run}) or (bound and step > int(bound)):
        return math.inf
    if incarnation == member.incarnation:
        return 0.0
    at_ms = str(departed or "").partition(" ")[2].partition(" ")[0]
    return float(seconds) - int(at_ms) / 1000 if at_ms.isdigit() else None


def is_overtaken(state: JobState, run: str) -> bool:
    """Whether the job goes on as another run, so that nobody will record any more what this one continued."""
    with translate(state.url):
        return bool(state.redis.hget(state.keys.meta, "last_run") != run)
