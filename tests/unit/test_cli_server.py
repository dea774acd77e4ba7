"""What `dtr status` says of the server, and what it makes of keys that somebody else has written."""

from __future__ import annotations

import pytest

from dtr.errors import StateCorrupt
from dtr.state.job import JobState
from dtr.state.keys import JOBS, Keys
from dtr.views import checkpoints, events, jobs, ring, rounds, status, workers
from dtr.views.server import describe

HEALTHY = {
    "redis_version": "7.2.4", "role": "master", "aof_enabled": 1, "maxmemory_policy": "noeviction", "used_memory": 10, "maxmemory": 0,
    "aof_last_write_status": "ok", "aof_last_bgrewrite_status": "ok", "rdb_last_bgsave_status": "ok", "loading": 0, "uptime_in_seconds": 60,
}  # fmt: skip


def test_a_server_that_is_well_has_no_warnings():
    """Version and engine are as INFO has them; the password of its URL is masked."""
    seen = describe(HEALTHY, url="redis://:hunter2@h/0", ping_ms=0.2)
    assert (seen.engine, seen.version, seen.warnings, seen.url) == ("redis", "7.2.4", (), "redis://:***@h/0")
    assert describe({**HEALTHY, "valkey_version": "9.1.2"}, url="redis://h", ping_ms=0.2).engine == "valkey"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"redis_version": "6.2.1"}, "dtr needs 7.0 or later"),
        ({"loading": 1}, "still loading"),
        (
            {"role": "slave", "master_host": "h", "master_port": 1, "master_link_status": "down"},
            "replica of h:1, and it has lost its primary",
        ),
        ({"aof_last_write_status": "err"}, "last write to the append-only file failed"),
        ({"rdb_last_bgsave_status": "err"}, "last snapshot failed"),
        ({"maxmemory": 100, "used_memory": 95}, "memory is 95 % full"),
        ({"maxmemory_policy": "allkeys-lru"}, "set noeviction"),
        ({"aof_enabled": 0}, "set appendonly yes"),
    ],
)
def test_each_danger_is_one_warning(change, says):
    """What is wrong with the server, and what to do."""
    seen = describe({**HEALTHY, **change}, url="redis://h", ping_ms=0.2)
    assert len(seen.warnings) == 1
    assert says in seen.warnings[0]


def test_a_server_that_does_not_tell_is_said_to_be_unknown():
    """A user who may not run INFO sees nothing that is made up."""
    seen = describe({}, url="redis://h", ping_ms=0.2, refused="NOPERM info")
    assert (seen.version, seen.uptime_s, seen.append_only) == (None, None, None)
    assert "NOPERM info" in seen.warnings[0]


@pytest.mark.parametrize("read", [workers.read, rounds.read, ring.read, checkpoints.read, status.read], ids=lambda read: read.__module__)
def test_a_job_that_does_not_exist_can_be_looked_at(job_state: JobState, read):
    """Every reader, on every engine: nothing is there, and nothing is written."""
    read(job_state)
    assert job_state.redis.keys(f"*{job_state.job}*") == []


@pytest.mark.parametrize(
    ("read", "key", "kind"),
    [
        (workers.read, "departed", "hash"),
        (workers.read, "members", "zset"),
        (ring.read, "ring", "zset"),
        (checkpoints.read, "ckpts", "zset"),
        (status.read, "counters", "hash"),
        (lambda state: events.read(state, count=3), "events", "stream"),
    ],
)
def test_a_key_of_the_wrong_type_is_named(job_state: JobState, read, key, kind):
    """StateCorrupt, not unavailable: trying again does not help."""
    name = job_state.keys.prefix + key
    job_state.redis.set(name, "x")
    with pytest.raises(StateCorrupt, match="wrong"):
        read(job_state)


@pytest.mark.parametrize(
    ("state_of", "says"),
    [({"world_size": "1"}, "no field state"), ({"state": "WRITING", "world_size": "many"}, "world_size must be an integer, got 'many'"),
     ({"state": "WRITING", "world_size": "1000000000000000"}, "world_size must be from 0 to 100000")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_with_its_field(job_state: JobState, state_of, says):
    """Also one that declares more ranks than memory holds."""
    job_state.redis.hset(job_state.keys.ckpt("0001-a", 5), mapping=state_of)
    job_state.redis.zadd(job_state.keys.open_ckpts, {"0001-a/5": 1})
    with pytest.raises(StateCorrupt, match=says):
        checkpoints.read_open(job_state)


def test_a_damaged_round_is_named(job_state: JobState):
    """A member set that is no JSON names its key."""
    key = job_state.keys.barrier("b", "0001-a", 0).round
    job_state.redis.hset(key, mapping={"state": "OPEN", "arrived": "1", "expected": "2", "members": "[broken"})
    with pytest.raises(StateCorrupt, match="field members must be a JSON array"):
        rounds.read(job_state)


def test_damaged_jobs_are_listed_as_such_and_hide_no_other(job_state: JobState):
    """Whatever somebody wrote by hand: a name that is none, keys of another type, bytes that are no text."""
    redis, sound, bad = job_state.redis, job_state.job, Keys(f"bad-{job_state.job}")
    names = ["a b", b"\xff", bad.job, sound]
    redis.zadd(JOBS, dict.fromkeys(names, 1))
    redis.zadd(job_state.keys.members, {"w": 10**15})
    redis.hset(job_state.keys.meta, mapping={"phase": "READY", "run": "0001-a"})
    redis.set(bad.meta, "x")
    redis.zadd(bad.members, {"w": 1})
    try:
        found = {one.job: one for one in jobs.read(job_state)}
        assert (found[sound].alive, found[sound].run, found[sound].damage) == (1, "0001-a", "")
        assert (found[bad.job].alive, found[bad.job].overdue, found[bad.job].phase) == (0, 1, "")
        assert found[bad.job].damage.startswith(f"{bad.meta} holds something else than dtr writes: WRONGTYPE")
        assert found["a b"].damage.startswith("dtr:jobs lists what is no job: job must be 1 to 63 characters")
        assert found["\\xff"].damage.startswith("dtr:jobs lists what is no job")
        redis.hset(job_state.keys.meta, "run", b"\xff")
        redis.delete(bad.members)
        redis.set(bad.members, "x")
        found = {one.job: one for one in jobs.read(job_state)}
        assert (found[sound].alive, found[sound].run) == (1, "\\xff")
        assert (found[bad.job].alive, found[bad.job].overdue) == (0, 0)
        assert [part.partition(" ")[0] for part in found[bad.job].damage.split("; ")] == [bad.members, bad.meta]
    finally:
        redis.zrem(JOBS, *names)
        redis.delete(bad.meta, bad.members)


def test_an_event_without_a_kind_is_named(job_state: JobState):
    """The entry's id is in the message."""
    entry = job_state.redis.xadd(job_state.keys.events, {"worker": "w"})
    with pytest.raises(StateCorrupt, match=entry):
        events.read(job_state, count=5)
