"""Saves and restores through the manager: real Redis, a real uploader, several ranks."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from dtr import counters
from dtr.checkpoint.keeping.rebuild import index_checkpoint
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.saving.handle import SaveHandle
from dtr.checkpoint.staging.slots import scan
from dtr.checkpoint.survey import manifest_key
from dtr.config import Settings
from dtr.errors import (
    CheckpointAborted,
    CheckpointConflict,
    CheckpointError,
    ConfigError,
    ForkedProcess,
    InvalidInput,
    NoFreeSlot,
    StoreRefused,
    UnsupportedLeaf,
)
from dtr.host import host_id
from dtr.session import Session
from dtr.state.job import JobState
from dtr.state.keys import uploader
from dtr.store import durable, open_store
from dtr.store.local import LocalStore
from tests.ranks import running
from tests.servers import RedisServer, seaweed_server
from tests.states import assert_is, state_of
from tests.uploading import Uploads, uploading
from tests.waiting import eventually

WITHIN_S = 30


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

    def test_what_is_taken_from_the_store_outlasts_a_power_cut(
        self, manager: CheckpointManager, settings: Settings, store: Path, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever tells Redis of a commit that another wrote makes sure of its folder first; who may only read tells it all the same."""
        handle = manager.save_async(state_of(3), 3)
        handle.durable.result(WITHIN_S)
        url, state, synced = str(store), JobState(settings.redis_url, settings.job), list[str]()
        of_job = open_store(url).child(settings.job)
        monkeypatch.setattr(durable, "sync_folder", synced.append)
        state.redis.delete(state.keys.ckpt(handle.run, 3))
        assert index_checkpoint(state, of_job, url, handle.run, 3) == "COMMITTED"
        assert os.path.dirname(f"{store}/{settings.job}/{manifest_key(handle.run, 3)}") in synced
        state.redis.delete(state.keys.ckpt(handle.run, 3))
        monkeypatch.setattr(LocalStore, "put", Mock(side_effect=StoreRefused("read-only file system")))
        assert index_checkpoint(state, of_job, url, handle.run, 3) == "COMMITTED"
        state.close()

    @pytest.mark.parametrize("options", [{}, {"only": "model/*"}], ids=["whole", "part"])
    def test_what_was_restored_goes_with_its_last_name(self, manager: CheckpointManager, uploads: Uploads, options: dict[str, Any]) -> None:
        """A restored state that nobody holds any more is freed at once, not when the garbage collector runs: it may be large."""
        manager.save_async(state_of(3), 3).durable.result(WITHIN_S)
        gc.disable()
        try:
            found = manager.restore(**options)
            assert found is not None
            kept = weakref.ref(found.state["model"]["w"])
            del found
            assert kept() is None
        finally:
            gc.enable()

    def test_who_waits_in_vain_is_told_for_what(self, manager: CheckpointManager) -> None:
        """Without an uploader nothing is decided; the error names the save and the command that tells more."""
        handle = manager.save_async(b"state", 4)
        with pytest.raises(TimeoutError, match=rf"step 4 in run {handle.run} is not decided after 0.05 s; .*dtr ckpt show {handle.run} 4"):
            handle.durable.result(timeout=0.05)

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


def test_through_celery(settings: Settings, store: Path, tmp_path: Path) -> None:
    """The uploader as people run it, ``celery -A tasks worker``: a save is committed by its message, long before the next look."""
    env = {**os.environ, "DTR_REDIS_URL": settings.redis_url, "DTR_STAGING": settings.staging, "DTR_SCAN_INTERVAL_S": "3600"}
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker"]
    with (tmp_path / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        state = JobState(settings.redis_url, settings.job)
        presence = uploader(host_id(settings.staging))
        eventually(lambda: state.redis.exists(presence), timeout_s=60, what="an uploader")
        state.close()
        with running(settings, store, 2) as job:
            for step in range(3):
                job.commit(lambda r: {"rank": r.rank}, step)
            assert [f.state["rank"] for f in job.restore()] == [0, 1]
    finally:
        worker.terminate()
        worker.wait(60)
    assert "Traceback" not in (tmp_path / "worker.log").read_text()


def test_on_s3(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way on a real S3 server: first save, commit, collective restore, listing, verification, retention."""
    here = replace(settings, keep_last=1, reader_grace_s=0.0)
    with seaweed_server(tmp_path / "weed") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        url = server.url("checkpoints")
        with uploading(here):
            with running(here, url, 2) as job:
                job.restore(fresh=True)
                for step in (1, 2):
                    job.commit(lambda r: state_of(r.rank), step)
            with running(here, url, 2) as job:
                for rank, found in enumerate(job.restore()):
                    assert found.step == 2
                    assert_is(found.state, rank)
                job.commit(lambda r: state_of(r.rank), 3)
                manager = job.ranks[0].manager
                assert manager.verify(job.ranks[0].session.run.id, 3).parts == 2
                eventually(lambda: {x.step: x.state for x in manager.list()}[1] == "RETIRED", what="retention")
                assert {x.step: x.state for x in manager.list()}[2] == "COMMITTED", "what the run continues stays"
        with CheckpointManager(url, settings=replace(here, redis_url="redis://127.0.0.1:1/0"), world_size=2, rank=1) as reader:
            found = reader.restore()
            assert found is not None
            assert found.step == 3


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"world_size": 0}, "world_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": -1, "world_size": 2}, "rank"),
        ({"job": "../x"}, "job"),
        ({"coordinator_url": "http://x"}, "redis_url|coordinator_url"),
        ({"store": "ftp://x"}, "store"),
        ({"store": "s3://"}, "bucket"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, given: dict[str, Any], named: str) -> None:
    """Nothing is connected or made for a manager that cannot work."""
    with pytest.raises((InvalidInput, ConfigError), match=named):
        CheckpointManager(**{"store": tmp_path / "store", **given}).restore(fresh=True)
    assert list(tmp_path.iterdir()) == []
