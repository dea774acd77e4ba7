"""How checkpoints end, on every engine: aborts, the store's decision, latest; and what a repeated call changes (nothing)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dtr.checkpoint import parts
from dtr.errors import (
    CheckpointAbandoned,
    CheckpointError,
    StaleIncarnation,
    StateCorrupt,
)
from dtr.state.job import JobState
from tests.lua.checkpoints import (
    based,
    begin,
    claim,
    decide,
    done,
    events,
    register,
    sealed,
    seat,
    snapshot,
    spec,
)
from tests.lua.jobs import leave


def view(state: JobState, run: Any, step: int = 10) -> parts.CheckpointView:
    found = parts.read(state, run.id, step)
    assert found is not None
    return found


class TestAbort:
    def test_a_rank_that_failed_ends_it_before_anyone_began(self, job_state: JobState) -> None:
        """A failure said first still reaches those who come later."""
        who, run = based(job_state, "a", "b")
        assert parts.fail(job_state, who[0].state_id, spec(run), seat(who[0], run), "no room") == "ABORTING"
        assert parts.fail(job_state, who[0].state_id, spec(run), seat(who[0], run), "no room") == "ABORTING"
        assert events(job_state) == ["ckpt_begun", "ckpt_aborting"]
        assert parts.open_checkpoints(job_state) == [(run.id, 10)]

    def test_only_the_roster_may_fail_it(self, job_state: JobState) -> None:
        """A stale process cannot abort a checkpoint of those who replaced it; a survivor of an ended run can abort that run's."""
        from dataclasses import replace

        who, run = based(job_state, "a", "b")
        begin(job_state, who[0], run)
        with pytest.raises(StaleIncarnation):
            parts.fail(job_state, who[0].state_id, spec(run), replace(seat(who[1], run), incarnation="elder"), "x")
        leave(job_state, who[0])
        assert parts.fail(job_state, who[1].state_id, spec(run), seat(who[1], run), "x") == "ABORTING"

    def test_a_lost_part_must_still_be_as_it_was_seen(self, job_state: JobState) -> None:
        """An uploader that slept between its look and its verdict does not abort what has gone on."""
        who, run = based(job_state, "a", "b")
        begin(job_state, who[0], run)
        register(job_state, who[1], run)
        assert parts.lose(job_state, run.id, 10, 1, seen="", reason="died before staging") == "WRITING"
        claim(job_state, run, 1, "t", host="host-b")
        done(job_state, run, 1, "nt")
        assert parts.lose(job_state, run.id, 10, 1, seen="staged", reason="bytes vanished") == "WRITING"
        assert parts.lose(job_state, run.id, 10, 0, seen="staged", reason="bytes vanished") == "ABORTING"
        assert parts.lose(job_state, "0009-none", 1, 0, seen="", reason="x") == ""


class TestDecide:
    def test_a_commit_is_latest(self, job_state: JobState) -> None:
        """COMMITTED, newest, no longer open; again changes nothing."""
        who, run = based(job_state, "a")
        sealed(job_state, who, run)
        assert decide(job_state, run) == "COMMITTED"
        before = snapshot(job_state)
        assert decide(job_state, run) == "COMMITTED"
        assert snapshot(job_state) == before
        assert job_state.redis.hget(job_state.keys.meta, "latest") == f"{run.id}/10"
        assert parts.open_checkpoints(job_state) == []
        assert events(job_state) == ["ckpt_begun", "ckpt_sealed", "ckpt_committed"]

    def test_latest_never_goes_back(self, job_state: JobState) -> None:
        """A late commit of an older step is committed, and is not the latest."""
        who, run = based(job_state, "a")
        for step in (10, 30, 20):
            sealed(job_state, who, run, step)
            decide(job_state, run, step)
        assert job_state.redis.hget(job_state.keys.meta, "latest") == f"{run.id}/30"

    def test_an_abandoned_run_never_becomes_latest(self, job_state: JobState) -> None:
        """The straggler of a run that the job left behind is ABANDONED, with the reason."""
        who, run = based(job_state, "a")
        sealed(job_state, who, run, 10)
        sealed(job_state, who, run, 20)
        decide(job_state, run, 10)
        job_state.redis.hset(job_state.keys.lineage, mapping={run.id: "10", "0002-next": ""})
        assert decide(job_state, run, 20) == "ABANDONED"
        assert job_state.redis.hget(job_state.keys.meta, "latest") == f"{run.id}/10"
        with pytest.raises(CheckpointAbandoned):
            begin(job_state, who[0], run, 20)

    @pytest.mark.parametrize(
        ("bound", "step", "latest"), [("20", 20, "0002-next/20"), ("20", 21, "0002-next/21"), (None, 5, "0002-next/5")]
    )
    def test_a_new_run_takes_over_latest(self, job_state: JobState, bound: str | None, step: int, latest: str) -> None:
        """The newest commit of the lineage: also at the same step as the parent's, and at a lower one after a fresh start."""
        who, run = based(job_state, "a")
        sealed(job_state, who, run, 20)
        decide(job_state, run, 20)
        if bound is None:
            job_state.redis.hdel(job_state.keys.lineage, run.id)
        else:
            job_state.redis.hset(job_state.keys.lineage, run.id, bound)
        job_state.redis.hset(job_state.keys.lineage, "0002-next", "")
        job_state.redis.hset(job_state.keys.meta, "last_run", "0002-next")
        job_state.redis.hset(job_state.keys.ckpt("0002-next", step), "state", "SEALED")
        assert decide(job_state, "0002-next", step) == "COMMITTED"
        assert job_state.redis.hget(job_state.keys.meta, "latest") == latest

    @pytest.mark.parametrize("before", ["WRITING", "SEALED", "ABORTING"])
    @pytest.mark.parametrize(("decision", "after"), [("commit", "COMMITTED"), ("abort", "ABORTED")])
    def test_the_store_is_the_truth(self, job_state: JobState, before: str, decision: str, after: str) -> None:
        """Whatever Redis thought, the record that is in the store decides."""
        who, run = based(job_state, "a", "b")
        begin(job_state, who[0], run)
        job_state.redis.hset(job_state.keys.ckpt(run.id, 10), "state", before)
        assert decide(job_state, run, 10, decision, "why") == after
        assert parts.open_checkpoints(job_state) == []

    def test_a_verdict_is_never_turned_round(self, job_state: JobState) -> None:
        """Two decisions for one checkpoint mean that something is badly wrong: say so."""
        who, run = based(job_state, "a")
        sealed(job_state, who, run)
        decide(job_state, run, 10)
        with pytest.raises(CheckpointError, match="is COMMITTED, its record in the store says abort"):
            decide(job_state, run, 10, "abort", "x")

    def test_what_redis_does_not_have_is_not_made(self, job_state: JobState) -> None:
        """A committer that slept while retention removed the checkpoint does not bring it back."""
        _, run = based(job_state, "a")
        assert decide(job_state, run) == "UNKNOWN"
        assert parts.read(job_state, run.id, 10) is None


def test_a_corrupt_checkpoint_is_named(job_state: JobState) -> None:
    """A field that is no number is an error about that key, not a crash."""
    who, run = based(job_state, "a")
    begin(job_state, who[0], run)
    job_state.redis.hset(job_state.keys.parts(run.id, 10), "0/attempts", "many")
    with pytest.raises(StateCorrupt, match=f"ckpt:{run.id}:10"):
        parts.read(job_state, run.id, 10)


SCRIPTS: dict[str, Callable[[JobState, Any, Any], Any]] = {
    "ckpt_begin": lambda s, who, run: begin(s, who[1], run, 11),
    "part_register": lambda s, who, run: register(s, who[1], run, 12),
    "part_claim": lambda s, who, run: claim(s, run, 0, "t"),
    "part_renew": lambda s, who, run: parts.renew(s, run.id, 10, 1, token="t1", lease_ms=60_000, progress_bytes=7),
    "part_release": lambda s, who, run: parts.release(s, run.id, 10, 1, token="t1", error="503", retry_ms=60_000),
    "part_done": lambda s, who, run: done(s, run, 1, "nt1"),
    "part_lose": lambda s, who, run: parts.lose(s, run.id, 10, 0, seen="staged", reason="gone"),
    "ckpt_fail": lambda s, who, run: parts.fail(s, who[1].state_id, spec(run, 13), seat(who[1], run), "no room"),
    "ckpt_decide": lambda s, who, run: decide(s, run),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_effect_of_a_repeated_call_happens_once(job_state: JobState, name: str) -> None:
    """A client resends when a reply is lost: the second run of each script leaves state and events as the first did."""
    who, run = based(job_state, "a", "b")
    for member in who:
        begin(job_state, member, run)
    claim(job_state, run, 1, "t1", host="host-b")
    SCRIPTS[name](job_state, who, run)
    once, told = timeless(snapshot(job_state)), events(job_state)
    SCRIPTS[name](job_state, who, run)
    assert timeless(snapshot(job_state)) == once
    assert events(job_state) == told


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    """Without the moments that a renewal moves."""
    return {
        key: {field: value for field, value in held.items() if not field.endswith(("/lease_until", "/retry_at"))}
        if isinstance(held, dict)
        else held
        for key, held in found.items()
    }
