"""The thread that beats: for all members of a job on a host at once, each with its own fate."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr import membership
from dtr.beats import Beats, Member
from dtr.errors import CoordinatorUnavailable
from dtr.membership import Identity
from dtr.progress import Progress
from dtr.state.job import JobState
from tests.lua.jobs import formed, joined, leave
from tests.servers import RedisServer, valkey_server
from tests.waiting import eventually

INTERVAL_MS, TTL_MS = 50, 60_000


@pytest.fixture
def state(valkey: RedisServer, job: str) -> Iterator[JobState]:
    """The job, as the test looks at it."""
    found = JobState(valkey.url, job)
    yield found
    found.close()


class Looked:
    """Beats for members, and what was told about each."""

    def __init__(self, url: str, job: str) -> None:
        self.beats = Beats(url, job, interval_ms=INTERVAL_MS)
        self.told: dict[str, list[str]] = {}

    def add(self, who: Identity, *, number: int = 0) -> Member:
        told = self.told.setdefault(who.worker_id, [])
        return self.beats.add(
            who, ttl_ms=TTL_MS, number=number, read_progress=lambda: Progress(step=7, phase="training", at=time.monotonic()),
            on_news=lambda news, detail: told.append(news),
        )  # fmt: skip


@pytest.fixture
def looked(state: JobState) -> Iterator[Looked]:
    """Ends its thread with the test."""
    found = Looked(state.url, state.job)
    yield found
    found.beats.stop()


def beats_of(state: JobState, *workers: str) -> list[int]:
    return [int(state.redis.hget(state.keys.worker(worker), "beat") or 0) for worker in workers]


def connections(state: JobState) -> int:
    return sum(client["name"].startswith("dtr-beat") for client in state.redis.client_list())


def threads() -> int:
    return sum(thread.name == "dtr-beat" for thread in threading.enumerate())


def test_members_beat_together_over_one_connection(state: JobState, looked: Looked) -> None:
    """Three members: one thread, one connection; whoever comes later beats at once, and in step with the others from then on."""
    who, run = formed(state, "a", "b", "c")
    before = connections(state)
    for member in who[:2]:
        looked.add(member)
    eventually(lambda: min(beats_of(state, "a", "b")) >= 3)
    late = looked.add(who[2])
    eventually(lambda: min(beats_of(state, "c")) >= 3)
    assert threads() == 1
    assert connections(state) == before + 1
    assert late.since is None
    assert looked.told == {"a": ["run"], "b": ["run"], "c": ["run"]}
    assert state.redis.hget(state.keys.worker("c"), "step") == "7"
    assert state.redis.hget(state.keys.meta, "run") == run.id


def test_one_that_may_not_go_on_ends_alone(state: JobState, looked: Looked) -> None:
    """A member that was declared dead hears so; the beats of the others go on."""
    a, b = joined(state, "a", "b")
    looked.add(a)
    looked.add(b)
    eventually(lambda: min(beats_of(state, "a", "b")) >= 2)
    leave(state, b)
    eventually(lambda: "stale" in looked.told["b"])
    (last,) = beats_of(state, "a")
    eventually(lambda: beats_of(state, "a")[0] >= last + 3)
    assert looked.told["b"][-1] == "stale"
    assert "stale" not in looked.told["a"]


def test_a_damaged_record_ends_the_beats_of_its_member_only(state: JobState, looked: Looked) -> None:
    """Where ``worker:ID`` is no hash, its member is told; the others of the host beat on."""
    a, b = joined(state, "a", "b")
    state.redis.delete(state.keys.worker("b"))
    state.redis.set(state.keys.worker("b"), "damaged")
    looked.add(a)
    looked.add(b)
    eventually(lambda: looked.told["b"] == ["stale"])
    eventually(lambda: beats_of(state, "a")[0] >= 3)


@pytest.mark.parametrize("where", ["progress", "news"])
def test_trouble_of_one_member_is_its_own(state: JobState, job: str, where: str) -> None:
    """A page of nonsense, or whoever is told raises: that member's beats end, and the other's go on."""
    a, b = joined(state, "a", "b")
    beats, told = Beats(state.url, job, interval_ms=INTERVAL_MS), []

    def fails(news: str, detail: str) -> None:
        told.append(news)
        raise RuntimeError("nobody listens")

    try:
        beats.add(
            b, ttl_ms=TTL_MS, number=0, on_news=fails,
            read_progress=lambda: Progress(step=1, phase="training", at=-math.inf if where == "progress" else time.monotonic()),
        )  # fmt: skip
        beats.add(
            a, ttl_ms=TTL_MS, number=0, on_news=lambda news, detail: None,
            read_progress=lambda: Progress(step=1, phase="training", at=time.monotonic()),
        )  # fmt: skip
        eventually(lambda: "stale" in told)
        (last,) = beats_of(state, "a")
        eventually(lambda: beats_of(state, "a")[0] >= last + 3)
    finally:
        beats.stop()


def test_a_reap_that_fails_costs_no_beat(state: JobState, looked: Looked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member has lapsed, and to put that on record does not work just now: beats go on, and one of the next ones does it."""
    a, b, lost = joined(state, "a", "b", "lost")
    refused: list[str] = []

    def reap(state: JobState, state_id: str) -> int:
        if len(refused) < 3:
            refused.append(state_id)
            raise CoordinatorUnavailable("the server took too long")
        return real(state, state_id)

    real = membership.reap
    monkeypatch.setattr(membership, "reap", reap)
    state.redis.zadd(state.keys.members, {lost.worker_id: 1})
    for who in (a, b):
        looked.add(who)
    eventually(lambda: state.redis.zscore(state.keys.members, "lost") is None)
    assert len(refused) == 3
    assert set(looked.told["a"] + looked.told["b"]) <= {"run"}


def test_a_server_that_became_a_replica_is_left(own_valkey: RedisServer, job: str) -> None:
    """READONLY in a round: the connection is closed, so that the next one goes to whoever is the master by then."""
    own = JobState(own_valkey.url, job)
    beats = Looked(own_valkey.url, job)
    try:
        for who in joined(own, "a", "b"):
            beats.add(who)
        eventually(lambda: min(beats_of(own, "a", "b")) >= 2)
        before = {client["id"] for client in own.redis.client_list() if client["name"].startswith("dtr-beat")}
        own.redis.replicaof("127.0.0.1", "1")
        eventually(lambda: beats.beats._failures >= 2)
        own.redis.replicaof("NO", "ONE")
        last = beats_of(own, "a", "b")
        eventually(lambda: min(now - then for now, then in zip(beats_of(own, "a", "b"), last, strict=True)) >= 2)
        after = {client["id"] for client in own.redis.client_list() if client["name"].startswith("dtr-beat")}
        assert not before & after
    finally:
        beats.beats.stop()
        own.close()


def test_the_thread_ends_with_the_last_member_and_begins_again(state: JobState, looked: Looked) -> None:
    """No member, no thread, no connection; the next member has one again, and its number goes on where it was."""
    (a,) = joined(state, "a")
    first = looked.add(a)
    eventually(lambda: beats_of(state, "a")[0] >= 2)
    looked.beats.remove(first)
    eventually(lambda: threads() == 0)
    (last,) = beats_of(state, "a")
    looked.add(a, number=-1)  # as when the launcher has gone: Redis knows the number
    eventually(lambda: beats_of(state, "a")[0] >= last + 2)
    assert "state_lost" not in looked.told["a"]


def test_an_emptied_server_is_told_to_every_member(state: JobState, looked: Looked) -> None:
    """The whole job is gone: each hears state_lost, once."""
    a, b = joined(state, "a", "b")
    looked.add(a)
    looked.add(b)
    eventually(lambda: min(beats_of(state, "a", "b")) >= 1)
    state.redis.delete(state.keys.meta)
    eventually(lambda: all("state_lost" in told for told in looked.told.values()))
    eventually(lambda: threads() == 0)
    assert [told.count("state_lost") for told in looked.told.values()] == [1, 1]


def test_beats_outlive_an_outage(tmp_path: Path, job: str) -> None:
    """Redis is stopped and started again, with all that it was told: nobody is told anything, and both beat on."""
    with valkey_server(tmp_path / "server", ["--appendonly", "yes", "--appendfsync", "always"]) as server:
        state, looked = JobState(server.url, job), Looked(server.url, job)
        try:
            for who in joined(state, "a", "b"):
                looked.add(who)
            eventually(lambda: min(beats_of(state, "a", "b")) >= 2)
            server.stop()
            eventually(lambda: looked.beats._failures > 0)
            server.start()
            before = beats_of(state, "a", "b")
            eventually(lambda: min(now - then for now, then in zip(beats_of(state, "a", "b"), before, strict=True)) >= 2)
            assert not {"stale", "state_lost"} & {news for told in looked.told.values() for news in told}
        finally:
            looked.beats.stop()
            state.close()
