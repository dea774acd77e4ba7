"""Which jobs a server knows, and which of them is meant when nobody said so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dtr.errors import InvalidInput, StateCorrupt
from dtr.state.client import translated
from dtr.state.job import JobState
from dtr.state.keys import JOBS, Keys
from dtr.views.reading import reading

__all__ = ["JobSummary", "choose", "pick", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSummary:
    """One job of a server. ``alive`` counts members within their deadline, ``overdue`` those beyond it.

    ``damage`` says what of the job cannot be read, empty if all can; what could not be read is 0 or empty here.
    """

    job: str
    alive: int
    overdue: int
    phase: str
    run: str  # empty between runs
    latest: str  # RUN/STEP of the newest commit, empty if there is none
    opened_ago_s: float  # since a process last found or created its state
    damage: str = ""


def read(state: JobState) -> tuple[JobSummary, ...]:
    """Every job that ``dtr:jobs`` lists: those alive first, then the one that was opened last. ``state`` may be of any job.

    A damaged one is listed with what is wrong about it, and keeps no other from being read.

    Raises:
        CoordinatorUnavailable.
        StateCorrupt: ``dtr:jobs`` itself is no list of jobs.
    """
    found: list[JobSummary] = []
    asked: list[tuple[Keys, float]] = []
    with reading(state):
        # Undecoded, as are the fields below: bytes that are no text, in one job, would else end the look at all of them.
        listed = state.redis.execute_command("ZRANGE", JOBS, 0, -1, "WITHSCORES", withscores=True, NEVER_DECODE=[])
        now_ms = state.server_now_ms()
        for name, opened_at in listed:
            job, opened_ago_s = _text(name), max(0.0, (now_ms - opened_at) / 1000)
            try:
                asked.append((Keys(job), opened_ago_s))
            except InvalidInput as exc:
                found.append(_unread(job, opened_ago_s, f"{JOBS} lists what is no job: {exc.message}"))
        pipeline = state.redis.pipeline(transaction=False)
        for keys, _ in asked:
            pipeline.zcount(keys.members, now_ms, "+inf")
            pipeline.zcard(keys.members)
            pipeline.execute_command("HMGET", keys.meta, "phase", "run", "latest", NEVER_DECODE=[])
        replies = pipeline.execute(raise_on_error=False)
        for (keys, opened_ago_s), *held in zip(asked, replies[::3], replies[1::3], replies[2::3], strict=True):
            found.append(_summary(keys, opened_ago_s, held, state.url))
    return tuple(sorted(found, key=lambda found: (found.alive == 0, found.opened_ago_s, found.job)))


def choose(jobs: Sequence[JobSummary]) -> str | None:
    """The job that is meant when none was chosen: the only one alive, or else the only one; None if that is not clear.

    A damaged one is never guessed.
    """
    meant = [found for found in jobs if found.alive] or [found for found in jobs if not found.damage]
    return meant[0].job if len(meant) == 1 and not meant[0].damage else None


def pick(listed: Sequence[JobSummary], job: str, *, asked: bool) -> tuple[str | None, str]:
    """The job to show and why: ``job`` if somebody asked for it, or if the server knows none; None if several could be meant."""
    if asked:
        return job, "as asked"
    found = choose(listed)
    if found is None:
        return (None, "") if listed else (job, "the default; this server has no job yet")
    if len(listed) == 1:
        return found, "the only one"
    return found, "the only one alive" if any(one.alive for one in listed) else "the only one that is not damaged"


def _summary(keys: Keys, opened_ago_s: float, held: Sequence[Any], url: str) -> JobSummary:
    """What the replies of Redis say of one job; raises the one that says something else than that a key is not ours."""
    wrong = {key: reply for key, reply in zip((keys.members, keys.members, keys.meta), held, strict=True) if isinstance(reply, Exception)}
    for reply in wrong.values():
        if not isinstance(translated(reply, url), StateCorrupt):
            raise reply
    alive, members = (0, 0) if keys.members in wrong else held[:2]
    phase, run, latest = ("", "", "") if keys.meta in wrong else map(_text, held[2])
    return JobSummary(
        job=keys.job, alive=alive, overdue=members - alive, phase=phase, run=run, latest=latest, opened_ago_s=opened_ago_s,
        damage="; ".join(f"{key} holds something else than dtr writes: {reply}" for key, reply in wrong.items()),
    )  # fmt: skip


def _unread(job: str, opened_ago_s: float, damage: str) -> JobSummary:
    return JobSummary(job=job, alive=0, overdue=0, phase="", run="", latest="", opened_ago_s=opened_ago_s, damage=damage)


def _text(held: bytes | None) -> str:
    """What a reply holds; bytes that are no text are spelled out."""
    return "" if held is None else held.decode(errors="backslashreplace")
