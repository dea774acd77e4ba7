"""A trainer that is stopped in mid-copy does not keep its checkpoint open for ever, nor does what it stages later count (I6)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.checkpoint import parts
from dtr.checkpoint.staging.locks import is_held
from dtr.checkpoint.staging.slots import Found, SlotRecord
from dtr.checkpoint.uploading.reconcile import Reconciler
from dtr.errors import CheckpointAborted, RosterChanged
from dtr.membership import depart
from tests.uploads import Training, follow, wait_for_stop
from tests.waiting import eventually

CHILD = """
import sys
from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.slots import SlotRecord
from tests.staged import PlainLayout
arena = Arena(sys.argv[1], job=sys.argv[3], worker=sys.argv[4])
record = SlotRecord.parse(sys.argv[2].encode())
arena.acquire(5000).write(PlainLayout(5000), {"x": b"z" * 5000}, record)
print("staged", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def stopped(pair: Training) -> Iterator[subprocess.Popen[str]]:
    """Rank 0 has staged step 1, and rank 1's trainer is stopped in the middle of its copy."""
    pair.stage(rank=0)
    who = pair.members[1]
    record = SlotRecord(
        job=pair.job, run=pair.run.id, step=1, rank=1, world_size=2, worker=who.worker_id, incarnation=who.incarnation, host=pair.host,
        store=pair.store_url,
    )  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, pair.staging, record.encode().decode(), pair.job, who.worker_id], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "DTR_FAILPOINT": "stage.mid_copy=stop", "DTR_TESTING": "1"},
    )  # fmt: skip
    try:
        wait_for_stop(child, eventually)
        yield child
    finally:
        child.kill()
        child.communicate()


class Uploading:
    """One host's uploader, which looks when it is told to, and does what that wakes."""

    def __init__(self, training: Training, *, copy_within_s: float = 3.0) -> None:
        self.training, self.uploader = training, training.uploader()
        self.reconciler = Reconciler(redis_url=training.url, staging=training.staging, host=training.host, copy_within_s=copy_within_s)

    def state(self) -> str:
        """The checkpoint's, after one look."""
        for wake in self.reconciler.look().wakes:
            follow(self.uploader, wake)
        return self.training.state_of()

    def aborts(self) -> None:
        eventually(lambda: self.state() == "ABORTED", what="the end of the checkpoint")

    def close(self) -> None:
        self.reconciler.close()
        self.uploader.close()


def gone(training: Training) -> None:
    """Rank 1's deadline has passed."""
    who = training.members[1]
    depart(training.state, state_id=who.state_id, worker_id=who.worker_id, incarnation=who.incarnation, reason="ttl")


def slot_of(training: Training, rank: int) -> Found:
    return next(found for found in training.slots() if found.record and found.record.rank == rank)


def test_its_part_is_lost_after_a_while_and_its_slot_is_left_to_it(pair: Training, stopped: subprocess.Popen[str]) -> None:
    """As long as it is a member it is waited for, and a while longer; continued then, its call is refused and its bytes go nowhere."""
    uploading = Uploading(pair)
    assert [uploading.state() for _ in range(3)] == ["WRITING"] * 3
    gone(pair)
    assert uploading.state() == "WRITING"
    uploading.aborts()
    assert "departed (ttl)" in pair.view().reason
    copying = slot_of(pair, 1)
    assert (copying.kind, is_held(copying.files.lock)) == ("COPYING", True)
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.stdout is not None
    assert stopped.stdout.readline() == "staged\n"
    late = slot_of(pair, 1).record
    assert late is not None
    part = parts.StagedPart(size_bytes=late.size_bytes, save=late.save)
    with pytest.raises(RosterChanged):
        parts.begin(pair.state, pair.members[1].state_id, pair.spec(), pair.fence(1), part)
    with pytest.raises(CheckpointAborted):
        parts.register(pair.state, pair.spec(), pair.fence(1), part)
    assert uploading.state() == "ABORTED"
    assert not [found for found in pair.slots() if found.kind in {"STAGED", "COPYING"}]
    assert pair.objects() == []
    assert pair.manifest().decision == "abort"
    uploading.close()


def test_it_is_not_waited_for_when_the_job_went_on_without_that_step(pair: Training, stopped: subprocess.Popen[str]) -> None:
    """The next run restored an earlier step: nobody will ever want this one."""
    uploading = Uploading(pair, copy_within_s=3600)
    gone(pair)
    assert uploading.state() == "WRITING"
    pair.state.redis.hset(pair.state.keys.lineage, pair.run.id, 1)
    assert uploading.state() == "WRITING", "this very step was taken"
    pair.state.redis.hset(pair.state.keys.lineage, pair.run.id, 0)
    uploading.aborts()
    uploading.close()


def test_a_departure_that_redis_forgot_is_timed_by_the_uploader(pair: Training, stopped: subprocess.Popen[str]) -> None:
    """After a failover, say: from its first look at it."""
    uploading = Uploading(pair)
    gone(pair)
    pair.state.redis.delete(pair.state.keys.departed)
    assert uploading.state() == "WRITING"
    uploading.aborts()
    uploading.close()


def test_a_copy_in_time_counts(pair: Training, stopped: subprocess.Popen[str]) -> None:
    """Continued within the bound, it completes the checkpoint, though its member is gone: a complete part counts, whoever died."""
    uploading = Uploading(pair, copy_within_s=3600)
    gone(pair)
    assert uploading.state() == "WRITING"
    os.kill(stopped.pid, signal.SIGCONT)
    eventually(lambda: uploading.state() == "COMMITTED", what="the commit")
    uploading.close()
