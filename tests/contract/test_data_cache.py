"""The folder of copies under many processes, kills, stops and disks that fail; and data sets in a store that changes, fails or is slow."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtr.clock import SystemClock
from dtr.datasets.formats import make_format
from dtr.datasets.loading.reading import read_shard
from dtr.datasets.registering.declared import declare, is_registered
from dtr.datasets.sources import cache as cache_module
from dtr.datasets.sources import copies as copies_module
from dtr.datasets.sources.cache import Cache, Draft
from dtr.datasets.sources.copies import Copies, Stamp, stamp_of
from dtr.datasets.sources.files import find_files
from dtr.errors import ConfigError, DatasetChanged, DatasetMismatch, DataUnavailable, FolderFull, StoreRefused, StoreUnavailable
from dtr.store import open_store
from tests.contract.test_dataset_sources import dataset, ids, lines
from tests.s3_faults import FaultyS3
from tests.servers import SeaweedServer
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
KEYS = [f"{n:02x}" * 20 for n in range(16)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of copies of one's own."""
    monkeypatch.setenv("DTR_DATA_CACHE", str(tmp_path / "cache"))
    copies_module.copies.cache_clear()
    yield tmp_path / "cache"
    copies_module.copies.cache_clear()


def writing(size_bytes: int, *, before: Callable[[], object] = lambda: None) -> Callable[[Draft], None]:
    def make(draft: Draft) -> None:
        draft.write(b"x" * (size_bytes // 2))
        before()
        draft.write(b"x" * (size_bytes - size_bytes // 2))

    return make


def drafts(folder: Path) -> list[str]:
    return [one.name for one in folder.glob("*.tmp")]


def held_bytes(folder: Path) -> int:
    """What the copies and those in the making take, of one moment."""
    with (folder / "room.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(facts.st_size for facts in map(Path.stat, there(folder)))


def there(folder: Path) -> list[Path]:
    return [one for one in folder.iterdir() if one.suffix != ".lock"]


HEAD = """
import sys, time
from dtr.datasets.sources.cache import Cache
held = Cache(folder=sys.argv[1], budget_bytes=1 << 30)"""

MAKER = """
import os, random, sys
from dtr.datasets.sources import cache
from dtr.datasets.sources.cache import Cache
cache.BUFFER_BYTES = 10_000
held = Cache(folder=sys.argv[1], budget_bytes=250_000)
rng = random.Random(int(sys.argv[2]))
keys = [f"{n:02x}" * 20 for n in range(16)]
def make(draft, n):
    if n % 2:
        draft.reserve(60_000 + n)
    for _ in range(60):
        draft.write(bytes([n]) * 1000)
    draft.write(bytes([n]) * n)
for _ in range(int(sys.argv[3])):
    n = rng.randrange(16)
    with held.open(keys[n], lambda draft: make(draft, n), source=f"file {n}") as file:
        content = file.read()
        assert content == bytes([n]) * (60_000 + n), (n, len(content))
print("done")
"""


def maker(folder: Path, seed: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAKER, str(folder), str(seed), str(count)], cwd=ROOT, text=True, stdout=subprocess.PIPE)


def test_processes_that_read_at_once_stay_within_the_budget(folder: Path) -> None:
    """Given room for four of sixteen copies, and four processes, one of which is killed, then the room is never exceeded."""
    folder.mkdir()
    processes, most = [maker(folder, seed, 15) for seed in range(3)], 0
    victim = maker(folder, 9, 100_000)
    eventually(lambda: drafts(folder), what="a copy in the making")
    while any(process.poll() is None for process in processes):
        with contextlib.suppress(FileNotFoundError):  # a copier that gives up removes its draft without asking anybody
            most = max(most, held_bytes(folder))
        time.sleep(0.01)
        if victim.poll() is None and most > 200_000:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
    victim.kill()
    assert [process.communicate()[0].strip() for process in processes] == ["done"] * 3
    victim.communicate()
    assert 200_000 < most <= 250_000
    with Cache(folder=str(folder), budget_bytes=250_000).open("ee" * 20, writing(10), source="last"):
        assert drafts(folder) == []


def test_what_a_killed_copier_left_is_swept_and_what_lives_is_not(folder: Path) -> None:
    """Given a maker that is killed and one that goes on, when a third makes a copy, then only the dead one's draft goes."""
    code = f"{HEAD}\nheld.open(sys.argv[2], lambda draft: (draft.reserve(9000), print('begun', flush=True), time.sleep(60)), source='s')"
    dead, alive = (
        subprocess.Popen([sys.executable, "-c", code, str(folder), KEYS[n], "x"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for n in (1, 2)
    )
    for one in (dead, alive):
        assert one.stdout is not None
        assert one.stdout.readline() == "begun\n"
    dead.kill()
    dead.wait()
    assert len(drafts(folder)) == 2
    try:
        with Cache(folder=str(folder), budget_bytes=1 << 30).open(KEYS[3], writing(10), source="third"):
            assert [name[:2] for name in drafts(folder)] == ["02"]
    finally:
        alive.kill()
        for one in (dead, alive):
            one.communicate()


def test_a_copier_that_was_stopped_holds_nobody_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a process that is stopped in the middle of a copy, when another wants it, then it makes its own after a bound."""
    monkeypatch.setattr(cache_module, "STALLED_S", 0.3)
    code = f"""{HEAD}
make = lambda draft: (draft.reserve(9), print('begun', flush=True), sys.stdin.readline(), draft.write(b'x' * 9))
print(held.open(sys.argv[2], make, source='s').read())"""
    stopped = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), KEYS[1]], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert stopped.stdout is not None
    assert stopped.stdout.readline() == "begun\n"
    stopped.send_signal(signal.SIGSTOP)
    try:
        with Cache(folder=str(folder), budget_bytes=1 << 30).open(KEYS[1], writing(9), source="s") as file:
            assert file.read() == b"x" * 9
        stopped.send_signal(signal.SIGCONT)  # its late copy is the same, whole, and harms nobody
        assert stopped.communicate("\n")[0] == "b'xxxxxxxxx'\n"
    finally:
        stopped.kill()
        stopped.communicate()
    assert drafts(folder) == []


def test_a_copy_larger_than_the_budget_is_refused_with_the_numbers(folder: Path) -> None:
    """Given room for 1,000 bytes, when a copy takes more, known before or not, then the setting is named and others' copies stay."""
    held = Cache(folder=str(folder), budget_bytes=1000)
    held.open(KEYS[0], writing(900), source="small").close()
    for make in (writing(1001), lambda draft: draft.reserve(1001)):
        with pytest.raises(ConfigError, match=r"the copy of large takes 1,001 bytes or more, and 1,000 .* raise DTR_DATA_CACHE_BYTES"):
            held.open(KEYS[1], make, source="large")
    assert [one.name for one in there(folder)] == [KEYS[0]]


def test_two_copies_that_only_fit_alone_wait_for_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given makers that each hold half the room and need more, then they do not wait for each other for ever, and both are served."""
    monkeypatch.setattr(cache_module, "BUFFER_BYTES", 10)
    held, meeting, first = Cache(folder=str(folder), budget_bytes=1000), threading.Barrier(2, timeout=10), threading.local()
    found: list[int] = []

    def together() -> None:
        if not getattr(first, "was", False):
            first.was = True
            meeting.wait()

    def read(key: str) -> None:
        with held.open(key, writing(900, before=together), source=key) as file:
            found.append(len(file.read()))

    threads = [threading.Thread(target=read, args=(key,), daemon=True) for key in KEYS[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [900, 900]


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ENOSPC, FolderFull, "has no room for the copy of s: .*bytes are free"),
        (errno.EDQUOT, FolderFull, "has no room"),
        (errno.EIO, DataUnavailable, "another disk"),
        (errno.EROFS, ConfigError, "set DTR_DATA_CACHE"),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "replace"])
def test_a_disk_that_fails_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], message: str, call: str
) -> None:
    """Given a cache's disk that is full or broken at any call, then the error says so, no draft stays, and the next try works."""
    held = Cache(folder=str(folder), budget_bytes=1 << 20)

    def failing(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(cache_module.os, call, failing)
        with pytest.raises(error, match=message):
            held.open(KEYS[0], writing(9), source="s")
    assert drafts(folder) == []
    with held.open(KEYS[0], writing(9), source="s") as file:
        assert file.read() == b"x" * 9


def test_a_copy_of_another_size_is_made_again(folder: Path) -> None:
    """Given a copy that somebody cut off, when its size is known, then it is not read."""
    held = Cache(folder=str(folder), budget_bytes=1 << 20)
    held.open(KEYS[0], writing(9), source="s", size_bytes=9).close()
    (folder / KEYS[0]).write_bytes(b"x")
    with held.open(KEYS[0], writing(9), source="s", size_bytes=9) as file:
        assert file.read() == b"x" * 9


@pytest.mark.parametrize("format", ["npy", "tar", "parquet", "mds"])
def test_a_reader_of_a_copy_that_is_removed_reads_on(tmp_path: Path, folder: Path, format: str) -> None:
    """Given a copy that another process evicts between opening and reading, in any format, then it is read all the same."""
    from tests.contract.test_dataset_formats import CASES

    case = CASES[format]
    plain = tmp_path / f"a{case.format.suffixes[0]}"
    case.write(plain, 9)
    packed = tmp_path / f"{plain.name}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    made = dataset(packed, format, shard_size=9)
    shard = made.shard(0)
    with shard._open() as file:
        for copy in folder.iterdir():
            copy.unlink()
        assert shard.format.read(file, shard.span, [case.column])[case.column].tolist() == [case.value(i) for i in range(9)]


# --- in a store ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(seaweed: SeaweedServer, s3_credentials: None) -> Iterator[FaultyS3]:
    made = FaultyS3(seaweed)
    yield made
    made.close()


@pytest.fixture
def remote(seaweed: SeaweedServer, faulty: FaultyS3, request: pytest.FixtureRequest) -> str:
    """The URL of a folder with ten samples in a file of a store that fails on demand."""
    url = seaweed.url(f"cache-{os.getpid()}-{abs(hash(request.node.name))}", endpoint=faulty.endpoint)
    store = open_store(url)
    store.put("a.jsonl", lines(0, 10))
    store.close()
    return url


@pytest.fixture
def local(tmp_path: Path) -> str:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.jsonl").write_bytes(lines(0, 10))
    return str(tmp_path / "store")


def emptied(folder: Path) -> None:
    for one in folder.iterdir():
        one.unlink()


def test_an_object_of_the_same_size_is_another_one(remote: str, folder: Path) -> None:
    """Given other bytes of the same length under the same name, then it is refused by name, never quarantined, and registered anew."""
    made = dataset(remote, shard_size=10)
    assert made.files[0].tag and made.files[0].mtime_ns == 0
    store = open_store(remote)
    store.put("a.jsonl", lines(0, 10).replace(b"0", b"7"))
    store.close()
    emptied(folder)
    with pytest.raises(DatasetChanged, match=r"a\.jsonl changed since it was registered: it had the tag .*register the data set again"):
        read_shard(made.shard(0), None)
    found = find_files(remote, make_format("jsonl"))
    declared = declare("d", make_format("jsonl"), total_samples=None, shard_size=10, shuffle=False, seed=0)
    assert not is_registered(made, declared, found)
    assert ids(dataset(remote))[0] == 7


def test_an_object_that_is_gone_is_refused_and_not_left_out(remote: str, folder: Path) -> None:
    """Given an object that was deleted, then training stops with its name instead of going on without it."""
    made = dataset(remote, shard_size=10)
    store = open_store(remote)
    store.delete("a.jsonl")
    store.close()
    emptied(folder)
    with pytest.raises(DatasetChanged, match=r"a\.jsonl is gone; put it back"):
        read_shard(made.shard(0), None)


@pytest.mark.parametrize("action", ["503", "reset", "truncate"])
def test_a_store_that_fails_in_the_middle_is_tried_again(remote: str, faulty: FaultyS3, folder: Path, action: str) -> None:
    """Given answers that fail or are cut off, then the shard is whole in the end."""
    made = dataset(remote, shard_size=10)
    emptied(folder)
    faulty.plan(action, times=2, method="GET")
    assert read_shard(made.shard(0), None)["id"].tolist() == list(range(10))
    assert faulty.met == [action] * 2
    assert drafts(folder) == []


class _Patient(SystemClock):
    """A clock by which each pause counts a hundred times over."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return 100 * sum(self.pauses)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


class _Away:
    """A shard whose store is away so many times."""

    index, dataset = 3, "d"

    def __init__(self, times: int, error: Exception) -> None:
        self.left, self.error = times, error

    def check_unchanged(self) -> None:
        """It is as it was."""

    def read(self, columns: object) -> dict[str, Any]:
        if self.left:
            self.left -= 1
            raise self.error
        return {"id": [1]}


def test_a_store_that_is_away_is_waited_for_and_no_shard_is_left_out() -> None:
    """Given a store that is away for longer than a shard has attempts, then it is waited for, with a bound; a refusal is not."""
    clock = _Patient()
    assert read_shard(_Away(2, StoreUnavailable("away")), None, clock) == {"id": [1]}  # type: ignore[arg-type]
    assert clock.pauses == [0.1, 0.2]
    with pytest.raises(StoreUnavailable, match="away"):
        read_shard(_Away(99, StoreUnavailable("away")), None, _Patient())  # type: ignore[arg-type]
    with pytest.raises(StoreRefused):
        read_shard(_Away(1, StoreRefused("no")), None, _Patient())  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [FolderFull("full"), DataUnavailable("no memory"), ConfigError("data_cache_bytes: too small")])
def test_a_host_in_trouble_takes_no_shard_for_unreadable(error: Exception) -> None:
    """Given a full disk, no memory or a wrong setting here, then that error is raised as it is, and a passing one is got over."""
    with pytest.raises(type(error)):
        read_shard(_Away(3, error), None, _Patient())  # type: ignore[arg-type]
    if not isinstance(error, ConfigError):
        assert read_shard(_Away(2, error), None, _Patient()) == {"id": [1]}  # type: ignore[arg-type]


def test_a_stamp_tells_contents_apart(local: str) -> None:
    """On disk by size and time; a stamp has no tag there."""
    before = stamp_of(local, "a.jsonl")
    assert (before.size_bytes, before.tag) == (len(lines(0, 10)), "")
    os.utime(Path(local) / "a.jsonl", ns=(5, 5))
    assert stamp_of(local, "a.jsonl") == Stamp(size_bytes=before.size_bytes, mtime_ns=5)


def test_a_source_that_cannot_be_read_is_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a disk that does not give a compressed file, then it is the file that is named, not the cache."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(0, 10)))
    held = Copies(folder=str(tmp_path / "cache"), budget_bytes=1 << 20)

    def failing(_: object) -> Iterator[bytes]:
        yield b"{"
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(copies_module, "_gunzipped", failing)
    with pytest.raises(DatasetMismatch, match=r"a\.jsonl\.gz cannot be read: Input/output error"):
        held.open(str(tmp_path), "a.jsonl.gz", stamp_of(str(tmp_path), "a.jsonl.gz"))
