"""Redis killed, stopped, emptied or unheard while leases and reports are under way: every sample once, or a typed error on every rank."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from dtr.config import Settings
from dtr.datasets.consuming import ranges, reports
from dtr.datasets.consuming.datastate import Dynamic, parse
from dtr.datasets.consuming.ledger import Ledger
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.errors import CoordinatorUnavailable, DtrError, RosterChanged, StateLost
from dtr.state import scripts
from dtr.state.job import JobState
from dtr.state.scripts import load
from tests.loading import Loading, LoadingRank, loading, once_each, write_lines
from tests.proxy import Proxy
from tests.servers import RedisServer, valkey_server
from tests.waiting import eventually

SAMPLES = 240
SCRIPTS = sorted(path.stem for path in (Path(scripts.__file__).parent / "lua").glob("ledger_*.lua"))


def registered(settings: Settings, folder: Path, shard_size: int = 10) -> Path:
    data = write_lines(folder / "data", SAMPLES)
    registry = DatasetRegistry(settings.redis_url, job=settings.job)
    registry.register("numbers", path=data, format="jsonl", shard_size=shard_size, shuffle=True)
    registry.close()
    return data


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may break, and that keeps what it acknowledged."""
    with valkey_server(tmp_path / "server", ["--appendonly", "yes", "--appendfsync", "always"]) as made:
        yield made


@pytest.fixture
def own(settings: Settings, server: RedisServer, tmp_path: Path) -> Settings:
    """Settings of a job on that server, its data set registered."""
    made = replace(settings, redis_url=server.url, ttl_s=6.0)
    registered(made, tmp_path)
    return made


def killed_and_restarted(server: RedisServer) -> None:
    server.kill()
    server.restart()


def paused(server: RedisServer) -> None:
    server.pause()
    threading.Timer(1.0, server.resume).start()


def connections_killed(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as raw:
        raw.client_kill_filter(_type="normal", skipme=True)


@pytest.mark.parametrize("fault", [killed_and_restarted, paused, connections_killed])
def test_redis_that_comes_back_loses_and_repeats_nothing(own: Settings, server: RedisServer, fault: Callable[..., None]) -> None:
    """Given three ranks in the middle of an epoch, when Redis goes away three times, then each sample comes once, in equal steps."""
    with loading(own, 3) as job:
        before = [job.train(2, batch_size=6), *[with_fault(job, server, fault) for _ in range(3)]]
        rest = job.train(batch_size=6)
        assert all(len(set(steps)) == 1 for steps in (*before, rest))
        assert once_each(job.seen(), range(SAMPLES))


def with_fault(job: Loading, server: RedisServer, fault: Callable[..., None]) -> list[int]:
    """Two steps during which the fault happens: after one rank's first batch, while the others ask for theirs."""
    begun = threading.Event()
    thread = threading.Thread(target=lambda: begun.wait(20) and fault(server))
    thread.start()

    def loop(rank: LoadingRank) -> int:
        for _ in range(2):
            batch = next(rank.loader(batch_size=6))
            begun.set()
            rank.consume(batch)
        return 2

    try:
        return job.each(loop)
    finally:
        thread.join(30)


def test_redis_that_was_emptied_ends_the_epoch_for_nobody(own: Settings) -> None:
    """Given ranks in the middle of an epoch, when Redis is emptied, then each is told, and none takes that for the end of its data."""
    with loading(own, 2) as job:
        job.train(3, batch_size=6)
        with redis.Redis.from_url(own.redis_url) as raw:
            raw.flushall()

        def told(rank: LoadingRank) -> DtrError:
            def ended() -> DtrError | None:
                try:
                    rank.consume(next(rank.loader(batch_size=6)))
                except (StateLost, RosterChanged) as exc:
                    return exc
                except StopIteration:
                    raise AssertionError("the epoch ended instead") from None
                return None

            return eventually(ended, what="the rank to be told")

        assert len(job.each(told)) == 2
        assert max(job.seen().values()) == 1


def test_the_state_of_all_ranks_is_whole_after_an_outage_longer_than_the_queue_of_reports(
    settings: Settings, server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given ranks that finish a shard each while Redis is away for more reports than wait, then both tell all that was consumed, alike."""
    monkeypatch.setattr(reports, "MOST_UNANSWERED", 20)
    made = replace(settings, redis_url=server.url, ttl_s=60.0)
    registered(made, tmp_path, shard_size=60)
    with loading(made, 2) as job:
        loaders = {rank.session.worker_id: rank.loader(batch_size=2, prefetch=4) for rank in job.ranks}

        def take(count: int) -> None:
            job.each(lambda rank: [rank.consume(next(loaders[rank.session.worker_id])) for _ in range(count)])

        take(28)
        state, spec = job.ranks[0].session.state, job.ranks[0].registry.get("numbers").spec
        leases = Ledger(job.ranks[0].session, spec, 0).keys.ledger
        eventually(lambda: sum(key.startswith("lease/") for key in state.redis.hkeys(leases)) == 4, what="a lease of every shard")
        server.kill()
        take(27)
        server.restart()
        take(2)
        told = job.each(lambda rank: loaders[rank.session.worker_id].state_dict()["dtr_data"])
        assert told[0] == told[1]
        found = parse("numbers", json.loads(told[0]))
        assert isinstance(found, Dynamic)
        assert 60 * ranges.count(found.done) + sum(map(ranges.count, found.partial.values())) == job.seen().total() == 2 * 57 * 2
        assert max(job.seen().values()) == 1
        assert ranges.count(found.done) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_reply_lost_to_any_script_of_the_ledger(settings: Settings, valkey: RedisServer, tmp_path: Path, script: str) -> None:
    """Given a damaged shard and a connection that breaks after each effect, then each other sample comes once, in equal steps."""
    damaged = registered(settings, tmp_path) / "part-1.jsonl"
    before = damaged.stat()
    with damaged.open("r+b") as file:
        file.write(b"?????")
    os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))
    with Proxy(valkey.port) as proxy:
        proxy.drop_replies(3, matching=load(script).sha.encode(), then="close")
        with loading(replace(settings, redis_url=f"redis://127.0.0.1:{proxy.port}/0"), 2) as job:
            assert len(set(job.train(batch_size=7))) == 1
            assert once_each(job.seen(), [*range(60), *range(70, SAMPLES)])


def test_what_an_unheard_lease_was_granted_comes_with_the_next(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease takes effect and its answer is lost, twice; the next one tells of all that this rank holds, once, and of quarantine."""
    registered(settings, tmp_path)
    with loading(settings, 1) as job:
        session = job.ranks[0].session
        spec = job.ranks[0].registry.get("numbers").spec
        ledger = Ledger(session, spec, 0)
        ledger.open(Dynamic(version=spec.version, digest=spec.digest, seed=7))
        session.state.redis.hset(ledger.quarantine_key, "1", "torn")
        call, lost = JobState.call, 2

        def unheard(self: JobState, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
            nonlocal lost
            answer = call(self, script, keys, args)
            if script == "ledger_lease" and lost:
                lost -= 1
                raise CoordinatorUnavailable("the reply was lost")
            return answer

        monkeypatch.setattr(JobState, "call", unheard)
        for candidates in ([0, 1, 2], [3, 4]):
            with pytest.raises(CoordinatorUnavailable):
                ledger.lease(candidates, want=2, have=0, anything=False)
        found = ledger.lease([5], want=1, have=0, anything=False)
        assert [shard for shard, _ in found.shards] == [0, 2, 5]
        assert (found.quarantined, found.dry) == ((1,), False)
        assert [shard for shard, _ in ledger.lease(range(spec.shards), want=99, have=0, anything=True).shards] == [
            3,
            4,
            *range(6, spec.shards),
        ]
        assert ledger.lease([], want=1, have=0, anything=True).dry
