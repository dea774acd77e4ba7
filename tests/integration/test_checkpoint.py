"""Saves and restores through the manager: real Redis, a real uploader, several ranks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dtr import counters
from dtr.checkpoint.handle import SaveHandle
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.slots import scan
from dtr.config import Settings
from dtr.errors import (
    CheckpointAbandoned,
    CheckpointAborted,
    CheckpointConflict,
    CheckpointError,
    ForkedProcess,
    InvalidInput,
    NoCheckpoint,
    NoFreeSlot,
    RosterChanged,
    UnsavedLineage,
    UnsupportedLeaf,
    WorldSizeMismatch,
)
from dtr.session import Session
from dtr.state.job import JobState
from tests.ranks import Rank, running
from tests.servers import RedisServer
from tests.uploading import Uploads, uploading
from tests.waiting import eventually

WITHIN_S = 30


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def uploads(settings: Settings) -> Iterator[Uploads]:
    with uploading(settings) as running_uploads:
        yield running_uploads
    assert not running_uploads.failures


@pytest.fixture
def manager(settings: Settings, store: Path) -> Iterator[CheckpointManager]:
    with CheckpointManager(store, settings=settings) as made:
        yield made


def state_of(step: int) -> dict[Any, Any]:
    """A state that has something of everything, other for each step."""
    return {
        "model": {"w": np.arange(64.0) + step, "half": np.float16(step), "none": None},
        7: [step, (True, -0.0, float("nan"), 2**70), b"bytes", "text"],
    }


def assert_is(found: Any, step: int) -> None:
    """``found`` is ``state_of(step)``, type by type and bit by bit."""
    wanted = state_of(step)
    assert_array_equal(found["model"]["w"], wanted["model"]["w"])
    assert found["model"]["w"].flags.writeable
    assert repr(found[7]) == repr(wanted[7])
    assert type(found["model"]["half"]) is np.float16
    assert found["model"]["half"] == step


def settled(state: JobState, run: str, step: int) -> str:
    """The state of a checkpoint once it is decided."""
    final = {"COMMITTED", "ABORTED", "ABANDONED"}
    return str(eventually(lambda: (w := state.redis.hget(state.keys.ckpt(run, step), "state")) in final and w, what="a decision"))


class TestSaving:
    def test_comes_back_as_it_was(self, manager: CheckpointManager, uploads: Uploads) -> None:
        """What was saved is restored, type by type and bit by bit, from the state at the call and not from later."""
        state = state_of(3)
        handle = manager.save_async(state, 3)
        state["model"]["w"][:] = -1
        commit = handle.durable.result(WITHIN_S)
        assert (commit.run, commit.step, handle.state) == (handle.run, 3, "COMMITTED")
        found = manager.restore()
        assert found is not None
        assert (found.run, found.step) == (handle.run, 3)
        assert_is(found.state, 3)

    def test_can_be_awaited(self, manager: CheckpointManager, uploads: Uploads) -> None:
        """``await`` gives the handle itself once the state is staged; ``durable`` can be awaited through asyncio as well."""

        async def save() -> None:
            handle = await manager.save_async(b"state", 0)
            assert handle.staged.done()
            assert (await asyncio.wrap_future(handle.durable)).step == 0

        asyncio.run(save())

    def test_is_durable_only_when_committed(self, manager: CheckpointManager, settings: Settings) -> None:
        """Without an uploader a save is staged and visible, and nothing more is promised."""
        handle = manager.save_async(b"state", 0)
        eventually(lambda: handle.state == "WRITING", what="the checkpoint in Redis")
        assert not handle.durable.done()
        assert manager.list() == ()
        with uploading(settings):
            handle.durable.result(WITHIN_S)
        assert [listed.state for listed in manager.list()] == ["COMMITTED"]

    def test_the_same_bytes_twice_are_one_checkpoint(self, manager: CheckpointManager, uploads: Uploads) -> None:
        """A step saved again, before and after its commit, follows the first save."""
        first, second = manager.save_async(state_of(1), 1), manager.save_async(state_of(1), 1)
        assert first.durable.result(WITHIN_S).run == second.durable.result(WITHIN_S).run
        assert manager.save_async(state_of(1), 1).durable.result(WITHIN_S).step == 1
        assert len(manager.list()) == 1

    @pytest.mark.parametrize("other", [b"other", b"statX"], ids=["another size", "the same size"])
    def test_other_bytes_under_one_step_are_a_conflict(self, manager: CheckpointManager, uploads: Uploads, other: bytes) -> None:
        """The first save stands; the second is told, and its slot is free again."""
        manager.save_async(b"state", 1).durable.result(WITHIN_S)
        with pytest.raises(CheckpointConflict):
            manager.save_async(other, 1).durable.result(WITHIN_S)
        found = manager.restore()
        assert found is not None
        assert found.state == b"state"
        eventually(lambda: not [s for s in scan(manager.settings.staging) if s.kind == "STAGED"], what="free slots")

    def test_never_waits_for_redis(self, own_valkey: RedisServer, settings: Settings, store: Path) -> None:
        """With Redis stopped, saves are staged at once and commit when it is back."""
        here = replace(settings, redis_url=own_valkey.url, slots=4)
        with uploading(here), CheckpointManager(store, settings=here) as manager:
            manager.save_async(b"0", 0).durable.result(WITHIN_S)
            own_valkey.pause()
            done = threading.Event()
            handles: list[SaveHandle] = []

            def save() -> None:
                handles.extend(manager.save_async(b"%d" % step, step) for step in (1, 2, 3))
                done.set()

            threading.Thread(target=save, daemon=True).start()
            assert done.wait(1.5), "less than the time-out of one command"
            own_valkey.resume()
            assert [handle.durable.result(WITHIN_S).step for handle in handles] == [1, 2, 3]

    def test_closing_waits_for_no_commit(self, settings: Settings, store: Path) -> None:
        """An undecided handle says that the manager was closed; the save commits all the same; no thread stays."""
        manager = CheckpointManager(store, settings=settings)
        handle = manager.save_async(b"state", 0)
        manager.close()
        with pytest.raises(CheckpointError, match="the uploader goes on"):
            handle.durable.result(0)
        assert handle.state == "CLOSED"
        with uploading(settings):
            state = JobState(settings.redis_url, settings.job)
            assert settled(state, handle.run, 0) == "COMMITTED"
            state.close()
        eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("dtr-")], what="no thread of dtr")
        with pytest.raises(CheckpointError, match="closed"):
            manager.save_async(b"state", 1)

    @pytest.mark.parametrize("step", [-1, 1.5, "1e3", 2**63, True, float("nan"), None])
    def test_a_step_is_an_integer(self, manager: CheckpointManager, step: Any) -> None:
        """Anything else is refused by name, before a run is started for it."""
        with pytest.raises(InvalidInput, match="step"):
            manager.save_async(b"state", step)
        assert Session.current(manager.settings.redis_url, manager.settings.job) is None

    def test_a_forked_child_is_told(self, manager: CheckpointManager, uploads: Uploads) -> None:
        """A manager from before a fork does not work in the child, and says so; the parent's goes on."""
        manager.save_async(b"state", 0).durable.result(WITHIN_S)
        child = os.fork()
        if child == 0:
            try:
                manager.save_async(b"child", 1)
            except ForkedProcess:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert manager.save_async(b"state", 1).durable.result(WITHIN_S).step == 1


class TestNoRoom:
    def test_skip_aborts_the_checkpoint_for_all(self, settings: Settings, store: Path) -> None:
        """A rank without a free slot skips; the other rank's save of that step is aborted with this reason, and it is counted."""
        with running(settings, store, 2, slot_policy="skip") as job:
            job.each(lambda r: [r.manager.save_async(b"x", step) for step in (0, 1)])
            first, second = job.ranks
            skipped = first.manager.save_async(b"x", 2)
            assert skipped.staged.done()
            with pytest.raises(CheckpointAborted, match="every staging slot"):
                skipped.durable.result(0)
            state = first.session.state
            key = state.keys.ckpt(first.session.run.id, 2)
            eventually(lambda: state.redis.hget(key, "state") == "ABORTING", what="the abort")
            assert "rank 0" in state.redis.hget(key, "reason")
            eventually(lambda: counters.read(state).get("saves_skipped") == 1, what="the count")
            with uploading(settings):
                eventually(lambda: not [s for s in scan(settings.staging) if s.kind == "STAGED"], what="free slots")
                other = second.manager.save_async(b"x", 2)
                with pytest.raises(CheckpointAborted, match="rank 0"):
                    other.durable.result(WITHIN_S)

    def test_fail_raises_and_tells_the_others(self, settings: Settings, store: Path) -> None:
        """Policy fail is an error in the caller, and an abort for everyone else."""
        with running(settings, store, 2, slot_policy="fail") as job:
            first, second = job.ranks
            for step in (0, 1):
                job.save(lambda _: b"x", step)
            with pytest.raises(NoFreeSlot):
                first.manager.save_async(b"x", 2)
            with uploading(settings):
                eventually(lambda: not [s for s in scan(settings.staging) if s.kind == "STAGED"], what="free slots")
                with pytest.raises(CheckpointAborted, match="NoFreeSlot"):
                    second.manager.save_async(b"x", 2).durable.result(WITHIN_S)

    def test_wait_waits_for_the_uploader(self, settings: Settings, store: Path, manager: CheckpointManager) -> None:
        """Policy wait goes on as soon as an upload frees a slot."""
        manager.save_async(b"0", 0)
        manager.save_async(b"1", 1)
        with uploading(settings):
            handle = manager.save_async(b"2", 2)
            handle.durable.result(WITHIN_S)

    def test_a_leaf_that_cannot_be_kept_aborts_the_checkpoint(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """The rank that has it gets its path, the other one the reason."""
        with running(settings, store, 2) as job:
            good = job.ranks[1].manager.save_async({"w": 1}, 0)
            with pytest.raises(UnsupportedLeaf, match=r'\["w"\]'):
                job.ranks[0].manager.save_async({"w": object()}, 0)
            with pytest.raises(CheckpointAborted, match="UnsupportedLeaf"):
                good.durable.result(WITHIN_S)


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


def test_importing_dtr_costs_nothing() -> None:
    """The public names are there, and nothing heavy is imported for them before they are used."""
    code = (
        "import sys, dtr\n"
        "heavy = {'numpy', 'redis', 'celery', 'boto3', 'awscrt', 'orjson'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'CheckpointManager', 'DatasetRegistry', '__version__'} <= set(dir(dtr))\n"
        "from dtr import CheckpointManager\n"
        "heavy = {'celery', 'boto3', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
