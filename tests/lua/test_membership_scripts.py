"""Members join, beat and depart: each rule of the scripts, on every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtr.errors import Recovering, StaleIncarnation, StateCorrupt, StateLost
from dtr.membership import Identity, depart, join, open_state
from dtr.state.job import JobState
from tests.lua.jobs import TTL_MS, beat, formed, joined, leave, opened


def test_the_first_caller_creates_the_state_and_the_others_find_it(job_state: JobState) -> None:
    """Given no state, when two open it, then the second gets the first's id."""
    assert opened(job_state) == opened(job_state)


def test_nobody_gets_in_while_the_state_is_rebuilt(job_state: JobState) -> None:
    """A member that comes during a rebuild is told so; a second rebuilder takes over only after the lease of the first."""
    k = job_state.keys
    state_id, phase, by, _ = job_state.call("state_open", [k.meta, k.events], ["a" * 16, "first", 60_000])
    assert (phase, by) == ("RECOVERING", "first")
    assert job_state.call("state_open", [k.meta, k.events], ["b" * 16, "second", 60_000])[2] == "first"
    who = replace(joined_identity(), state_id=state_id)
    with pytest.raises(Recovering):
        join(job_state, who, ttl_ms=TTL_MS)
    job_state.redis.hset(k.meta, "recover_until", 0)
    assert job_state.call("state_open", [k.meta, k.events], ["b" * 16, "second", 60_000])[2] == "second"
    assert job_state.call("state_ready", [k.meta, k.wake, k.events], [state_id, 7]) == "READY"
    assert job_state.redis.hget(k.meta, "run_counter") == "7"


def settled_beat(state: JobState, who: Identity, number: int) -> None:
    """A beat, some time after anyone's last one: only such a one looks for the dead."""
    state.redis.hset(state.keys.meta, "beat_at", state.server_now_ms() - 500)
    beat(state, who, number=number, ttl_ms=TTL_MS, interval_ms=1000)


def joined_identity() -> Identity:
    return Identity(state_id="", worker_id="w", incarnation="00w", host="h", pid=1)


def test_a_state_without_its_id_is_reported_and_not_overwritten(job_state: JobState) -> None:
    """Given a meta that somebody damaged, when it is opened, then the error says so and nothing changes."""
    job_state.redis.hset(job_state.keys.meta, "phase", "READY")
    with pytest.raises(StateCorrupt, match="state_id"):
        open_state(job_state)
    assert job_state.redis.hgetall(job_state.keys.meta) == {"phase": "READY"}


def test_a_member_is_visible_with_its_ttl(job_state: JobState) -> None:
    """redis-cli shows worker:ID with its time to live, and the member's virtual nodes on the ring."""
    joined(job_state, "w")
    assert 0 < job_state.redis.pttl(job_state.keys.worker("w")) <= 2 * TTL_MS
    assert job_state.redis.hget(job_state.keys.worker("w"), "incarnation") == "00w"
    assert job_state.redis.zcard(job_state.keys.ring) == 150


def test_the_newest_registration_of_a_worker_wins(job_state: JobState) -> None:
    """Given a living worker, when its id registers again, then the older one is refused and the departure is on record."""
    (old,) = joined(job_state, "w")
    new = replace(old, incarnation="new")
    join(job_state, new, ttl_ms=TTL_MS)
    with pytest.raises(StaleIncarnation, match="takeover by new"):
        beat(job_state, old, number=1, ttl_ms=TTL_MS, interval_ms=1000)
    beat(job_state, new, number=1, ttl_ms=TTL_MS, interval_ms=1000)
    assert job_state.redis.zcard(job_state.keys.members) == 1
    assert job_state.redis.zcard(job_state.keys.ring) == 150


def test_a_late_beat_revives_before_the_reap_and_never_after(job_state: JobState) -> None:
    """A passed deadline is no death; the recorded reap is."""
    late, other = joined(job_state, "late", "other")
    k = job_state.keys
    job_state.redis.zadd(k.members, {"late": 1})
    beat(job_state, late, number=1, ttl_ms=TTL_MS, interval_ms=1000)
    assert job_state.redis.zscore(k.members, "late") > 1e12
    job_state.redis.zadd(k.members, {"late": 1})
    settled_beat(job_state, other, 1)
    with pytest.raises(StaleIncarnation, match="no beat within its ttl"):
        beat(job_state, late, number=2, ttl_ms=TTL_MS, interval_ms=1000)


def test_a_reap_is_bounded_and_goes_on_with_the_next_beat(job_state: JobState) -> None:
    """Given 20 lapsed members, when one beats thrice, then 8, 8 and 4 are recorded."""
    *lapsed, alive = joined(job_state, *[f"w{n}" for n in range(20)], "alive")
    k = job_state.keys
    job_state.redis.zadd(k.members, {w.worker_id: 1 for w in lapsed})
    counts = []
    for number in (1, 2, 3):
        settled_beat(job_state, alive, number)
        counts.append(job_state.redis.hlen(k.departed))
    assert counts == [8, 16, 20]
    assert job_state.redis.zcard(k.ring) == 150


def test_a_pause_that_nobody_could_beat_in_kills_nobody(job_state: JobState) -> None:
    """Given that the last beat of anyone is long ago, when one beats, then the others get a whole ttl to come back."""
    first, _second = joined(job_state, "first", "second")
    k = job_state.keys
    now = job_state.server_now_ms()
    job_state.redis.hset(k.meta, "beat_at", now - 10_000)
    job_state.redis.zadd(k.members, {"first": now - 5_000, "second": now - 5_000})
    for number in range(1, 4):
        beat(job_state, first, number=number, ttl_ms=TTL_MS, interval_ms=1000)
    assert job_state.redis.zscore(k.members, "second") is not None
    assert int(job_state.redis.hget(k.meta, "grace_until")) >= now + TTL_MS
    job_state.redis.hset(k.meta, "grace_until", 0)
    settled_beat(job_state, first, 4)
    assert job_state.redis.zscore(k.members, "second") is None


def test_a_launcher_may_report_a_death_within_the_grace(job_state: JobState) -> None:
    """The grace is for deadlines; a death that was seen is recorded at once, and once."""
    first, second = joined(job_state, "first", "second")
    job_state.redis.hset(job_state.keys.meta, "grace_until", job_state.server_now_ms() + 60_000)
    facts = {"state_id": second.state_id, "worker_id": "second", "incarnation": second.incarnation}
    assert depart(job_state, **facts, reason="signal 9") is True
    assert depart(job_state, **facts, reason="signal 9") is False
    assert job_state.redis.hget(job_state.keys.departed, "second").endswith("signal 9")
    with pytest.raises(StaleIncarnation):
        beat(job_state, second, number=1, ttl_ms=TTL_MS, interval_ms=1000)
    beat(job_state, first, number=1, ttl_ms=TTL_MS, interval_ms=1000)


def test_a_report_about_an_older_incarnation_does_not_touch_the_new_one(job_state: JobState) -> None:
    """Given that a worker came back, when its launcher reports the death of the old process late, then nothing happens."""
    (old,) = joined(job_state, "w")
    join(job_state, replace(old, incarnation="new"), ttl_ms=TTL_MS)
    assert leave(job_state, old) == 0
    assert job_state.redis.hget(job_state.keys.fences, "w") == "new"


def test_a_lost_beat_is_noticed(job_state: JobState) -> None:
    """Given that Redis forgot acknowledged beats, when the next comes, then it is refused as STATE_LOST; a repeat is not."""
    (who,) = joined(job_state, "w")
    for number in (1, 2, 2, 3):
        beat(job_state, who, number=number, ttl_ms=TTL_MS, interval_ms=1000, step=number)
    job_state.redis.hset(job_state.keys.worker("w"), "beat", 1)
    with pytest.raises(StateLost, match="beat 3 was acknowledged and is gone"):
        beat(job_state, who, number=4, ttl_ms=TTL_MS, interval_ms=1000)


def test_every_call_of_another_state_is_refused(job_state: JobState) -> None:
    """Given an emptied and recreated Redis, when a member of the old state calls, then it learns that the state was lost."""
    who, _ = formed(job_state, "a", "b")
    job_state.redis.flushall()
    with pytest.raises(StateLost, match="emptied"):
        beat(job_state, who[0], number=1, ttl_ms=TTL_MS, interval_ms=1000)
    opened(job_state)
    with pytest.raises(StateLost, match="another state"):
        beat(job_state, who[0], number=1, ttl_ms=TTL_MS, interval_ms=1000)


def test_a_death_in_the_roster_ends_the_run_and_writes_fixed_keys_only(job_state: JobState) -> None:
    """Given a run, when a member departs, then meta names it, wake has one entry, and no other key appeared or vanished."""
    who, run = formed(job_state, "a", "b")
    k = job_state.keys
    before = set(job_state.redis.keys("*"))
    woken = job_state.redis.xlen(k.wake)
    leave(job_state, who[1], "signal 9")
    assert job_state.redis.hmget(k.meta, "run", "ended_run", "ended_worker", "ended_rank", "ended_reason") == [
        "",
        run.id,
        "b",
        "1",
        "signal 9",
    ]
    assert job_state.redis.xlen(k.wake) == woken + 1
    assert set(job_state.redis.keys("*")) - before <= {k.departed}


def test_the_echo_of_an_older_registration_does_not_come_back(job_state: JobState) -> None:
    """Given that a newer process took the worker_id, when the older one's join is sent again, then it is refused and the newer stays."""
    (old,) = joined(job_state, "w")
    new = replace(old, incarnation="new")
    join(job_state, new, ttl_ms=TTL_MS)
    with pytest.raises(StaleIncarnation, match="has departed"):
        join(job_state, old, ttl_ms=TTL_MS)
    assert job_state.redis.hget(job_state.keys.fences, "w") == "new"


def test_a_join_does_not_hide_a_pause(job_state: JobState) -> None:
    """Given that nobody could beat for long, when one joins and then beats, then the others still get their grace."""
    joined(job_state, "a", "b")
    k, now = job_state.keys, job_state.server_now_ms()
    job_state.redis.hset(k.meta, "beat_at", now - 10_000)
    job_state.redis.zadd(k.members, {"a": now - 5_000, "b": now - 5_000})
    (late,) = joined(job_state, "z")
    for number in (1, 2):
        beat(job_state, late, number=number, ttl_ms=TTL_MS, interval_ms=1000)
    assert job_state.redis.hlen(k.departed) == 0


def test_a_server_clock_that_goes_back_keeps_the_dead_dead(job_state: JobState) -> None:
    """Given marks of an hour ahead, when one beats, then deadlines are near again and the silent are reaped after their grace."""
    silent, alive = joined(job_state, "silent", "alive")
    k, hour = job_state.keys, 3_600_000
    job_state.redis.hset(k.meta, "beat_at", job_state.server_now_ms() + hour)
    job_state.redis.zadd(k.members, {"silent": job_state.server_now_ms() + hour})
    beat(job_state, alive, number=1, ttl_ms=TTL_MS, interval_ms=1000)
    assert job_state.redis.zscore(k.members, silent.worker_id) <= job_state.server_now_ms() + TTL_MS
    assert int(job_state.redis.hget(k.meta, "grace_until")) > job_state.server_now_ms()
