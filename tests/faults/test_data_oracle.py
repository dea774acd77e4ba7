"""Exactly once, whatever dies: an oracle with logs of its own, over jobs whose processes and servers are killed, stopped and restarted.

One seed alone: ``make soak ARGS="-k dynamic-seed07"``.
"""

from __future__ import annotations

import json
import random
from contextlib import closing
from pathlib import Path

import pytest
import redis

from dtr.state.keys import Keys
from tests.disturbing import Job, disturb, drawn, training
from tests.oracle import Verdict, judge, sequence
from tests.oracle_trainer import COLUMNS, Task
from tests.servers import RedisServer, valkey_server
from tests.waiting import eventually

KEPT = ("--appendonly", "yes")
MODES = ("dynamic", "deterministic")
SEEDS = range(20)


def verdict(job: Job) -> Verdict:
    """What the oracle says about a job that is over; no trainer of it may have ended by an error of its own."""
    found = judge(job.folder, samples=job.task.samples, epochs=job.task.epochs)
    out = (job.folder / "out").read_text()[-6000:]
    assert found.clean, f"{found}\n{out}"
    assert not job.surprises, "\n".join(job.surprises)
    return found


def prove(job: Job, seed: int, count: int) -> str:
    """Train through so many random events, and on to the end; returns what happened."""
    dice = random.Random(seed)
    total = job.task.samples * job.task.epochs
    goals = sorted(dice.randrange(total * 4 // 5) for _ in range(count))
    done: list[str] = []
    try:
        with job.held():
            for goal, event in zip(goals, drawn(dice, count), strict=True):
                job.wait_for_samples(goal)
                done.append(disturb(job, dice, event))
        job.wait()
        found = verdict(job)
    finally:
        print(f"{job.task.mode} seed {seed}, {job.task.form}: {', '.join(done)}")
    return f"{job.task.mode} seed {seed}, {job.task.form}: {len(done)} events, {found}"


def task_of(mode: str, seed: int, **sizes: int) -> Task:
    """Seed by seed the formats take turns."""
    return Task(mode=mode, form=sorted(COLUMNS)[seed % len(COLUMNS)], **sizes)


@pytest.mark.parametrize("seed", [3, 5])  # mds and parquet
@pytest.mark.parametrize("mode", MODES)
def test_each_sample_once_through_ten_events(job: str, tmp_path: Path, mode: str, seed: int) -> None:
    """Given three trainers and ten random events, one of each kind among them, then the surviving lineage consumed each sample once."""
    task = task_of(mode, seed, samples=1200, shard_size=30, save_every=3)
    with valkey_server(tmp_path / "redis", KEPT) as server, training(server, job, tmp_path / "job", task, size=3, high=4) as disturbed:
        prove(disturbed, seed, 10)


@pytest.mark.soak
@pytest.mark.parametrize("seed", SEEDS, ids=[f"seed{seed:02}" for seed in SEEDS])
@pytest.mark.parametrize("mode", MODES)
def test_each_sample_once_through_sixty_events(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, seed: int) -> None:
    """Given eight trainers, three epochs and sixty random events, then the surviving lineage consumed each sample once."""
    task = task_of(mode, seed, samples=24_000, shard_size=100, global_batch=80)
    with valkey_server(tmp_path / "redis", KEPT) as server, training(server, job, tmp_path / "job", task, size=8, high=10) as disturbed:
        told = prove(disturbed, seed, 60)
    with capsys.disabled():
        print(f"\n{told}")


@pytest.mark.parametrize(
    ("rank", "step", "fault", "taken"),
    [
        (1, 10, "save.before_share", 5), (1, 10, "save.after_stage", 10), (2, 11, "load.after_lease", 10),
        (0, 10, "save.after_begin", 10), pytest.param(1, 10, "save.after_begin", 10, marks=pytest.mark.soak),
        pytest.param(2, 11, "load.after_open", 10, marks=pytest.mark.soak),
        pytest.param(0, 10, "stage.after_staged_record", 10, marks=pytest.mark.soak),
        pytest.param(0, 10, "stage.mid_copy", 5, marks=pytest.mark.soak),
        pytest.param(2, 11, "load.before_report", 10, marks=pytest.mark.soak),
        pytest.param(2, 11, "load.after_report", 10, marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_a_kill_at_any_point_of_a_save_or_a_lease(
    valkey: RedisServer, job: str, tmp_path: Path, rank: int, step: int, fault: str, taken: int
) -> None:
    """Given a rank that dies in or after the save of step 10, its share told or not, then what is restored has all shares or is older."""
    task = Task(samples=450, epochs=2, shard_size=20)
    with training(valkey, job, tmp_path / "job", task, size=0, high=3, low=3, ttl_s=30) as three:
        for n in range(3):
            three.start(f"w{n}", RANK=str(n), DTR_TESTING="1", DTR_TEST_FAULT=f"{rank}:{step}:{fault}=kill")
        eventually(lambda: three.children[f"w{rank}"].poll() is not None, timeout_s=60, what="the kill")
        eventually(lambda: waiting(three) == 2, timeout_s=60, what="the others, past their save of step 10, at the next barrier")
        three.wait()
        verdict(three)
        lineage = json.loads((three.folder / "lineage.json").read_text())
    assert lineage[0][1] == taken


def waiting(job: Job) -> int:
    """How many trainers are at a barrier of the first run that comes after the save of step 10."""
    with closing(redis.Redis.from_url(job.server.url, decode_responses=True)) as client:
        keys = Keys(job.name)
        run = client.hget(keys.meta, "run") or ""
        found = [client.hmget(keys.barrier("gradients", run, step).round, "state", "arrived") for step in range(11, 15)]
    return next((int(arrived) for state, arrived in found if state == "OPEN"), 0)


@pytest.mark.soak
def test_other_numbers_of_workers_see_the_same_global_batches(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """Given a job that is killed and begun again, with 4 -> 3 -> 8 -> 1 workers, then its batches have the hashes of 4 throughout."""
    task = Task(mode="deterministic", samples=1200, epochs=2, global_batch=24)
    found = {}
    for sizes in ([4], [4, 3, 8, 1]):
        folder = tmp_path / f"job-of-{len(sizes)}"
        with training(valkey, f"{job}-{len(sizes)}", folder, task, size=0, high=8) as several:
            for size in sizes:
                several.low = several.high = size
                several.begin_again(size)
                several.wait_for_samples(several.samples() + task.samples * task.epochs // 5)
            several.wait()
        assert verdict(several).runs == len(sizes)
        found[len(sizes)] = sequence(folder)
    assert found[4] == found[1]
    assert list(found[1]) == [(epoch, number) for epoch in range(2) for number in range(50)]
