"""Counts of what people want to see, in ``counters``; each addition happens once, however often its reply is lost."""

from __future__ import annotations

from dtr.session import Session
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["add", "read"]


def add(session: Session, counter: str, amount: int = 1) -> int:
    """Add to ``counter`` (such as ``saves_skipped``) and return its new value."""
    keys = session.state.keys
    who = session.identity
    answer = session.numbered(
        "trainer",
        "counter_add",
        [keys.meta, keys.fences, keys.counters],
        [who.state_id, who.worker_id, who.incarnation, counter, amount],
    )
    return int(answer)


def read(state: JobState) -> dict[str, int]:
    """All counters of the job."""
    with translate(state.url):
        return {name: int(value) for name, value in sorted(state.redis.hgetall(state.keys.counters).items())}
