"""Staging under kills, stops and full folders: a part is complete or torn, never in between, and nothing leaks (I1, I9, I12)."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.reclaim import reclaim
from dtr.checkpoint.staging.slots import finish, open_for_reading, roots, scan
from dtr.errors import NoFreeSlot, StagingFull
from tests.staged import finished, record, stage, staged, trainer
from tests.waiting import eventually

SIZE = 200_000
FAILPOINTS = [
    "stage.before_record",
    "stage.after_copying_record",
    "stage.mid_copy",
    "stage.before_staged_record",
    "stage.after_staged_record",
]


@pytest.mark.parametrize("name", ["stage.after_claim", *FAILPOINTS])
def test_a_killed_trainer_leaves_a_part_or_nothing(tmp_path: Path, name: str) -> None:
    """Before the STAGED record there is no part; from then on it is whole; the memory of the rest comes back."""
    child = trainer(tmp_path, fault=f"{name}=kill")
    assert finished(child) == -signal.SIGKILL
    complete = staged(tmp_path)
    if name == "stage.after_staged_record":
        with open_for_reading(complete[0]) as reading:
            assert bytes(reading.buffer) == b"A" * SIZE
        assert finish(complete[0], "committed")
    else:
        assert complete == []
    reclaim(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_bytes_that_somebody_removed_are_not_replaced_by_others(tmp_path: Path) -> None:
    """Given a staged slot without its bytes, when the next save takes it and is killed as soon as it has its size, no part is there."""
    child = trainer(tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == "staged 0\n"
    finished(child, kill=True)
    (found,) = staged(tmp_path)
    os.unlink(found.files.data)
    assert finished(trainer(tmp_path, fault="stage.after_claim=kill")) == -signal.SIGKILL
    assert staged(tmp_path) == []


@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_part_that_was_staged_before_stays_whole(tmp_path: Path, name: str) -> None:
    """A kill while the second slot fills, or while a finished slot fills again, touches no complete part."""
    child = trainer(tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == "staged 0\n"
    finished(child, kill=True)
    assert finished(trainer(tmp_path, fault=f"{name}=kill")) == -signal.SIGKILL
    first = staged(tmp_path)[0]
    with open_for_reading(first) as reading:
        assert bytes(reading.buffer) == b"A" * SIZE
    survivor = Arena(str(tmp_path), job="job", worker="w0", policy="fail")
    if name != "stage.after_staged_record":
        stage(survivor, b"z" * SIZE, record(9))
    else:
        with pytest.raises(NoFreeSlot):
            survivor.acquire(SIZE)
    assert bytes(Path(first.files.data).read_bytes()) == b"A" * SIZE
    survivor.close()


def test_a_stopped_trainer_keeps_its_slot(tmp_path: Path) -> None:
    """COPYING under a held lock is not torn, however long it takes; once continued, it is staged as if nothing had been."""
    child = trainer(tmp_path, fault="stage.mid_copy=stop")
    try:
        eventually(lambda: [f.kind for f in scan(str(tmp_path))] == ["COPYING"] and stopped(child.pid), what="a stopped copy")
        reclaim(str(tmp_path))
        other = Arena(str(tmp_path), job="job", worker="w0", slots=2, policy="fail")
        stage(other, b"o" * SIZE, record(7))
        other.close()
        assert [f.kind for f in scan(str(tmp_path))].count("COPYING") == 1
        os.kill(child.pid, signal.SIGCONT)
        assert child.stdout is not None
        assert child.stdout.readline() == "staged 0\n"
        for found in staged(tmp_path):
            with open_for_reading(found) as reading:
                assert set(bytes(reading.buffer)) == ({ord("A")} if found.record and found.record.step == 0 else {ord("o")})
    finally:
        finished(child, kill=True)


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


READER = """
import sys
from dtr.checkpoint.staging.slots import open_for_reading
from tests.staged import staged
with open_for_reading(staged(sys.argv[1])[0]) as reading:
    print("reading", flush=True)
    sys.stdin.read(1)
    print(bytes(reading.buffer) == b"a" * len(reading.buffer), flush=True)
"""


def test_a_stopped_uploader_keeps_what_it_reads(tmp_path: Path) -> None:
    """While it holds the shared lock its slot is neither finished nor reused, so what it sends late is what it began to send."""
    arena = Arena(str(tmp_path), job="job", worker="w0", policy="fail")
    stage(arena, b"a" * SIZE, record(1))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == "reading\n"
    os.kill(child.pid, signal.SIGSTOP)
    (found,) = staged(tmp_path)
    assert not finish(found, "committed")
    stage(arena, b"b" * SIZE, record(2))
    with pytest.raises(NoFreeSlot):
        arena.acquire(SIZE)
    os.kill(child.pid, signal.SIGCONT)
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "True\n"
    finished(child)
    assert finish(found, "committed")
    stage(arena, b"c" * SIZE, record(3))
    arena.close()


# --- full folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    folder = tmp_path / "memory"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def warmed(arena: Arena) -> None:
    """Return when no slot is made in the background any more."""
    eventually(lambda: arena._warming is not None and not arena._warming.is_alive(), what="the background slot")


def test_too_little_shared_memory_falls_back_to_disk(small_memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Docker's small /dev/shm does not stop a save of 16 MiB: it goes to disk, with the numbers, where the uploader looks as well."""
    arena = Arena(str(small_memory), job="job", worker="w0", fallback=str(tmp_path / "disk"))
    with caplog.at_level(logging.WARNING):
        stage(arena, b"a" * (16 << 20), record(1))
    assert f"holds {4 << 20} bytes and two slots need {32 << 20}" in caplog.text
    assert str(tmp_path / "disk") in caplog.text
    assert roots(str(small_memory)) == [str(small_memory), str(tmp_path / "disk")]
    (found,) = staged(small_memory)
    with open_for_reading(found) as reading:
        assert len(reading.buffer) == 16 << 20
    assert finish(found, "committed")
    arena.close()
    assert reclaim(str(small_memory)) == 0
    assert [name for name in os.listdir(tmp_path / "disk") if not name.startswith(".")] == []


def test_ranks_that_find_no_room_in_memory_go_to_disk(small_memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Memory for two or three slots, and five ranks: those that come first have theirs there, the others on disk, and nobody starves."""
    size_bytes, disk = 5 << 18, tmp_path / "disk"  # three slots are 3.75 MiB
    arenas = [Arena(str(small_memory), job="job", worker=f"w{n}", fallback=str(disk), policy="fail") for n in range(5)]

    with caplog.at_level(logging.WARNING):
        for n, arena in enumerate(arenas):
            stage(arena, bytes([65 + n]) * size_bytes, record(1, worker=f"w{n}"))
            warmed(arena)
    assert f"holds {4 << 20} bytes and two slots need {2 * size_bytes}" in caplog.text
    found = staged(small_memory)
    assert sorted(one.record.worker for one in found if one.record) == [f"w{n}" for n in range(5)]
    assert sum(one.files.data.startswith(str(small_memory)) for one in found) == 2, "the first rank's second slot is the third in memory"
    for one in found:
        assert finish(one, "committed")
    stage(arenas[4], b"f" * size_bytes, record(2, worker="w4"))
    assert [one.files.data.startswith(str(disk)) for one in staged(small_memory)] == [True]
    for arena in arenas:
        arena.close()


def test_a_state_that_outgrew_memory_goes_to_disk(small_memory: Path, tmp_path: Path) -> None:
    """Its free slots in memory are given up for the others, and what still waits there stays."""
    (small_memory / "others").write_bytes(b"x" * (1 << 20))
    arena = Arena(str(small_memory), job="job", worker="w0", fallback=str(tmp_path / "disk"), policy="fail", slots=3)
    stage(arena, b"a" * (1 << 19), record(1))
    stage(arena, b"b" * (1 << 19), record(2))
    assert finish(next(one for one in staged(small_memory) if one.record and one.record.step == 1), "committed")
    warmed(arena)
    (small_memory / "more").write_bytes(b"x" * (1 << 20))
    stage(arena, b"c" * (2 << 20), record(3))
    where = {one.record.step: one.files.folder for one in staged(small_memory) if one.record}
    assert where == {2: f"{small_memory}/job/w0", 3: f"{tmp_path}/disk/job/w0"}
    assert sum(path.stat().st_size for path in (small_memory / "job" / "w0").glob("*.safetensors")) == 1 << 19
    arena.close()


def test_a_full_folder_fails_the_save_with_the_numbers(small_memory: Path) -> None:
    """Shared memory that is large enough but full, with a budget for it, so that disk was not asked for: nothing is written, nothing is
    killed, and the next save works once there is room.
    """
    (small_memory / "others").write_bytes(b"x" * (3 << 20))
    arena = Arena(str(small_memory), job="job", worker="w0", policy="fail", budget_bytes=4 << 20)
    with pytest.raises(StagingFull, match="needs 1572864 bytes more") as error:
        arena.acquire(3 << 19)
    assert error.value.needed_bytes == 3 << 19
    assert 0 < error.value.free_bytes <= 1 << 20
    (small_memory / "others").unlink()
    stage(arena, b"a" * (3 << 19), record(1))
    arena.close()


FILLS = """
import os, sys
from dtr.checkpoint.staging.slots import finish, open_for_reading, scan
from dtr.checkpoint.staging.arena import Arena
from dtr.errors import StagingFull
from tests.staged import record, stage, staged
staging = sys.argv[1]
SIZE = 300_000
done = refused = 0
for pages in range(0, 120, 3):
    status = os.statvfs(staging)
    filler = os.open(f"{staging}/filler", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(filler, 0, (status.f_bavail - pages) * status.f_frsize)
    arena = Arena(staging, job="job", worker="w0", policy="fail", budget_bytes=4 << 20)
    try:
        stage(arena, bytes([pages]) * SIZE, record(pages))
    except StagingFull as error:
        refused += 1
        assert staged(staging) == []
    else:
        done += 1
        (found,) = staged(staging)
        with open_for_reading(found) as reading:
            assert bytes(reading.buffer) == bytes([pages]) * SIZE
        assert finish(found, "committed")
    arena.close()
    os.close(filler)
    os.unlink(f"{staging}/filler")
    left = [name for name in os.listdir(staging) if not name.startswith(".")]
    assert not left, left
print(done, refused)
"""


def test_no_byte_count_kills_the_trainer(small_memory: Path) -> None:
    """With k pages left, for many k, a save is whole or refused; the process lives, and nothing stays behind."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run([sys.executable, "-c", FILLS, str(small_memory)], capture_output=True, text=True, env=env, timeout=120)
    assert child.returncode == 0, child.stderr
    done, refused = map(int, child.stdout.split())
    assert done > 5
    assert refused > 5
