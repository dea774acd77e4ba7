"""A process that may not have more memory, files or threads: the save fails with a typed error, and the next one works (I9, I12)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import os, resource, sys, threading
import numpy as np
from dtr.checkpoint.staging.slots import finish, scan
from dtr.checkpoint.staging.stage import Stage
from dtr.errors import CheckpointError, StagingFull
from tests.stages import kinds, put, settings, take
here = settings(sys.argv[1])
stage = Stage()
state = {"w": np.arange(4 << 20, dtype=np.float64), "t": np.arange(1000.0)}
def refused():
    try:
        put(stage, here, state)
    except CheckpointError as exc:
        return exc
    raise SystemExit("the save was not refused")
def works():
    put(stage, here, state)
    assert (take(here)["w"] == state["w"]).all()
"""

ADDRESS_SPACE = """
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
error = refused()
assert isinstance(error, StagingFull) and error.needed_bytes > 32 << 20, repr(error)
assert "address space" in str(error), error
assert kinds(here) == [], kinds(here)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
works()
"""

FILES = """
works()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
works()
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
error = refused()
assert "cannot be used" in str(error) and "open files" in str(error), error
for spare in (1, 2, 3):
    os.close(taken.pop())
    try:
        put(stage, here, state)
    except CheckpointError:
        pass
for descriptor in taken:
    os.close(descriptor)
for found in scan(here.staging):
    assert found.kind in {"FREE", "DONE", "STAGED"}, found
    assert finish(found, "committed")
works()
"""

THREADS = """
real = threading.Thread.start
def start(thread):
    if thread.name.startswith("dtr-"):
        raise RuntimeError("can't start new thread")
    real(thread)
threading.Thread.start = start
for _ in range(3):
    works()
threading.Thread.start = real
works()
"""

FILE_SIZE = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
refused()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
works()
"""


@pytest.mark.parametrize("body", [ADDRESS_SPACE, FILES, THREADS, FILE_SIZE], ids=["address space", "files", "threads", "file size"])
def test_a_limited_process(tmp_path: Path, body: str) -> None:
    """Nothing is left in the folder but free slots, no slot is torn, and what it says names what is missing."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    tail = "stage.close()\nassert os.listdir(sys.argv[1]) == [], os.listdir(sys.argv[1])\n"
    child = subprocess.run([sys.executable, "-c", HEAD + body + tail, str(tmp_path)], capture_output=True, text=True, env=env, timeout=120)
    assert child.returncode == 0, child.stderr
