"""Slots for tests: a layout of plain bytes, records, and a trainer process that stages and is killed on demand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.slots import Found, SlotRecord, scan

INCARNATION = "0123456789ab"
RUN = "0001-aaaa"


class PlainLayout:
    """One leaf ``x`` of bytes, copied as it is."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def copy_into(self, buffer: memoryview, leaves: Mapping[str, Any], *, threads: int = 1) -> None:
        buffer[:] = leaves["x"]


def record(step: int = 1, *, job: str = "job", worker: str = "w0", **facts: Any) -> SlotRecord:
    """A record of rank 0 of a run of one."""
    known: dict[str, Any] = {"run": RUN, "rank": 0, "world_size": 1, "incarnation": INCARNATION, "host": "host-1", "store": "/none"}
    return SlotRecord(job=job, worker=worker, step=step, **{**known, **facts})


def stage(arena: Arena, data: bytes, given: SlotRecord) -> SlotRecord:
    """Stage ``data`` as a trainer would."""
    slot = arena.acquire(len(data))
    assert slot is not None
    return slot.write(PlainLayout(len(data)), {"x": data}, given)


def staged(staging: str | Path) -> list[Found]:
    """The complete parts that wait for their upload."""
    return [found for found in scan(str(staging)) if found.kind == "STAGED"]


TRAINER = """
import sys
from dtr.checkpoint.staging.arena import Arena
from tests.staged import record, stage
staging, size, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
arena = Arena(staging, job="job", worker="w0", policy="fail")
for step in range(steps):
    stage(arena, bytes([65 + step]) * size, record(step))
    print("staged", step, flush=True)
sys.stdin.read()
"""


def trainer(staging: Path, *, size_bytes: int = 200_000, steps: int = 1, fault: str | None = None) -> subprocess.Popen[str]:
    """A process that stages ``steps`` parts, the letters A, B, ..., then waits for its end."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    if fault:
        env |= {"DTR_FAILPOINT": fault, "DTR_TESTING": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(staging), str(size_bytes), str(steps)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def finished(child: subprocess.Popen[str], *, kill: bool = False) -> int:
    """End a child and return its exit status."""
    if kill:
        child.kill()
    child.communicate(timeout=60)
    return child.returncode
