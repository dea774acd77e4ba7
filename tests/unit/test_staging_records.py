"""What a slot's record may say, and what a scan makes of records that say something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.reclaim import free_torn, reclaim
from dtr.checkpoint.staging.slots import Found, SlotRecord, finish, look, open_for_reading, roots, scan
from dtr.errors import SlotUnavailable
from tests.staged import record, stage, staged


@pytest.fixture
def slot(tmp_path: Path) -> Found:
    """One complete part, its trainer still there."""
    arena = Arena(str(tmp_path), job="tenant/job", worker="w0", slots=1)
    stage(arena, b"a" * 5000, record(1, job="tenant/job"))
    (found,) = staged(tmp_path)
    return found


def test_a_record_comes_back_as_it_was() -> None:
    """Every field survives, and so does the whole through bytes."""
    full = replace(record(2**53 - 1), replicated="all", outcome="aborted", reason="no ‘room’\n", size_bytes=2**40)
    assert SlotRecord.parse(full.encode()) == full


def test_each_save_has_an_id_of_its_own() -> None:
    """Two saves of one step are told apart."""
    assert record(1).save != record(1).save


BAD: list[dict[str, Any]] = [
    {"step": -1}, {"step": 1.5}, {"step": True}, {"step": 2**53}, {"rank": 1}, {"world_size": 0}, {"job": "a/b/c"}, {"job": "../x"},
    {"run": "a b"}, {"worker": ""}, {"worker": "x" * 64}, {"incarnation": "../../etc"}, {"size_bytes": -1}, {"size_bytes": "5"},
    {"state": "READY"}, {"replicated": 1}, {"incarnation": "0123456789AB"}, {"v": 2}, {"surprise": 1}, {"store": None},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD, ids=str)
def test_what_is_not_a_record_is_none(change: dict[str, Any]) -> None:
    """A record with a wrong, extra or missing field is not half understood."""
    document = json.loads(record(1).encode())
    assert SlotRecord.parse(json.dumps(document).encode()) is not None
    assert SlotRecord.parse(json.dumps(document | change).encode()) is None
    for name in change:
        document.pop(name, None)
    assert SlotRecord.parse(json.dumps(document).encode()) is None or "surprise" in change


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_garbage_never_raises(text: bytes) -> None:
    """Whatever lies in the file, parsing ends without an error."""
    assert SlotRecord.parse(text) is None


def test_deep_nesting_never_raises() -> None:
    """10,000 levels are no record."""
    assert SlotRecord.parse(b"[" * 10_000) is None


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"boot_id": "another"}, "TORN"),
        ({"size_bytes": 4999}, "TORN"),
        ({"state": "COPYING"}, "TORN"),
        ({"state": "DONE"}, "DONE"),
    ],
    ids=["written before the machine booted", "of another size", "never finished", "finished"],
)
def test_only_a_complete_part_of_this_boot_counts(slot: Found, tmp_path: Path, change: dict[str, Any], kind: str) -> None:
    """Anything else is torn, cannot be read, and is freed by reclaim."""
    assert slot.record is not None
    slot.files.write(replace(slot.record, **change))
    (found, *_) = scan(str(tmp_path))
    assert found.kind == kind
    with pytest.raises(SlotUnavailable, match="no longer holds"), open_for_reading(slot):
        pass
    reclaim(str(tmp_path))
    assert scan(str(tmp_path))[0].kind in {"FREE", "DONE"}


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"v": 1}'])
def test_a_record_that_cannot_be_read_is_torn(slot: Found, tmp_path: Path, text: bytes) -> None:
    """A disk that lost the record at a crash does not keep the slot for ever."""
    Path(slot.files.record).write_bytes(text)
    assert scan(str(tmp_path))[0].kind == "TORN"
    reclaim(str(tmp_path))
    assert scan(str(tmp_path))[0].kind == "FREE"


def with_field(slot: Found, **more: Any) -> bytes:
    """The slot's record as a later version would write it."""
    assert slot.record is not None
    return json.dumps({**json.loads(slot.record.encode()), **more}).encode()


@pytest.mark.parametrize("more", [{"v": 2}, {"tier": "cold"}, {"v": 2, "step": "ten"}, {"tier": "cold", "state": "PINNED"}])
def test_a_record_of_another_version_is_left_alone(slot: Found, tmp_path: Path, more: dict[str, Any]) -> None:
    """A newer dtr may share the folder during an upgrade: its slot is neither read, reused nor reclaimed; or one with just a field more."""
    Path(slot.files.record).write_bytes(text := with_field(slot, **more))
    assert finish(slot, "committed")
    reclaim(str(tmp_path))
    assert scan(str(tmp_path))[0].kind == "FOREIGN"
    newcomer = Arena(str(tmp_path), job="tenant/job", worker="w0", policy="fail")
    taken = newcomer.acquire(5000)
    assert taken is not None
    assert taken.files != slot.files
    assert (Path(slot.files.record).read_bytes(), Path(slot.files.data).read_bytes()) == (text, b"a" * 5000)


@pytest.mark.parametrize("change", [{"step": "ten"}, {"state": "PINNED"}, {"rank": 3}, {"save": "a b"}])
def test_a_damaged_field_is_torn(slot: Found, tmp_path: Path, change: dict[str, Any]) -> None:
    """As is a record that lacks one."""
    whole = json.loads(with_field(slot))
    for document in ({**whole, **change}, {name: value for name, value in whole.items() if name not in change}):
        Path(slot.files.record).write_text(json.dumps(document))
        assert scan(str(tmp_path))[0].kind == "TORN"


def test_what_a_newer_one_wrote_meanwhile_is_not_freed(slot: Found) -> None:
    """Damaged at the scan, and by the time of the lock the record of another version: neither can be read, and only one is torn."""
    Path(slot.files.record).write_bytes(b"{")
    torn = look(slot.files)
    assert torn.kind == "TORN"
    Path(slot.files.record).write_bytes(text := with_field(slot, tier="cold"))
    free_torn([torn])
    assert Path(slot.files.record).read_bytes() == text


def test_a_slot_with_another_save_is_not_read_as_the_first(slot: Found) -> None:
    """An uploader that slept between its scan and its lock reads nothing rather than something else."""
    assert slot.record is not None
    slot.files.write(replace(slot.record, save="another"))
    with pytest.raises(SlotUnavailable), open_for_reading(slot):
        pass
    assert finish(slot, "committed"), "the save is gone, so there is nothing to finish"
    assert slot.files.read() is not None, "and the other save is untouched"


def test_finish_says_how_it_ended(slot: Found) -> None:
    """People see in the record what became of the save."""
    assert finish(slot, "aborted", "rank 1 departed")
    record = slot.files.read()
    assert record is not None
    assert (record.state, record.outcome, record.reason) == ("DONE", "aborted", "rank 1 departed")


def test_scan_of_what_is_not_there_is_empty(tmp_path: Path) -> None:
    """No staging folder, no slots; foreign files are ignored."""
    assert scan(str(tmp_path / "none")) == []
    (tmp_path / "job" / "w0").mkdir(parents=True)
    (tmp_path / "job" / "w0" / "slot-x.json").touch()
    (tmp_path / "job" / "w0" / "notes.txt").touch()
    (tmp_path / "file").touch()
    assert scan(str(tmp_path)) == []


@pytest.mark.parametrize("name", ["slot-0.json", "slot-0.lock"])
def test_what_cannot_be_opened_hides_nothing_else(slot: Found, tmp_path: Path, name: str) -> None:
    """A folder where a file should be, say: that slot is left alone, the others are scanned and reclaimed."""
    odd = tmp_path / "aaa" / "w0"
    odd.mkdir(parents=True)
    (odd / name).mkdir()
    if name == "slot-0.lock":
        (odd / "slot-0.json").write_bytes(record(1).encode())
    reclaim(str(tmp_path))
    assert [found.files for found in staged(tmp_path)] == [slot.files]
    assert scan(str(tmp_path))[0].kind == "FOREIGN"


def test_the_fallback_folder_is_scanned_as_well(slot: Found, tmp_path: Path) -> None:
    """What trainers staged on disk because shared memory was too small uploads like the rest."""
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".fallback").write_text(f"{tmp_path}\n")
    assert roots(str(elsewhere)) == [str(elsewhere), str(tmp_path)]
    assert [found.files for found in staged(elsewhere)] == [slot.files]
    (elsewhere / ".fallback").write_text("relative/path")
    assert roots(str(elsewhere)) == [str(elsewhere)]
