"""A slot as the source of a part: held while it is read, never another save's bytes, whether or not its save is over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.checkpoint import checksum
from dtr.checkpoint.restoring.fetch import read_bytes
from dtr.checkpoint.restoring.nearby import of_slot
from dtr.checkpoint.restoring.source import Pieces
from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.locks import try_lock
from dtr.checkpoint.staging.memory import mapped_here
from dtr.checkpoint.staging.slots import Found, finish
from dtr.errors import ChecksumMismatch, SlotUnavailable
from tests.staged import finished, record, stage, staged, trainer
from tests.waiting import eventually

DATA = bytes(range(256)) * 1000
PIECES = Pieces(size_bytes=len(DATA), piece_bytes=50_000, crcs=tuple(checksum.pieces_of(DATA, 50_000)), whole=checksum.crc_of(DATA))


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena(str(tmp_path), job="job", worker="w0", policy="fail")
    yield made
    made.close()


@pytest.fixture
def slot(arena: Arena, tmp_path: Path) -> Found:
    stage(arena, DATA, record())
    (found,) = staged(tmp_path)
    return found


@pytest.mark.parametrize("over", [False, True])
def test_its_bytes_are_read_while_they_last(slot: Found, over: bool) -> None:
    """Before its save is committed, and afterwards until the slot is used again."""
    if over:
        assert finish(slot, "COMMITTED")
    source = of_slot(slot, PIECES)
    assert bytes(read_bytes(source)) == DATA
    assert try_lock(slot.files.lock) is None, "nobody may change it meanwhile"
    source.close()
    hold = try_lock(slot.files.lock)
    assert hold is not None
    hold.release()


def test_another_save_in_the_slot_is_not_taken_for_it(slot: Found, arena: Arena) -> None:
    """The slot was reused between the look and the read: an error that says so, and the part is read elsewhere."""
    assert finish(slot, "COMMITTED")
    for step in (2, 3):
        stage(arena, bytes(len(DATA)), record(step))
    with pytest.raises(SlotUnavailable) as failed:
        read_bytes(of_slot(slot, PIECES))
    assert failed.value.facts["where"] == "slot"


def test_a_slot_that_is_being_written_is_not_waited_for(slot: Found) -> None:
    """Its trainer has it exclusively."""
    hold = try_lock(slot.files.lock)
    assert hold is not None
    with hold, pytest.raises(SlotUnavailable):
        read_bytes(of_slot(slot, PIECES))


def test_a_slot_whose_folder_went_is_unavailable(slot: Found, arena: Arena) -> None:
    """Its trainer ended: no FileNotFoundError comes out of a restore."""
    assert finish(slot, "COMMITTED")
    arena.close()
    with pytest.raises(SlotUnavailable):
        read_bytes(of_slot(slot, PIECES))


def test_bytes_that_changed_are_found(slot: Found) -> None:
    """Whoever wrote past the lock: the manifest's checksum tells."""
    with open(slot.files.data, "r+b") as file:
        file.seek(60_000)
        file.write(b"?")
    with pytest.raises(ChecksumMismatch, match="50000 to 100000"):
        read_bytes(of_slot(slot, PIECES))


def test_its_own_trainer_reads_what_it_has_mapped(slot: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """No system call per block, and no page met anew; a file that was replaced is not read from the old mapping."""
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("the file was read"))
    source = of_slot(slot, PIECES)
    assert bytes(read_bytes(source)) == DATA
    source.close()
    os.rename(slot.files.data, f"{slot.files.data}.old")
    Path(slot.files.data).write_bytes(DATA)
    assert mapped_here(slot.files.data, len(DATA)) is None


def test_another_process_reads_the_file(tmp_path: Path) -> None:
    """A trainer's slot, seen from elsewhere on its host."""
    child = trainer(tmp_path, size_bytes=100_000)
    try:
        eventually(lambda: len(staged(tmp_path)) == 1, what="a staged slot")
        (found,) = staged(tmp_path)
        data = b"A" * 100_000
        pieces = Pieces(size_bytes=len(data), piece_bytes=50_000, crcs=tuple(checksum.pieces_of(data, 50_000)), whole=checksum.crc_of(data))
        source = of_slot(found, pieces)
        assert bytes(read_bytes(source)) == data
        source.close()
    finally:
        finished(child, kill=True)
