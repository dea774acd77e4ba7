"""Members of a job: they join, beat and depart. Owns ``members``, ``fences``, ``departed``, ``ring``, ``worker:ID`` and ``meta``'s phase.

Guarantees: a worker_id has at most one living incarnation, the newest; death is the recorded reap, so a beat before it revives and
nothing after it does; only Redis's own clock decides; a time in which nobody could beat kills nobody.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtr.clock import SYSTEM, Clock
from dtr.errors import CoordinatorUnavailable, DtrError, StateCorrupt
from dtr.failpoints import failpoint
from dtr.ring import virtual_nodes
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.state.keys import JOBS

__all__ = [
    "BeatAnswer",
    "BeatCall",
    "Identity",
    "MemberView",
    "beat_all",
    "beat_arguments",
    "depart",
    "join",
    "members",
    "new_incarnation",
    "open_state",
    "reap",
    "stall",
    "why_departed",
]

RECOVER_LEASE_S = 10.0
TOLD_AFTER_S = 1.0  # a rebuild that takes longer is worth a line
REAP_LIMIT = 8  # keeps the script short; the next beat goes on

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One registration of one worker."""

    state_id: str
    worker_id: str
    incarnation: str
    host: str
    pid: int
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatCall:
    """One beat.

    Attributes:
        who: the registration.
        number: of this beat: one more than the last that was answered.
        ttl_ms: time to live without another beat.
        interval_ms: between two beats.
        step: the last step, -1 before the first.
        fields: for ``worker:ID``, for people; only those that changed since the last beat that was answered.
    """

    who: Identity
    number: int
    ttl_ms: int
    interval_ms: int
    step: int = -1
    fields: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatAnswer:
    """What a beat learns: the generation of the membership, the open run ('' between runs), and whether ``worker:ID`` had expired."""

    generation: int
    run: str
    revived: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """A member as people see it; ``deadline_ms`` from now, negative when it is overdue and not yet reaped."""

    worker_id: str
    deadline_ms: int
    fields: dict[str, str]


def new_incarnation() -> str:
    """The token of one registration."""
    return secrets.token_hex(6)


def open_state(
    state: JobState,
    *,
    recover: Callable[[str], int] | None = None,
    counter: int = 0,
    timeout_s: float = 120.0,
    clock: Clock = SYSTEM,
) -> str:
    """Find the job's state, or create it; whoever creates it rebuilds the index first, and the others wait until that is done.

    Args:
        state: the job.
        recover: called with the state id by the one member that rebuilds; returns the highest run number that the store knows.
        counter: the highest run number that the caller knows.
        timeout_s: how long to wait for another member's rebuild.
        clock: for the wait.

    Returns the state id.
    """
    proposed, who = secrets.token_hex(8), secrets.token_hex(8)
    began_s, told = clock.monotonic(), False
    keys = state.keys

    def look(lease_s: float = RECOVER_LEASE_S) -> tuple[str, str, str]:
        state_id, phase, by, _ = state.call("state_open", [keys.meta, keys.events], [proposed, who, int(lease_s * 1000)])
        return state_id, phase, by

    while True:
        state_id, phase, recover_by = look()
        if phase != "READY" and recover_by == who:
            try:
                with _renewed(look):
                    known = recover(state_id) if recover is not None else 0
            except BaseException:
                with contextlib.suppress(DtrError):
                    look(0.0)  # another member's rebuild need not fail too, nor this one's next
                raise
            phase = state.call("state_ready", [keys.meta, keys.wake, keys.events], [state_id, max(known, counter)])
        if phase == "READY":
            with translate(state.url):
                state.redis.zadd(JOBS, {state.job: state.server_now_ms()})
            return state_id
        waited_s = clock.monotonic() - began_s
        if waited_s > TOLD_AFTER_S and not told:
            told = True
            log.warning("job %s: another process rebuilds the state from the store; waiting for it (up to %g s)", state.job, timeout_s)
        if waited_s > timeout_s:
            raise CoordinatorUnavailable(
                f"job {state.job}: another process has been rebuilding the state for {timeout_s:g} s; look at its log, or run `dtr rebuild`"
            )
        clock.sleep(0.1)


@contextlib.contextmanager
def _renewed(renew: Callable[[], object]) -> Iterator[None]:
    """Keep the lease of a rebuild meanwhile, however long it takes; when this process dies, it lapses within seconds."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(RECOVER_LEASE_S / 3):
            try:
                renew()
            except (CoordinatorUnavailable, StateCorrupt) as exc:
                log.warning("cannot renew the lease of the rebuild: %s", exc)

    thread = threading.Thread(target=loop, name="dtr-rebuild-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def join(state: JobState, who: Identity, *, ttl_ms: int) -> int:
    """Register; an older incarnation of the same worker_id departs. Returns the generation."""
    keys = state.keys
    points = virtual_nodes(who.worker_id).values()
    failpoint("join.before")
    answer = state.call(
        "member_join",
        [
            keys.meta,
            keys.members,
            keys.fences,
            keys.departed,
            keys.roster,
            keys.ring,
            keys.wake,
            keys.events,
            keys.worker(who.worker_id),
        ],
        [who.state_id, who.worker_id, who.incarnation, ttl_ms, who.host, who.pid, who.address, *points],
    )
    failpoint("join.after")
    return int(answer)


def beat_all(state: JobState, calls: Sequence[BeatCall]) -> list[BeatAnswer | DtrError]:
    """Renew the deadlines of members and report, in one round trip; reaps lapsed members on the way.

    Returns an answer for each, or the error: StaleIncarnation when it was reaped or replaced, StateLost when Redis was emptied or lost
    writes, CoordinatorUnavailable or Recovering when nobody knows whether it was renewed (send the same beat again).
    """
    answers = state.call_all("member_beat", [beat_arguments(state, call) for call in calls])
    if lapsed := next((call for call, answer in zip(calls, answers, strict=True) if not isinstance(answer, DtrError) and answer[3]), None):
        try:
            reap(state, lapsed.who.state_id)
        except DtrError as exc:  # the beats are on record all the same, and one of the next reaps
            log.info("who lapsed is not on record yet: %s", exc)
    return [answer if isinstance(answer, DtrError) else _beat_answer(*answer) for answer in answers]


def _beat_answer(generation: str, run: str, how: str, _: str) -> BeatAnswer:
    return BeatAnswer(generation=int(generation), run=run or "", revived=how == "revived")


def beat_arguments(state: JobState, call: BeatCall) -> tuple[list[str], list[Any]]:
    """KEYS and ARGV of the script of a beat."""
    keys, who = state.keys, call.who
    return (
        [keys.meta, keys.members, keys.fences, keys.departed, keys.worker(who.worker_id)],
        [who.state_id, who.worker_id, who.incarnation, call.number, call.ttl_ms, call.interval_ms, "" if call.step < 0 else call.step]
        + [text for pair in call.fields.items() for text in pair],
    )


def stall(state: JobState, who: Identity, *, step: int, reason: str) -> bool:
    """Put on record that a member does not move any more, or with an empty ``reason`` that it moves again; whether that was news.

    Raises:
        StaleIncarnation, StateLost, CoordinatorUnavailable.
    """
    keys = state.keys
    answer = state.call(
        "member_stall",
        [keys.meta, keys.fences, keys.worker(who.worker_id), keys.events],
        [who.state_id, who.worker_id, who.incarnation, "" if step < 0 else step, reason],
    )
    return bool(int(answer))


def reap(state: JobState, state_id: str) -> int:
    """Record the death of members whose deadline has passed, some at a time; returns how many."""
    keys = state.keys
    answer = state.call(
        "member_reap",
        [keys.meta, keys.members, keys.fences, keys.departed, keys.roster, keys.ring, keys.wake, keys.events],
        [state_id, REAP_LIMIT],
    )
    return int(answer)


def depart(state: JobState, *, state_id: str, worker_id: str, incarnation: str, reason: str) -> bool:
    """Record that this incarnation is gone; True if it was not known to be. Safe to call for one that is gone already."""
    keys = state.keys
    answer = state.call(
        "member_depart",
        [keys.meta, keys.members, keys.fences, keys.departed, keys.roster, keys.ring, keys.wake, keys.events],
        [state_id, worker_id, incarnation, " ".join(reason.split())[:200] or "left"],
    )
    return bool(int(answer))


def why_departed(state: JobState, worker_id: str) -> str:
    """Why the newest departed incarnation of this worker is gone; empty if that is not known."""
    try:
        with translate(state.url):
            found = state.redis.hget(state.keys.departed, worker_id)
    except CoordinatorUnavailable:
        return ""
    return str(found or "").partition(" ")[2].partition(" ")[2]


def members(state: JobState) -> list[MemberView]:
    """All members, by name, with their hashes."""
    with translate(state.url):
        deadlines: dict[str, float] = dict(state.redis.zrange(state.keys.members, 0, -1, withscores=True))
        now = state.server_now_ms()
        pipeline = state.redis.pipeline(transaction=False)
        names = sorted(deadlines)
        for name in names:
            pipeline.hgetall(state.keys.worker(name))
        hashes = pipeline.execute()
    return [
        MemberView(worker_id=name, deadline_ms=int(deadlines[name]) - now, fields=fields)
        for name, fields in zip(names, hashes, strict=True)
    ]
