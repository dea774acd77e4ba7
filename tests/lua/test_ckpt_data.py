"""Shares of the data state: a checkpoint of a run that loads data is sealed only when every rank's share is there."""

from __future__ import annotations

import pytest

from dtr.checkpoint import handover
from dtr.errors import CheckpointError, RunUnknown
from dtr.membership import Identity
from dtr.runs import Run
from dtr.state.job import JobState
from tests.lua import checkpoints as ckpt
from tests.lua.jobs import leave


def hand_over(state: JobState, who: Identity, run: Run, share: str = "{}", step: int = 10) -> str:
    return handover.hand_over(state, run.id, step, ckpt.seat(who, run), share)


def uploaded(state: JobState, who: Identity, run: Run) -> str:
    """Rank 0's part of a replicated state is in the store; returns the checkpoint's state."""
    ckpt.begin(state, who, run, replicated="all")
    ckpt.claim(state, run, 0, "t")
    return ckpt.done(state, run, 0, "nt")[0]


def test_a_run_that_loads_nothing_needs_no_shares(job_state: JobState) -> None:
    """Given ranks that have nothing to say, when the only part is there, then the checkpoint is sealed."""
    (a, b), run = ckpt.based(job_state, "a", "b")
    assert hand_over(job_state, b, run, "") == ""
    assert uploaded(job_state, a, run) == "SEALED"


@pytest.mark.parametrize("early", [0, 1, 2])
def test_the_last_share_or_the_last_part_seals(job_state: JobState, early: int) -> None:
    """Given two ranks of which one writes, when shares come before or after the part, then it is sealed once all is there."""
    (a, b), run = ckpt.based(job_state, "a", "b")
    job_state.redis.hset(job_state.keys.run(run.id), "data", 1)
    for who in (a, b)[:early]:
        hand_over(job_state, who, run)
    assert uploaded(job_state, a, run) == ("SEALED" if early == 2 else "WRITING")
    states = [hand_over(job_state, who, run) for who in (a, b)[early:]]
    assert states == ["WRITING", "SEALED"][early:]
    sealed = [e for _, e in job_state.redis.xrange(job_state.keys.events) if e["event"] == "ckpt_sealed"]
    assert len(sealed) == 1


def test_the_share_of_one_who_died_counts_and_its_first_one_stands(job_state: JobState) -> None:
    """Given a member that departed, when its share comes, then it counts; another share of the same rank changes nothing."""
    (a, b), run = ckpt.based(job_state, "a", "b")
    leave(job_state, b)
    hand_over(job_state, b, run, '{"x": 1}')
    hand_over(job_state, b, run, '{"x": 2}')
    hand_over(job_state, a, run, "")
    assert job_state.redis.hgetall(job_state.keys.ckpt_data(run.id, 10)) == {"0": "", "1": '{"x": 1}'}
    assert handover.missing(job_state, run.id, 10, 2) == []
    assert handover.is_needed(job_state, run.id)


def test_only_members_of_the_run_have_a_share(job_state: JobState) -> None:
    """Given another incarnation, or a run that Redis does not know, when a share comes, then it is refused."""
    (a,), run = ckpt.based(job_state, "a")
    other = Identity(state_id=a.state_id, worker_id="a", incarnation="f" * 12, host="h", pid=1)
    with pytest.raises(CheckpointError, match="was not rank 0"):
        hand_over(job_state, other, run)
    with pytest.raises(RunUnknown):
        handover.hand_over(job_state, "0099-zzzz", 10, ckpt.seat(a, run), "{}")
    assert not job_state.redis.exists(job_state.keys.ckpt_data(run.id, 10))
