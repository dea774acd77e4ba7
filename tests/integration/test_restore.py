"""Restores: collective, of any world size, along the lineage, and by whoever only reads."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtr.checkpoint import base
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.restoring.agreement import Agreement, Answer
from dtr.config import Settings
from dtr.errors import (
    CheckpointAbandoned,
    CheckpointConflict,
    NoCheckpoint,
    RosterChanged,
    UnsavedLineage,
    WorldSizeMismatch,
)
from dtr.session import Session
from dtr.state.job import JobState
from tests.ranks import Rank, running
from tests.servers import RedisServer
from tests.states import assert_is, state_of
from tests.uploading import Uploads, uploading
from tests.waiting import eventually

WITHIN_S = 30


class TestRanks:
    def test_each_rank_gets_its_own_part(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """A sharded checkpoint commits when every rank saved, and each restores what it saved."""
        with running(settings, store, 3) as job:
            assert {commit.run for commit in job.commit(lambda r: {"rank": r.rank}, 4)} == {job.ranks[0].session.run.id}
        with running(settings, store, 3) as job:
            found = job.restore()
            assert [f.state["rank"] for f in found] == [0, 1, 2]
            assert {f.step for f in found} == {4}

    def test_a_sharded_checkpoint_needs_its_world_size(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """Another number of ranks is told what would fit, rather than being given an older checkpoint."""
        with running(settings, store, 2) as job:
            job.commit(lambda _: b"old", 1, replicated=True)
            job.commit(lambda _: b"new", 2)
        with CheckpointManager(store, settings=settings) as reader, pytest.raises(WorldSizeMismatch):
            reader.restore()
        with CheckpointManager(store, settings=settings, rank=1, world_size=2) as reader:
            found = reader.restore()
            assert found is not None
            assert found.state == b"new"
        with running(settings, store, 3) as job:
            errors = job.restore(fresh=True)
            assert [type(e) for e in errors] == [WorldSizeMismatch] * 3
            assert "world_size=2" in str(errors[0])
            assert "restore(step=1)" in str(errors[0])
            assert [f.state for f in job.restore(step=1)] == [b"old"] * 3

    def test_the_verdict_is_that_of_every_rank_whoever_left_with_it(
        self, settings: Settings, store: Path, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The rank that hears it first exits, and so ends the run: the one that looks later is told the same, not who left."""
        with running(settings, store, 3) as job:
            job.commit(lambda r: r.rank, 1)
        left, wait = threading.Event(), Agreement._wait_for_news

        def late(agreement: Agreement, before: Answer) -> Answer:
            assert left.wait(WITHIN_S)
            return wait(agreement, before)

        def restored(rank: Rank) -> object:
            try:
                return rank.manager.restore()
            finally:
                rank.session.close()
                left.set()

        monkeypatch.setattr(Agreement, "_wait_for_news", late)
        with running(settings, store, 2) as job:
            assert [type(error) for error in job.each(restored)] == [WorldSizeMismatch] * 2

    @pytest.mark.parametrize("readers", [1, 4])
    def test_any_world_size_restores_replicated_state(self, settings: Settings, store: Path, uploads: Uploads, readers: int) -> None:
        """Rank 0 writes the one part; the others' handles are staged at once and durable with it."""
        with running(settings, store, 3) as job:
            handles = job.save(lambda _: state_of(9), 9, replicated=True)
            assert all(handle.staged.done() for handle in handles)
            assert {handle.durable.result(WITHIN_S).step for handle in handles} == {9}
            listed = job.ranks[0].manager.latest()
            assert listed is not None
            assert listed.replicated
            assert job.ranks[0].manager.verify(listed.run, 9).parts == 1
        with running(settings, store, readers) as job:
            for found in job.restore():
                assert_is(found.state, 9)

    def test_ranks_that_disagree_about_a_step_are_told(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """One rank says replicated, the other not: the second to come gets a conflict, not a torn checkpoint."""
        with running(settings, store, 2) as job:
            job.commit(lambda _: b"x", 0, replicated=True)
            first = job.ranks[0].manager.save_async(b"x", 1, replicated=True)
            first.durable.result(WITHIN_S)
            with pytest.raises(CheckpointConflict, match="replicated"):
                job.ranks[1].manager.save_async(b"x", 1).durable.result(WITHIN_S)

    def test_a_restore_takes_the_newest_that_all_can_read(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """One rank's part of the newest checkpoint is gone: all take the one before, and the run continues that."""
        with running(settings, store, 2) as job:
            for step in (1, 2):
                job.commit(lambda r: {"rank": r.rank}, step)
        (victim,) = store.glob("*/runs/*/*2/part-00001-*")
        victim.unlink()
        with running(settings, store, 2) as job:
            found = job.restore()
            assert [(f.step, f.state["rank"]) for f in found] == [(1, 0), (1, 1)]
            run = job.ranks[0].session.run.id
            assert job.ranks[0].manager.lineage() == [(found[0].run, 1)]
            assert {commit.run for commit in job.commit(lambda r: {"rank": r.rank}, 2)} == {run}

    def test_a_member_that_dies_in_mid_restore_ends_it(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """The others get RosterChanged, and restore in the next run."""
        with running(settings, store, 3) as job:
            job.commit(lambda _: b"x", 1)
        with running(settings, store, 3) as job:
            dead = job.ranks.pop()
            results: list[Any] = []
            waiting = threading.Thread(target=lambda: results.extend(job.restore()), daemon=True)
            waiting.start()
            state = dead.session.state
            key = state.keys.restore(dead.session.run.id)
            eventually(lambda: state.redis.hget(key, "offers") == "2", what="two offers")
            dead.session.close(reason="signal 9")
            waiting.join(WITHIN_S)
            assert [type(r) for r in results] == [RosterChanged] * 2
            assert "signal 9" in str(results[0])


class TestLineage:
    def test_nothing_to_restore_is_an_error_unless_all_say_fresh(self, settings: Settings, store: Path) -> None:
        """One rank without fresh=True keeps the others from starting anew; asked again with it, all do."""
        with running(settings, store, 2) as job:
            errors = job.each(lambda r: r.manager.restore(fresh=r.rank == 0))
            assert [type(e) for e in errors] == [NoCheckpoint] * 2
            assert job.restore(fresh=True) == [None, None]

    def test_the_first_save_of_a_run_that_restored_nothing_is_refused(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """A store that holds checkpoints of the job is never silently started over; fresh=True on the manager is on purpose."""
        with CheckpointManager(store, settings=settings) as manager:
            manager.save_async(b"old", 5).durable.result(WITHIN_S)
        with CheckpointManager(store, settings=settings) as manager, pytest.raises(UnsavedLineage, match="/5"):
            manager.save_async(b"new", 0)
        with CheckpointManager(store, settings=settings, fresh=True) as manager:
            manager.save_async(b"new", 0).durable.result(WITHIN_S)
            found = manager.restore()
            assert found is not None
            assert (found.step, found.state) == (0, b"new")
            assert manager.lineage() == []

    def test_another_store_is_another_lineage(self, settings: Settings, store: Path, uploads: Uploads, tmp_path: Path) -> None:
        """The same job in an empty store starts anew; back in the first one it goes on from there."""
        with CheckpointManager(store, settings=settings) as manager:
            manager.save_async(b"first", 5).durable.result(WITHIN_S)
        with CheckpointManager(tmp_path / "other", settings=settings) as manager:
            manager.save_async(b"second", 7).durable.result(WITHIN_S)
        with CheckpointManager(store, settings=settings) as manager:
            found = manager.restore()
            assert found is not None
            assert found.state == b"first"
            manager.save_async(b"third", 6).durable.result(WITHIN_S)
            assert manager.lineage() == [(found.run, 5)]

    def test_a_run_saves_into_one_store(self, manager: CheckpointManager, uploads: Uploads, tmp_path: Path) -> None:
        """A second manager of the same process cannot send the same run's checkpoints elsewhere."""
        manager.save_async(b"x", 0).durable.result(WITHIN_S)
        elsewhere = CheckpointManager(tmp_path / "other", settings=manager.settings)
        with pytest.raises(CheckpointConflict, match="one store"):
            elsewhere.save_async(b"x", 1)
        elsewhere.close()

    def test_a_straggler_of_a_run_that_was_left_never_becomes_latest(self, settings: Settings, store: Path) -> None:
        """What a run staged, and its successor did not restore, is abandoned when it arrives at last; its handle says so."""
        settings = replace(settings, keep_last=0)
        old = CheckpointManager(store, session=Session(settings, worker_id="w0").start())
        assert old._session is not None
        old._session.form()
        with uploading(settings):
            old.save_async(b"1", 1).durable.result(WITHIN_S)
        late = old.save_async(b"2", 2)
        eventually(lambda: late.state == "WRITING", what="the checkpoint in Redis")
        old._session.close(reason="left it behind")
        with running(settings, store, 1) as job:
            assert job.restore()[0].step == 1  # nobody uploads, so it is not waited for for long
            with uploading(settings):
                with pytest.raises(CheckpointAbandoned):
                    late.durable.result(WITHIN_S)
                job.ranks[0].manager.save_async(b"3", 2).durable.result(WITHIN_S)
            assert job.restore()[0].state == b"3"
            assert {(x.step, x.state) for x in job.ranks[0].manager.list()} == {(1, "COMMITTED"), (2, "ABANDONED"), (2, "COMMITTED")}
            state = job.ranks[0].session.state
            assert state.redis.hget(state.keys.meta, "latest") == f"{job.ranks[0].session.run.id}/2"
        old.close()

    def test_the_newest_staged_save_is_waited_for(self, settings: Settings, store: Path) -> None:
        """A complete save of a dead trainer is committed before the next run chooses, though its uploader comes late."""
        with CheckpointManager(store, settings=settings) as old:
            old.save_async(b"staged", 8)
        with running(settings, store, 1) as job:
            found: list[Any] = []
            restoring = threading.Thread(target=lambda: found.extend(job.restore()), daemon=True)
            restoring.start()
            with uploading(settings):
                restoring.join(WITHIN_S)
            assert [f.step for f in found] == [8]

    def test_a_restart_with_an_emptied_redis_continues(self, own_valkey: RedisServer, settings: Settings, store: Path) -> None:
        """The chain is rebuilt from the store: the same lineage, a higher run number, and nothing is saved over."""
        here = replace(settings, redis_url=own_valkey.url)
        runs = []
        for step in (1, 2, 3):
            with uploading(here), running(here, store, 2) as job:
                found = job.restore(fresh=True)
                assert [f.step if f else None for f in found] == [step - 1 or None] * 2
                job.commit(lambda _: b"x", step)
                runs.append(job.ranks[0].session.run.id)
                assert job.ranks[0].manager.lineage() == [(run, n + 1) for n, run in enumerate(runs[:-1])]
            state = JobState(here.redis_url, here.job)
            state.redis.flushall()
            state.close()
        assert [run[:4] for run in runs] == ["0001", "0002", "0003"]

    def test_a_redis_that_forgot_under_a_live_job_is_filled_again(self, own_valkey: RedisServer, settings: Settings, store: Path) -> None:
        """FLUSHALL in mid-training: the open save commits, the members form again and go on from the newest."""
        here = replace(settings, redis_url=own_valkey.url)
        with running(here, store, 2) as job:
            job.restore(fresh=True)
            open_saves = job.save(lambda r: {"rank": r.rank}, 5)
            eventually(lambda: all(h.state == "WRITING" for h in open_saves), what="an open checkpoint")
            job.ranks[0].session.state.redis.flushall()
            with uploading(here):
                eventually(lambda: all(isinstance(e, RosterChanged) for e in job.each(_check)), what="the news at every rank")
                job.each(_form_again)
                found = job.restore()
                assert [(f.step, f.state["rank"]) for f in found] == [(5, 0), (5, 1)]
                assert {h.durable.result(WITHIN_S).step for h in open_saves} == {5}

    def test_a_single_process_goes_on_by_itself(self, own_valkey: RedisServer, settings: Settings, store: Path) -> None:
        """Without an agent there is nobody to call form(): after Redis forgot, the next save opens a run that continues the last."""
        here = replace(settings, redis_url=own_valkey.url)
        with uploading(here), CheckpointManager(store, settings=here) as manager:
            first = manager.save_async(b"1", 1)
            first.durable.result(WITHIN_S)
            JobState(here.redis_url, here.job).redis.flushall()
            session = Session.current(here.redis_url, here.job)
            assert session is not None
            eventually(lambda: session._ended is not None, what="the news")
            second = manager.save_async(b"2", 2)
            assert second.run != first.run
            second.durable.result(WITHIN_S)
            assert manager.lineage() == [(first.run, 1)]


def _check(rank: Rank) -> None:
    rank.session.check()


def _form_again(rank: Rank) -> None:
    rank.manager.end_run()
    rank.session.form()


class TestReading:
    def test_starts_no_run_and_no_member(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """restore, list, latest and verify by someone who only looks leave no trace in Redis."""
        with CheckpointManager(store, settings=settings) as manager:
            run = manager.save_async(b"x", 1).durable.result(WITHIN_S).run
        state = JobState(settings.redis_url, settings.job)
        eventually(lambda: state.redis.zcard(state.keys.members) == 0, what="nobody there")
        before = state.redis.hgetall(state.keys.meta)
        with CheckpointManager(store, settings=settings) as reader:
            found = reader.restore()
            assert found is not None
            assert (found.run, found.state) == (run, b"x")
            latest = reader.latest()
            assert latest is not None
            assert reader.verify(latest.run, latest.step).size_bytes == latest.size_bytes
        assert state.redis.hgetall(state.keys.meta) == before
        assert state.redis.zcard(state.keys.members) == 0
        state.close()

    @pytest.mark.parametrize("redis", ["empty", "away"])
    def test_needs_no_redis(self, own_valkey: RedisServer, settings: Settings, store: Path, redis: str) -> None:
        """The store alone tells the lineage: also which checkpoints are off it."""
        here = replace(settings, redis_url=own_valkey.url)
        with uploading(here):
            with CheckpointManager(store, settings=here) as manager:
                for step in (1, 9):
                    manager.save_async(b"left at 1", step).durable.result(WITHIN_S)
            with CheckpointManager(store, settings=here) as manager:
                manager.restore(step=1)
                manager.save_async(b"2", 2).durable.result(WITHIN_S)
        if redis == "away":
            own_valkey.stop()
        else:
            JobState(here.redis_url, here.job).redis.flushall()
        with CheckpointManager(store, settings=here) as reader:
            found = reader.restore()
            assert found is not None
            assert (found.step, found.state) == (2, b"2")

    def test_nothing_there_is_said(self, settings: Settings, store: Path) -> None:
        """An empty store is an error to whoever reads, unless that is what is asked for."""
        with CheckpointManager(store, settings=settings) as reader:
            with pytest.raises(NoCheckpoint, match="fresh=True"):
                reader.restore()
            assert reader.restore(fresh=True) is None
            with pytest.raises(NoCheckpoint, match="step 7"):
                reader.restore(step=7, fresh=True)
            assert (reader.list(), reader.latest(), reader.lineage()) == ((), None, [])

    def test_a_manager_uses_the_agents_membership(self, settings: Settings, store: Path, uploads: Uploads, make_session: Any) -> None:
        """In a process that is in the job already, a manager made from the URL saves under that run and starts none."""
        session = make_session("w0").start()
        session.form()
        with CheckpointManager(store, coordinator_url=settings.redis_url, job=settings.job) as manager:
            assert manager.save_async(b"x", 0).durable.result(WITHIN_S).run == session.run.id
            found = manager.restore()
            assert found is not None
            assert found.run == session.run.id
        session.check()


def test_a_rank_that_comes_late_gets_what_its_run_continues(settings: Settings, store: Path, uploads: Uploads) -> None:
    """One whose restore was cut short after all had agreed gets the same checkpoint, not what the others have saved since."""
    with running(settings, store, 2) as job:
        job.commit(lambda _: b"old", 1, replicated=True)
    with running(settings, store, 2) as job:
        writer, late = job.ranks
        base.fix(late.session, writer.manager._store, writer.manager.url, (_run_of(store), 1))
        assert _state(writer) == b"old"
        writer.manager.save_async(b"new", 2, replicated=True).durable.result(WITHIN_S)
        assert _state(late) == b"old"
        assert _state(late) == b"new", "asked again, it only reads"


def _state(rank: Rank) -> Any:
    found = rank.manager.restore()
    assert found is not None
    return found.state


def _run_of(store: Path) -> str:
    return min(store.glob("*/runs/*.json")).stem
