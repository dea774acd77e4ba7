"""A real uploader for benchmarks: the Celery worker that ``dtr up`` starts, what its processes cost, and when each upload began and ended.

Times come from the server's clock, as the uploader's own scripts wrote them: from the claim of the first part to the decision.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import redis

from dtr.host import host_id
from dtr.state.job import JobState
from dtr.state.keys import uploader

__all__ = ["Took", "Worker", "took", "worker"]

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_SAMPLE_S: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """One checkpoint's way: from staged to claimed, and from claimed to COMMITTED."""

    dispatch_s: float
    upload_s: float


def took(state: JobState, run: str, step: int) -> Took:
    """What the server says of a checkpoint that is COMMITTED."""
    parts = state.redis.hgetall(state.keys.parts(run, step))
    staged_ms, claimed_ms = (
        min(int(value) for name, value in parts.items() if name.endswith(f"/{what}")) for what in ("staged_at", "claimed_at")
    )
    decided_ms = int(state.redis.hget(state.keys.ckpt(run, step), "decided_at") or 0)
    return Took(dispatch_s=(claimed_ms - staged_ms) / 1000, upload_s=(decided_ms - claimed_ms) / 1000)


class Worker:
    """The uploader's processes. As a context manager: samples their memory while the block runs, which is too much work to time the block.

    Memory is what all of them hold together, what several share counted once (PSS), without the slots, which the trainer has anyway:
    ``idle_bytes`` before the first upload, ``peak_bytes`` in the blocks.
    """

    def __init__(self, pid: int, staging: str) -> None:
        self._pid, self._staging = pid, staging
        self.idle_bytes = self.peak_bytes = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def cpu_s(self) -> float:
        """Of all processes together, since they began."""
        return sum(_cpu_s(pid) for pid in self._pids())

    def came_up(self, url: str, *, timeout_s: float = 60.0) -> None:
        """Wait until the worker is there, and note what its processes hold."""
        deadline = time.monotonic() + timeout_s
        with redis.Redis.from_url(url) as client:
            while not client.exists(uploader(host_id(self._staging))):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no uploader came up in {timeout_s:.0f} s")
                time.sleep(0.02)
        self.idle_bytes = self.peak_bytes = self._own_bytes()

    def _own_bytes(self) -> int:
        return sum(_own_bytes(pid, self._staging) for pid in self._pids())

    def _pids(self) -> list[int]:
        """The worker and its pool; none of them may end while a benchmark runs."""
        found = [self._pid]
        for task in Path(f"/proc/{self._pid}/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
        return found

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._own_bytes())
            if self._over.wait(_SAMPLE_S):
                return

    def __enter__(self) -> Self:
        self._over.clear()
        self._thread = threading.Thread(target=self._sample, name="bench-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()


@contextlib.contextmanager
def worker(url: str, folder: Path, **environment: str) -> Iterator[Worker]:
    """An uploader with default settings, but one kept commit; the environment of this process is that of its trainers meanwhile."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else str(folder)
    staging = Path(tempfile.mkdtemp(prefix="dtr-bench-", dir=base))
    settings = {"DTR_REDIS_URL": url, "DTR_STAGING": str(staging), "DTR_KEEP_LAST": "1", "DTR_READER_GRACE_S": "0", **environment}
    before = dict(os.environ)
    os.environ.update(settings)
    with (folder / "uploader.log").open("wb") as log:
        child = subprocess.Popen([sys.executable, "-m", "celery", "-A", "tasks", "worker"], stdout=log, stderr=log)
    try:
        yield Worker(child.pid, str(staging))
    finally:
        child.terminate()
        child.wait(timeout=60)
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(staging, ignore_errors=True)


def settled(staging: Path, *, timeout_s: float = 60.0) -> None:
    """Wait until no slot holds a save any more, so that what follows is measured alone."""
    from dtr.checkpoint.staging.slots import scan

    deadline = time.monotonic() + timeout_s
    while any(found.kind == "STAGED" for found in scan(str(staging))):
        if time.monotonic() > deadline:
            raise RuntimeError(f"slots in {staging} were not freed in {timeout_s:.0f} s")
        time.sleep(0.02)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _own_bytes(pid: int, staging: str) -> int:
    """A process's share of the memory that it maps, but for files below ``staging``."""
    total_kb, counts = 0, True
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if not line[0].isupper():  # a mapping begins; its figures follow
                counts = staging not in line
            elif counts and line.startswith("Pss:"):
                total_kb += int(line.split()[1])
    return total_kb << 10
