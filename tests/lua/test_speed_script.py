"""A member's samples per second stand in its hash, and nowhere after it has gone."""

from __future__ import annotations

import pytest

from dtr.errors import RosterChanged
from dtr.membership import Identity
from dtr.runs import Run
from dtr.state.job import JobState
from tests.lua.jobs import formed, leave

FIELD = "samples_per_s/numbers"


def note(state: JobState, who: Identity, run: Run, speed: str = "812.5") -> int:
    """One call of speed_note."""
    seat = [f"{who.state_id} {run.id}", who.worker_id, run.roster[who.worker_id].rank, who.incarnation]
    return int(state.call("speed_note", [state.keys.roster, state.keys.worker(who.worker_id)], [*seat, FIELD, speed]))


def test_the_newest_speed_stands_beside_the_beats(job_state: JobState) -> None:
    """Given a member of a run, when it tells twice, then people see the second, and the hash goes with its beats as before."""
    (a, _), run = formed(job_state, "a", "b")
    before_ms = job_state.redis.pttl(job_state.keys.worker("a"))
    assert note(job_state, a, run) == 1
    assert note(job_state, a, run, "90") == 1
    assert job_state.redis.hget(job_state.keys.worker("a"), FIELD) == "90"
    assert 0 < job_state.redis.pttl(job_state.keys.worker("a")) <= before_ms


def test_a_hash_that_expired_is_not_made_again(job_state: JobState) -> None:
    """Given a member whose beats have stopped for long, when a late note comes, then no hash without a TTL is left behind."""
    (a, _), run = formed(job_state, "a", "b")
    job_state.redis.delete(job_state.keys.worker("a"))
    assert note(job_state, a, run) == 0
    assert job_state.redis.exists(job_state.keys.worker("a")) == 0


def test_nobody_outside_the_run_tells_a_speed(job_state: JobState) -> None:
    """Given a run that ended, or an older incarnation, then nothing is written."""
    (a, b), run = formed(job_state, "a", "b")
    stranger = Identity(state_id=a.state_id, worker_id="a", incarnation="other", host="h", pid=1)
    with pytest.raises(RosterChanged):
        note(job_state, stranger, run)
    leave(job_state, b)
    with pytest.raises(RosterChanged):
        note(job_state, a, run)
    assert job_state.redis.hget(job_state.keys.worker("a"), FIELD) is None
