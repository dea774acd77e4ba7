"""The trainer's arena: slots are reserved, filled, reused warm, and given back."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.memory import WarmMaps, grow, is_reserved
from dtr.checkpoint.staging.reclaim import reclaim
from dtr.checkpoint.staging.slots import SlotFiles, finish, open_for_reading, scan
from dtr.errors import CheckpointError, ForkedProcess, InvalidInput, NoFreeSlot, StagingFull
from tests.staged import PlainLayout, record, stage, staged
from tests.waiting import eventually

SIZE = 100_000


@pytest.fixture
def staging(tmp_path: Path) -> str:
    return str(tmp_path / "staging")


def arena(staging: str, **options: object) -> Arena:
    return Arena(staging, job="job", worker="w0", **{"policy": "fail", **options})  # type: ignore[arg-type]


def data_file(staging: str, index: int = 0) -> str:
    return f"{staging}/job/w0/slot-{index}.safetensors"


def test_a_staged_part_is_there_for_the_uploader(staging: str) -> None:
    """The bytes and the facts come back through the reader's side, exactly."""
    a = arena(staging)
    written = stage(a, b"x" * SIZE, record(3))
    (found,) = staged(staging)
    assert found.record == written
    with open_for_reading(found) as reading:
        assert bytes(reading.buffer) == b"x" * SIZE
        assert os.fstat(reading.descriptor).st_size == SIZE
        assert (reading.record.step, reading.record.size_bytes) == (3, SIZE)
    a.close()


def test_a_slot_is_reused_with_its_pages(staging: str) -> None:
    """The second save into a slot allocates nothing and maps nothing: same inode, same blocks, same mapping."""
    a = arena(staging)
    stage(a, b"a" * SIZE, record(1))
    eventually(lambda: len(scan(staging)) == 2, what="the second slot")
    (found,) = staged(staging)
    before, mapping = os.stat(found.files.data), a.maps._maps[found.files.data].mapping
    assert finish(found, "committed")
    stage(a, b"b" * SIZE, record(2))
    (again,) = staged(staging)
    after = os.stat(again.files.data)
    assert (again.files, after.st_ino, after.st_blocks) == (found.files, before.st_ino, before.st_blocks)
    assert a.maps._maps[again.files.data].mapping is mapping
    a.close()


def test_the_other_slots_are_made_in_the_background(staging: str) -> None:
    """After the first save every slot is there, wholly allocated and mapped, without a save having waited for it."""
    a = arena(staging, slots=3)
    stage(a, b"a" * SIZE, record(1))
    eventually(lambda: len(a.maps._maps) == 3, what="three mapped slots")
    for index in range(3):
        status = os.stat(data_file(staging, index))
        assert status.st_size == SIZE
        assert status.st_blocks * 512 >= SIZE
    assert [found.kind for found in scan(staging)].count("FREE") == 2
    a.close()


@pytest.mark.parametrize("sizes", [(SIZE, SIZE // 3, SIZE * 2), (1, 4096, 4097), (SIZE, 1, SIZE)])
def test_a_slot_has_exactly_the_size_of_its_part(staging: str, sizes: tuple[int, ...]) -> None:
    """A state that grows or shrinks still leaves a file that is valid to its last byte."""
    a = arena(staging)
    for step, size in enumerate(sizes):
        stage(a, bytes([step]) * size, record(step))
        (found,) = staged(staging)
        with open(found.files.data, "rb") as file:
            assert file.read() == bytes([step]) * size
        assert finish(found, "committed")
    a.close()


def test_a_slot_that_changes_its_size_stays_mapped(tmp_path: Path) -> None:
    """A few bytes more or less cost a few pages, not all of them; what was there stays as far as the file goes."""
    maps, files = WarmMaps(), SlotFiles(folder=str(tmp_path), index=0)
    mapping = None
    for letter, size in enumerate((SIZE, SIZE + 5000, SIZE - 5000, SIZE + 1, SIZE * 3, 1, SIZE)):
        grow(files.data, size, root=str(tmp_path), budget_bytes=None)
        assert is_reserved(files.data, size)
        with maps.buffer(files, size) as buffer:
            assert len(buffer) == size
            buffer[:] = bytes([letter]) * size
        assert Path(files.data).read_bytes() == bytes([letter]) * size
        mapping = mapping or maps._maps[files.data].mapping
        assert maps._maps[files.data].mapping is mapping
    with maps.buffer(files, SIZE) as held:  # somebody looks at it while it has to grow: it is mapped anew
        grow(files.data, 2 * SIZE, root=str(tmp_path), budget_bytes=None)
        with maps.buffer(files, 2 * SIZE) as buffer:
            buffer[-1] = 7
        assert bytes(held[:3]) == bytes([letter]) * 3
    assert maps._maps[files.data].mapping is not mapping
    maps.close()


def test_holes_are_filled_before_they_are_written(staging: str) -> None:
    """A file that a killed trainer lengthened but did not allocate is no reserved slot."""
    a = arena(staging)
    os.makedirs(f"{staging}/job/w0")
    with open(data_file(staging), "wb") as file:
        file.truncate(SIZE)
    assert os.stat(data_file(staging)).st_blocks == 0
    slot = a.acquire(SIZE)
    assert slot is not None
    assert os.stat(data_file(staging)).st_blocks * 512 >= SIZE
    slot.free()
    a.close()


class TestNoSlotIsFree:
    """Both slots hold parts that are still to be uploaded."""

    @staticmethod
    def full(staging: str, policy: str, **options: object) -> Arena:
        a = arena(staging, policy=policy, **options)
        for step in (1, 2):
            stage(a, b"a" * SIZE, record(step))
        return a

    def test_fail_says_what_the_slots_hold(self, staging: str) -> None:
        """The error names the steps that wait and what to do."""
        a = self.full(staging, "fail")
        with pytest.raises(NoFreeSlot, match=r"step 1 \(STAGED\).*step 2 \(STAGED\).*celery -A tasks worker"):
            a.acquire(SIZE)
        assert a.counters.refused == 1
        a.close()

    def test_skip_answers_none_and_counts(self, staging: str) -> None:
        """A skipped save is visible in the counters."""
        a = self.full(staging, "skip")
        assert a.acquire(SIZE) is None
        assert (a.counters.skipped, a.counters.staged) == (1, 2)
        a.close()

    def test_wait_waits_for_an_upload(self, staging: str) -> None:
        """The save goes on as soon as a slot is finished, and the wait is counted."""
        a = self.full(staging, "wait")
        waiting = threading.Event()

        def upload() -> None:
            waiting.wait(30)
            assert finish(staged(staging)[0], "committed")

        uploader = threading.Thread(target=upload)
        uploader.start()
        a.clock = WakesOnSleep(waiting)
        stage(a, b"c" * SIZE, record(3))
        uploader.join()
        assert a.counters.waited == 1
        assert {found.record.step for found in staged(staging) if found.record} == {2, 3}
        a.close()

    def test_wait_ends(self, staging: str) -> None:
        """A wait that is too long is an error, not a hang."""
        a = self.full(staging, "wait", wait_s=0.05)
        with pytest.raises(NoFreeSlot, match="no staging slot is free after"):
            a.acquire(SIZE)
        a.close()

    def test_a_slot_that_is_being_read_is_not_free(self, staging: str) -> None:
        """A stopped uploader keeps its bytes: its slot is neither finished nor reused while it holds the shared lock."""
        a = self.full(staging, "fail")
        slow, quick = staged(staging)
        with open_for_reading(slow) as reading:
            assert not finish(slow, "committed")
            assert finish(quick, "committed")
            stage(a, b"c" * SIZE, record(3))
            with pytest.raises(NoFreeSlot):
                a.acquire(SIZE)
            assert bytes(reading.buffer) == b"a" * SIZE
        assert finish(slow, "committed")
        a.close()


class WakesOnSleep:
    """A clock that says when somebody sleeps."""

    def __init__(self, slept: threading.Event) -> None:
        from dtr.clock import SYSTEM

        self.monotonic, self.wall, self._sleep, self._slept = SYSTEM.monotonic, SYSTEM.wall, SYSTEM.sleep, slept

    def sleep(self, seconds: float) -> None:
        self._slept.set()
        self._sleep(seconds)


class TestBudget:
    def test_is_checked_before_anything_changes(self, staging: str) -> None:
        """The error has the numbers, and the folder has not a byte more."""
        a = arena(staging, budget_bytes=SIZE)
        with pytest.raises(StagingFull, match=f"0 of {SIZE} bytes") as error:
            a.acquire(SIZE + 1)
        assert (error.value.needed_bytes, error.value.free_bytes, error.value.budget_bytes) == (SIZE + 1, SIZE, SIZE)
        assert not os.path.exists(data_file(staging))
        a.close()

    def test_is_shared_by_all_workers(self, staging: str) -> None:
        """Two trainers of one host cannot together exceed it."""
        first, second = arena(staging, budget_bytes=2 * SIZE), Arena(staging, job="t/b", worker="w1", budget_bytes=2 * SIZE)
        stage(first, b"a" * SIZE, record(1))
        eventually(lambda: first._warming is not None and not first._warming.is_alive(), what="the background slot")
        with pytest.raises(StagingFull, match=f"{2 * SIZE} of {2 * SIZE} bytes"):
            second.acquire(1000)
        first.close()
        second.close()

    def test_holds_with_one_slot_where_two_do_not_fit(self, staging: str) -> None:
        """Saves go on through the one slot that fits."""
        a = arena(staging, budget_bytes=SIZE + SIZE // 2, policy="fail")
        stage(a, b"a" * SIZE, record(1))
        with pytest.raises(NoFreeSlot):
            a.acquire(SIZE)
        assert finish(staged(staging)[0], "committed")
        stage(a, b"b" * SIZE, record(2))
        a.close()

    def test_a_larger_state_gets_the_memory_of_free_slots(self, staging: str) -> None:
        """One save now is worth more than two warm slots."""
        a = arena(staging, budget_bytes=3 * SIZE)
        stage(a, b"a" * SIZE, record(1))
        eventually(lambda: len(scan(staging)) == 2, what="the second slot")
        assert finish(staged(staging)[0], "committed")
        stage(a, b"b" * (5 * SIZE // 2), record(2))
        assert [found.record.step for found in staged(staging) if found.record] == [2]
        a.close()

    def test_leftovers_of_the_dead_are_given_up_for_the_living(self, staging: str) -> None:
        """Memory that a killed trainer left behind does not fail another's save."""
        os.makedirs(f"{staging}/job/dead")
        with open(f"{staging}/job/dead/slot-0.safetensors", "wb") as file:
            file.write(b"x" * SIZE)
        a = arena(staging, budget_bytes=SIZE)
        stage(a, b"a" * SIZE, record(1))
        assert not os.path.exists(f"{staging}/job/dead")
        a.close()


class TestFailedCopies:
    def test_frees_the_slot(self, staging: str) -> None:
        """Whatever the copy raises reaches the caller, and nothing is staged."""

        class Refuses(PlainLayout):
            def copy_into(self, buffer: memoryview, leaves: object, *, threads: int = 1) -> None:
                buffer[:10] = b"y" * 10
                raise ZeroDivisionError

        a = arena(staging)
        slot = a.acquire(SIZE)
        assert slot is not None
        with pytest.raises(ZeroDivisionError):
            slot.write(Refuses(SIZE), {}, record(1))
        assert [found.kind for found in scan(staging)] == ["FREE"]
        stage(a, b"a" * SIZE, record(2))
        a.close()

    def test_a_wrong_size_is_refused(self, staging: str) -> None:
        """A layout that does not match the acquired slot writes nothing."""
        a = arena(staging)
        slot = a.acquire(SIZE)
        assert slot is not None
        with pytest.raises(InvalidInput, match=f"acquired for {SIZE} bytes"):
            slot.write(PlainLayout(SIZE - 1), {"x": b""}, record(1))
        assert [found.kind for found in scan(staging)] == ["FREE"]
        a.close()


class TestLife:
    def test_close_gives_everything_back(self, staging: str) -> None:
        """Nothing stays: no file, no folder, no descriptor, no thread."""
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        a = arena(staging)
        stage(a, b"a" * SIZE, record(1))
        assert finish(staged(staging)[0], "committed")
        a.close()
        a.close()
        assert os.listdir(staging) == []
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before

    def test_close_leaves_what_waits_for_its_upload(self, staging: str) -> None:
        """A complete part outlives its trainer; once it is finished, its memory goes, and the folder with the next reclaim."""
        a = arena(staging)
        stage(a, b"a" * SIZE, record(1))
        a.close()
        (found,) = staged(staging)
        reclaim(staging)
        with open_for_reading(found) as reading:
            assert bytes(reading.buffer) == b"a" * SIZE
        assert finish(found, "committed")
        assert not os.path.exists(found.files.data)
        reclaim(staging)
        assert os.listdir(staging) == []

    def test_reclaim_keeps_the_slots_of_the_living(self, staging: str) -> None:
        """A free slot of a living trainer stays warm."""
        a = arena(staging)
        stage(a, b"a" * SIZE, record(1))
        assert finish(staged(staging)[0], "committed")
        assert reclaim(staging) == 0
        assert os.path.exists(data_file(staging))
        a.close()

    def test_a_closed_arena_says_so(self, staging: str) -> None:
        """No save after close."""
        a = arena(staging)
        a.close()
        with pytest.raises(CheckpointError, match="closed"):
            a.acquire(1)

    def test_a_fork_must_make_its_own(self, staging: str) -> None:
        """A child of the trainer cannot use, and does not disturb, its parent's slots."""
        a = arena(staging)
        stage(a, b"a" * SIZE, record(1))
        pid = os.fork()
        if pid == 0:
            try:
                a.acquire(SIZE)
            except ForkedProcess:
                a.close()
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert finish(staged(staging)[0], "committed")
        stage(a, b"b" * SIZE, record(2))
        a.close()

    def test_two_processes_with_one_worker_id_do_not_mix(self, staging: str) -> None:
        """While the older of two holds a slot, the newer takes another."""
        older, newer = arena(staging), arena(staging)
        slot = older.acquire(SIZE)
        assert slot is not None
        stage(newer, b"n" * SIZE, record(2))
        slot.write(PlainLayout(SIZE), {"x": b"o" * SIZE}, record(1))
        found = {f.record.step: f for f in staged(staging) if f.record}
        for step, letter in ((1, b"o"), (2, b"n")):
            with open_for_reading(found[step]) as reading:
                assert bytes(reading.buffer) == letter * SIZE
        older.close()
        newer.close()

    @pytest.mark.parametrize("bad", [{"policy": "hope"}, {"worker": "../x"}, {"job": "a{b}"}])
    def test_bad_arguments_are_named(self, staging: str, bad: dict[str, str]) -> None:
        """Names become folders, so they are checked."""
        with pytest.raises(InvalidInput, match="worker|job|slot_policy"):
            Arena(staging, **{"job": "job", "worker": "w0", **bad})  # type: ignore[arg-type]
