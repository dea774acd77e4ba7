"""Exactly once, whatever dies: an oracle with logs of its own, over jobs whose trainers are killed, stopped, added and removed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import Task, Trainers, disturb, verdict
from tests.servers import RedisServer
from tests.waiting import eventually
from tests.workers import worker

FORMS = ("jsonl", "npy", "bin")


@contextmanager
def training(server: RedisServer, name: str, folder: Path, task: Task, size: int, high: int) -> Iterator[Trainers]:
    """Trainers and an uploader; all are ended with the block."""
    env = {"DTR_REDIS_URL": server.url, "DTR_JOB": name, "DTR_STAGING": str(folder / "staging"), "DTR_BARRIER_TIMEOUT_S": "60"}
    with worker(url=server.url, staging=folder / "staging"):
        trainers = Trainers(folder / "job", env, task, low=1, high=high)
        try:
            for n in range(size):
                trainers.start(f"w{n}")
            yield trainers
        finally:
            trainers.close()


def prove(server: RedisServer, name: str, folder: Path, seed: int, events: int, task: Task, **sizes: int) -> dict[str, Any]:
    """Train through so many random events; what the oracle says."""
    dice = random.Random(seed)
    done: list[str] = []
    with training(server, name, folder, task, **sizes) as trainers:
        while len(done) < events and trainers.wait_for_progress(dice.randrange(5, 30)):
            done.append(disturb(trainers, dice))
        trainers.wait()
        out = (folder / "job" / "out").read_text()
        print(f"seed {seed}: {', '.join(done)}")
        return verdict(folder / "job", task) | {"events": len(done), "out": out}


@pytest.mark.parametrize(("mode", "seed"), [("dynamic", 1), ("deterministic", 2)])
def test_each_sample_once_through_random_events(valkey: RedisServer, job: str, tmp_path: Path, mode: str, seed: int) -> None:
    """Given three trainers and ten random events, when the job is over, then the surviving lineage consumed each sample exactly once."""
    task = Task(samples=1200, epochs=3, mode=mode, form=FORMS[seed % 3], step_s=0.03)
    found = prove(valkey, job, tmp_path, seed, 10, task, size=3, high=4)
    assert (found["lost"], found["twice"]) == (0, 0), found["out"][-4000:]
    assert found["events"] >= 5


@pytest.mark.parametrize(
    ("rank", "fault", "taken"),
    [
        (1, "save.before_share", 5), (1, "save.after_stage", 10), (2, "load.after_lease", 10),
        pytest.param(0, "stage.after_staged_record", 10, marks=pytest.mark.soak),
        pytest.param(0, "stage.mid_copy", 5, marks=pytest.mark.soak),
        pytest.param(2, "load.before_report", 10, marks=pytest.mark.soak),
        pytest.param(2, "load.after_report", 10, marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_a_kill_at_any_point_of_a_save_or_a_lease(valkey: RedisServer, job: str, tmp_path: Path, rank: int, fault: str, taken: int) -> None:
    """Given a rank that dies at step 10, its share of that save told or not, then the cut that is restored has all shares or is older."""
    task = Task(samples=450, epochs=2, shard_size=20)
    with training(valkey, job, tmp_path, task, size=0, high=3) as trainers:
        trainers.low = 3
        for n in range(3):
            trainers.start(f"w{n}", RANK=str(n), DTR_TESTING="1", DTR_TEST_FAULT=f"{rank}:10:{fault}=kill")
        eventually(lambda: trainers.children[f"w{rank}"].poll() is not None, timeout_s=60, what="the kill")
        trainers.start(f"w{rank}")
        trainers.wait()
        found = verdict(tmp_path / "job", task)
        lineage = json.loads((tmp_path / "job" / "lineage.json").read_text())
        assert (found["lost"], found["twice"]) == (0, 0), (tmp_path / "job" / "out").read_text()
        assert lineage[0][1] == taken


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["dynamic", "deterministic"])
@pytest.mark.parametrize("seed", range(20))
def test_each_sample_once_through_sixty_events(valkey: RedisServer, job: str, tmp_path: Path, mode: str, seed: int) -> None:
    """Eight trainers, three epochs, sixty random events, the format drawn by the seed."""
    task = Task(samples=24_000, epochs=3, shard_size=100, mode=mode, form=FORMS[seed % 3])
    found = prove(valkey, job, tmp_path, seed, 60, task, size=8, high=10)
    assert (found["lost"], found["twice"]) == (0, 0), found["out"][-4000:]
