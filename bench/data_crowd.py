"""What many workers on many shards cost one Redis: an epoch of the ledger's own scripts on real keys, leased, reported and done.

1,000 members form a run; one of them computes and installs the placement of 100,000 shards, and the ledger is opened. Then the epoch: each
second, if it went by the clock, every worker leases a shard, says how many batches it has, and reports the batch that it hands out, which
counts the shard of eight batches ago as consumed, as loaders do. It ends when every worker was told that no shard is free; then all must be
done, which is checked.

The first seconds are sent one call at a time, as 1,000 processes would, and of these the server's own CPU time is taken: the share of a
core. The rest goes in pipelines, to save time.

SLOWLOG tells what a script took on the clock, and on a machine that others use that is what they took from it. So the slowest script is
bounded by the most CPU time that the server's main thread took for one round trip, of one call or of ten, all else that it did included,
unless SLOWLOG's slowest of that second is less; only a rewrite of the append-only file is put off. Beside it stand SLOWLOG's slowest of
all, and its 99th of a hundred.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dtr.datasets.consuming.datastate import Dynamic
from dtr.datasets.consuming.ledger import KEEP_MS, Leased, base_digest, taken_bits
from dtr.membership import Identity, join, open_state
from dtr.placement import ShardPoints, place
from dtr.ring import Ring
from dtr.runs import Run, read_run
from dtr.state.job import JobState
from dtr.state.scripts import load

__all__ = ["measure"]

SAMPLES: Final = 256  # of a shard, and of a batch
CANDIDATES: Final = 64  # as a loader asks for
OLD: Final = 8  # batches after which it tells the shard as a sum
PACED_S: Final = 10
SLOW_US: Final = 100
INSTALLS: Final = 5
PIPED: Final = 10  # a server that never rests is preempted, and that looks like a slow script

Call = tuple[str, Sequence[str], Sequence[Any]]


@dataclass(slots=True, kw_only=True)
class _Worker:
    """One simulated rank: what it may still ask for, and what it was given."""

    who: Identity
    rank: int
    own: deque[int]
    known: int = 0
    number: int = 0
    dry: bool = False
    recent: deque[tuple[int, int]] = field(default_factory=deque)  # (shard, fence), handed out and not counted yet


class _Crowd:
    """A formed run and its ledger. The members' calls are made here, in their names."""

    def __init__(self, state: JobState, members: Sequence[Identity], run: Run, shards: int) -> None:
        self.state, self.run, self.shards = state, run, shards
        self.keys = state.keys.ledger("d", 0, run.id)
        placement = place(Ring.of(who.worker_id for who in members), ShardPoints.of("d", shards))
        self.placed = placement.to_fields()
        self.workers = [
            _Worker(who=who, rank=run.roster[who.worker_id].rank, own=deque(placement.shards_of(who.worker_id))) for who in members
        ]

    def seat(self, worker: _Worker) -> list[Any]:
        who = worker.who
        return [who.state_id, self.run.id, who.worker_id, worker.rank, who.incarnation]

    def install(self, parent: str, grandparent: str, generation: int) -> None:
        """The placement, as the member that computed it writes it."""
        k, fields = self.state.keys, [text for pair in self.placed.items() for text in pair]
        keys = [
            k.meta,
            k.roster,
            k.placement("d"),
            k.placement("d", generation),
            k.placement("d", int(grandparent or generation)),
            k.events,
        ]
        args = [*self.seat(self.workers[0]), "d", parent, grandparent, generation, 1, "members", 0, *fields]
        if self.state.call("placement_install", keys, args) != "installed":
            raise RuntimeError(f"placement {generation} was not installed")

    def open(self) -> None:
        k, base = self.state.keys, Dynamic(version=1, digest="d", seed=0)
        where = [k.meta, k.roster, k.run(self.run.id), self.keys.ledger, self.keys.taken]
        facts = [1, "d", "dynamic", 0, self.shards, base_digest(base), taken_bits(base, self.shards), KEEP_MS]
        for worker in self.workers:
            self.state.call("ledger_open", where, [*self.seat(worker), *facts])

    def second(self, send: Callable[[list[Call]], list[Any]]) -> int:
        """What all workers send in one second of the epoch; returns how many calls that were."""
        asking = [worker for worker in self.workers if not worker.dry]
        answers = send([self._lease(worker) for worker in asking])
        given = [worker for worker, answer in zip(asking, answers, strict=True) if self._granted(worker, Leased.parse(answer))]
        send([self._report(worker, "", "", -1, []) for worker in given])
        send([self._handed_out(worker) for worker in given])
        return len(asking) + 2 * len(given)

    def last(self, send: Callable[[list[Call]], list[Any]]) -> None:
        """The shards that no batch came after."""
        left = [(worker, [text for pair in worker.recent for text in (*pair, "")]) for worker in self.workers]
        send([self._report(worker, "", "", -1, sums) for worker, sums in left])
        done, free = self.state.redis.bitcount(self.keys.done), self.shards - self.state.redis.bitcount(self.keys.done)
        if free:
            raise RuntimeError(f"{done} of {self.shards} shards are done at the end of the epoch")

    def _lease(self, worker: _Worker) -> Call:
        k, first = self.state.keys, list(worker.own)[:CANDIDATES]
        for _ in first[:1]:
            worker.own.popleft()
        anything = len(first) >= len(worker.own) + 1
        from_byte = worker.rank * (-(-self.shards // 8)) // len(self.workers) if anything else -1
        worker.number += 1
        args = [*self.seat(worker), worker.known, 1, worker.known, from_byte, KEEP_MS, " ".join(map(str, first)), worker.number]
        return "ledger_lease", [k.meta, k.roster, k.fences, self.keys.ledger, self.keys.taken, k.quarantine("d", "d")], args

    def _granted(self, worker: _Worker, answer: Leased) -> bool:
        worker.dry = answer.dry
        worker.known += len(answer.shards)
        worker.recent.extend(answer.shards)
        return bool(answer.shards)

    def _handed_out(self, worker: _Worker) -> Call:
        shard, batch = worker.recent[-1][0], worker.known - 1
        sums = [*worker.recent.popleft(), ""] if len(worker.recent) > OLD else []
        return self._report(worker, str(batch), f"{shard}:0-{SAMPLES}", batch - OLD, sums)

    def _report(self, worker: _Worker, batch: str, out: str, old: int, sums: list[Any]) -> Call:
        done = max(0, worker.known - 1)
        args = [
            f"{worker.who.state_id} {self.run.id}",
            *self.seat(worker)[2:],
            worker.known,
            done,
            SAMPLES * done,
            batch,
            out,
            old,
            KEEP_MS,
        ]
        return "ledger_report", [self.state.keys.roster, self.keys.ledger, self.keys.done], [*args, *sums]


def measure(url: str, workers: int, shards: int) -> dict[str, float]:
    """The figures of ``workers`` on ``shards``, at a shard and a batch a second each."""
    with closing(JobState(url, "crowd", name="bench")) as state:
        empty_bytes = state.redis.info("memory")["used_memory"]
        state.redis.config_set("slowlog-log-slower-than", SLOW_US)
        state.redis.config_set("slowlog-max-len", 4 * workers)
        members, run = _formed(state, workers)
        crowd = _Crowd(state, members, run, shards)
        state.redis.config_set("auto-aof-rewrite-percentage", 0)
        for script in ("ledger_lease", "ledger_report"):
            state.redis.script_load(load(script).text)
        meter = _Meter(state)
        for generation in range(1, INSTALLS + 1):  # as for one generation after the other
            names = [str(n) if n > 0 else "" for n in (generation - 1, generation - 2)]
            state.redis.slowlog_reset()
            with meter.round_trip():
                crowd.install(names[0], names[1], generation)
        install_ms, meter.most_ms = meter.most_ms, 0.0
        crowd.open()
        found = _epoch(crowd, meter, empty_bytes) | {"install_ms_1000": install_ms}
        return found | {"slowest_script_ms_1000": max(install_ms, found["lease_or_report_ms_1000"])}


class _Meter:
    """The most that a script can have taken, by the server's CPU time for each round trip and by what it logged meanwhile."""

    def __init__(self, state: JobState) -> None:
        self._redis = state.redis
        pid = int(state.redis.info("server")["process_id"])
        self._of_thread = Path(f"/proc/{pid}/task/{pid}/schedstat")
        self.most_ms = 0.0

    def logged_ms(self) -> list[float]:
        """What scripts took on the clock since the log was emptied, if it was more than `SLOW_US`."""
        return [entry["duration"] / 1000 for entry in self._redis.slowlog_get(1 << 20) if entry["command"].startswith(b"EVAL")]

    @contextmanager
    def round_trip(self) -> Iterator[None]:
        before_ms = self._used_ms()
        yield
        if (took_ms := self._used_ms() - before_ms) > self.most_ms:
            self.most_ms = max(self.most_ms, min(took_ms, max(self.logged_ms(), default=SLOW_US / 1000)))

    def _used_ms(self) -> float:
        return int(self._of_thread.read_text().split()[0]) / 1e6


def _epoch(crowd: _Crowd, meter: _Meter, empty_bytes: int) -> dict[str, float]:
    redis, slow, most_bytes, seconds = crowd.state.redis, list[float](), 0, 0
    figures: dict[str, float] = {}
    calls, started, before_s = 0, time.perf_counter(), _cpu_s(crowd.state)
    while not all(worker.dry for worker in crowd.workers):
        redis.slowlog_reset()
        calls += crowd.second(lambda batch: _sent(crowd.state, meter, batch, 1 if seconds < PACED_S else PIPED))  # noqa: B023
        slow += meter.logged_ms()
        most_bytes = max(most_bytes, redis.info("memory")["used_memory"])
        seconds += 1
        if seconds <= PACED_S:
            figures["core_share_1000"] = (_cpu_s(crowd.state) - before_s) / seconds
            figures["operations_per_s"] = calls / (time.perf_counter() - started)
    crowd.last(lambda batch: _sent(crowd.state, meter, batch, PIPED))
    figures["lease_or_report_ms_1000"], figures["slowest_on_the_clock_ms_1000"] = meter.most_ms, max(slow, default=SLOW_US / 1000)
    figures["p99_script_ms_1000"] = sorted(slow)[-(calls // 100)] if len(slow) > calls // 100 > 0 else SLOW_US / 1000
    own = [*crowd.keys, crowd.state.keys.placement("d", INSTALLS)]
    figures["ledger_mb_1000"] = sum(redis.memory_usage(key, samples=0) or 0 for key in own) / 1e6
    return figures | {"redis_mb_1000": (most_bytes - empty_bytes) / 1e6, "calls_1000": calls}


def _cpu_s(state: JobState) -> float:
    used = state.redis.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def _sent(state: JobState, meter: _Meter, calls: list[Call], at_once: int) -> list[Any]:
    found: list[Any] = []
    for first in range(0, len(calls), at_once):
        with state.redis.pipeline(transaction=False) as pipe, meter.round_trip():
            for script, keys, args in calls[first : first + at_once]:
                pipe.evalsha(load(script).sha, len(keys), *keys, *args)
            found += pipe.execute()
    return found


def _formed(state: JobState, workers: int) -> tuple[list[Identity], Run]:
    state_id, k = open_state(state), state.keys
    members = [
        Identity(state_id=state_id, worker_id=f"w{n:04d}", incarnation=f"{n:012x}", host="bench", pid=1) for n in range(max(2, workers))
    ]
    for who in members:
        join(state, who, ttl_ms=3_600_000)
    name = "0001-data"
    for n, who in enumerate(members):
        state.call(
            "form_arrive",
            [k.meta, k.members, k.fences, k.roster, k.forming, k.wake, k.events, k.run(name)],
            [state_id, who.worker_id, who.incarnation, n, who.host, len(members), len(members), 0, name, ""],
        )
    return members, read_run(state, name, worker_id=members[0].worker_id)
