"""What a step consumed, and what a person skipped: the rules of both scripts, on every engine."""

from __future__ import annotations

import orjson
import pytest

from dtr.datasets.timemachine.skipping import read_skips
from dtr.datasets.timemachine.skips import Skip
from dtr.errors import RosterChanged, StateCorrupt
from dtr.membership import Identity
from dtr.runs import Run
from dtr.state.job import JobState
from tests.lua.jobs import formed, leave


def note(state: JobState, who: Identity, run: Run, step: int, text: str = "{}", keep: int = 10) -> int:
    """One rank's step consumed something."""
    rank = run.roster[who.worker_id].rank
    seat = [f"{who.state_id} {run.id}", who.worker_id, rank, who.incarnation, step, keep, 60_000]
    return int(state.call("journal_note", [state.keys.roster, state.keys.journal(run.id, rank)], [*seat, "numbers", text]))


def skip(state: JobState, target: str, reason: str = "broken", at_ms: int = 5) -> str:
    """A person takes samples out."""
    one = Skip(at_ms=at_ms, reason=reason, size_bytes=10, mtime_ns=20)
    return str(state.call("dataset_skip", [state.keys.skips("numbers"), state.keys.events], ["numbers", target, one.to_text(), reason]))


def steps(state: JobState, run: Run, rank: int = 0) -> list[tuple[int, str]]:
    return [(int(at.partition("-")[0]), held["numbers"]) for at, held in state.redis.xrange(state.keys.journal(run.id, rank))]


def test_each_step_is_noted_once_and_the_newest_are_kept(job_state: JobState) -> None:
    """Given a journal that keeps three, when step 0 and later ones come, some twice, then each is there once, the oldest gone."""
    (a,), run = formed(job_state, "a")
    assert [note(job_state, a, run, step, keep=3) for step in (0, 1, 1, 2, 4, 0)] == [1, 1, 0, 1, 1, 0]
    assert [step for step, _ in steps(job_state, run)] == [1, 2, 4]
    assert 0 < job_state.redis.pttl(job_state.keys.journal(run.id, 0)) <= 60_000


def test_the_first_word_of_a_step_stands(job_state: JobState) -> None:
    """Given a step on record, when another text of it comes, then it changes nothing."""
    (a,), run = formed(job_state, "a")
    note(job_state, a, run, 3, "first")
    note(job_state, a, run, 3, "second")
    assert steps(job_state, run) == [(3, "first")]


def test_only_members_of_an_open_run_write(job_state: JobState) -> None:
    """Given a run that ended, when a straggler's report comes, then it is refused."""
    (a, b), run = formed(job_state, "a", "b")
    leave(job_state, b)
    with pytest.raises(RosterChanged):
        note(job_state, a, run, 3)
    assert steps(job_state, run) == []


def test_a_skip_is_on_record_once_with_its_first_reason(job_state: JobState) -> None:
    """Given a skip, when the same samples are skipped again, then the first reason stands and there is one event."""
    assert [skip(job_state, "a:0-4"), skip(job_state, "a:0-4", "other"), skip(job_state, "a:4-5")] == ["new", "same", "new"]
    found = read_skips(job_state, "numbers")
    assert {target: one.reason for target, one in found.items()} == {"a:0-4": "broken", "a:4-5": "broken"}
    events = [held for _, held in job_state.redis.xrange(job_state.keys.events) if held["event"] == "samples_skipped"]
    assert [held["samples"] for held in events] == ["a:0-4", "a:4-5"]


@pytest.mark.parametrize("text", ["no json", "[]", orjson.dumps({"reason": "x", "at_ms": -1, "size_bytes": 1, "mtime_ns": 1}).decode()])
def test_a_damaged_skip_is_named(job_state: JobState, text: str) -> None:
    """Given a record that nobody wrote so, when it is read, then the error names the key."""
    job_state.redis.hset(job_state.keys.skips("numbers"), "a:0-4", text)
    with pytest.raises(StateCorrupt, match="skips:numbers"):
        read_skips(job_state, "numbers")
