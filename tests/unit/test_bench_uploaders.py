"""What the upload benchmark says of others is what it says it is: the memory of all processes, the best setting of each peer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import upload_peers
from bench.upload_peers import How, quickest
from bench.uploaders import Worker

MB = 1_000_000

HOLDER = """
import mmap, os, sys
with open(sys.argv[1], "r+b") as file:
    slot = mmap.mmap(file.fileno(), 0)
slot[::4096] = b"x" * len(slot[::4096])
child = os.fork()
own = os.urandom(20_000_000)
print(flush=True)
sys.stdin.read()
"""


def test_memory_is_that_of_all_processes_without_the_slot(tmp_path: Path) -> None:
    """A process and its child hold 20 MB each, and both map 100 MB of a slot."""
    slot = tmp_path / "staging" / "slot.data"
    slot.parent.mkdir()
    slot.write_bytes(bytes(100 * MB))
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(slot)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        for _ in range(2):
            holder.stdout.readline()
        worker = Worker(holder.pid, str(slot.parent))
        with worker:
            pass
        holder.stdin.close()
    assert 40 * MB < worker.peak_bytes < 90 * MB


def test_a_peer_gets_its_quickest_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nine ways are tried; the one that takes the least time by the clock is chosen, and the first transfer does not count."""
    now, seen = [0.0], []
    monkeypatch.setattr(upload_peers.time, "perf_counter", lambda: now[0])

    def put(path: Path, key: str, how: How) -> None:
        seen.append(how)
        now[0] += abs(how.part_mib - 16) + abs(how.at_once - 8) + 1

    assert quickest(put, tmp_path, "k") == How(part_mib=16, at_once=8)
    assert (len(seen), len(set(seen))) == (10, 9)
