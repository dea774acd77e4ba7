"""Jobs in a known state, written through the scripts themselves."""

from __future__ import annotations

from typing import Any

from dtr.errors import DtrError, RosterChanged
from dtr.membership import BeatAnswer, BeatCall, Identity, beat_all, join, open_state
from dtr.runs import Run, read_run
from dtr.state.job import JobState

TTL_MS = 60_000


def opened(state: JobState) -> str:
    """A job that is READY; returns its state id."""
    return open_state(state)


def joined(state: JobState, *workers: str, ttl_ms: int = TTL_MS) -> list[Identity]:
    """Members of a READY job."""
    state_id = opened(state)
    found = []
    for n, worker in enumerate(workers):
        who = Identity(state_id=state_id, worker_id=worker, incarnation=f"{n:02d}{worker}", host=f"host-{worker}", pid=1)
        join(state, who, ttl_ms=ttl_ms)
        found.append(who)
    return found


def beat(state: JobState, who: Identity, *, number: int, ttl_ms: int = TTL_MS, interval_ms: int = 1000, step: int = -1) -> BeatAnswer:
    """One beat of ``who``; raises what its answer says."""
    (answer,) = beat_all(state, [BeatCall(who=who, number=number, ttl_ms=ttl_ms, interval_ms=interval_ms, step=step)])
    if isinstance(answer, DtrError):
        raise answer
    return answer


def beat_keys(state: JobState, worker: str) -> list[str]:
    k = state.keys
    return [k.meta, k.members, k.fences, k.departed, k.roster, k.ring, k.wake, k.events, k.worker(worker)]


def form_call(
    state: JobState, who: Identity, name: str, *, low: int, high: int, rank: int = -1, settle_ms: int = 0, after: str = ""
) -> tuple[list[str], list[Any]]:
    """Keys and arguments of form_arrive."""
    k = state.keys
    keys = [k.meta, k.members, k.fences, k.roster, k.forming, k.wake, k.events, k.run(name)]
    return keys, [who.state_id, who.worker_id, who.incarnation, rank, who.host, low, high, settle_ms, name, after]


def arrive(state: JobState, who: Identity, *, low: int, high: int, number: int = 1, **options: Any) -> list[Any]:
    """One arrival of ``who``."""
    keys, args = form_call(state, who, f"{number:04d}-test", low=low, high=high, **options)
    answer: list[Any] = state.call("form_arrive", keys, args)
    return answer


def formed(state: JobState, *workers: str, spare: int = 0) -> tuple[list[Identity], Run]:
    """A job with one open run of ``workers``, ranks in their order; ``spare`` leaves room to grow."""
    who = joined(state, *workers)
    for rank, member in enumerate(who):
        answer = arrive(state, member, low=len(who), high=len(who) + spare, rank=rank)
    return who, read_run(state, answer[1], worker_id=workers[-1])


def barrier_call(state: JobState, who: Identity, run: Run, name: str, seq: int, subset: str = "") -> tuple[list[str], list[Any]]:
    """Keys and arguments of barrier_arrive."""
    r = state.keys.barrier(name, run.id, seq)
    place = f"{run.roster[who.worker_id].rank} {who.incarnation}"
    return [state.keys.roster, r.round, r.arrived, r.wake], [f"{who.state_id} {run.id}", who.worker_id, place, name, seq, subset]


def meet(state: JobState, who: Identity, run: Run, name: str = "b", seq: int = 0, subset: str = "") -> Any:
    """One arrival at a barrier, as dtr.barrier makes it."""
    keys, args = barrier_call(state, who, run, name, seq, subset)
    try:
        answer = state.call("barrier_arrive", keys, args)
    except RosterChanged:
        keys, args = break_call(state, who, run, name, seq, subset)
        answer = state.call("barrier_break", keys, args)
    return answer


def break_call(state: JobState, who: Identity, run: Run, name: str, seq: int, subset: str = "") -> tuple[list[str], list[Any]]:
    """Keys and arguments of barrier_break."""
    k, r = state.keys, state.keys.barrier(name, run.id, seq)
    keys = [k.meta, k.roster, k.run(run.id), r.round, r.arrived, r.wake, k.events]
    return keys, [who.state_id, run.id, who.worker_id, run.roster[who.worker_id].rank, who.incarnation, subset]


def time_out(state: JobState, who: Identity, run: Run, name: str = "b", seq: int = 0, subset: str = "") -> list[Any]:
    """One member's wait is over."""
    r = state.keys.barrier(name, run.id, seq)
    keys = [state.keys.run(run.id), r.round, r.arrived, r.wake, state.keys.events]
    answer: list[Any] = state.call("barrier_timeout", keys, [who.worker_id, subset, "5"])
    return answer


def leave(state: JobState, who: Identity, reason: str = "signal 9") -> int:
    """The departure of a member."""
    return int(state.call("member_depart", beat_keys(state, who.worker_id)[:8], [who.state_id, who.worker_id, who.incarnation, reason]))
