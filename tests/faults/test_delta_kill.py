"""Delta beside deaths: an uploader killed anywhere commits, sending only what is missing; a collector never takes what a commit names."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.checkpoint import parts
from dtr.checkpoint.delta import chunks as chunk_format
from dtr.checkpoint.delta.collection import collect_chunks
from dtr.checkpoint.delta.damage import note_damage
from dtr.checkpoint.delta.source import recipe_of
from dtr.checkpoint.keeping.catalogue import verify_parts
from dtr.errors import IntegrityError, ManifestInvalid
from dtr.store import durable
from tests.chunked import CHUNK_BYTES, Chunked, collecting, folder_of, same, uploading, weights
from tests.servers import RedisServer
from tests.uploads import outcome, wait_for_stop
from tests.waiting import eventually

UPLOADER = [
    "delta.before_intent", "delta.after_intent", "delta.after_condemned", "delta.mid_send", "upload.after_put", "upload.after_part_done",
]  # fmt: skip
COLLECTOR = ["chunks.before_condemn", "chunks.after_condemn", "chunks.before_delete", "chunks.mid_delete", "chunks.before_forget"]
SHARED = 8  # chunks of eight frozen tensors


@pytest.fixture
def training(valkey: RedisServer, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chunked]:
    monkeypatch.setitem(chunk_format.cut.__kwdefaults__, "chunk_bytes", CHUNK_BYTES)
    made = Chunked(valkey.url, job, tmp_path)
    yield made
    made.close()


def is_right(training: Chunked, *steps: int) -> None:
    """Every byte of these commits verifies, and reads as what was saved."""
    for step in steps:
        verify_parts(training.store, training.manifest(step))
        assert same(training.restored(step), weights(step, frozen=8))


def is_clean(training: Chunked, *steps: int) -> None:
    """After a collection there are the chunks that these commits name, and nothing else of ours (I9)."""
    collect_chunks(training.store)
    assert training.chunks() == set().union(*(training.named(step) for step in steps))
    assert training.condemned() == []
    assert training.damaged() == []
    assert len(training.recipes()) == len(steps)


@pytest.mark.parametrize("name", UPLOADER)
def test_a_killed_uploader_is_succeeded(training: Chunked, name: str) -> None:
    """What it had sent is used, what it had not is sent; the step commits, and nothing is left over."""
    training.commit_state(1, weights(1, frozen=8))
    training.stage_state(2, weights(2, frozen=8))
    status, _ = outcome(uploading(training, 2, fault=f"{name}=kill"))
    assert status == -signal.SIGKILL
    before = training.chunks()
    assert training.settled(2) == "COMMITTED"
    assert before <= training.chunks() == training.named(1) | training.named(2), "a chunk was sent twice"
    is_right(training, 1, 2)
    is_clean(training, 1, 2)


def test_killed_after_each_chunk(training: Chunked) -> None:
    """An uploader that dies at every chunk it sends gets there all the same, and is not given up: each attempt got further."""
    training.stage_state(1, weights(1, frozen=8))
    deaths = 0
    while True:
        status, word = outcome(uploading(training, 1, fault="delta.mid_send=kill"))
        if status == 0:
            if word in {"BUSY", "LATER"}:
                eventually(lambda: training.view().parts[0].lease_until_ms < training.state.server_now_ms(), what="the lapse of the lease")
                continue
            break
        deaths += 1
        assert deaths < 40
    assert training.state_of(1) == "COMMITTED"
    assert deaths >= 3
    assert len(training.chunks()) == len(training.named(1))


@pytest.mark.parametrize("name", COLLECTOR)
def test_a_killed_collector_is_succeeded(training: Chunked, name: str) -> None:
    """Whatever it had done, commits read well, the next collector finishes its work, and its list goes."""
    for step in (1, 2):
        training.commit_state(step, weights(step, frozen=8))
    training.retire(1)
    status, _ = outcome(collecting(training, fault=f"{name}=kill"))
    assert status == -signal.SIGKILL
    is_right(training, 2)
    training.commit_state(3, weights(3, frozen=8))
    is_right(training, 2, 3)
    is_clean(training, 2, 3)


def test_a_damaged_recipe_stops_the_collector(training: Chunked) -> None:
    """Nobody knows what it names, so nothing is deleted, and the collector says which it is."""
    for step in (1, 2):
        training.commit_state(step, weights(step, frozen=8))
    training.retire(1)
    before = training.chunks()
    path = folder_of(training) / training.manifest(2).parts[0].object
    spoil(path)
    with pytest.raises(ManifestInvalid, match=path.name):
        collect_chunks(training.store)
    assert training.chunks() == before
    assert training.condemned() == []


def test_an_aborted_step_leaves_no_chunks(training: Chunked) -> None:
    """What an upload sent for a step that was aborted is collected."""
    training.commit_state(1, weights(1, frozen=8))
    training.stage_state(2, weights(2, frozen=8))
    assert outcome(uploading(training, 2, fault="delta.mid_send=kill"))[0] == -signal.SIGKILL
    parts.fail(training.state, training.members[0].state_id, training.spec(2), training.fence(), "a test")
    assert training.settled(2) == "ABORTED"
    is_right(training, 1)
    is_clean(training, 1)


@pytest.mark.parametrize("point", ["delta.before_intent", "delta.after_intent", "delta.mid_send", "upload.after_put"])
def test_a_late_uploader_leaves_nothing(training: Chunked, point: str, tmp_path: Path) -> None:
    """Stopped until another has committed the step, it takes its own recipe back: else that would keep its chunks for ever."""
    training.commit_state(1, weights(1, frozen=8))
    training.stage_state(2, weights(2, frozen=8))
    late = uploading(training, 2, fault=f"{point}=stop@{tmp_path / 'once'}")
    wait_for_stop(late, eventually)
    assert training.settled(2) == "COMMITTED"
    os.kill(late.pid, signal.SIGCONT)
    status, _ = outcome(late)
    assert status == 0
    is_right(training, 1, 2)
    is_clean(training, 1, 2)


def test_what_a_killed_uploader_left_is_made_durable(training: Chunked, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have died between a chunk's link and the folder's fsync: its successor sees to that before it relies on the chunk."""
    training.stage_state(1, weights(1, frozen=8))
    assert outcome(uploading(training, 1, fault="delta.mid_send=kill"))[0] == -signal.SIGKILL
    left, sizes = training.chunks(), {path: path.stat().st_size for path in folder_of(training).glob("chunks/??/*")}
    real, synced = durable.sync_folder, set[str]()

    def noted(path: str) -> None:
        synced.add(path)
        real(path)

    monkeypatch.setattr(durable, "sync_folder", noted)
    assert training.settled(1) == "COMMITTED"
    assert left
    assert left <= training.named(1)
    assert {str((folder_of(training) / key).parent) for key in left} <= synced
    assert {path: path.stat().st_size for path in sizes} == sizes
    is_right(training, 1)
    is_clean(training, 1)


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_a_chunk_that_is_missing_is_stored_anew(training: Chunked, harm: str) -> None:
    """That a commit names a chunk does not say that it is there: the next save of the same bytes is whole."""
    training.commit_state(1, weights(1, frozen=8))
    key = frozen_chunk(training)
    path = folder_of(training) / key
    if harm == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    training.commit_state(2, weights(2, frozen=8))
    assert key not in training.named(2)
    assert len(training.named(1) & training.named(2)) == SHARED - 1
    is_right(training, 2)
    training.retire(1)
    is_clean(training, 2)


@pytest.mark.parametrize("reader", ["verify", "restore"])
def test_a_chunk_that_was_found_wrong_is_stored_anew(training: Chunked, reader: str) -> None:
    """Whoever reads wrong bytes puts it on record, so that the next save of the same bytes is whole; the record goes with the chunk."""
    training.commit_state(1, weights(1, frozen=8))
    key = frozen_chunk(training)
    spoil(folder_of(training) / key)
    training.commit_state(2, weights(2, frozen=8))
    assert key in training.named(2), "nobody has read it yet"
    reads = {"verify": lambda: verify_parts(training.store, training.manifest(2)), "restore": lambda: training.restored(2)}
    with pytest.raises(IntegrityError, match=key):
        reads[reader]()
    training.commit_state(3, weights(3, frozen=8))
    assert key not in training.named(3)
    assert len(training.named(2) & training.named(3)) == SHARED - 1
    is_right(training, 3)
    collect_chunks(training.store)
    assert len(training.damaged()) == 1, "the chunk is there, since a commit names it, and may not be used again"
    training.retire(1)
    training.retire(2)
    is_clean(training, 3)


def test_what_a_killed_uploader_left_may_be_wrong(training: Chunked) -> None:
    """Bytes of a dead uploader that were found wrong are sent again by its successor, too."""
    training.stage_state(1, weights(1, frozen=8))
    assert outcome(uploading(training, 1, fault="upload.after_put=kill"))[0] == -signal.SIGKILL
    key = min(training.chunks())
    spoil(folder_of(training) / key)
    note_damage(training.store, key)
    assert training.settled(1) == "COMMITTED"
    assert key not in training.named(1)
    is_right(training, 1)
    is_clean(training, 1)


def frozen_chunk(training: Chunked) -> str:
    """A chunk that every save will name."""
    (part,) = training.manifest(1).parts
    return recipe_of(training.store, part).chunks[0].key


def spoil(path: Path) -> None:
    """Other bytes of the same number."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
