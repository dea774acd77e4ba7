"""Damage in the store and a store that is away: detected, named, and an older checkpoint is used where that helps (I1, I3, I10)."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtr.checkpoint import records
from dtr.checkpoint.keeping.rebuild import rebuild
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.manifest import Manifest
from dtr.checkpoint.restoring import restore
from dtr.checkpoint.survey import survey
from dtr.config import Settings
from dtr.errors import IntegrityError, RestoreFailed, StoreUnavailable, UnsavedLineage
from dtr.state.job import JobState
from dtr.store import open_store
from dtr.store.local import LocalStore
from tests.ranks import Job, running
from tests.uploading import uploading

SIZE = 4096


def flip(path: Path) -> None:
    """One bit of the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def change(member: str, value: Any) -> Callable[[Path], None]:
    """Another value in the manifest, its checksum left as it was."""

    def act(path: Path) -> None:
        record = json.loads(path.read_text())
        record[member] = value
        path.write_text(json.dumps(record))

    return act


def declare(size_bytes: int) -> Callable[[Path], None]:
    """A well-formed manifest, checksum and all, that promises more than there is."""

    def act(path: Path) -> None:
        record = Manifest.parse(path.read_bytes()).encode()
        document = json.loads(record)
        for part in document["parts"]:
            part["size_bytes"] = size_bytes
        del document["checksum"]
        path.write_bytes(records.encode(document))

    return act


def _commit(job: Job, step: int) -> None:
    job.commit(lambda _: {"step": step, "x": bytes(SIZE)}, step)


@pytest.fixture
def store(settings: Settings, tmp_path: Path) -> Path:
    """Three checkpoints of two ranks, at steps 1, 2 and 3."""
    folder = tmp_path / "store"
    with uploading(settings), running(settings, folder, 2) as job:
        for step in (1, 2, 3):
            _commit(job, step)
    return folder


def newest(store: Path, name: str, step: int = 3) -> Path:
    (found,) = store.glob(f"*/runs/*/*{step}/{name}")
    return found


PARTS = {"bit flip": flip, "truncated": truncate, "longer": lengthen, "missing": Path.unlink}
MANIFESTS = {
    "bit flip": flip,
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "another step": change("step", 2),
    "unknown version": change("version", 9),
    "10**15 bytes declared": declare(5 << 40),
}


@pytest.mark.parametrize("damage", PARTS.values(), ids=PARTS)
def test_one_damaged_part_makes_all_ranks_use_the_one_before(
    settings: Settings, store: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 1's part of step 3 is damaged: both ranks restore step 2, and the log says why."""
    damage(newest(store, "part-00001-*"))
    with running(settings, store, 2) as job, caplog.at_level(logging.WARNING):
        assert [f.state["step"] for f in job.restore()] == [2, 2]
        assert "rank 1" in caplog.text
        assert "part-00001" in caplog.text
        state = job.ranks[0].session.state
        assert state.redis.hget(state.keys.meta, "latest").endswith("/2")


@pytest.mark.parametrize("damage", MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_no_checkpoint(settings: Settings, store: Path, damage: Callable[[Path], None]) -> None:
    """Whatever is wrong with it, nothing is allocated or read for it, and the one before is used; a listing shows it."""
    damage(newest(store, "manifest.json"))
    with CheckpointManager(store, settings=settings, rank=0, world_size=2) as reader:
        found = reader.restore()
        assert found is not None
        assert found.step == 2
        assert [listed.step for listed in reader.list() if listed.state == "COMMITTED"][-2:] == [2, 1]
    with running(settings, store, 2) as job:
        assert [f.step for f in job.restore()] == [2, 2]


def test_none_left_is_an_error_with_every_reason_even_for_a_fresh_start(settings: Settings, store: Path) -> None:
    """Checkpoints that cannot be read are no reason to start anew silently."""
    flip(newest(store, "part-00000-*", 1))
    newest(store, "part-00001-*", 2).unlink()
    truncate(newest(store, "manifest.json", 3))
    with running(settings, store, 2) as job:
        errors = job.restore(fresh=True)
        assert [type(e) for e in errors] == [RestoreFailed] * 2
        for words in ("/1: rank 0", "checksum", "/2: rank 1", "is missing", "/000"):
            assert words in str(errors[0])
    with CheckpointManager(store, settings=settings, rank=0, world_size=2) as reader:
        reader_found = reader.restore()
        assert reader_found is not None
        assert reader_found.step == 2, "rank 0's own part of step 2 is whole"


def test_a_restore_that_failed_can_be_repeated(settings: Settings, store: Path) -> None:
    """Once the objects are back (a mount that was missing), the same run restores them."""
    hidden = [(path, path.with_name(f"hidden-{path.name}")) for path in store.glob("*/runs/*/*/part-*")]
    for path, aside in hidden:
        path.rename(aside)
    with running(settings, store, 2) as job:
        assert [type(e) for e in job.restore()] == [RestoreFailed] * 2
        for path, aside in hidden:
            aside.rename(path)
        assert [f.step for f in job.restore()] == [3, 3]


def test_verify_names_each_damaged_object(settings: Settings, store: Path) -> None:
    """One error tells all that is wrong with a checkpoint."""
    flip(newest(store, "part-00000-*"))
    newest(store, "part-00001-*").unlink()
    with CheckpointManager(store, settings=settings) as reader:
        run = next(iter(survey(open_store(store).child(settings.job)).runs))
        with pytest.raises(IntegrityError, match=r"(?s)part-00000.*part-00001.*is missing"):
            reader.verify(run, 3)
        assert reader.verify(run, 2).parts == 2


def test_a_lost_run_record_does_not_lose_its_checkpoints(settings: Settings, store: Path) -> None:
    """With the index emptied and the record unreadable, the manifests still tell which run there was."""
    (record,) = store.glob("*/runs/*.json")
    truncate(record)
    state = JobState(settings.redis_url, settings.job)
    for key in state.redis.scan_iter(f"{state.keys.prefix}*"):
        state.redis.delete(key)
    with running(settings, store, 2) as job:
        assert [f.step for f in job.restore()] == [3, 3]
    state.close()


def test_rebuilding_twice_and_over_a_full_index_changes_nothing(settings: Settings, store: Path) -> None:
    """The index from the store is the index that the job had; filling it again is no news."""
    state = JobState(settings.redis_url, settings.job)
    keys = state.keys

    def seen() -> Any:
        ckpts = state.redis.zrange(keys.ckpts, 0, -1)
        facts = [state.redis.hmget(keys.ckpt(*_split(name)), ["state", "world_size", "size_bytes", "replicated"]) for name in ckpts]
        return ckpts, facts, state.redis.hgetall(keys.lineage), state.redis.hget(keys.meta, "latest")

    before = seen()
    rebuild(state, str(store))
    assert seen() == before
    state_id = state.redis.hget(keys.meta, "state_id")
    for key in [*state.redis.scan_iter(f"{keys.prefix}ckpt*"), keys.lineage]:
        state.redis.delete(key)
    state.redis.hdel(keys.meta, "latest", "run_counter")
    state.redis.delete(*state.redis.scan_iter(f"{keys.prefix}run:*"))
    for _ in range(2):
        assert rebuild(state, str(store), state_id=state_id) == 1
        assert seen() == before
        assert state.redis.hget(keys.meta, "run_counter") == "1"
    state.close()


def _split(name: str) -> tuple[str, int]:
    run, _, step = name.rpartition("/")
    return run, int(step)


def test_a_store_that_is_away_is_waited_for(settings: Settings, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that fails for a while is repeated: an older checkpoint would not be nearer, so none is taken instead."""
    real, failures = LocalStore.read_into, [2]

    def flaky(self: LocalStore, key: str, *rest: Any) -> int:
        if failures[0]:
            failures[0] -= 1
            raise StoreUnavailable("503")
        return real(self, key, *rest)

    monkeypatch.setattr(LocalStore, "read_into", flaky)
    with CheckpointManager(store, settings=settings, rank=0, world_size=2) as reader:
        found = reader.restore()
        assert found is not None
        assert found.step == 3
        monkeypatch.setattr(restore, "STORE_PATIENCE_S", 0.0)
        failures[0] = 10**6
        with pytest.raises(StoreUnavailable):
            reader.restore()


def test_a_store_that_lost_everything_is_no_fresh_start(settings: Settings, store: Path) -> None:
    """A mount that is missing shows an empty folder: Redis knows better, so neither a restore nor a first save begins anew silently."""
    store.rename(store.with_name("elsewhere"))
    with running(settings, store, 2) as job:
        errors = job.restore(fresh=True)
        assert [type(e) for e in errors] == [RestoreFailed] * 2
        assert "the store holds no record of it" in str(errors[0])
        with pytest.raises(UnsavedLineage, match="/3"):
            job.ranks[0].manager.save_async(b"x", 0)
        shutil.copytree(store.with_name("elsewhere"), store, dirs_exist_ok=True)
        assert [f.step for f in job.restore(fresh=True)] == [3, 3]


def test_a_store_that_cannot_be_listed_for_a_while_is_waited_for(settings: Settings, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """503s while the ranks look, agree and record: the restore takes longer, and nothing else."""
    counts = {"list": 0, "put": 0}

    def flaky(name: str) -> None:
        real = getattr(LocalStore, name)

        def method(self: LocalStore, *given: Any, **more: Any) -> Any:
            counts[name] += 1
            if counts[name] % 2:
                raise StoreUnavailable("503", unknown=name == "put")
            return real(self, *given, **more)

        monkeypatch.setattr(LocalStore, name, method)

    for name in ("list", "put"):
        flaky(name)
    with running(settings, store, 2) as job:
        assert [f.step for f in job.restore()] == [3, 3]
    assert counts["list"] > 1
    assert counts["put"] > 1
