"""Locks of staging: between threads, between processes, over forks, and against a file that is deleted meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dtr.checkpoint.staging.locks import is_held, try_lock

HOLDER = """
import sys
from dtr.checkpoint.staging.locks import try_lock
hold = try_lock(sys.argv[1], shared=sys.argv[2] == "shared")
print("held" if hold else "busy", flush=True)
sys.stdin.read()
"""


def other_process(path: Path, how: str) -> subprocess.Popen[str]:
    """A process that has tried to take the lock, and keeps it until it is killed."""
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.outcome = child.stdout.readline().strip()  # type: ignore[attr-defined]
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slot-0.lock"


def test_exclusive_excludes_both_kinds_in_this_process(path: Path) -> None:
    """POSIX locks do not exclude threads of one process; the table does."""
    with try_lock(str(path)) as hold:  # type: ignore[union-attr]
        assert not hold.shared
        assert try_lock(str(path)) is None
        assert try_lock(str(path), shared=True) is None
    again = try_lock(str(path))
    assert again is not None
    again.release()


def test_shared_holders_count(path: Path) -> None:
    """The last shared holder lets go, not the first."""
    first, second = try_lock(str(path), shared=True), try_lock(str(path), shared=True)
    assert first is not None and second is not None
    first.release()
    first.release()
    assert try_lock(str(path)) is None
    second.release()
    last = try_lock(str(path))
    assert last is not None
    last.release()


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"),
    [(False, "shared", "busy"), (False, "exclusive", "busy"), (True, "shared", "held"), (True, "exclusive", "busy")],
)
def test_another_process_is_excluded(path: Path, ours: bool, theirs: str, outcome: str) -> None:
    """What this process holds, another process meets."""
    with try_lock(str(path), shared=ours) as _:  # type: ignore[union-attr]
        child = other_process(path, theirs)
        end(child)
        assert child.outcome == outcome  # type: ignore[attr-defined]


def test_death_releases(path: Path) -> None:
    """A killed holder holds nothing."""
    child = other_process(path, "exclusive")
    assert child.outcome == "held"  # type: ignore[attr-defined]
    assert try_lock(str(path)) is None
    assert is_held(str(path))
    end(child)
    assert not is_held(str(path))
    hold = try_lock(str(path))
    assert hold is not None
    hold.release()


def test_a_failed_attempt_and_a_question_do_not_drop_our_lock(path: Path) -> None:
    """Closing any descriptor of a file drops a POSIX lock on it, so nothing here opens a file that is held, by whatever name."""
    alias = path.parent / "alias" / path.name
    (path.parent / "alias").symlink_to(path.parent)
    with try_lock(str(path)) as _:  # type: ignore[union-attr]
        assert try_lock(str(path)) is None
        assert try_lock(str(alias)) is None
        assert is_held(str(path)) and is_held(str(alias))
        child = other_process(path, "shared")
        end(child)
        assert child.outcome == "busy"  # type: ignore[attr-defined]


def test_asking_takes_nothing(path: Path) -> None:
    """is_held makes no file and no lock, so that the owner's own attempt cannot fail because somebody looked."""
    assert not is_held(str(path))
    assert not path.exists()
    path.touch()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            is_held(str(path))

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        for _ in range(300):
            hold = try_lock(str(path))
            assert hold is not None
            hold.release()
    finally:
        stop.set()
        asker.join()


def test_a_forked_child_holds_nothing_and_takes_nothing_away(path: Path) -> None:
    """The child of a fork can neither release its parent's lock nor believe that it has it."""
    hold = try_lock(str(path))
    assert hold is not None
    pid = os.fork()
    if pid == 0:
        hold.release()
        os._exit(0 if try_lock(str(path)) is None and is_held(str(path)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    child = other_process(path, "shared")
    end(child)
    assert child.outcome == "busy"  # type: ignore[attr-defined]
    hold.release()


def test_a_deleted_file_is_no_lock(path: Path) -> None:
    """Whoever holds a file that was deleted and made anew does not exclude those who came later, and they do not meet it."""
    old = try_lock(str(path))
    assert old is not None
    path.unlink()
    new = try_lock(str(path))
    assert new is not None
    old.release()
    assert is_held(str(path))
    child = other_process(path, "exclusive")
    end(child)
    assert child.outcome == "busy"  # type: ignore[attr-defined]
    new.release()


def test_no_descriptor_is_left(path: Path) -> None:
    """Locks that were let go cost nothing."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        hold = try_lock(str(path))
        assert hold is not None
        assert try_lock(str(path)) is None
        hold.release()
        is_held(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    """The caller decides what a vanished folder means."""
    with pytest.raises(FileNotFoundError):
        try_lock(str(tmp_path / "gone" / "x.lock"))
