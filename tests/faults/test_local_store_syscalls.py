"""A put into a folder, with a fault in each of its own system calls: strace makes it fail, or kills the process in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dtr.errors import NotFound
from dtr.store import open_store

KEY, OLD, NEW = "runs/0001/manifest.json", b"old", b"new" * 100_000

WRITER = """
import sys
from dtr.errors import StoreUnavailable
from dtr.store import open_store
try:
    open_store(sys.argv[1]).put(sys.argv[2], b"new" * 100_000, if_absent=sys.argv[3] == "absent")
except StoreUnavailable as exc:
    sys.exit(11 if exc.unknown else 10)
"""


def can_trace() -> bool:
    return shutil.which("strace") is not None and subprocess.run(["strace", "-qq", "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_trace(), reason="strace is not there or may not trace (.ci/run installs it)")


def put_under(fault: str, root: Path, kind: str) -> int:
    """Run the writer with a fault; its exit code, negative if it was killed."""
    command = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", f"inject={fault}", sys.executable, "-c", WRITER, str(root), KEY, kind]
    return subprocess.run(command, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=60).returncode


# The calls of one put into a store that does not exist yet: fsync of the parents of `store`, `runs` and `0001`, of the file, of the folder.
CALLS = [("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 4), ("fsync", 5), ("link", 1), ("mkdir", 1), ("mkdir", 3)]


@pytest.mark.parametrize(("call", "when"), CALLS)
@pytest.mark.parametrize("fault", ["error=EIO", "signal=KILL"])
def test_a_fault_in_a_first_put(tmp_path: Path, call: str, when: int, fault: str) -> None:
    """Success means it is there, a sure failure that it is not, an unknown one and a kill: whole or absent; nothing stays."""
    root = tmp_path / "store"
    code = put_under(f"{call}:{fault}:when={when}", root, "absent")
    store = open_store(root)
    try:
        content = store.get(KEY)
    except NotFound:
        content = None
    if fault == "error=EIO":
        assert code == (11 if call == "link" or (call, when) == ("fsync", 5) else 10)
    else:
        assert code in {-9, 137}
    assert content in ({None, NEW} if code != 10 else {None})
    store.abort_uploads()
    assert [path.name for path in root.rglob("*") if path.is_file()] == ([] if content is None else ["manifest.json"])
    if content is None:
        store.put(KEY, NEW, if_absent=True)
    assert store.get(KEY) == NEW


@pytest.mark.parametrize(("call", "when"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 4), ("rename", 1)])
@pytest.mark.parametrize("fault", ["error=EIO", "signal=KILL"])
def test_a_fault_in_a_replacement(tmp_path: Path, call: str, when: int, fault: str) -> None:
    """The object is the old one or the new one, whole; a sure failure left the old one."""
    root = tmp_path / "store"
    store = open_store(root)
    store.put(KEY, OLD)
    code = put_under(f"{call}:{fault}:when={when}", root, "replace")
    content = store.get(KEY)
    assert code != 0
    assert content in ({OLD} if code == 10 else {OLD, NEW})
    store.abort_uploads()
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["manifest.json"]
