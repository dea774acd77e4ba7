"""The cache folder: within its budget, verified, never an error of its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.checkpoint.restoring.cache import Cache, Entry, over_budget
from dtr.checkpoint.restoring.fetch import read_bytes
from dtr.checkpoint.restoring.source import PieceSource
from dtr.checkpoint.staging.locks import try_lock
from dtr.config import Settings
from dtr.errors import IntegrityError
from tests.unit.test_source import DATA, SIZE, facts_of, memory_source

URL = "s3://bucket/prefix"
FACTS = facts_of(DATA)


def fill(cache: Cache, data: bytes = DATA, *, pieces: bool = True, object: str = "runs/r/part") -> bool:
    """Read a part as a restore does, with the cache listening."""
    facts = facts_with(data, pieces=pieces, object=object)
    filling = cache.filling(URL, facts)
    if filling is None:
        return False
    read_bytes(memory_source(data, facts), filling.write)
    filling.keep()
    return cache.holds(URL, facts)


def facts_with(data: bytes = DATA, *, pieces: bool = True, object: str = "runs/r/part"):
    from dataclasses import replace

    return replace(facts_of(data, pieces=pieces), object=object)


def read(cache: Cache, **which: object) -> bytes | None:
    source = cache.source(URL, facts_with(**which))  # type: ignore[arg-type]
    if source is None:
        return None
    try:
        return bytes(read_bytes(source))
    finally:
        source.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> Cache:
    return Cache(str(folder), 10 * SIZE)


@pytest.mark.parametrize("pieces", [True, False])
def test_what_was_filled_is_read(cache: Cache, folder: Path, pieces: bool) -> None:
    """Verified by the manifest's pieces, or by the whole and the pieces that were noted; nothing else is left behind."""
    assert fill(cache, pieces=pieces)
    assert read(cache, pieces=pieces) == DATA
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_an_entry_belongs_to_one_object(cache: Cache) -> None:
    """Another store, another object, other bytes under the same key: none of them is answered with it."""
    fill(cache)
    assert cache.source("s3://other/prefix", facts_with()) is None
    assert cache.source(URL, facts_with(object="runs/r/other")) is None
    assert cache.source(URL, facts_with(DATA[:-1] + b"?")) is None


@pytest.mark.parametrize("end", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_damage_never_comes_through(cache: Cache, folder: Path, end: str, damage: str) -> None:
    """Whatever happens to either file: the right bytes, an IntegrityError, or no entry."""
    fill(cache)
    (path,) = folder.glob(f"*{end}")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "remove":
        path.unlink()
    else:
        os.truncate(path, len(data) // 2 if damage == "truncate" else 0)
    if (end, damage) == (".safetensors", "flip"):
        with pytest.raises(IntegrityError) as failed:
            read(cache)
        assert failed.value.facts["where"] == "cache"
    else:
        assert read(cache) in {None, DATA}
    cache.drop(URL, facts_with())
    assert read(cache) is None
    assert fill(cache)
    assert read(cache) == DATA


def test_the_longest_unused_go_first(folder: Path) -> None:
    """Three parts in a folder for two: the one that was not used since goes."""
    cache = Cache(str(folder), 2 * SIZE + 100)
    for n, name in enumerate(("a", "b")):
        assert fill(cache, object=name)
        for path in folder.glob(f"{name}-*"):
            os.utime(path, (100 + n, 100 + n))
    assert read(cache, object="a") == DATA
    assert fill(cache, object="c")
    assert [read(cache, object=name) is not None for name in "abc"] == [True, False, True]


def test_what_is_too_large_for_the_budget_is_not_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the numbers in the log, and what is there stays."""
    cache = Cache(str(folder), SIZE)
    assert fill(cache)
    with caplog.at_level(logging.WARNING):
        assert not fill(cache, DATA + b"x", object="large")
    assert f"{SIZE + 1} bytes, cache_budget_bytes is {SIZE}" in caplog.text
    assert read(cache) == DATA


def test_over_budget_counts_what_is_on_its_way_and_leaves_it() -> None:
    """Pure: only whole entries are let go of, in the order of their last use, as few as do."""
    entries = [Entry(path=f"{n}.safetensors", size_bytes=10, used_at=n) for n in (3, 1, 2)]
    entries.append(Entry(path="0.tmp", size_bytes=10, used_at=0))
    assert over_budget(entries, 40) == []
    assert over_budget(entries, 39) == ["1.safetensors"]
    assert over_budget(entries, 11) == ["1.safetensors", "2.safetensors", "3.safetensors"]


def test_two_fill_one_part_once(cache: Cache, folder: Path) -> None:
    """The second restore of the same part meanwhile does not write it, too."""
    first = cache.filling(URL, facts_with())
    assert first is not None
    assert cache.filling(URL, facts_with()) is None
    first.discard()
    assert list(folder.iterdir()) == []
    assert fill(cache)


def _file(folder: Path) -> None:
    folder.write_text("a file")


def _unwritable(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o500)


def _nowhere(folder: Path) -> None:
    folder.symlink_to("/proc/self/nowhere")


@pytest.mark.parametrize("make", [_file, _unwritable, _nowhere])
def test_a_folder_that_is_none_costs_a_line_in_the_log(cache: Cache, folder: Path, make, caplog: pytest.LogCaptureFixture) -> None:
    """A file in its place, or no permission: the restore goes on, and says why nothing is kept."""
    if make is _unwritable and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    make(folder)
    with caplog.at_level(logging.WARNING):
        assert not fill(cache)
    assert str(folder) in caplog.text
    assert read(cache) is None


def test_a_disk_that_is_full_costs_a_line_in_the_log(cache: Cache, folder: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    """Before the first byte, or at any later one: the part is read, the cache holds nothing, and nothing is left behind."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    for name in ("posix_fallocate", "pwrite", "rename"):
        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
            patched.setattr(os, name, full)
            assert not fill(cache)
        assert "No space left" in caplog.text
        caplog.clear()
        assert [path.name for path in folder.glob("*.safetensors")] == []
        assert [path.name for path in folder.glob("*.lock")] == []
    assert fill(cache)


KILLED = """
import sys
from tests.unit.test_part_cache import fill
from dtr.checkpoint.restoring.cache import Cache
fill(Cache(sys.argv[1], 10**9))
"""


@pytest.mark.parametrize("point", ["cache.mid_fill", "cache.before_rename"])
def test_a_kill_leaves_nothing_that_counts(cache: Cache, folder: Path, point: str) -> None:
    """A process dies while it fills: no entry is there, and the next filling takes its place and clears up."""
    env = {**os.environ, "DTR_FAILPOINT": f"{point}=kill", "DTR_TESTING": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=env, timeout=60, capture_output=True)
    assert child.returncode == -9, child.stderr
    assert read(cache) is None
    assert list(folder.glob("*.tmp"))
    assert fill(cache, object="another")
    assert list(folder.glob("*.tmp")) == []
    assert fill(cache)
    assert read(cache) == DATA


def test_what_another_process_fills_is_left_alone(cache: Cache, folder: Path) -> None:
    """Clearing up after the dead never takes a living one's file."""
    filling = cache.filling(URL, facts_with(object="slow"))
    assert filling is not None
    assert fill(cache)
    assert len(list(folder.glob("slow*.tmp"))) == 1
    filling.discard()
    assert try_lock(str(folder / "free.lock")) is not None


def test_the_settings_name_it(tmp_path: Path) -> None:
    """Off by default; a folder and a budget where given."""
    assert Cache.of(Settings.load(environ={})) is None
    found = Cache.of(Settings.load(environ={"DTR_CACHE": str(tmp_path), "DTR_CACHE_BUDGET_BYTES": "5"}))
    assert found is not None
    assert (found.folder, found._budget()) == (str(tmp_path), 5)
    assert Cache(str(tmp_path), None)._budget() > 0


def test_a_note_of_others_is_no_entry(cache: Cache, folder: Path) -> None:
    """JSON of another shape, another version or another size of pieces is not believed."""
    fill(cache, pieces=False)
    (path,) = folder.glob("*.json")
    note = json.loads(path.read_text())
    for change in ({"v": 9}, {"object": "x"}, {"state_bytes": 1}):
        path.write_text(json.dumps({**note, **change}))
        assert cache.source(URL, facts_with(pieces=False)) is None
    for change in ({"pieces": "zz"}, {"piece_bytes": 0}, {"piece_bytes": 7}, {"pieces": "0" * 16}):
        path.write_text(json.dumps({**note, **change}))
        assert read(cache, pieces=False) == DATA, "then only the whole is verified"
    path.write_text("[" * 100_000)
    assert cache.source(URL, facts_with(pieces=False)) is None


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every source that a test opened is closed: no descriptor leaks."""
    opened: list[PieceSource] = []
    real = Cache.source
    monkeypatch.setattr(Cache, "source", lambda *given: opened.append(found := real(*given)) or found)
    yield
    for source in opened:
        if source is not None:
            source.close()
