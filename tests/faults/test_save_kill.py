"""A trainer is killed in a save; Redis or the uploader goes away: what was staged whole commits, nothing torn does (I1, I3, I8, I9)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.staging.reclaim import reclaim
from dtr.checkpoint.staging.slots import scan
from dtr.config import Settings
from dtr.errors import CheckpointAborted, CoordinatorUnavailable
from dtr.state.job import JobState
from tests.proxy import Proxy
from tests.ranks import running
from tests.servers import RedisServer
from tests.uploading import uploading
from tests.waiting import eventually

WITHIN_S = 30
STAGED = ["save.after_stage", "save.before_begin", "save.after_begin", "save.after_enqueue", "stage.after_staged_record"]
TORN = [
    "stage.before_record",
    "stage.after_copying_record",
    "stage.mid_copy",
    "stage.half_copied",
    "stage.before_staged_record",
]
BASE = ["restore.before_record", "restore.after_record", "restore.after_base"]

# Saves step 1 and waits for it, then dies in the save of step 2, as a trainer without an agent.
TRAINER = """
import os, sys
import numpy as np
from dtr.checkpoint.manager import CheckpointManager
from dtr.config import Settings
url, job, staging, store, fault, *steps = sys.argv[1:]
settings = Settings.load(redis_url=url, job=job, staging=staging, ttl_s=1.5, beat_interval_s=0.2)
manager = CheckpointManager(store, settings=settings)
found = manager.restore(fresh=True)
print("restored", found and found.step, flush=True)
for step in map(int, steps):
    if step == int(steps[-1]):
        os.environ["DTR_FAILPOINT"] = fault
    handle = manager.save_async({"step": step, "w": np.full(5000, step)}, step)
    handle.durable.result(60)
    print("saved", step, flush=True)
"""


# Saves step 1, and then other bytes under the same step; ends once that has been told.
CONFLICT = """
import os, sys
from dtr.checkpoint.manager import CheckpointManager
from dtr.config import Settings
url, job, staging, store, fault = sys.argv[1:]
settings = Settings.load(redis_url=url, job=job, staging=staging, ttl_s=1.5, beat_interval_s=0.2)
manager = CheckpointManager(store, settings=settings)
manager.save_async(b"first", 1).durable.result(60)
os.environ["DTR_FAILPOINT"] = fault
print(type(manager.save_async(b"other", 1).durable.exception(60)).__name__, flush=True)
manager.close()
"""


def trainer(settings: Settings, store: Path, *steps: int, fault: str = "none=raise", text: str = TRAINER) -> tuple[int, str]:
    """Run one to its end; its exit code and what it said."""
    command = [sys.executable, "-c", text, settings.redis_url, settings.job, settings.staging, str(store), fault, *map(str, steps)]
    done = subprocess.run(command, env={**os.environ, "DTR_TESTING": "1"}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode, done.stdout


def committed(store: Path, settings: Settings) -> list[int]:
    """The steps on the lineage, newest first, each verified byte by byte."""
    with CheckpointManager(store, settings=settings) as reader:
        found = [listed for listed in reader.list() if listed.state == "COMMITTED"]
        for listed in found:
            reader.verify(listed.run, listed.step)
        return [listed.step for listed in found]


def staged(settings: Settings) -> list[Any]:
    return [found for found in scan(settings.staging) if found.kind == "STAGED"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.parametrize("failpoint", STAGED)
def test_a_complete_save_of_a_killed_trainer_commits(settings: Settings, store: Path, failpoint: str) -> None:
    """SIGKILL at any point after the copy: the uploader finds the slot, and the next process restores that step."""
    with uploading(settings):
        assert trainer(settings, store, 1, 2, fault=f"{failpoint}=kill")[0] == -signal.SIGKILL
        eventually(lambda: committed(store, settings) == [2, 1], what="the commit of step 2")
        assert trainer(settings, store, 3) == (0, "restored 2\nsaved 3\n")
    assert committed(store, settings) == [3, 2, 1]
    reclaim(settings.staging)
    assert scan(settings.staging) == [], "no shared memory is left behind"


@pytest.mark.parametrize("failpoint", TORN)
def test_a_torn_save_of_a_killed_trainer_is_nothing(settings: Settings, store: Path, failpoint: str) -> None:
    """SIGKILL before the copy was complete: the step before is the newest, and the next process goes on from there."""
    with uploading(settings):
        assert trainer(settings, store, 1, 2, fault=f"{failpoint}=kill")[0] == -signal.SIGKILL
        assert trainer(settings, store, 2) == (0, "restored 1\nsaved 2\n")
    assert committed(store, settings) == [2, 1]
    reclaim(settings.staging)
    assert scan(settings.staging) == []


@pytest.mark.parametrize(("failpoint", "told"), [("save.before_report", 0), ("save.after_report", 1)])
def test_a_kill_between_a_conflict_and_its_report(settings: Settings, store: Path, failpoint: str, told: int) -> None:
    """The first save stands, the second one's slot is freed, and it is told once or, with the process that it was for, not at all."""
    with uploading(settings):
        assert trainer(settings, store, fault=f"{failpoint}=kill", text=CONFLICT)[0] == -signal.SIGKILL
        eventually(lambda: not staged(settings), what="a free slot")
        with (
            CheckpointManager(store, settings=settings) as manager,
            contextlib.closing(JobState(settings.redis_url, settings.job)) as state,
        ):
            assert state.redis.xlen(state.keys.failed_saves) == told
            found = manager.restore()
            assert found is not None
            assert (found.step, found.state) == (1, b"first")
            manager.save_async(b"next", 2).durable.result(WITHIN_S)
    assert committed(store, settings) == [2, 1]


@pytest.mark.parametrize("failpoint", BASE)
def test_a_kill_while_the_first_save_fixes_what_the_run_continues(settings: Settings, store: Path, failpoint: str) -> None:
    """Nothing was staged yet; the next process finds nothing to restore, and its own first save commits."""
    with uploading(settings):
        assert trainer(settings, store, 1, fault=f"{failpoint}=kill") == (-signal.SIGKILL, "restored None\n")
        assert trainer(settings, store, 1) == (0, "restored None\nsaved 1\n")
    assert committed(store, settings) == [1]


def test_a_rank_that_dies_in_mid_copy_aborts_its_checkpoint(settings: Settings, store: Path) -> None:
    """The others' handles say who and why; their slots come back."""
    with uploading(settings), running(settings, store, 2) as job:
        job.commit(lambda r: {"rank": r.rank}, 1)
        alive, dead = job.ranks
        handle = alive.manager.save_async(b"half", 2)
        dead.session.close(reason="signal 9")
        with pytest.raises(CheckpointAborted, match=r"rank 1.*w1 departed \(signal 9\)"):
            handle.durable.result(WITHIN_S)
        eventually(lambda: not staged(settings), what="free slots")
    with running(settings, store, 2) as job:
        assert [f.step for f in job.restore()] == [1, 1]


def test_a_save_that_is_complete_counts_though_a_rank_dies(settings: Settings, store: Path) -> None:
    """Both parts were staged when rank 1 died: the checkpoint commits, and the handle that is left says so."""
    with running(settings, store, 2) as job:
        handles = job.save(lambda r: {"rank": r.rank}, 1)
        job.ranks[1].session.close(reason="signal 9")
        with uploading(settings):
            assert handles[0].durable.result(WITHIN_S).step == 1
    with running(settings, store, 2) as job:
        assert [f.state["rank"] for f in job.restore()] == [0, 1]


def test_a_run_that_ended_before_its_save_was_published_commits_it(own_valkey: RedisServer, settings: Settings, store: Path) -> None:
    """Staged while Redis was away, and the run ended meanwhile: the part counts as a dead trainer's does."""
    with Proxy(own_valkey.port) as proxy:
        direct = replace(settings, redis_url=own_valkey.url)
        through = replace(settings, redis_url=f"redis://127.0.0.1:{proxy.port}/0")
        with running(through, store, 1) as job:
            with uploading(direct):
                job.commit(lambda _: b"0", 0)
            proxy.set_mode("refuse")
            (handle,) = job.save(lambda _: b"1", 1)
            with running(direct, store, 1, names="other") as other:  # forms the next run once the first member lapsed
                proxy.set_mode("pass")
                with uploading(direct):
                    assert handle.durable.result(WITHIN_S).step == 1
                    assert [f.step for f in other.restore()] == [1]


@pytest.mark.parametrize("away", ["refuse", "blackhole"])
def test_a_redis_that_is_away_spools_saves(own_valkey: RedisServer, settings: Settings, store: Path, away: Any) -> None:
    """Saves go on into the slots, the first of a run included, and all are committed when Redis is back."""
    with Proxy(own_valkey.port) as proxy:
        here = replace(settings, redis_url=f"redis://127.0.0.1:{proxy.port}/0", slots=4)
        with uploading(replace(settings, redis_url=own_valkey.url)), running(here, store, 1) as job:
            proxy.set_mode(away)
            handles = [job.ranks[0].manager.save_async(b"%d" % step, step) for step in range(3)]
            assert not any(handle.durable.done() for handle in handles)
            proxy.set_mode("pass")
            assert [handle.durable.result(WITHIN_S).step for handle in handles] == [0, 1, 2]
            assert job.restore()[0].state == b"2"


def test_a_reply_that_was_lost_changes_nothing(own_valkey: RedisServer, settings: Settings, store: Path) -> None:
    """The answers to the base and to the begin of a save are lost after the effect: one checkpoint, committed once."""
    with Proxy(own_valkey.port) as proxy:
        here = replace(settings, redis_url=f"redis://127.0.0.1:{proxy.port}/0")
        with uploading(replace(settings, redis_url=own_valkey.url)), running(here, store, 1) as job:
            for step in range(4):
                proxy.drop_replies(2, matching=b"EVALSHA", then="close")
                job.commit(lambda _: b"x", step)
            assert [listed.step for listed in job.ranks[0].manager.list()] == [3, 2, 1, 0]


def test_a_redis_killed_under_load_loses_no_commit(own_valkey: RedisServer, settings: Settings, store: Path) -> None:
    """SIGKILL of a server without persistence, again and again: every commit that was reported is restored, and training goes on."""
    here = replace(settings, redis_url=own_valkey.url, slots=4, keep_last=0)
    reported: list[tuple[str, int]] = []
    with uploading(here), CheckpointManager(store, settings=here) as manager:
        step = 0
        for _ in range(3):
            handles = []
            for _ in range(3):
                handles.append(_save(manager, step))
                step += 1
            own_valkey.kill()
            own_valkey.start()
            for handle in handles:
                try:
                    commit = handle.durable.result(WITHIN_S)
                    reported.append((commit.run, commit.step))
                except CheckpointAborted:
                    continue
        eventually(lambda: _saves_again(manager, step, reported), what="a commit after all that")
        in_store = {(listed.run, listed.step) for listed in manager.list() if listed.state == "COMMITTED"}
    assert set(reported) <= in_store
    with CheckpointManager(store, settings=here) as reader:
        found = reader.restore()
        assert found is not None
        assert (found.run, found.step) == reported[-1]


def _save(manager: CheckpointManager, step: int) -> Any:
    def attempt() -> Any:
        try:
            return manager.save_async(b"%d" % step, step)
        except CoordinatorUnavailable:
            return None

    return eventually(attempt, what="a save that is staged")


def _saves_again(manager: CheckpointManager, step: int, reported: list[tuple[str, int]]) -> bool:
    commit = _save(manager, step).durable.result(WITHIN_S)
    reported.append((commit.run, commit.step))
    return True
