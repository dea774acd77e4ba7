"""Pool processes give way to trainers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

LOOK = """
import ctypes, json, os, sys, threading
from tasks.priority import _IOPRIO_SET, give_way
give_way(int(sys.argv[1]))
found = []
get = _IOPRIO_SET[os.uname().machine] + 1 if os.uname().machine != "aarch64" else 31
def look():
    found.append([os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), ctypes.CDLL(None).syscall(get, 1, 0) >> 13])
look()
thread = threading.Thread(target=look)
thread.start()
thread.join()
print(json.dumps(found))
"""


@pytest.mark.parametrize(("nice", "io_class"), [(7, 3), (0, 0)])
def test_the_process_and_its_threads_give_way(nice: int, io_class: int) -> None:
    """As far as asked at the processor; at the disk idle, or untouched with 0."""
    out = subprocess.run([sys.executable, "-c", LOOK, f"{nice}"], capture_output=True, text=True, check=True, cwd=ROOT)
    (own, own_io), (thread, thread_io) = json.loads(out.stdout)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert own == thread == min(before + nice, 19)
    if nice:
        assert own_io == thread_io == io_class
    else:
        assert own_io in {0, 2}, "as it was"


AUTOGROUP = Path("/proc/self/autogroup")


@pytest.mark.skipif(not os.access(AUTOGROUP, os.W_OK), reason="this kernel shares the processor out among processes, not sessions")
@pytest.mark.parametrize("leads", [True, False])
def test_a_session_of_its_own_gives_way_as_a_whole(leads: bool) -> None:
    """Where nice counts inside a session only, a worker that leads one lowers it; one in a person's session leaves that alone."""
    code = "import sys; sys.path[:0] = ['.']; from tasks.priority import give_way; give_way(7); print(open('/proc/self/autogroup').read())"
    # Not led: a shell of its own session starts a shell, which starts the worker.
    command = [sys.executable, "-c", code] if leads else ["sh", "-c", 'sh -c \'"$0" -c "$1"; true\' "$0" "$1"; true', sys.executable, code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, start_new_session=True)
    assert out.stdout.split()[-1] == ("7" if leads else "0")
