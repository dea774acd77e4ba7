"""Real agents of which one is slow: from the next run on it has fewer shards, and the others need not come for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest
import redis

from dtr.datasets.registering.registry import DatasetRegistry
from dtr.placement import parse_ranges
from dtr.state.keys import Keys
from dtr.weights import from_fields, is_field
from tests import pacing
from tests.servers import RedisServer
from tests.waiting import eventually

SHARDS = 600
PACE_MS = {"fast-1": 5, "fast-2": 5, "slow": 50, "leaver": 5}
FIELD = "samples_per_s/numbers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the run after the leaver's death placed, and which shards each worker consumed in its one epoch."""

    speeds: dict[str, float]
    placed: dict[str, set[int]]
    weights: dict[str, float]
    consumed: dict[str, set[int]]

    def fetched_from_slow(self) -> int:
        """Shards of the slow worker that others consumed."""
        return len(self.placed["slow"] - self.consumed["slow"])

    def alone_s(self) -> float:
        """When the last would end if nobody took a shard of another's, as the measured speeds say."""
        return max(20 * len(held) / self.speeds[worker] for worker, held in self.placed.items())


@pytest.fixture
def trainers() -> Iterator[dict[str, Popen[str]]]:
    """By worker; none outlives the test."""
    started: dict[str, Popen[str]] = {}
    yield started
    for process in started.values():
        process.kill()
        process.communicate(timeout=30)


def outcome(url: str, job: str, folder: Path, raw: redis.Redis, trainers: dict[str, Popen[str]], data_weights: str) -> Outcome:
    """Four workers until all speeds are known, then three."""
    keys = Keys(job)
    np.save(folder / "numbers.npy", np.arange(20 * SHARDS))
    with closing(DatasetRegistry(url, job=job)) as registry:
        registry.register("numbers", path=folder / "numbers.npy", format="npy", shard_size=20)
    for worker, pace_ms in PACE_MS.items():
        trainers[worker] = pacing.start(url, job, folder / "staging", worker, world=4, pace_ms=pace_ms, data_weights=data_weights)
    eventually(lambda: all(raw.hget(keys.worker(worker), FIELD) for worker in PACE_MS), what="the speed of every worker")
    first: Any = raw.hgetall(keys.placement("numbers", int(raw.hget(keys.placement("numbers"), "generation") or 0)))
    assert {len(parse_ranges(held)) for held in first.values()} == {SHARDS // 4}, "nobody was measured before the first run"
    speeds = {worker: float(raw.hget(keys.worker(worker), FIELD) or 0) for worker in PACE_MS}
    leaver = trainers["leaver"]
    leaver.kill()
    said = [json.loads(process.communicate(timeout=60)[0]) for process in trainers.values() if process is not leaver]
    fields: Any = raw.hgetall(keys.placement("numbers", int(raw.hget(keys.placement("numbers"), "generation") or 0)))
    return Outcome(
        speeds=speeds,
        placed={worker: set(parse_ranges(held).tolist()) for worker, held in fields.items() if not is_field(worker)},
        weights=from_fields(fields),
        consumed={each["worker"]: set(each["shards"]) for each in said},
    )


def test_a_slow_worker_has_fewer_shards_in_the_next_run(
    valkey: RedisServer, job: str, tmp_path: Path, raw: redis.Redis, trainers: dict[str, Popen[str]]
) -> None:
    """Given one of three at a tenth of the pace, then its shards are as few as its weight says, and it gets through most by itself."""
    found = outcome(valkey.url, job, tmp_path, raw, trainers, "speed")
    assert sorted(shard for held in found.consumed.values() for shard in held) == list(range(SHARDS))
    total = sum(found.weights.values())
    for worker, held in found.placed.items():
        assert abs(len(held) - SHARDS * found.weights[worker] / total) < 1
    assert found.weights["slow"] < min(found.weights["fast-1"], found.weights["fast-2"]) / 2
    even_s = 20 * SHARDS / 3 / found.speeds["slow"]
    assert found.alone_s() < even_s / 2
    assert found.fetched_from_slow() < SHARDS / 3 / 4


def test_by_setting_all_have_as_many(
    valkey: RedisServer, job: str, tmp_path: Path, raw: redis.Redis, trainers: dict[str, Popen[str]]
) -> None:
    """Given data_weights=even, then the slow worker has a third, and the others take most of it off its hands."""
    found = outcome(valkey.url, job, tmp_path, raw, trainers, "even")
    assert {len(held) for held in found.placed.values()} == {SHARDS // 3}
    assert set(found.weights.values()) == {1.0}
    assert found.fetched_from_slow() > SHARDS / 3 / 2
