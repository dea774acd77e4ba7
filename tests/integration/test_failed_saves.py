"""A save that comes to nothing is noticed: at the next save, among the events, on the status page, in the message of a full arena."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtr.checkpoint.manager import CheckpointManager
from dtr.cli import main
from dtr.config import Settings
from dtr.errors import CheckpointAborted, CheckpointConflict, NoFreeSlot, SaveFailed, UnsupportedLeaf
from dtr.state.job import JobState
from dtr.views import status
from tests.proxy import Proxy
from tests.ranks import Job, running
from tests.servers import RedisServer
from tests.uploading import Uploads, uploading
from tests.waiting import eventually

WITHIN_S = 30


@pytest.fixture
def state(settings: Settings) -> Iterator[JobState]:
    found = JobState(settings.redis_url, settings.job, name="test")
    yield found
    found.close()


def fail_one(job: Job, step: int) -> None:
    """Rank 1 cannot save this step; rank 0 learns it from its handle."""
    handle = job.ranks[0].manager.save_async({"w": step}, step)
    with pytest.raises(UnsupportedLeaf):
        job.ranks[1].manager.save_async({"w": object()}, step)
    with pytest.raises(CheckpointAborted, match="rank 1"):
        handle.durable.result(WITHIN_S)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What saves said of earlier ones."""
    return [record.message for record in caplog.records if record.name == "dtr.checkpoint.saving.failures"]


def test_fatal_raises_at_the_next_save_and_tells_the_others(settings: Settings, store: Path, uploads: Uploads) -> None:
    """Before anything is staged; then saving goes on, and ranks that catch the error do not make each other raise for ever."""
    with running(replace(settings, on_failed_save="fatal"), store, 2) as job:
        job.commit(lambda r: {"w": 1}, 1)
        fail_one(job, 2)
        other = job.ranks[1].manager.save_async({"w": 3}, 3)  # it has seen its own exception
        with pytest.raises(SaveFailed, match=r"step 2 failed \(ABORTED\): .*rank 1.*newest commit is .*/1, of .*on_failed_save=fatal"):
            job.ranks[0].manager.save_async({"w": 3}, 3)
        with pytest.raises(CheckpointAborted, match=r"rank 0: it stopped at an earlier failed save: .* step 2"):
            other.durable.result(WITHIN_S)
        job.commit(lambda r: {"w": 4}, 4)


def test_warn_logs_one_line_and_saves(settings: Settings, store: Path, uploads: Uploads, caplog: pytest.LogCaptureFixture) -> None:
    """The default: training goes on, and the next save commits."""
    with running(settings, store, 2) as job:
        fail_one(job, 1)
        with caplog.at_level(logging.WARNING, logger="dtr.checkpoint.saving.failures"):
            for step in (2, 3):
                job.commit(lambda r: {"w": 0}, step)
        (told,) = said(caplog)
        assert "step 1 failed (ABORTED)" in told and "nothing is committed" in told


def test_rpo_warns_until_the_last_commit_is_too_old(settings: Settings, store: Path, uploads: Uploads) -> None:
    """While it is recent the save goes through; when the time is over it raises, unless a commit came in between."""
    patient, strict = replace(settings, on_failed_save="rpo", rpo_s=3600.0), replace(settings, on_failed_save="rpo", rpo_s=1e-6)
    with running(patient, store, 2) as job:
        job.commit(lambda r: {"w": 1}, 1)
        fail_one(job, 2)
        job.commit(lambda r: {"w": 3}, 3)
        job.ranks[0].manager.settings = strict
        fail_one(job, 4)
        with pytest.raises(SaveFailed, match=r"step 4 .*newest commit is .*/3"):
            job.ranks[0].manager.save_async({"w": 5}, 5)


def test_the_failure_of_an_ended_run_stops_nobody(settings: Settings, store: Path, uploads: Uploads) -> None:
    """Rank 1 dies in the middle of a save: the survivors form again, restore, and may save under ``fatal``."""
    with running(replace(settings, on_failed_save="fatal"), store, 2) as job:
        job.commit(lambda r: {"w": 1}, 1)
        alive, dead = job.ranks
        handle = alive.manager.save_async({"w": 2}, 2)
        dead.session.close(reason="signal 9")
        with pytest.raises(CheckpointAborted):
            handle.durable.result(WITHIN_S)
        job.ranks[1] = job._make("w1", 1, 2, {"on_failed_save": "fatal"})
        job.ranks[1].session.start()
        job.each(lambda rank: rank.session.form())
        alive.manager.end_run()
        assert [found.step for found in job.restore()] == [1, 1]
        job.commit(lambda r: {"w": 3}, 3)
        dead.manager.close(0.5)


def page(settings: Settings, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["status", "--url", settings.redis_url, "--job", settings.job, *args]) == 0
    return capsys.readouterr().out


def test_an_aborted_save_is_on_the_status_page(
    settings: Settings, store: Path, uploads: Uploads, state: JobState, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its reason, as a warning and in JSON, until a newer one is committed."""
    monkeypatch.setenv("COLUMNS", "80")
    with running(settings, store, 2) as job:
        job.commit(lambda r: {"w": 1}, 1)
        fail_one(job, 2)
        eventually(lambda: status.read(state).failed_saves, what="the decision")  # the handle may know of the abort before that
        found = json.loads(page(settings, capsys, "--json"))["job"]
        assert [(one["step"], one["state"], one["since_latest"]) for one in found["failed_saves"]] == [(2, "ABORTED", True)]
        assert "rank 1: UnsupportedLeaf" in found["failed_saves"][0]["reason"]
        assert any("1 save has failed since the latest commit" in text for text in found["warnings"])
        text = page(settings, capsys)
        assert f"failed       {job.ranks[0].session.run.id}/2 aborted" in text
        job.commit(lambda r: {"w": 3}, 3)
        seen = status.read(state)
        assert [(one.step, one.since_latest) for one in seen.failed_saves] == [(2, False)]
        assert "/2 aborted" not in page(settings, capsys, "--events", "0")


def test_a_conflict_is_an_event_though_the_checkpoint_is_whole(settings: Settings, store: Path, uploads: Uploads, state: JobState) -> None:
    """Other bytes under a step that was saved before: nothing was aborted, so only this report tells of it."""
    with CheckpointManager(store, settings=settings) as manager:
        manager.save_async(b"state", 1).durable.result(WITHIN_S)
        with pytest.raises(CheckpointConflict):
            manager.save_async(b"other", 1).durable.result(WITHIN_S)

        def reported() -> list[Any]:
            return [one for one in status.read(state, event_count=20).events if one.event == "save_failed"]

        (event,) = eventually(reported, what="the event")
        assert (event.fields["step"], event.fields["state"], event.fields["rank"]) == ("1", "CONFLICT", "0")
        (lost,) = status.read(state).failed_saves
        assert (lost.step, lost.state, lost.rank, lost.since_latest) == (1, "CONFLICT", 0, True)
        assert "bytes" in lost.reason


def test_a_report_whose_reply_is_lost_is_written_once(
    valkey: RedisServer, settings: Settings, store: Path, uploads: Uploads, state: JobState
) -> None:
    """The answer is swallowed twice and the connection cut; it is sent again until it is known to be there."""
    with Proxy(valkey.port) as proxy:
        here = replace(settings, redis_url=f"redis://127.0.0.1:{proxy.port}/0")
        with CheckpointManager(store, settings=here) as manager:
            manager.save_async(b"state", 1).durable.result(WITHIN_S)
            proxy.drop_replies(2, matching=b"failed_saves", then="close")
            with pytest.raises(CheckpointConflict):
                manager.save_async(b"other bytes", 1).durable.result(WITHIN_S)
            eventually(lambda: status.read(state).failed_saves, what="the report")
    assert [one.state for one in status.read(state).failed_saves] == ["CONFLICT"]
    assert len([one for one in status.read(state, event_count=50).events if one.event == "save_failed"]) == 1


@pytest.mark.parametrize("policy", ["warn", "fatal"])
def test_a_skipped_save_is_warned_of(settings: Settings, store: Path, caplog: pytest.LogCaptureFixture, policy: str) -> None:
    """No slot is free and the policy is ``skip``: the next save says so, and goes on under ``fatal`` too, since that was chosen."""
    here = replace(settings, slot_policy="skip", on_failed_save=policy)
    with CheckpointManager(store, settings=here) as manager:
        handles = [manager.save_async(b"%d" % step, step) for step in range(3)]
        assert handles[2].progress().state == "SKIPPED"
        with caplog.at_level(logging.WARNING, logger="dtr.checkpoint.saving.failures"):
            manager.save_async(b"3", 3)
        assert ["step 2 failed (SKIPPED)" in told for told in said(caplog)] == [True]


def test_skipped_saves_count_for_rpo(settings: Settings, store: Path) -> None:
    """What is at stake grows, whyever nothing is saved."""
    here = replace(settings, slot_policy="skip", on_failed_save="rpo", rpo_s=1e-6)
    with CheckpointManager(store, settings=here) as manager:
        for step in range(3):
            manager.settings = replace(here, on_failed_save="warn")
            manager.save_async(b"%d" % step, step)
        manager.settings = here
        with pytest.raises(SaveFailed, match=r"step 2 failed \(SKIPPED\)|step . is not committed"):
            manager.save_async(b"3", 3)


def test_a_rank_that_skips_stops_no_other(settings: Settings, store: Path, uploads: Uploads) -> None:
    """Its checkpoint is aborted for all, with the reason; under ``fatal`` nobody raises for it."""
    with running(replace(settings, on_failed_save="fatal", slot_policy="skip"), store, 2) as job:
        job.commit(lambda r: {"w": 1}, 1)
        arena = job.ranks[1].manager._saves._stage._arena
        assert arena is not None
        taken = [arena.acquire(10) for _ in range(2)]
        handle = job.ranks[0].manager.save_async({"w": 2}, 2)
        job.ranks[1].manager.save_async({"w": 2}, 2)
        with pytest.raises(CheckpointAborted, match="rank 1: skipped"):
            handle.durable.result(WITHIN_S)
        for slot in taken:
            assert slot is not None
            slot.free()
        job.commit(lambda r: {"w": 3}, 3)


def test_a_full_arena_quotes_what_holds_uploads_back(settings: Settings, tmp_path: Path) -> None:
    """The store refuses: whoever waits for a slot reads why, instead of being asked whether an uploader runs."""
    store = tmp_path / "store"
    here = replace(settings, slot_policy="fail")
    with CheckpointManager(store, settings=here) as manager, uploading(here):
        manager.save_async(b"0", 0).durable.result(WITHIN_S)
        runs = store / settings.job / "runs"
        before = runs.stat().st_mode
        moved = runs.rename(store / "elsewhere")
        runs.write_text("a file where the folder was")
        try:
            handles = [manager.save_async(b"%d" % step, step) for step in (1, 2)]

            def refused() -> str:
                try:
                    manager.save_async(b"3", 3)
                except NoFreeSlot as exc:
                    return str(exc) if "step 1:" in str(exc) else ""
                return ""

            message = eventually(refused, what="an error that quotes the upload's")
            assert "Uploads are behind: step 1: " in message
            assert "is an uploader running" not in message
        finally:
            runs.unlink()
            moved.rename(runs)
            assert runs.stat().st_mode == before
        for handle in handles:
            handle.durable.result(WITHIN_S)
