"""The scripts of the collective restore, of a run's base and of the index, on every engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dtr.errors import CheckpointConflict, CheckpointError, RosterChanged, StateLost
from dtr.membership import Identity
from dtr.runs import Run
from dtr.state.job import JobState
from tests.lua.checkpoints import snapshot
from tests.lua.jobs import formed, leave, opened

STORE = "file:///store"


def seat(who: Identity, run: Run) -> list[Any]:
    return [who.state_id, run.id, who.worker_id, run.roster[who.worker_id].rank, who.incarnation]


def offer(
    state: JobState, who: Identity, run: Run, offered: str, *rejected: str, attempt: int = 0, fresh: bool = False, limit: int = 0
) -> list[Any]:
    k = state.keys
    keys = [k.meta, k.roster, k.run(run.id), k.restore(run.id), k.wake, k.restores, k.events]
    answer: list[Any] = state.call("restore_offer", keys, [*seat(who, run), attempt, int(fresh), offered, limit, *rejected])
    return answer


def vote(state: JobState, who: Identity, run: Run, choice: str, no: str = "", attempt: int = 0, *, damaged: bool = False) -> list[Any]:
    k = state.keys
    keys = [k.meta, k.roster, k.run(run.id), k.restore(run.id), k.wake, k.restores]
    answer: list[Any] = state.call("restore_vote", keys, [*seat(who, run), attempt, choice, no, int(damaged)])
    return answer


def base(
    state: JobState, who: Identity, run: Run, phase: str, on: str = "/", *ancestors: Any, store: str = STORE, after_ms: int = 0
) -> list[Any]:
    k = state.keys
    base_run, _, base_step = on.rpartition("/")
    keys = [
        k.meta,
        k.roster,
        k.run(run.id),
        k.restore(run.id),
        k.ckpt(base_run or run.id, int(base_step or 0)),
        k.lineage,
        k.wake,
        k.events,
    ]
    answer: list[Any] = state.call(
        "run_base", keys, [*seat(who, run), phase, base_run, base_step, store, after_ms, 5, 1000, 0, "", 0, *ancestors]
    )
    return answer


class TestOffers:
    def test_the_newest_that_all_can_read_is_chosen(self, job_state: JobState) -> None:
        """Two ranks offer different sets; the newest of their intersection is put to the vote."""
        (a, b), run = formed(job_state, "a", "b")
        assert offer(job_state, a, run, "0001-x/30 0001-x/20 0001-x/10")[0] == "OFFERING"
        assert offer(job_state, b, run, "0001-x/20 0001-x/10", "0001-x/30", "its part is missing") == [
            "VOTING", "0001-x/20", "NONE", ["0001-x/30", "rank 1: its part is missing"],
        ]  # fmt: skip

    def test_an_offer_counts_once(self, job_state: JobState) -> None:
        """A rank that offers twice is not two ranks, and its first offer stands."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, "0001-x/10")
        assert offer(job_state, a, run, "0001-x/20")[0] == "OFFERING"
        assert offer(job_state, b, run, "0001-x/20 0001-x/10")[:2] == ["VOTING", "0001-x/10"]

    def test_nothing_offered_is_fresh_only_if_all_say_so(self, job_state: JobState) -> None:
        """One rank without fresh=True keeps all from a silent fresh start; the next attempt asks again."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, "", fresh=True)
        assert offer(job_state, b, run, "")[0] == "NONE"
        assert offer(job_state, b, run, "", attempt=1, fresh=True)[0] == "OFFERING"
        assert offer(job_state, a, run, "", fresh=True)[0] == "NONE", "a late look at the first attempt sees its verdict"
        assert offer(job_state, a, run, "", attempt=1, fresh=True)[0] == "FRESH"

    def test_something_seen_that_nobody_can_read_is_no_fresh_start(self, job_state: JobState) -> None:
        """Candidates that were all rejected end in FAILED with each reason, whatever fresh says."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, "", "0001-x/30", "truncated", fresh=True)
        state, _, _, reasons = offer(job_state, b, run, "", fresh=True)
        assert (state, reasons) == ("FAILED", ["0001-x/30", "rank 0: truncated"])

    def test_disjoint_offers_fail(self, job_state: JobState) -> None:
        """Checkpoints that no two ranks share are not a reason to start anew."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, "0001-x/1", fresh=True)
        assert offer(job_state, b, run, "0001-x/2", fresh=True)[0] == "FAILED"

    def test_a_run_that_ended_takes_no_offer(self, job_state: JobState) -> None:
        """A member that died in mid-restore ends it for the others."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, "0001-x/1")
        leave(job_state, b)
        with pytest.raises(RosterChanged, match="signal 9"):
            offer(job_state, a, run, "0001-x/1")

    @pytest.mark.parametrize("verdict", ["FAILED", "NONE"])
    def test_how_an_attempt_failed_is_told_after_the_run_has_ended(self, job_state: JobState, verdict: str) -> None:
        """Whoever heard it first has left: the other hears the same, and nothing is written; no later attempt is begun."""
        (a, b), run = formed(job_state, "a", "b")
        rejected = ["0001-x/30", "truncated"] if verdict == "FAILED" else []
        offer(job_state, a, run, "", *rejected)
        assert offer(job_state, b, run, "")[0] == verdict
        leave(job_state, b)
        before = snapshot(job_state)
        for answer in (offer(job_state, a, run, ""), vote(job_state, a, run, "0001-x/30")):
            assert (answer[0], answer[3]) == (verdict, ["0001-x/30", "rank 0: truncated"] if rejected else [])
        with pytest.raises(RosterChanged):
            offer(job_state, a, run, "", attempt=1)
        with pytest.raises(RosterChanged):
            offer(job_state, replace(a, incarnation="0" * 12), run, "")
        assert snapshot(job_state) == before

    @pytest.mark.parametrize("offered", ["", "0001-x/1"])
    def test_an_agreement_does_not_outlive_its_run(self, job_state: JobState, offered: str) -> None:
        """What the run continues can't be fixed any more, be it a checkpoint or nothing: that is no verdict."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, offered, fresh=True)
        answer = offer(job_state, b, run, offered, fresh=True)
        if offered:
            vote(job_state, a, run, offered)
            answer = vote(job_state, b, run, offered)
        assert answer[0] == ("AGREED" if offered else "FRESH")
        leave(job_state, b)
        with pytest.raises(RosterChanged):
            offer(job_state, a, run, offered, fresh=True)


class TestVotes:
    def test_all_must_say_yes(self, job_state: JobState) -> None:
        """The last yes agrees; a yes said twice is one."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, "0001-x/2 0001-x/1")
        offer(job_state, b, run, "0001-x/2 0001-x/1")
        assert vote(job_state, a, run, "0001-x/2")[0] == "VOTING"
        assert vote(job_state, a, run, "0001-x/2")[0] == "VOTING"
        assert vote(job_state, b, run, "0001-x/2")[:2] == ["AGREED", "0001-x/2"]
        assert offer(job_state, a, run, "")[:2] == ["AGREED", "0001-x/2"], "asking again is how a rank waits"

    def test_one_no_drops_the_choice_with_its_reason(self, job_state: JobState) -> None:
        """The next candidate is chosen, yes votes start over, and a late yes for the dropped one counts for nothing."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, "0001-x/2 0001-x/1")
        offer(job_state, b, run, "0001-x/2 0001-x/1")
        vote(job_state, a, run, "0001-x/2")
        answer = vote(job_state, b, run, "0001-x/2", no="checksum differs")
        assert answer == ["VOTING", "0001-x/1", "NONE", ["0001-x/2", "rank 1 (b): checksum differs"]]
        assert vote(job_state, a, run, "0001-x/2")[:2] == ["VOTING", "0001-x/1"]
        vote(job_state, b, run, "0001-x/1")
        assert vote(job_state, a, run, "0001-x/1")[:2] == ["AGREED", "0001-x/1"]

    def test_none_left_fails_with_every_reason(self, job_state: JobState) -> None:
        """When the last candidate is dropped, the answer lists why each was."""
        (a,), run = formed(job_state, "a")
        offer(job_state, a, run, "0001-x/2 0001-x/1", fresh=True)
        vote(job_state, a, run, "0001-x/2", no="flipped bit")
        state, _, _, reasons = vote(job_state, a, run, "0001-x/1", no="missing")
        assert state == "FAILED"
        assert dict(zip(reasons[::2], reasons[1::2], strict=True)) == {
            "0001-x/2": "rank 0 (a): flipped bit",
            "0001-x/1": "rank 0 (a): missing",
        }

    def test_a_vote_without_a_restore_says_that_redis_lost_it(self, job_state: JobState) -> None:
        """A vote never opens a restore."""
        (a,), run = formed(job_state, "a")
        with pytest.raises(CheckpointError, match="Redis lost it"):
            vote(job_state, a, run, "0001-x/2")


class TestCounting:
    def counted(self, state: JobState) -> dict[str, str]:
        held: dict[str, str] = state.redis.hgetall(state.keys.restores)
        return held

    def test_a_choice_is_counted_and_an_agreement_clears_it(self, job_state: JobState) -> None:
        """What is chosen was begun; restored by all, nothing of it stays."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, "0001-x/2")
        assert self.counted(job_state) == {}
        offer(job_state, b, run, "0001-x/2")
        assert self.counted(job_state) == {"0001-x/2/begun": "1"}
        vote(job_state, a, run, "0001-x/2")
        vote(job_state, b, run, "0001-x/2")
        assert self.counted(job_state) == {}

    def test_every_try_is_counted_once_for_all_ranks(self, job_state: JobState) -> None:
        """Each attempt that chose it counts one, and one that found damage is told apart; also one that nobody could finish."""
        (a, b), run = formed(job_state, "a", "b")
        for attempt, damaged in enumerate((True, False)):
            offer(job_state, a, run, "0001-x/2", attempt=attempt)
            offer(job_state, b, run, "0001-x/2", attempt=attempt)
            for who in (b, a):
                vote(job_state, who, run, "0001-x/2", f"no {attempt}", attempt, damaged=damaged)
        offer(job_state, a, run, "0001-x/2", attempt=2)
        offer(job_state, b, run, "0001-x/2", attempt=2)
        assert self.counted(job_state) == {"0001-x/2/begun": "3", "0001-x/2/damaged": "1", "0001-x/2/reason": "no 1"}

    def test_passing_over_what_was_tried_too_often_is_an_event(self, job_state: JobState) -> None:
        """Once for the run, whoever says it first; what is rejected for another reason is none."""
        (a, b), run = formed(job_state, "a", "b")
        job_state.redis.hset(job_state.keys.restores, mapping={"0001-x/2/begun": 3, "0001-x/3/begun": 2})
        for who in (a, b):
            offer(job_state, who, run, "0001-x/1", "0001-x/2", "is quarantined", "0001-x/3", "is missing", limit=3)
        told = [fields for _, fields in job_state.redis.xrange(job_state.keys.events) if fields["event"] == "ckpt_quarantined"]
        assert told == [{"event": "ckpt_quarantined", "run": "0001-x", "step": "2", "begun": "3", "reason": "is quarantined"}]


class TestBase:
    def test_cut_replaces_the_lineage_and_set_opens_the_run(self, job_state: JobState) -> None:
        """After CUT the lineage ends at the chosen step; latest is the base; SET is what others wait for."""
        (a,), run = formed(job_state, "a")
        redis, keys = job_state.redis, job_state.keys
        redis.hset(keys.lineage, mapping={"0000-old": "", "0000-gone": "5"})
        redis.hset(keys.meta, "latest", "0000-old/90")
        state, _, _, base_at, did = base(job_state, a, run, "CUT", "0000-old/40", "0000-old", 40)
        assert (state, did) == ("CUT", 1)
        assert redis.hgetall(keys.lineage) == {run.id: "", "0000-old": "40"}
        assert redis.hget(keys.meta, "latest") == "0000-old/40"
        assert base(job_state, a, run, "SET", "0000-old/40") == ["SET", "0000-old", "40", base_at, 1]
        assert base(job_state, a, run, "SET", "0000-old/40")[4] == 0, "sent twice, done once"
        assert base(job_state, a, run, "CUT", "0000-old/40")[0] == "SET"

    def test_the_first_facts_win(self, job_state: JobState) -> None:
        """A rank that would continue something else is told what the run continues."""
        (a, b), run = formed(job_state, "a", "b")
        base(job_state, a, run, "CUT", "0000-old/40")
        with pytest.raises(CheckpointConflict, match="continues 0000-old/40"):
            base(job_state, b, run, "CUT", "0000-old/30")
        with pytest.raises(CheckpointConflict):
            base(job_state, b, run, "SET", "/")
        with pytest.raises(CheckpointConflict, match="file:///other"):
            base(job_state, b, run, "CUT", "0000-old/40", store="file:///other")

    def test_set_needs_a_cut(self, job_state: JobState) -> None:
        """A SET after a failover that lost the CUT says so, rather than leaving the lineage as it was."""
        (a,), run = formed(job_state, "a")
        with pytest.raises(CheckpointError, match="was not cut"):
            base(job_state, a, run, "SET")

    def test_a_save_cannot_overtake_a_restore(self, job_state: JobState) -> None:
        """A rank that saves without restoring does not fix the base under ranks that are restoring."""
        (a, b), run = formed(job_state, "a", "b")
        offer(job_state, a, run, "0000-old/40")
        with pytest.raises(CheckpointConflict, match="must call restore"):
            base(job_state, b, run, "CUT")
        offer(job_state, b, run, "0000-old/40")
        vote(job_state, a, run, "0000-old/40")
        vote(job_state, b, run, "0000-old/40")
        with pytest.raises(CheckpointConflict):
            base(job_state, b, run, "CUT")
        assert base(job_state, a, run, "CUT", "0000-old/40")[0] == "CUT"

    def test_a_restore_after_the_base_was_set_is_told(self, job_state: JobState) -> None:
        """Who comes to restore when the run already continues something only reads."""
        (a,), run = formed(job_state, "a")
        base(job_state, a, run, "CUT")
        base(job_state, a, run, "SET")
        assert offer(job_state, a, run, "0000-old/40")[0] == "BASED"

    def test_base_at_is_later_than_every_record(self, job_state: JobState) -> None:
        """The time that orders records grows, whatever the clock says."""
        (a,), run = formed(job_state, "a")
        assert int(base(job_state, a, run, "CUT", after_ms=2**50)[3]) == 2**50 + 1

    def test_a_retired_checkpoint_is_no_base(self, job_state: JobState) -> None:
        """Retention and restore meet in Redis: what is retired cannot become the base."""
        (a,), run = formed(job_state, "a")
        job_state.redis.hset(job_state.keys.ckpt("0000-old", 4), mapping={"state": "COMMITTED", "retired_at": 1})
        with pytest.raises(CheckpointError, match="retired"):
            base(job_state, a, run, "CUT", "0000-old/4")

    def test_a_run_that_ended_gets_no_base(self, job_state: JobState) -> None:
        """The fence holds for what a stopped member does late."""
        (a, b), run = formed(job_state, "a", "b")
        base(job_state, a, run, "CUT")
        leave(job_state, b)
        with pytest.raises(RosterChanged):
            base(job_state, a, run, "SET")


class TestIndex:
    def run_of(self, state: JobState, state_id: str, run: str, parent: str = "/", base_at: int = 7) -> int:
        base_run, _, base_step = parent.rpartition("/")
        args = [state_id, 2, base_run, base_step, STORE, base_at, int(run[:4]), "w0", "0 aa h", "w1", "1 bb h"]
        return int(state.call("index_run", [state.keys.meta, state.keys.run(run)], args))

    def ckpt_of(self, state: JobState, state_id: str, run: str, step: int, decision: str = "commit") -> str:
        k = state.keys
        keys = [k.meta, k.lineage, k.ckpt(run, step), k.parts(run, step), k.ckpts, k.open_ckpts, k.events]
        return str(state.call("index_ckpt", keys, [state_id, run, step, decision, "", 2, 0, STORE, 5, 100, "", "", "", "0/state", "done"]))

    def test_fills_an_empty_index_once(self, job_state: JobState) -> None:
        """Runs, lineage and checkpoints come back as the store has them; again changes nothing."""
        state_id = opened(job_state)
        redis, keys = job_state.redis, job_state.keys
        assert [self.run_of(job_state, state_id, "0003-c", "0002-b/40") for _ in range(2)] == [1, 0]
        filled = [job_state.call("index_lineage", [keys.meta, keys.lineage, keys.events],
                                 [state_id, "", "0003-c", "0003-c/60", "0002-b", 40]) for _ in range(2)]  # fmt: skip
        assert filled == [1, 1]
        assert self.ckpt_of(job_state, state_id, "0002-b", 40) == "COMMITTED"
        assert self.ckpt_of(job_state, state_id, "0002-b", 50) == "ABANDONED"
        assert self.ckpt_of(job_state, state_id, "0003-c", 70, "abort") == "ABORTED"
        assert self.ckpt_of(job_state, state_id, "0003-c", 70, "commit") == "ABORTED", "what was decided stays"
        assert redis.hget(keys.meta, "run_counter") == "3"
        assert redis.hget(keys.meta, "latest") == "0003-c/60"
        assert redis.hget(keys.run("0003-c"), "member:w1") == "1 bb h"
        assert redis.zrange(keys.ckpts, 0, -1) == ["0002-b/40", "0002-b/50", "0003-c/70"]

    def test_a_lineage_that_moved_is_left_alone(self, job_state: JobState) -> None:
        """Who rebuilds from an old look does not undo what a run has cut since."""
        (a,), run = formed(job_state, "a")
        base(job_state, a, run, "CUT")
        keys = job_state.keys
        assert job_state.call("index_lineage", [keys.meta, keys.lineage, keys.events], [a.state_id, "", "0000-b", "", "0000-a", 1]) == 0
        assert job_state.redis.hgetall(keys.lineage) == {run.id: ""}

    def test_another_state_is_not_filled(self, job_state: JobState) -> None:
        """A rebuild that Redis was emptied under does not write into its successor."""
        opened(job_state)
        with pytest.raises(StateLost):
            self.run_of(job_state, "0" * 16, "0001-a")
