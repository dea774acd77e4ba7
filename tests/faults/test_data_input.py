"""Data under faults of the host: no descriptors, no memory, a disk that fails, counters killed half-way; two data sets at once."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest

from dtr.config import Settings
from dtr.datasets.formats import Measure
from dtr.datasets.formats.jsonl import JsonLines
from dtr.datasets.loading.reading import read_shard
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.registering.spec import Shard
from dtr.errors import CoordinatorUnavailable, DatasetChanged, DatasetMismatch, ShardUnreadable
from dtr.state.job import JobState
from tests.loading import loading, once_each, write_lines
from tests.servers import RedisServer
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def registry(settings: Settings) -> DatasetRegistry:
    return DatasetRegistry(settings.redis_url, job=settings.job)


HEAD = """
import os, resource, sys
import numpy, pyarrow
from dtr.config import Settings
from dtr.datasets.loading.reading import read_shard
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.errors import DataUnavailable, DtrError, ShardUnreadable
from tests.loading import Loading
settings = Settings.load(environ={}, redis_url=sys.argv[1], job=sys.argv[2], staging=sys.argv[3])
registry = DatasetRegistry(settings.redis_url, job=settings.job)
def limit(what, value):
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))
def address_space(more):
    limit(resource.RLIMIT_AS, int(open("/proc/self/statm").read().split()[0]) * 4096 + more)
def refused(call):
    try:
        call()
    except DtrError as exc:
        return exc
    raise SystemExit("it was not refused")
"""


def run(code: str, settings: Settings, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HEAD + code, settings.redis_url, settings.job, settings.staging, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_process_out_of_descriptors_leaves_out_no_shard(settings: Settings, tmp_path: Path) -> None:
    """Given 64 descriptors, then training works; given none free, then the error says so, and no shard is taken for unreadable."""
    write_lines(tmp_path / "data", 100)
    run("""
limit(resource.RLIMIT_NOFILE, 64)
registry.register("numbers", path=sys.argv[4] + "/data", format="jsonl", shard_size=10)
rank = Loading(settings, 1).start().ranks[0]
for batch in rank.loader():
    rank.consume(batch)
assert sorted(i for _, ids in rank.seen for i in ids) == list(range(100))
shard = registry.get("numbers").shard(3)
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
error = refused(lambda: read_shard(shard, None))
assert isinstance(error, DataUnavailable) and "out of file descriptors" in str(error) and "part-1.jsonl" in str(error), repr(error)
error = refused(lambda: registry.register("others", path=sys.argv[4] + "/data/part-0.jsonl", format="jsonl", shard_size=10))
for one in taken:
    os.close(one)
assert len(read_shard(shard, None)["id"]) == 10
os._exit(0)
""", settings, tmp_path)  # fmt: skip


def test_a_process_out_of_memory_leaves_out_no_shard(settings: Settings, tmp_path: Path) -> None:
    """Given shards larger than the address space left, then the error says what to do, and no shard is taken for unreadable."""
    run("""
for name, values in (("data.npy", numpy.zeros((64 << 20,), dtype=numpy.float64)), ("tokens.bin", None)):
    path = os.path.join(sys.argv[4], name)
    if values is None:
        with open(path, "wb") as file:
            file.truncate(512 << 20)
    else:
        numpy.lib.format.open_memmap(path, mode="w+", dtype=values.dtype, shape=values.shape)
registry.register("npy", path=sys.argv[4] + "/data.npy", format="npy", shard_size=1 << 30)
registry.register("bin", path=sys.argv[4] + "/tokens.bin", format="bin", dtype="uint16", sample_length=64, shard_size=1 << 30)
shards = [registry.get(name).shard(0) for name in ("npy", "bin")]
small = registry.register("npy", path=sys.argv[4] + "/data.npy", format="npy", shard_size=1000)
address_space(64 << 20)
for shard in shards:
    error = refused(lambda: read_shard(shard, None))
    assert isinstance(error, DataUnavailable) and "memory enough" in str(error) and "smaller shard_size" in str(error), repr(error)
assert len(read_shard(registry.get("npy").shard(60_000), None)["data"]) == 1000
os._exit(0)
""", settings, tmp_path)  # fmt: skip


def test_a_disk_that_does_not_give_a_file_makes_its_shards_unreadable(
    settings: Settings, registry: DatasetRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given EIO for one file, when it is read, then after three attempts it is unreadable, with the error; others are read."""
    registry.register("numbers", path=write_lines(tmp_path / "data", 40), format="jsonl", shard_size=10)
    attempts: list[str] = []
    plain = Shard.read

    def read(shard: Shard, columns: object) -> object:
        if shard.file == "part-2.jsonl":
            attempts.append(shard.file)
            raise OSError(5, "Input/output error")
        return plain(shard, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(Shard, "read", read)
    dataset = registry.get("numbers")
    with pytest.raises(ShardUnreadable, match=r"part-2\.jsonl: shard 2 .*Input/output error"):
        read_shard(dataset.shard(2), None)
    assert len(attempts) == 3
    with loading(settings, 3) as job:
        assert len(set(job.train(epochs=2))) == 1
        for epoch in (0, 1):
            assert once_each(job.seen(epoch), [*range(20), *range(30, 40)])
        assert "Input/output error" in job.merged()["numbers"]["notes"]["quarantined"]["0"]["2"]
    registry.close()


def test_a_file_that_changes_while_it_is_read_is_refused(
    registry: DatasetRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given somebody who writes into a file after it was opened, then what was read of it is not handed out."""
    registry.register("tokens", path=tokens(tmp_path), format="bin", dtype="uint8", sample_length=10, shard_size=5)
    shard = registry.get("tokens").shard(1)
    plain = type(shard.format).read

    def while_writing(*given: object) -> object:
        found = plain(*given)  # type: ignore[arg-type]
        (tmp_path / "a.bin").write_bytes(bytes(100))
        return found

    monkeypatch.setattr(type(shard.format), "read", while_writing)
    with pytest.raises(DatasetChanged, match=r"a\.bin changed since"):
        read_shard(shard, None)
    registry.close()


def tokens(folder: Path) -> Path:
    path = folder / "a.bin"
    path.write_bytes(bytes(range(100)))
    os.utime(path, ns=(1, 1))
    return path


def test_two_data_sets_at_once(settings: Settings, registry: DatasetRegistry, tmp_path: Path) -> None:
    """Given two data sets with names alike, one with a damaged file, when ranks train on both in turn, then neither touches the other."""
    for name in ("numbers", "numbers2"):
        registry.register(name, path=write_lines(tmp_path / name, 60), format="jsonl", shard_size=5, shuffle=True)
    damaged = tmp_path / "numbers2" / "part-1.jsonl"
    before = damaged.stat()
    with damaged.open("r+b") as file:
        file.write(b"?????")
    os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))
    with loading(settings, 2) as job:
        first = job.train(batch_size=7, epochs=2)
        assert once_each(job.seen(0), range(60)) and once_each(job.seen(1), range(60)) and len(set(first)) == 1
        for rank in job.ranks:
            rank.seen.clear()

        def other(rank: object) -> int:
            count = 0
            for batch in rank.loader("numbers2", batch_size=4):  # type: ignore[attr-defined]
                rank.consume(batch)  # type: ignore[attr-defined]
                count += 1
            return count

        assert len(set(job.each(other))) == 1
        assert once_each(job.seen(0), [*range(15), *range(20, 60)])
        merged = job.merged()
        assert "quarantined" not in merged["numbers"].get("notes", {}) and "quarantined" in merged["numbers2"]["notes"]
    registry.close()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ('{"id": 1, "y": 2}', "columns x, y are in some files of the data set and not in others"),
        ('{"id": 1}', "columns x are in some files"),
        ('{"id": 1, "x": [1, 2]}', "column 'x' is .*shape .* in different files"),
    ],
)
def test_files_that_do_not_go_together_are_told_apart(
    settings: Settings, registry: DatasetRegistry, tmp_path: Path, other: str, message: str
) -> None:
    """Given files with other columns or shapes, when they meet in a batch, then the columns are named; without them all is read."""
    for name, line in (("a", '{"id": 1, "x": 2}'), ("b", other)):
        (tmp_path / f"{name}.jsonl").write_text(f"{line}\n" * 10)
    registry.register("mixed", path=tmp_path, format="jsonl", shard_size=5)
    with loading(settings, 1) as job, pytest.raises(DatasetMismatch, match=message):
        for _ in job.ranks[0].loader("mixed", batch_size=20, columns=None):
            pass
    with loading(settings, 1, names="other") as job:
        assert sum(len(batch) for batch in job.ranks[0].loader("mixed", batch_size=20, columns=["id"])) == 20
    registry.close()


COUNTER = """
import logging, os, sys, time
from pathlib import Path
from dtr.datasets.registering import counting
from dtr.datasets.formats.jsonl import JsonLines
from dtr.datasets.registering.registry import DatasetRegistry
counting._LEASE_S = 1.0
log, hold = sys.argv[4], sys.argv[5] == "hold"
plain = JsonLines.measure
def measure(self, file, shard_size):
    with open(log, "a") as out:
        out.write(f"{os.getpid()} {os.path.basename(file.name)}\\n")
    while hold:
        time.sleep(0.05)
    return plain(self, file, shard_size)
JsonLines.measure = measure
registry = DatasetRegistry(sys.argv[1], job=sys.argv[2])
spec = registry.register("numbers", path=sys.argv[3], format="jsonl", shard_size=10)
print(spec.version, spec.digest)
"""


def test_an_index_is_counted_once_also_if_who_counts_is_killed(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """Given five processes that register at once, the first of which is killed half-way, then one of the others counts, once."""
    folder, log = write_lines(tmp_path / "data", 100, files=6), tmp_path / "log"

    def counter(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COUNTER, valkey.url, job, str(folder), str(log), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    first = counter("hold")
    eventually(lambda: log.exists() and log.read_text(), what="the first to count")
    others = [counter("go") for _ in range(4)]
    state = JobState(valkey.url, job)
    first.kill()
    first.communicate()
    outputs = {process.communicate(timeout=60)[0] for process in others}
    assert len(outputs) == 1 and outputs.pop().startswith("1 ")
    counted = [line.split() for line in log.read_text().splitlines() if not line.startswith(f"{first.pid} ")]
    assert len({pid for pid, _ in counted}) == 1
    assert sorted(name for _, name in counted) == [f"part-{n}.jsonl" for n in range(6)]
    assert not state.redis.exists(state.keys.dataset_counting("numbers"))
    state.close()


def test_what_was_counted_when_redis_was_away_is_not_counted_again(
    settings: Settings, own_valkey: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a Redis that goes away while files are counted, when they are registered again, then they are not read again."""
    registry, counted = DatasetRegistry(own_valkey.url, job=settings.job), []
    plain = JsonLines.measure

    def measure(self: JsonLines, file: BufferedReader, shard_size: int) -> Measure:
        if not counted:
            own_valkey.kill()
        counted.append(file.name)
        return plain(self, file, shard_size)

    monkeypatch.setattr(JsonLines, "measure", measure)
    given: dict[str, Any] = {"path": write_lines(tmp_path / "data", 40), "format": "jsonl", "shard_size": 10}
    with pytest.raises(CoordinatorUnavailable):
        registry.register("numbers", **given)
    own_valkey.start()
    assert registry.register("numbers", **given).total_samples == 40
    assert len(counted) == 4
    registry.close()


def test_a_terminal_shows_how_far_the_count_is(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """Given a terminal, when several files are counted, then a bar says of how many; without one nothing is drawn."""
    folder = write_lines(tmp_path / "data", 100, files=12)
    code = "import sys; from dtr import *; from dtr.datasets.registering.registry import DatasetRegistry\n"
    code += "DatasetRegistry(sys.argv[1], job=sys.argv[2]).register('numbers', path=sys.argv[3], format='jsonl', shard_size=10)"
    command = [sys.executable, "-c", code, valkey.url, job, str(folder)]
    ours, theirs = pty.openpty()
    done = subprocess.Popen(command, stderr=theirs, cwd=ROOT, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"})
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert done.wait(30) == 0
    assert b"counting the samples of 12 files" in shown
    assert subprocess.run(command, capture_output=True, cwd=ROOT, timeout=30, check=True).stderr == b""
