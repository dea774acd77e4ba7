"""Failed saves and stalled members on record: once each, by whoever may say so."""

from __future__ import annotations

import pytest

from dtr.checkpoint.saving.failures import Failed, report
from dtr.errors import StaleIncarnation
from dtr.membership import stall
from dtr.state.job import JobState
from tests.lua import checkpoints as ckpt
from tests.lua import jobs


def failed(state: JobState) -> list[dict[str, str]]:
    return [fields for _, fields in state.redis.xrange(state.keys.failed_saves)]


def told(state: JobState, *kinds: str) -> list[dict[str, str]]:
    return [fields for _, fields in state.redis.xrange(state.keys.events) if fields["event"] in kinds]


class TestSaveReport:
    def test_is_an_entry_and_an_event(self, job_state: JobState) -> None:
        """Both name the rank, the state and the reason; the same save again changes nothing, another one is one more."""
        who, run = ckpt.based(job_state, "a", "b")
        lost = Failed(run=run.id, step=10, state="CONFLICT", reason="other\nbytes", begun_s=0.0)
        for save in ("one", "one", "two", "one"):
            report(job_state, who[1].state_id, ckpt.seat(who[1], run), lost, save)
        common = {"run": run.id, "step": "10", "state": "CONFLICT", "reason": "other bytes", "rank": "1", "worker": "b"}
        assert failed(job_state) == [{**common, "save": "one"}, {**common, "save": "two"}]
        assert told(job_state, "save_failed") == [{"event": "save_failed", **common}] * 2

    def test_of_a_stranger_is_refused(self, job_state: JobState) -> None:
        """Only who was in the run's roster, under that rank and incarnation; a run that has ended counts as well."""
        who, run = ckpt.based(job_state, "a", "b")
        jobs.leave(job_state, who[0])
        lost = Failed(run=run.id, step=10, state="FAILED", reason="x", begun_s=0.0)
        report(job_state, who[1].state_id, ckpt.seat(who[1], run), lost, "mine")
        keys = job_state.keys
        for rank, incarnation in ((0, who[1].incarnation), (1, "other")):
            args = [who[1].state_id, run.id, 10, rank, "b", incarnation, "s", "FAILED", "x"]
            with pytest.raises(StaleIncarnation):
                job_state.call("save_report", [keys.meta, keys.run(run.id), keys.failed_saves, keys.events], args)
        assert len(failed(job_state)) == 1


class TestDecide:
    def test_an_abort_is_a_failed_save(self, job_state: JobState) -> None:
        """Once, with its reason; a commit is none."""
        who, run = ckpt.based(job_state, "a")
        ckpt.begin(job_state, who[0], run)
        ckpt.parts.fail(job_state, who[0].state_id, ckpt.spec(run), ckpt.seat(who[0], run), "no free slot")
        for _ in range(2):
            ckpt.decide(job_state, run, decision="abort", reason="rank 0: no free slot")
        ckpt.sealed(job_state, who, run, step=11)
        ckpt.decide(job_state, run, 11)
        assert failed(job_state) == [{"run": run.id, "step": "10", "state": "ABORTED", "reason": "rank 0: no free slot"}]


class TestStall:
    def test_is_told_when_it_begins_and_when_it_is_over(self, job_state: JobState) -> None:
        """A report that says nothing new is no event; another reason is one."""
        (who,) = jobs.joined(job_state, "a")
        news = [stall(job_state, who, step=3, reason=reason) for reason in ("", "stopped", "stopped", "no progress", "", "")]
        assert news == [False, True, False, True, True, False]
        events = told(job_state, "stalled", "resumed")
        assert [(e["event"], e.get("reason"), e["step"]) for e in events] == [
            ("stalled", "stopped", "3"),
            ("stalled", "no progress", "3"),
            ("resumed", None, "3"),
        ]
        assert int(events[-1]["after_ms"]) >= 0

    def test_of_one_that_is_gone_is_refused(self, job_state: JobState) -> None:
        """A launcher that was itself stopped does not bring its trainer back."""
        (who,) = jobs.joined(job_state, "a")
        jobs.leave(job_state, who)
        with pytest.raises(StaleIncarnation):
            stall(job_state, who, step=3, reason="stopped")
        assert told(job_state, "stalled") == []

    def test_leaves_no_hash_without_a_time_to_live(self, job_state: JobState) -> None:
        """A hash that has expired is for the next beat to bring back; then the stall is told."""
        (who,) = jobs.joined(job_state, "a")
        key = job_state.keys.worker("a")
        job_state.redis.delete(key)
        assert not stall(job_state, who, step=3, reason="stopped")
        assert not job_state.redis.exists(key)
        jobs.beat(job_state, who, number=1, ttl_ms=60_000, interval_ms=1000)
        assert stall(job_state, who, step=3, reason="stopped")
        assert job_state.redis.ttl(key) > 0
