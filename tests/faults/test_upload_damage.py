"""What an uploader's look meets that is damaged, or does not move: it holds up nothing else, and is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtr.errors import StateCorrupt
from dtr.state.job import JobState
from dtr.state.keys import JOBS
from tasks.reconciler import stuck_s
from tests.faults.test_upload_faults import Later, upload
from tests.servers import RedisServer
from tests.uploads import Training, verified


def test_a_damaged_job_holds_up_no_other(training: Training) -> None:
    """A key of another job has the wrong type: its look fails, and those after it are looked at all the same."""
    redis, damaged = training.state.redis, JobState(training.url, f"a-{training.job}")
    redis.set(damaged.keys.open_ckpts, "x")
    redis.zadd(JOBS, {damaged.job: 1})
    try:
        training.stage()
        assert training.settled() == "COMMITTED"
    finally:
        redis.zrem(JOBS, damaged.job)
        redis.delete(damaged.keys.open_ckpts)
        damaged.close()
    verified(training)


@pytest.mark.parametrize("mistake", ["a string", "no number"])
def test_a_damaged_checkpoint_holds_up_no_other(training: Training, mistake: str) -> None:
    """Its parts are of the wrong type, or a script meets what is no number: typed as damage, and the next step commits."""
    redis, damaged = training.state.redis, training.state.keys.parts(training.run.id, 1)
    training.stage(1)
    if mistake == "a string":
        redis.delete(damaged)
        redis.set(damaged, "x")
    else:
        redis.hset(damaged, "0/retry_at", "soon")
    with pytest.raises(StateCorrupt):
        upload(training, step=1)
    training.stage(2)
    assert training.settled(2) == "COMMITTED"
    verified(training, 2)


def test_a_part_that_nobody_takes_up_is_noticed(own_valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """Messages go out and no process claims it: the looks say for how long, until one does."""
    training = Training(own_valkey.url, job, tmp_path)
    training.stage()
    clock, reconciler = Later(), training.reconciler()
    reconciler._clock = clock
    assert reconciler.look().unclaimed_s == 0.0
    clock.at += 40
    late = reconciler.look()
    assert (late.unclaimed_s, len(late.wakes)) == (40.0, 1)
    assert [stuck_s(late, uploads) for uploads in (0, 1)] == [40.0, 0.0]
    assert upload(training) == "COMMITTED"
    assert reconciler.look().unclaimed_s == 0.0
    reconciler.close()
    training.close()
