"""The store contract on a folder, and what only a file system can break."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtr.errors import AlreadyExists, ConditionalPutUnsupported, IntegrityError, StoreRefused, StoreUnavailable
from dtr.store import Store, durable, open_store
from dtr.store.local import LocalStore
from tests.contract.store_contract import LARGE_BYTES, MANIFEST, StoreContract
from tests.waiting import eventually


def refuse(code: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


@pytest.fixture
def store(root: Path) -> Store:
    return open_store(root)


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, root: Path) -> Store:
        return open_store(root)


class TestWithoutHardLinks(StoreContract):
    """The same on a file system that has renameat2(RENAME_NOREPLACE) only."""

    @pytest.fixture
    def store(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
        return open_store(root)


class TestWithoutCopyInTheKernel(StoreContract):
    """The same where neither copy_file_range nor sendfile works between the two file systems."""

    @pytest.fixture
    def store(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
        monkeypatch.setattr(os, "sendfile", refuse(errno.EINVAL))
        return open_store(root)


# --- kills ---

WRITER = """
import sys
from dtr.store import open_store
kind, url, key, path = sys.argv[1:]
store = open_store(url)
if kind == "file":
    store.put_file(key, path, 3_000_000)
else:
    store.put(key, b"new" * 1_000_000, if_absent=kind == "absent")
"""
STEPS = ["before_write", "before_link", "after_link", "after_sync"]


def run_writer(store: Store, kind: str, path: Path, **environment: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", WRITER, kind, store.url, MANIFEST, str(path)], env={**os.environ, **environment}, check=False
    ).returncode


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["absent", "replace", "file"])
def test_a_kill_leaves_old_or_new(store: Store, root: Path, tmp_path: Path, kind: str, step: str) -> None:
    """SIGKILL between any two steps of a put: the object is the old one or the new one, the rest is found and cleaned."""
    source = tmp_path / "source"
    source.write_bytes(b"new" * 1_000_000)
    if kind == "replace":
        store.put(MANIFEST, b"old")
    code = run_writer(store, kind, source, DTR_TESTING="1", DTR_FAILPOINT=f"store.local.{step}=kill")
    assert code == -signal.SIGKILL
    linked = step in {"after_link", "after_sync"}
    if linked:
        assert store.get(MANIFEST) == b"new" * 1_000_000
    else:
        assert list(store.list()) == ([MANIFEST] if kind == "replace" else [])
    left = 0 if linked and kind == "replace" else 1  # a rename takes the temporary name away, a link leaves it
    assert store.abort_uploads("another/folder") == 0
    assert store.abort_uploads(MANIFEST) == left
    assert store.abort_uploads() == 0
    assert [path.name for path in root.rglob("*") if path.is_file()] == (["manifest.json"] if linked or kind == "replace" else [])
    store.put(MANIFEST, b"again")
    assert store.get(MANIFEST) == b"again"


def test_what_is_being_written_is_not_cleaned(store: Store, large: Path) -> None:
    """abort_uploads of another thread or process leaves a live writer's file alone, also by key."""
    writing, cleaned = threading.Event(), threading.Event()

    def wait(done: int) -> None:
        writing.set()
        assert cleaned.wait(30)

    writer = threading.Thread(target=store.put_file, args=("a/part", large, LARGE_BYTES), kwargs={"progress": wait})
    writer.start()
    assert writing.wait(30)
    assert [store.abort_uploads(), store.abort_uploads("a"), store.abort_uploads("a/part")] == [0, 0, 0]
    assert list(store.list()) == []
    cleaned.set()
    writer.join(30)
    assert store.size("a/part") == LARGE_BYTES


def test_old_leftovers_only(store: Store, root: Path) -> None:
    """older_than_s spares what was written lately."""
    (root / "a").mkdir(parents=True)
    for name, age_s in (("old", 1000), ("new", 0)):
        path = root / "a" / f"{durable.TEMPORARY}0123~{name}"
        path.write_bytes(b"x")
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age_s))
    assert store.abort_uploads(older_than_s=500) == 1
    assert store.abort_uploads(older_than_s=500) == 0
    assert store.abort_uploads("a") == 1


# --- durability ---


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fsyncs, links, renames and mkdirs, in order, with the name they concern."""
    seen: list[str] = []

    def note(verb: str, real: Callable[..., Any], name: Callable[..., str]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            seen.append(f"{verb} {name(*args)}")
            return result

        monkeypatch.setattr(os, verb, call)

    base = os.path.basename
    note("fsync", os.fsync, lambda fd: base(os.readlink(f"/proc/self/fd/{fd}")).rpartition("~")[2])  # NAME of a temporary file
    note("link", os.link, lambda source, target: base(target))
    note("rename", os.rename, lambda source, target: base(target))
    note("mkdir", os.mkdir, lambda path, *mode: base(path))
    return seen


def test_each_name_is_synced_after_it_was_made(tmp_path: Path, calls: list[str]) -> None:
    """A put syncs each new folder's parent, then the bytes, then links, then syncs the folder; a second one makes no folder."""
    store = open_store(tmp_path / "x" / "store")
    calls.clear()
    store.put("a/b/k", b"1", if_absent=True)
    parent = tmp_path.name
    assert calls == [
        "mkdir x", f"fsync {parent}", "mkdir store", "fsync x", "mkdir a", "fsync store", "mkdir b", "fsync a",
        "fsync k", "link k", "fsync b",
    ]  # fmt: skip
    calls.clear()
    store.put("a/b/k", b"2")
    assert calls == ["fsync k", "rename k", "fsync b"]


def test_folders_of_others_are_synced_once(tmp_path: Path, calls: list[str]) -> None:
    """A folder that another process made, perhaps a moment ago, is made durable as well; a folder made anew is synced anew."""
    store = open_store(tmp_path / "store")
    (tmp_path / "store" / "a").mkdir(parents=True)
    calls.clear()
    store.put("a/k", b"1")
    assert calls == ["fsync store", "fsync k", "rename k", "fsync a"]
    store.delete("a/k")
    calls.clear()
    store.put("a/k", b"1")
    assert calls == ["mkdir a", "fsync store", "fsync k", "rename k", "fsync a"]


def test_the_loser_finds_a_durable_winner(store: Store, calls: list[str]) -> None:
    """AlreadyExists is raised only after the folder was synced: the winner may have been killed before it did that."""
    store.put("a/k", b"1", if_absent=True)
    calls.clear()
    with pytest.raises(AlreadyExists):
        store.put("a/k", b"2", if_absent=True)
    assert calls == ["fsync k", "fsync a"]
    calls.clear()
    with pytest.raises(AlreadyExists) as caught:
        store.put_file("a/k", __file__, 1)
    assert (calls, caught.value.key) == (["fsync a"], "a/k")


def test_a_failed_fsync_of_the_bytes_commits_nothing(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO on the file: a typed error that is sure nothing happened, and nothing stays."""
    store.put("a/other", b"")
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(StoreUnavailable, match="Input/output error") as caught:
        store.put("a/k", b"1", if_absent=True)
    assert caught.value.unknown is False
    assert [path.name for path in (root / "a").iterdir()] == ["other"]


def test_a_failed_fsync_of_the_folder_is_unknown(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO on the folder after the link: the caller is told to look; a second put syncs before it says that it lost."""
    store.put("a/other", b"")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync_folder", refuse(errno.EIO))
        for _ in range(2):  # the object is there now, and still nobody says that it is safe
            with pytest.raises(StoreUnavailable) as caught:
                store.put("a/k", b"1", if_absent=True)
            assert caught.value.unknown is True
        with pytest.raises(StoreUnavailable):
            store.put_file("a/k", __file__, 1)
    with pytest.raises(AlreadyExists):
        store.put("a/k", b"1", if_absent=True)


# --- file systems ---


def test_neither_link_nor_renameat2_is_refused(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without an atomic put-if-absent is refused by probe and by put, by name, and left as it was."""
    monkeypatch.setattr(os, "link", refuse(errno.EOPNOTSUPP))
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    for write in (store.probe, lambda: store.put("k", b"1", if_absent=True)):
        with pytest.raises(ConditionalPutUnsupported, match="renameat2"):
            write()
    assert list(root.iterdir()) == []
    store.put("k", b"replaceable")  # only decisions need the condition


def test_a_link_that_replaces_is_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe does not believe link(2): it tries."""
    monkeypatch.setattr(os, "link", os.replace)
    with pytest.raises(ConditionalPutUnsupported):
        store.probe()


def test_a_resent_link_is_a_success(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS resends a LINK whose reply was lost, and then reports that the name exists: it is ours."""
    real = os.link

    def twice(source: str, target: str) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", twice)
    store.put("k", b"mine", if_absent=True)
    assert store.get("k") == b"mine"


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o644, 0o775)])
def test_modes_follow_the_umask(store: Store, root: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    """Files are 0644 and folders 0777, less the umask: nobody who may not is given access, nobody who may loses it."""
    before = os.umask(mask)
    try:
        store.put("a/k", b"1", if_absent=True)
        store.put("a/l", b"1")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((root / name).stat().st_mode) for name in ("a/k", "a/l", "a")] == [file_mode, file_mode, folder_mode]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "dtr-test", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tiny: Path, large: Path) -> None:
    """ENOSPC: the numbers are in the message, nothing is visible, nothing stays, and what fits is stored afterwards."""
    store = open_store(tiny / "store")
    writes: list[Callable[[], None]] = [
        lambda: store.put("a/k", bytes(2 << 20), if_absent=True),
        lambda: store.put_file("a/k", large, LARGE_BYTES),
    ]
    for write, needed in zip(writes, (2 << 20, LARGE_BYTES), strict=True):
        with pytest.raises(StoreUnavailable) as caught:
            write()
        assert caught.value.unknown is False
        numbers = re.search(r"No space left on device: (\d+) bytes are needed, (\d+) bytes are free", str(caught.value))
        assert numbers is not None
        assert int(numbers[1]) == needed
        assert (1 << 20) - (64 << 10) < int(numbers[2]) <= 1 << 20
    assert [path for path in tiny.rglob("*") if path.is_file()] == []
    store.put("a/k", bytes(1 << 18), if_absent=True)


def test_a_source_that_shrinks(store: Store, tmp_path: Path) -> None:
    """A file that becomes shorter while it is copied is never stored as if it were whole."""
    source = tmp_path / "source"
    source.write_bytes(bytes(20 << 20))

    def shrink(done: int) -> None:
        os.truncate(source, 10 << 20)

    with pytest.raises(IntegrityError, match="ended after"):
        store.put_file("k", source, 20 << 20, progress=shrink)
    assert list(store.list()) == []


def test_a_file_where_a_folder_is_needed(store: Store) -> None:
    """A key below an object cannot be a file: refused with the reason, the object unharmed."""
    store.put("a", b"1")
    with pytest.raises(StoreRefused, match="a file stands where a folder is needed"):
        store.put("a/b", b"2")
    store.put("b/c", b"1")
    with pytest.raises(StoreRefused):
        store.put("b", b"2")
    assert list(store.list()) == ["a", "b/c"]


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    """A folder and a key that together exceed the system's limit are named as the problem."""
    store = LocalStore(str(tmp_path / "/".join(["d" * 200] * 18)))
    with pytest.raises(ValueError, match="longer than the system allows"):
        store.put("/".join(["k" * 200] * 4), b"")


def test_foreign_files_are_not_listed(store: Store, root: Path) -> None:
    """What could not be a key (bad names, pipes, temporary files) is not listed and does not disturb."""
    store.put("k", b"")
    (root / "new\nline").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe")).write_bytes(b"")
    os.mkfifo(root / "pipe")
    (root / f"{durable.TEMPORARY}0~k").write_bytes(b"")
    (root / "loop").symlink_to(root)
    assert list(store.list()) == ["k"]


def test_writers_and_deleters_of_one_folder(store: Store) -> None:
    """A folder that another thread empties, and so removes, at this moment is made again."""
    over = threading.Event()

    def churn() -> None:
        while not over.is_set():
            store.put("a/b/other", b"")
            store.delete("a/b/other")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for n in range(100):
            store.put("a/b/mine", str(n).encode(), if_absent=True)
            assert store.get("a/b/mine") == str(n).encode()
            store.delete("a/b/mine")
    finally:
        over.set()
        thread.join()
    assert list(store.list()) == []


def test_nothing_stays_open(store: Store, large: Path) -> None:
    """Descriptors are closed after success and failure alike."""
    store.put("a", b"1")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        store.put_file("part", large, LARGE_BYTES, if_absent=False)
        store.read_into("part", bytearray(1000))
        with pytest.raises(AlreadyExists):
            store.put("a", b"2", if_absent=True)
        list(store.list())
    eventually(lambda: len(os.listdir("/proc/self/fd")) == before, what="as many descriptors as before")
