"""Retention on a real store and index: what goes, what stays, and what a collector that died, slept or ran twice leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtr.checkpoint import restore, retention
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.payload import read_state
from dtr.config import Settings
from dtr.errors import NoCheckpoint, RestoreFailed
from dtr.state.job import JobState
from dtr.store import Store, open_store
from tests.ranks import running
from tests.uploading import uploading
from tests.waiting import eventually

WITHIN_S = 30


@pytest.fixture
def here(settings: Settings) -> Settings:
    """Two commits are kept, and readers get no grace unless a test says so."""
    return replace(settings, keep_last=2, reader_grace_s=0.0)


@pytest.fixture
def state(here: Settings) -> Iterator[JobState]:
    made = JobState(here.redis_url, here.job)
    yield made
    made.close()


@pytest.fixture
def folder(here: Settings, tmp_path: Path) -> Path:
    """Four checkpoints of one run, steps 0 to 3, none retired yet: that run keeps all."""
    with uploading(replace(here, keep_last=0)), running(replace(here, keep_last=0), tmp_path / "store", 1) as job:
        for step in range(4):
            job.commit(lambda _: b"x" * 100, step)
    return tmp_path / "store"


def store_of(folder: Path, settings: Settings) -> Store:
    return open_store(folder).child(settings.job)


def listing(folder: Path, settings: Settings) -> dict[int, str]:
    with CheckpointManager(folder, settings=settings) as reader:
        return {listed.step: listed.state for listed in reader.list()}


def objects(folder: Path) -> list[int]:
    """The steps that have an object."""
    return sorted({int(path.parent.name) for path in folder.glob("*/runs/*/*/part-*")})


def test_runs_by_itself_after_a_commit(here: Settings, tmp_path: Path, state: JobState) -> None:
    """With keep_last=2, the two newest of five are left, with their objects alone; the index forgot the others."""
    with uploading(here), running(here, tmp_path / "store", 1) as job:
        for step in range(5):
            job.commit(lambda _: b"x", step)
        eventually(lambda: objects(tmp_path / "store") == [3, 4], what="retention")
        eventually(lambda: state.redis.zcard(state.keys.ckpts) == 2, what="a short index")
        assert job.restore()[0].step == 4
        run = job.ranks[0].session.run.id
    assert listing(tmp_path / "store", here) == {4: "COMMITTED", 3: "COMMITTED", 2: "RETIRED", 1: "RETIRED", 0: "RETIRED"}
    assert not state.redis.exists(*[state.keys.ckpt(run, step) for step in range(3)], *[state.keys.parts(run, s) for s in range(3)])


def test_the_base_of_the_run_stays(here: Settings, folder: Path, state: JobState) -> None:
    """What the newest run continues is kept, though two newer commits are there and the one between goes."""
    with uploading(here), running(here, folder, 1) as job:
        assert job.restore(step=1)[0].step == 1
        for step in (11, 12, 13):
            job.commit(lambda _: b"y", step)
        eventually(lambda: objects(folder) == [1, 12, 13], what="retention")
    found = listing(folder, here)
    assert (found[1], found[0], found[2], found[3]) == ("COMMITTED", "RETIRED", "RETIRED", "RETIRED")


def test_readers_keep_their_time(here: Settings, folder: Path, state: JobState) -> None:
    """Objects outlive the tombstone by the grace, however late the collector comes back; nobody new starts on them."""
    with running(here, folder, 1) as job:
        job.restore()
        todo = retention.collect(store_of(folder, here), state, reader_grace_s=3600.0)
        assert [step for _, step in todo.retire] == [0, 1]
        assert objects(folder) == [0, 1, 2, 3]
        assert listing(folder, here)[0] == "RETIRED"
        with CheckpointManager(folder, settings=here) as reader, pytest.raises(NoCheckpoint):
            reader.restore(step=0)
        again = retention.collect(store_of(folder, here), state, reader_grace_s=3600.0)
        assert ([step for _, step in again.retire], [step for _, step in again.sweep]) == ([], [0, 1])
        assert objects(folder) == [0, 1, 2, 3]
        retention.collect(store_of(folder, here), state)
        assert objects(folder) == [2, 3]


COLLECT = """
import sys
from dtr.checkpoint import retention
from dtr.state.job import JobState
from dtr.store import open_store
url, job, folder = sys.argv[1:]
retention.collect(open_store(folder).child(job), JobState(url, job), keep_last=2, reader_grace_s=0.0)
"""


def test_a_collector_killed_after_a_tombstone_is_succeeded(here: Settings, folder: Path, state: JobState) -> None:
    """Its successor deletes what it tombstoned, and goes on with the rest."""
    with running(here, folder, 1) as job:
        job.restore()
        env = {**os.environ, "DTR_TESTING": "1", "DTR_FAILPOINT": "retention.after_tombstone=kill"}
        command = [sys.executable, "-c", COLLECT, here.redis_url, here.job, str(folder)]
        for left in (1, 0):
            assert subprocess.run(command, env=env, timeout=60, check=False).returncode == -signal.SIGKILL
            retired = [step for step, word in listing(folder, here).items() if word == "RETIRED"]
            assert len(retired) == 2 - left
        subprocess.run(command, env={**env, "DTR_FAILPOINT": "none=kill"}, timeout=60, check=True)
        assert objects(folder) == [2, 3]
        assert state.redis.zcard(state.keys.ckpts) == 2


def test_two_collectors_at_once_are_as_one(here: Settings, folder: Path, state: JobState) -> None:
    """They meet in every step and neither errs; what stays is whole."""
    errors: list[BaseException] = []

    def collect() -> None:
        mine = JobState(here.redis_url, here.job)
        try:
            retention.collect(store_of(folder, here), mine)
        except Exception as exc:
            errors.append(exc)
        finally:
            mine.close()

    with running(here, folder, 1) as job:
        job.restore()
        threads = [threading.Thread(target=collect) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN_S)
        assert not errors
        assert objects(folder) == [2, 3]
        manager = job.ranks[0].manager
        for listed in manager.list():
            if listed.state == "COMMITTED":
                manager.verify(listed.run, listed.step)


def test_a_collection_in_mid_restore_takes_nothing_that_is_read(
    here: Settings, folder: Path, state: JobState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the run has fixed what it continues, nothing is retired; what was agreed upon is there."""
    with running(here, folder, 1) as job:
        reading, go_on = threading.Event(), threading.Event()
        found: list[Any] = []

        def slow(*given: Any, **more: Any) -> Any:
            reading.set()
            assert go_on.wait(WITHIN_S)
            return read_state(*given, **more)

        monkeypatch.setattr(restore, "read_state", slow)
        thread = threading.Thread(target=lambda: found.extend(job.restore(step=0)), daemon=True)
        thread.start()
        assert reading.wait(WITHIN_S)
        assert retention.collect(store_of(folder, here), state) == retention.Plan()
        go_on.set()
        thread.join(WITHIN_S)
        assert [f.step for f in found] == [0]
        retention.collect(store_of(folder, here), state)
        assert listing(folder, here)[0] == "COMMITTED"


def test_a_damaged_manifest_stops_nothing_but_itself(here: Settings, folder: Path, state: JobState) -> None:
    """What a record that cannot be read names is not known, so nothing of it is deleted; the others go."""
    (broken,) = folder.glob("*/runs/*/*0/manifest.json")
    broken.write_bytes(b"{")
    with running(here, folder, 1) as job:
        job.restore()
        retention.collect(store_of(folder, here), state)
        assert objects(folder) == [0, 2, 3]
    with CheckpointManager(folder, settings=here) as reader, pytest.raises((NoCheckpoint, RestoreFailed)):
        reader.restore(step=0)


def test_another_store_is_left_alone(here: Settings, folder: Path, state: JobState, tmp_path: Path) -> None:
    """A collector that is given a store which is not the newest run's does nothing."""
    with uploading(here), running(here, tmp_path / "other", 1) as job:
        job.commit(lambda _: b"x", 0)
        assert retention.collect(store_of(folder, here), state) == retention.Plan()
        assert objects(folder) == [0, 1, 2, 3]
