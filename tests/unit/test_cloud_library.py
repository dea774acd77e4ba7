"""obstore in processes that fork: each has a library of its own, and nobody else's import is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dtr.errors import ConfigError
from dtr.store import cloud_library

ROOT = Path(__file__).parents[2]

FORKS = """
import os, sys
from dtr.store.cloud_library import library

def use(name):
    library().store.LocalStore(sys.argv[1]).put(name, b"1")
    assert library() is library()

def fork(then):
    pid = os.fork()
    if pid == 0:
        try:
            then()
            os._exit(0)
        except BaseException as exc:
            print(repr(exc), file=sys.stderr, flush=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

use("parent")
fork(lambda: (use("child"), fork(lambda: use("grandchild"))))
fork(lambda: fork(lambda: use("child of an idle child")))
use("parent again")
"""

THEIRS = """
import os, sys
import obstore
import obstore.store
obstore.store.LocalStore(sys.argv[1]).put("theirs", b"1")
from dtr.store.cloud_library import library
assert library() is not obstore and sys.modules["obstore"] is obstore and sys.modules["obstore.store"] is obstore.store
library().store.LocalStore(sys.argv[1]).put("ours", b"1")
obstore.store.LocalStore(sys.argv[1]).put("theirs again", b"1")
if os.fork() == 0:
    library().store.LocalStore(sys.argv[1]).put("child", b"1")
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(
    ("code", "names"),
    [
        (FORKS, {"parent", "child", "grandchild", "child of an idle child", "parent again"}),
        (THEIRS, {"theirs", "ours", "theirs again", "child"}),
    ],
)
def test_every_process_has_its_own(tmp_path: Path, code: str, names: set[str]) -> None:
    """Requests end in parent, child and grandchild, and where the user's own code had imported and used obstore before."""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == names


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install."""
    monkeypatch.setattr(cloud_library, "_NAME", "no_such_package")
    monkeypatch.setattr(cloud_library, "_loaded", {})
    with pytest.raises(ConfigError, match=r"pip install 'dtr\[cloud\]'"):
        cloud_library.library()
