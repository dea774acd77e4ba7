"""Retention on a real store and index: what goes, what stays, and what a collector that died, slept or ran twice leaves behind."""

from __future__ import annotations

import itertools
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

from dtr.checkpoint import records
from dtr.checkpoint.keeping import pins
from dtr.checkpoint.keeping.collect import Collected, Scene, collect, look, remove
from dtr.checkpoint.keeping.rebuild import rebuild
from dtr.checkpoint.keeping.retention import Policy
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.restoring.source import PieceSource
from dtr.checkpoint.survey import manifest_key, pin_key, read_manifest
from dtr.checkpoint.uploading.reconcile import Reconciler
from dtr.checkpoint.uploading.upload import Limits, Uploader
from dtr.config import Settings
from dtr.errors import CheckpointProtected, NoCheckpoint, RestoreFailed
from dtr.membership import open_state
from dtr.state.job import JobState
from dtr.store import Store, open_store
from tests.ranks import running
from tests.uploading import uploading
from tests.uploads import is_stopped
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
        patient = Policy(keep_last=2, grace_ms=3_600_000)
        todo = collect(store_of(folder, here), state, policy=patient)
        assert [step for _, step in todo.plan.retire] == [0, 1]
        assert [(done.step, done.act) for done in todo.done] == [(0, "retired"), (1, "retired")]
        assert objects(folder) == [0, 1, 2, 3]
        assert listing(folder, here)[0] == "RETIRED"
        with CheckpointManager(folder, settings=here) as reader, pytest.raises(NoCheckpoint):
            reader.restore(step=0)
        again = collect(store_of(folder, here), state, policy=patient).plan
        assert ([step for _, step in again.retire], [step for _, step in again.sweep]) == ([], [0, 1])
        assert objects(folder) == [0, 1, 2, 3]
        collect(store_of(folder, here), state)
        assert objects(folder) == [2, 3]


COLLECT = """
import sys
from dtr.checkpoint.keeping.collect import collect
from dtr.checkpoint.keeping.rebuild import rebuild
from dtr.checkpoint.keeping.retention import Policy
from dtr.membership import open_state
from dtr.state.job import JobState
from dtr.store import open_store
url, job, folder = sys.argv[1:]
print(collect(open_store(folder).child(job), JobState(url, job), policy=Policy(keep_last=2, grace_ms=0)).done)
"""


def collector(settings: Settings, folder: Path, fault: str, *, text: str = COLLECT) -> subprocess.Popen[str]:
    """A collector in a process of its own, with a fault on its way."""
    env = {**os.environ, "DTR_TESTING": "1", "DTR_FAILPOINT": fault}
    command = [sys.executable, "-c", text, settings.redis_url, settings.job, str(folder)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_collector_killed_anywhere_is_succeeded(here: Settings, folder: Path, state: JobState) -> None:
    """Killed at each step of its work in turn: what is listed as committed verifies, and its successor leaves nothing behind."""
    steps = ["after_plan", "after_retire", "after_retiring", "before_tombstone", "after_tombstone", "mid_delete", "before_forget"]
    with uploading(replace(here, keep_last=0)), running(replace(here, keep_last=0), folder, 1) as job:
        job.restore()
        for step in range(4, 10):
            job.commit(lambda _: b"z" * 100, step)
        for step in steps:
            child = collector(here, folder, f"retention.{step}=kill")
            assert (child.communicate(timeout=60), child.returncode)[1] == -signal.SIGKILL, step
            with CheckpointManager(folder, settings=here) as reader:
                for listed in reader.list():
                    if listed.state == "COMMITTED":
                        reader.verify(listed.run, listed.step)
        collect(store_of(folder, here), state, policy=Policy(keep_last=2, grace_ms=0))
        assert objects(folder) == [3, 8, 9], "the two newest, and what the run continues"
        assert not list(folder.glob("*/runs/*/*/retiring.json"))
        assert state.redis.zcard(state.keys.ckpts) == 3
        assert job.restore()[0].step == 9


SWEEP = """
import sys
from dtr.checkpoint.keeping.collect import look
from dtr.checkpoint.keeping.orphans import sweep
from dtr.checkpoint.keeping.retention import Policy
from dtr.state.job import JobState
from dtr.store import open_store
url, job, folder = sys.argv[1:]
store, state = open_store(folder).child(job), JobState(url, job)
print(sweep(store, state, look(state, store, Policy(grace_ms=0))))
"""


def test_a_sweep_killed_anywhere_is_succeeded(here: Settings, folder: Path, state: JobState) -> None:
    """Killed after its abort record and after each deletion: the commits stay whole, and its successor deletes the rest, nothing else."""
    store = store_of(folder, here)
    run = next(path.name for path in folder.glob("*/runs/*") if path.is_dir())
    with running(here, folder, 1) as job:
        assert job.restore(step=2)[0].step == 2
        left, before = manifest_key(run, 40), set(store.list())
        strays = [f"{left.rpartition('/')[0]}/part-0000{n}-{'0' * 12}-dead.safetensors" for n in range(3)]
        for key in strays:
            store.put(key, b"x")
        for point, gone in (("after_abort", 0), ("mid_delete", 1), ("mid_delete", 2)):
            child = collector(here, folder, f"orphans.{point}=kill", text=SWEEP)
            assert (child.communicate(timeout=60), child.returncode)[1] == -signal.SIGKILL, point
            assert before | {left} <= set(store.list())
            assert len(set(store.list()) & set(strays)) == len(strays) - gone
        assert read_manifest(store, run, 40).decision == "abort"
        with CheckpointManager(folder, settings=here) as reader:
            assert [reader.verify(run, step).parts for step in range(4)] == [1] * 4
        child = collector(here, folder, "", text=SWEEP)
        assert (child.communicate(timeout=60), child.returncode)[1] == 0
        assert set(store.list()) == before | {left}


def wipe(state: JobState) -> None:
    """Redis loses this job."""
    state.redis.delete(*state.redis.scan_iter(f"{state.keys.prefix}*"))


def test_a_collector_that_slept_takes_nothing_that_was_chosen_since(here: Settings, folder: Path, state: JobState) -> None:
    """It had retired step 0 in a Redis that was then emptied and rebuilt; a new run continues step 0. Awake again, it gives way."""
    child = collector(here, folder, "retention.after_retire=stop")
    eventually(lambda: is_stopped(child.pid), what="a collector that sleeps")
    wipe(state)
    with running(here, folder, 1) as job:
        assert job.restore(step=0)[0].step == 0
        os.kill(child.pid, signal.SIGCONT)
        out, err = child.communicate(timeout=60)
        assert "Redis lost its state meanwhile" in out, err
        assert listing(folder, here) == dict.fromkeys((0, 1, 2, 3), "COMMITTED") | dict.fromkeys((1, 2, 3), "ABANDONED")
        assert objects(folder) == [0, 1, 2, 3]
        assert not list(folder.glob("*/runs/*/*/retiring.json"))
        assert job.restore()[0].step == 0


def test_what_a_sleeping_collector_has_announced_is_nobodys_base(here: Settings, folder: Path, state: JobState) -> None:
    """It sleeps between its last question and the tombstone while Redis is emptied and rebuilt: the new index has step 0 as retired."""
    child = collector(here, folder, "retention.before_tombstone=stop")
    eventually(lambda: is_stopped(child.pid), what="a collector that sleeps")
    wipe(state)
    with running(here, folder, 1) as job:
        (refused,) = job.restore(step=0)
        assert isinstance(refused, (NoCheckpoint, RestoreFailed))
    with running(here, folder, 1, names="v") as job:
        assert job.restore()[0].step == 3
        os.kill(child.pid, signal.SIGCONT)
        child.communicate(timeout=60)
        collect(store_of(folder, here), state)
        assert objects(folder) == [2, 3]


def test_a_pin_outlives_redis(here: Settings, folder: Path, state: JobState) -> None:
    """It is in the store: an index that is filled anew has it, one that lost it gets it back, and no rule lets the checkpoint go."""
    store = store_of(folder, here)
    run = next(path.name for path in folder.glob("*/runs/*") if path.is_dir())
    pins.pin(state, store, run, 0, "for the paper")
    wipe(state)
    with running(here, folder, 1) as job:
        job.restore()
        key = state.keys.ckpt(run, 0)
        assert state.redis.hget(key, "pinned") == "for the paper"
        state.redis.hdel(key, "pinned")
        done = {one.step: one.act for one in collect(store, state).done}
        assert done == {0: "kept", 1: "deleted"}
        assert state.redis.hget(key, "pinned") == "for the paper"
        assert ("pinned: for the paper",) in [one.why for one in collect(store, state).plan.keep]
        assert pins.unpin(state, store, run, 0)
        assert not pins.unpin(state, store, run, 0)
        collect(store, state)
        assert objects(folder) == [2, 3]


def test_a_pin_that_redis_lost_keeps_to_the_last(here: Settings, folder: Path, state: JobState) -> None:
    """The collector has asked Redis for the last time when it learns of the pin from the store: the commit stays, and Redis hears of it."""
    store = store_of(folder, here)
    run = next(path.name for path in folder.glob("*/runs/*") if path.is_dir())
    child = collector(here, folder, "retention.before_tombstone=stop@" + str(folder / "once"))
    eventually(lambda: is_stopped(child.pid), what="a collector that sleeps")
    store.put(pin_key(run, 0), records.encode({"run": run, "step": 0, "note": "for the paper", "pinned_at": 1}))
    os.kill(child.pid, signal.SIGCONT)
    out, err = child.communicate(timeout=60)
    assert "why='pinned'" in out, err
    assert listing(folder, here) == {3: "COMMITTED", 2: "COMMITTED", 1: "RETIRED", 0: "COMMITTED"}
    assert state.redis.hmget(state.keys.ckpt(run, 0), ["pinned", "retired_at"]) == ["for the paper", None]
    assert not list(folder.glob("*/runs/*/*/retiring.json"))


def test_what_late_uploaders_left_goes_with_its_step(here: Settings, folder: Path, state: JobState) -> None:
    """A recipe that no manifest names would keep its chunks for ever: it goes when its step is retired, and what is not ours stays."""
    store = store_of(folder, here)
    run = next(path.name for path in folder.glob("*/runs/*") if path.is_dir())
    step = manifest_key(run, 0).rpartition("/")[0]
    store.put(f"{step}/part-00000-{'0' * 12}-dead-beef.chunks.json", b"a late one")
    store.put(f"{step}/notes.txt", b"a person's")
    collect(store, state, policy=Policy(keep_last=2, grace_ms=0))
    assert objects(folder) == [2, 3]
    assert list(store.list(step)) == [manifest_key(run, 0), f"{step}/notes.txt"]


def test_a_rebuilt_index_is_enough_to_let_go(here: Settings, folder: Path, state: JobState) -> None:
    """Before any trainer starts, for a person: an uploader knows no rules, for those of the run went with Redis, and lets nothing go."""
    store = store_of(folder, here)
    run = next(path.name for path in folder.glob("*/runs/*") if path.is_dir())
    wipe(state)
    open_state(state)
    assert look(state, store) == "no run of this job has begun since Redis was filled: the rules come with the next run"
    rebuild(state, f"file://{folder}")
    assert state.redis.hget(state.keys.meta, "last_run") == run
    assert look(state, store) == f"the rules of run {run} went with what Redis lost: they come with the next run"
    assert collect(store, state) == Collected()
    assert isinstance(look(state, store, default=Policy(keep_last=2)), Scene)
    with pytest.raises(CheckpointProtected, match="newest"):
        remove(store, state, [(run, 3)], policy=Policy(grace_ms=0))
    assert remove(store, state, [(run, 0)], policy=Policy(grace_ms=0))[0].act == "deleted"
    assert [(one.step, one.act) for one in collect(store, state, policy=Policy(keep_last=2, grace_ms=0)).done] == [(1, "deleted")]
    with running(here, folder, 1) as job:
        assert job.restore()[0].step == 3
        newer = state.redis.hget(state.keys.meta, "last_run")
        rebuild(state, f"file://{folder}")
        assert state.redis.hget(state.keys.meta, "last_run") == newer != run


def test_a_pin_killed_half_way_keeps(here: Settings, folder: Path, state: JobState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between Redis and the store, in both directions, the checkpoint stays; the same call again finishes."""
    store = store_of(folder, here)
    run = next(path.name for path in folder.glob("*/runs/*") if path.is_dir())
    monkeypatch.setenv("DTR_TESTING", "1")
    patient = Policy(keep_last=2, grace_ms=0)
    for fault, call in (("pin.after_index", pins.pin), ("unpin.after_store", pins.unpin)):
        monkeypatch.setenv("DTR_FAILPOINT", f"{fault}=raise")
        with pytest.raises(OSError, match=fault):
            call(state, store, run, 0)
        assert (run, 0) not in collect(store, state, policy=patient, dry_run=True).plan.retire
        monkeypatch.delenv("DTR_FAILPOINT")
        call(state, store, run, 0)
    assert (run, 0) in collect(store, state, policy=patient, dry_run=True).plan.retire


def test_the_best_stay_by_what_the_trainer_said(here: Settings, tmp_path: Path, state: JobState) -> None:
    """Metrics go from save_async through slot, Redis and manifest to the rule; a rebuilt index knows them too."""
    chosen = replace(here, keep_last=1, keep_best="loss:min:1")
    losses = [3.0, 0.5, float("nan"), 2.0, 4.0]
    with uploading(chosen), running(chosen, tmp_path / "store", 2) as job:
        for step, loss in enumerate(losses):
            handles = job.each(lambda rank, at=step, of=loss: rank.manager.save_async(b"x", at, metrics={"loss": of + rank.rank}))
            for handle in handles:
                handle.durable.result(WITHIN_S)
        eventually(lambda: objects(tmp_path / "store") == [1, 4], what="retention")
        run = job.ranks[0].session.run.id
    assert read_manifest(store_of(tmp_path / "store", here), run, 1).metrics == {"loss": 0.5}
    wipe(state)
    with running(chosen, tmp_path / "store", 2) as job:
        job.restore()
        found = collect(store_of(tmp_path / "store", here), state, dry_run=True).plan
        assert {one.step: one.why[-1] for one in found.keep}[1] == "loss 0.5: one of the 1 lowest"


def test_a_person_removes_one(here: Settings, folder: Path, state: JobState) -> None:
    """With the readers' grace; never the newest, a pinned one, the base, or what is no commit, and then none of the others either."""
    store = store_of(folder, here)
    run = next(path.name for path in folder.glob("*/runs/*") if path.is_dir())
    patient = Policy(grace_ms=3_600_000)
    pins.pin(state, store, run, 1)
    for name, why in (((run, 3), "newest"), ((run, 1), "pinned"), ((run, 77), "only a commit"), (("0009-none", 1), "only a commit")):
        with pytest.raises((CheckpointProtected, NoCheckpoint), match=why):
            remove(store, state, [(run, 0), name])
    assert set(listing(folder, here).values()) == {"COMMITTED"}
    (done,) = remove(store, state, [(run, 0)], policy=patient)
    assert (done.act, done.left_s > 3500) == ("retired", True)
    assert objects(folder) == [0, 1, 2, 3]
    assert listing(folder, here)[0] == "RETIRED"
    assert remove(store, state, [(run, 0)])[0].act == "deleted", "again, with the run's own grace of none"
    assert objects(folder) == [1, 2, 3]


def test_it_goes_on_without_a_commit(here: Settings, folder: Path, state: JobState) -> None:
    """The uploaders' own round finishes what waits for its grace, once an interval whoever asks."""
    store = store_of(folder, here)
    collect(store, state, policy=Policy(keep_last=2, grace_ms=3_600_000))
    state.redis.hset(state.keys.run(state.redis.hget(state.keys.meta, "last_run")), mapping={"keep_last": 2, "grace_ms": 0})
    uploader = Uploader(redis_url=here.redis_url, staging=here.staging, host="h", limits=Limits(collect_interval_s=3600))
    assert [uploader.collect(here.job) for _ in range(2)] == ["COLLECTED 2", "EARLY"]
    uploader.close()
    assert objects(folder) == [2, 3]


class Hours:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    wall = monotonic

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_the_reconciler_asks_for_it_now_and_then(here: Settings, folder: Path) -> None:
    """For each job once an interval, the first time somewhere within it; a message with the job's name is all that it takes."""
    clock = Hours()
    reconciler = Reconciler(redis_url=here.redis_url, staging=here.staging, host="h", collect_interval_s=100.0, clock=clock)
    asked = []
    for _ in range(41):  # from 0 s to 400 s; the first turn falls on one of 10, 20, ..., 100 s
        asked.append(reconciler.look().collects.count(here.job))
        clock.sleep(10.0)
    reconciler.close()
    assert sum(asked) == 4
    turns = [n for n, word in enumerate(asked) if word]
    assert [later - earlier for earlier, later in itertools.pairwise(turns)] == [10, 10, 10]


def test_two_collectors_at_once_are_as_one(here: Settings, folder: Path, state: JobState) -> None:
    """They meet in every step and neither errs; what stays is whole."""
    errors: list[BaseException] = []

    def collect_too() -> None:
        mine = JobState(here.redis_url, here.job)
        try:
            collect(store_of(folder, here), mine)
        except Exception as exc:
            errors.append(exc)
        finally:
            mine.close()

    with running(here, folder, 1) as job:
        job.restore()
        threads = [threading.Thread(target=collect_too) for _ in range(4)]
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

        read_into = PieceSource.read_into

        def slow(source: PieceSource, *given: Any) -> None:
            reading.set()
            assert go_on.wait(WITHIN_S)
            read_into(source, *given)

        monkeypatch.setattr(PieceSource, "read_into", slow)
        thread = threading.Thread(target=lambda: found.extend(job.restore(step=0)), daemon=True)
        thread.start()
        assert reading.wait(WITHIN_S)
        assert collect(store_of(folder, here), state) == Collected()
        why = look(state, store_of(folder, here))
        assert isinstance(why, str)
        assert why.endswith("it neither restored nor saved; retention waits for a run that does")
        go_on.set()
        thread.join(WITHIN_S)
        assert [f.step for f in found] == [0]
        collect(store_of(folder, here), state)
        assert listing(folder, here)[0] == "COMMITTED"


def test_a_damaged_manifest_stops_nothing_but_itself(here: Settings, folder: Path, state: JobState) -> None:
    """What a record that cannot be read names is not known, so nothing of it is deleted; the others go."""
    (broken,) = folder.glob("*/runs/*/*0/manifest.json")
    broken.write_bytes(b"{")
    with running(here, folder, 1) as job:
        job.restore()
        collect(store_of(folder, here), state)
        assert objects(folder) == [0, 2, 3]
    with CheckpointManager(folder, settings=here) as reader, pytest.raises((NoCheckpoint, RestoreFailed)):
        reader.restore(step=0)


def test_another_store_is_left_alone(here: Settings, folder: Path, state: JobState, tmp_path: Path) -> None:
    """A collector that is given a store which is not the newest run's does nothing."""
    with uploading(here), running(here, tmp_path / "other", 1) as job:
        job.commit(lambda _: b"x", 0)
        assert collect(store_of(folder, here), state) == Collected()
        assert objects(folder) == [0, 1, 2, 3]
