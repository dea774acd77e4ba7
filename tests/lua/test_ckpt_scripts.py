"""The state machine of checkpoints, on every engine: who may do what when, and what a repeated or late call changes (nothing)."""

from __future__ import annotations

from typing import Any

import pytest

from dtr.checkpoint import parts
from dtr.errors import (
    CheckpointAbandoned,
    CheckpointAborted,
    CheckpointConflict,
    CheckpointError,
    InvalidInput,
    Recovering,
    RosterChanged,
    RunUnknown,
    StaleIncarnation,
    StateLost,
)
from dtr.state.job import JobState
from tests.lua.checkpoints import (
    SIZE,
    based,
    begin,
    claim,
    decide,
    done,
    events,
    lapse,
    part,
    register,
    sealed,
    seat,
    snapshot,
    spec,
)
from tests.lua.jobs import formed, leave


def view(state: JobState, run: Any, step: int = 10) -> parts.CheckpointView:
    found = parts.read(state, run.id, step)
    assert found is not None
    return found


class TestBegin:
    def test_the_first_caller_creates_the_checkpoint(self, job_state: JobState) -> None:
        """The roster is the set of expected parts, and the index shows it at once."""
        who, run = based(job_state, "a", "b")
        placed = begin(job_state, who[1], run)
        assert (placed.state, placed.part_state, placed.save) == ("WRITING", "staged", "save-b")
        found = view(job_state, run)
        assert (found.state, found.expected, found.world_size, list(found.expected_ranks)) == ("WRITING", 2, 2, [0, 1])
        assert {rank: (p.worker, p.host, p.size_bytes, p.state) for rank, p in found.parts.items()} == {1: ("b", "host-b", SIZE, "staged")}
        assert parts.open_checkpoints(job_state) == [(run.id, 10)]
        assert events(job_state) == ["ckpt_begun"]

    @pytest.mark.parametrize("field", ["world_size", "store", "replicated"])
    def test_all_ranks_must_mean_the_same_checkpoint(self, job_state: JobState, field: str) -> None:
        """A rank that saves into another store, or another kind of state, is told so."""
        who, run = based(job_state, "a", "b")
        begin(job_state, who[0], run)
        other: dict[str, Any] = {"world_size": 3, "store": "s3://other", "replicated": "all"}
        with pytest.raises(CheckpointConflict, match=field):
            begin(job_state, who[1], run, **{field: other[field], "writer": 1})

    def test_a_replicated_state_expects_one_part(self, job_state: JobState) -> None:
        """Other ranks join without a part; one that brings one is refused."""
        who, run = based(job_state, "a", "b")
        spec_ = spec(run, replicated="all", writer=1)
        assert parts.begin(job_state, who[0].state_id, spec_, seat(who[0], run), None).save == ""
        with pytest.raises(InvalidInput, match="written by rank 1"):
            parts.begin(job_state, who[0].state_id, spec_, seat(who[0], run), part())
        parts.begin(job_state, who[1].state_id, spec_, seat(who[1], run), part())
        found = view(job_state, run)
        assert (found.expected, list(found.expected_ranks), list(found.parts)) == (1, [1], [1])

    def test_a_run_without_a_base_cannot_save(self, job_state: JobState) -> None:
        """What a run continues is on record before its first part, or a restore would not know."""
        who, run = formed(job_state, "a")
        with pytest.raises(CheckpointError, match="no base"):
            begin(job_state, who[0], run)
        assert parts.open_checkpoints(job_state) == []

    def test_is_fenced_by_run_and_incarnation(self, job_state: JobState) -> None:
        """A member of an ended run, a replaced one, and one of another state change nothing."""
        who, run = based(job_state, "a", "b")
        before = snapshot(job_state)
        from dataclasses import replace

        with pytest.raises(StaleIncarnation):
            begin(job_state, replace(who[0], incarnation="elder"), run)
        with pytest.raises(StateLost):
            begin(job_state, replace(who[0], state_id="other"), run)
        assert snapshot(job_state) == before
        leave(job_state, who[1])
        with pytest.raises(RosterChanged, match="signal 9"):
            begin(job_state, who[0], run)
        assert parts.open_checkpoints(job_state) == []

    def test_the_same_step_again_names_the_save_that_counts(self, job_state: JobState) -> None:
        """A second save of as many bytes is for its sender to compare; one of other bytes is a conflict at once."""
        who, run = based(job_state, "a")
        begin(job_state, who[0], run)
        assert begin(job_state, who[0], run, given=part("save-2")).save == "save-a"
        with pytest.raises(CheckpointConflict, match="1000 bytes before, now with 1001"):
            begin(job_state, who[0], run, given=part("save-2", SIZE + 1))
        sealed(job_state, who, run)
        assert begin(job_state, who[0], run, given=part("save-3")) == parts.Placed(state="SEALED", part_state="done", save="save-a")

    def test_an_aborted_checkpoint_says_why(self, job_state: JobState) -> None:
        """Whoever comes late learns the reason."""
        who, run = based(job_state, "a", "b")
        parts.fail(job_state, who[1].state_id, spec(run), seat(who[1], run), "rank 1 skipped:\n no slot")
        with pytest.raises(CheckpointAborted, match="rank 1 skipped: no slot"):
            begin(job_state, who[0], run)
        decide(job_state, run, 10, "abort", "rank 1 skipped")
        with pytest.raises(CheckpointAborted):
            begin(job_state, who[0], run)

    def test_waits_while_the_state_is_rebuilt(self, job_state: JobState) -> None:
        """Nothing is written beside a rebuild."""
        who, run = based(job_state, "a")
        job_state.redis.hset(job_state.keys.meta, "phase", "RECOVERING")
        for call in (
            lambda: begin(job_state, who[0], run),
            lambda: register(job_state, who[0], run),
            lambda: claim(job_state, run, 0, "t"),
        ):
            with pytest.raises(Recovering):
                call()


class TestRegister:
    def test_a_dead_members_part_counts(self, job_state: JobState) -> None:
        """The run has ended and its member is gone; its complete slot is still a part."""
        who, run = based(job_state, "a", "b")
        leave(job_state, who[0])
        placed = register(job_state, who[0], run)
        assert (placed.state, placed.part_state, placed.save) == ("WRITING", "staged", "save-a")

    def test_only_the_roster_counts(self, job_state: JobState) -> None:
        """Another incarnation, another rank, another worker: not a part of this run."""
        from dataclasses import replace

        who, run = based(job_state, "a", "b")
        fence = seat(who[0], run)
        for wrong in (replace(fence, incarnation="elder"), replace(fence, rank=1), replace(fence, worker="c")):
            with pytest.raises(CheckpointError, match="was not rank"):
                parts.register(job_state, spec(run), wrong, part())
        with pytest.raises(RunUnknown):
            parts.register(job_state, spec("0099-zzzz"), fence, part())
        assert parts.open_checkpoints(job_state) == []

    def test_the_lineage_bounds_it(self, job_state: JobState) -> None:
        """What the job has left behind is not uploaded any more; up to the step that it took, it is."""
        who, run = based(job_state, "a")
        job_state.redis.hset(job_state.keys.lineage, mapping={run.id: "10", "0002-next": ""})
        job_state.redis.hset(job_state.keys.meta, "last_run", "0002-next")
        assert register(job_state, who[0], run, step=10).state == "WRITING"
        with pytest.raises(CheckpointAbandoned, match="earlier step"):
            register(job_state, who[0], run, step=11)
        job_state.redis.hdel(job_state.keys.lineage, run.id)
        with pytest.raises(CheckpointAbandoned):
            register(job_state, who[0], run, step=9)

    def test_without_a_base_it_waits(self, job_state: JobState) -> None:
        """A run whose base nobody recorded has no checkpoint yet."""
        who, run = formed(job_state, "a")
        with pytest.raises(CheckpointError, match="no base"):
            register(job_state, who[0], run)

    def test_redis_without_any_state(self, job_state: JobState) -> None:
        """An emptied Redis is not filled with half a job."""
        who, run = based(job_state, "a")
        job_state.redis.flushall()
        with pytest.raises(StateLost):
            register(job_state, who[0], run)
        assert job_state.redis.dbsize() == 0


class TestClaim:
    def test_one_holder_at_a_time(self, job_state: JobState) -> None:
        """While a lease runs, nobody else gets the part, and is told how long and who."""
        who, run = based(job_state, "a")
        begin(job_state, who[0], run)
        first = claim(job_state, run, 0, "t1")
        assert (first.answer, first.nonce, first.save, first.attempts) == ("CLAIMED", "nt1", "save-a", 1)
        second = claim(job_state, run, 0, "t2")
        assert (second.answer, second.detail) == ("BUSY", "t1")
        assert 0 < second.left_ms <= 60_000

    def test_a_lapsed_lease_is_taken_with_a_new_nonce(self, job_state: JobState) -> None:
        """The late holder may neither renew, nor release, nor finish: its object is not the part."""
        who, run = based(job_state, "a")
        begin(job_state, who[0], run)
        claim(job_state, run, 0, "t1")
        lapse(job_state, run, 0)
        second = claim(job_state, run, 0, "t2")
        assert (second.answer, second.nonce, second.attempts) == ("CLAIMED", "nt2", 2)
        before = snapshot(job_state)
        assert not parts.renew(job_state, run.id, 10, 0, token="t1", lease_ms=1, progress_bytes=1)
        assert not parts.release(job_state, run.id, 10, 0, token="t1", error="x", retry_ms=0)
        assert done(job_state, run, 0, "nt1")[0] == "LOST"
        assert snapshot(job_state) == before
        assert done(job_state, run, 0, "nt2") == ("SEALED", "")

    def test_attempts_without_progress_end_the_checkpoint(self, job_state: JobState) -> None:
        """A part that kills its uploader each time stops after max_attempts, with the reason; the same death costs one attempt."""
        who, run = based(job_state, "a")
        begin(job_state, who[0], run)
        for attempt in range(1, 4):
            assert claim(job_state, run, 0, f"t{attempt}").attempts == attempt
            assert claim(job_state, run, 0, f"t{attempt}").attempts == attempt
            lapse(job_state, run, 0)
        last = claim(job_state, run, 0, "t4")
        assert (last.answer, last.state) == ("NONE", "ABORTING")
        assert "3 attempts to upload its part ended without progress" in last.detail
        assert view(job_state, run).reason == last.detail
        assert events(job_state) == ["ckpt_begun", "ckpt_aborting"]

    def test_an_attempt_that_got_further_does_not_count(self, job_state: JobState) -> None:
        """Only bytes beyond all earlier attempts are progress, so dying at one place each time still ends."""
        who, run = based(job_state, "a")
        begin(job_state, who[0], run)
        seen = []
        for attempt, reached in enumerate([100, 200, 200, 150, 200], start=1):
            seen.append(claim(job_state, run, 0, f"t{attempt}").attempts)
            assert parts.renew(job_state, run.id, 10, 0, token=f"t{attempt}", lease_ms=60_000, progress_bytes=reached)
            lapse(job_state, run, 0)
        assert seen == [1, 1, 1, 2, 3]
        assert claim(job_state, run, 0, "t6").answer == "NONE"

    def test_a_released_claim_waits_and_does_not_count(self, job_state: JobState) -> None:
        """A store that throttles for an hour aborts nothing: its error and the pause are visible."""
        who, run = based(job_state, "a")
        begin(job_state, who[0], run)
        for attempt in range(1, 8):
            found = claim(job_state, run, 0, f"t{attempt}")
            assert (found.answer, found.attempts, found.failures) == ("CLAIMED", 1, attempt - 1)
            assert parts.release(job_state, run.id, 10, 0, token=f"t{attempt}", error="503\nslow down", retry_ms=0)
            assert not parts.release(job_state, run.id, 10, 0, token=f"t{attempt}", error="503", retry_ms=0)
        claim(job_state, run, 0, "t8")
        parts.release(job_state, run.id, 10, 0, token="t8", error="503 slow down", retry_ms=60_000)
        later = claim(job_state, run, 0, "t9")
        assert (later.answer, later.detail) == ("LATER", "503 slow down")
        assert 0 < later.left_ms <= 60_000
        assert view(job_state, run).state == "WRITING"

    def test_a_failure_of_the_part_itself_counts(self, job_state: JobState) -> None:
        """An error that is no one else's fault ends the checkpoint after max_attempts, with its text."""
        who, run = based(job_state, "a")
        begin(job_state, who[0], run)
        for attempt in range(1, 4):
            assert claim(job_state, run, 0, f"t{attempt}").attempts == attempt
            parts.release(job_state, run.id, 10, 0, token=f"t{attempt}", error="cannot be read", retry_ms=0, counts=True)
        assert claim(job_state, run, 0, "t4").detail.endswith("without progress: cannot be read")

    def test_what_cannot_be_claimed(self, job_state: JobState) -> None:
        """Another host's part, a finished one, one that nobody staged, a checkpoint that is over or unknown."""
        who, run = based(job_state, "a", "b")
        assert claim(job_state, run, 0, "t").answer == "NONE"
        begin(job_state, who[0], run)
        assert claim(job_state, run, 1, "t").answer == "NONE"
        assert (claim(job_state, run, 0, "t", host="host-x").answer, claim(job_state, run, 0, "t", host="host-x").detail) == (
            "ELSEWHERE",
            "host-a",
        )
        claim(job_state, run, 0, "t")
        done(job_state, run, 0, "nt")
        assert claim(job_state, run, 0, "t2").answer == "DONE"
        begin(job_state, who[1], run)
        parts.lose(job_state, run.id, 10, 1, seen="staged", reason="gone")
        assert claim(job_state, run, 1, "t3", host="host-b").state == "ABORTING"

    def test_a_holder_learns_that_the_checkpoint_is_over(self, job_state: JobState) -> None:
        """An upload for an aborted checkpoint stops at its next renewal."""
        who, run = based(job_state, "a", "b")
        begin(job_state, who[0], run)
        claim(job_state, run, 0, "t")
        assert parts.renew(job_state, run.id, 10, 0, token="t", lease_ms=60_000, progress_bytes=5)
        parts.fail(job_state, who[1].state_id, spec(run), seat(who[1], run), "no slot")
        assert not parts.renew(job_state, run.id, 10, 0, token="t", lease_ms=60_000, progress_bytes=6)
        assert done(job_state, run, 0, "nt")[0] == "LOST"


class TestDone:
    def test_the_last_part_seals(self, job_state: JobState) -> None:
        """SEALED comes with the last expected part, once, and its facts never change."""
        who, run = based(job_state, "a", "b")
        for rank, member in enumerate(who):
            begin(job_state, member, run)
            claim(job_state, run, rank, f"t{rank}", host=member.host)
        assert done(job_state, run, 1, "nt1") == ("WRITING", "")
        assert done(job_state, run, 0, "nt0") == ("SEALED", "")
        before = snapshot(job_state)
        assert done(job_state, run, 0, "nt0") == ("SEALED", "")
        assert parts.lose(job_state, run.id, 10, 0, seen="done", reason="late") == "SEALED"
        assert parts.fail(job_state, who[0].state_id, spec(run), seat(who[0], run), "late") == "SEALED"
        assert snapshot(job_state) == before
        assert events(job_state) == ["ckpt_begun", "ckpt_sealed"]
        assert view(job_state, run).sealed_at_ms > 0

    def test_other_bytes_are_a_conflict(self, job_state: JobState) -> None:
        """The first facts of a rank win; another checksum is an error, another object of the same bytes is merely not needed."""
        who, run = based(job_state, "a", "b")
        begin(job_state, who[0], run)
        claim(job_state, run, 0, "t0")
        with pytest.raises(CheckpointConflict, match="staged 1000 bytes, this upload has 999"):
            done(job_state, run, 0, "nt0", size_bytes=999)
        done(job_state, run, 0, "nt0")
        before = snapshot(job_state)
        with pytest.raises(CheckpointConflict, match="0000001"):
            done(job_state, run, 0, "nt0", checksum="2")
        assert done(job_state, run, 0, "elder") == ("LOST", "another upload of this part was first")
        assert snapshot(job_state) == before
