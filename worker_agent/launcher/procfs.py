"""What Linux tells about processes in ``/proc``; nothing is known where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ProcessState", "is_stopped", "living_group", "oom_kills"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """``state`` is the letter of ps(1): R, S, D, T (stopped), t (traced), Z (ended, not yet waited for)."""

    state: str
    group: int


def _look(pid: int) -> ProcessState | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # before it stands the name, which may hold anything
        return ProcessState(state=fields[0].decode(), group=int(fields[2]))
    except (OSError, ValueError, IndexError):
        return None


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped, by SIGSTOP or a debugger."""
    found = _look(pid)
    return found is not None and found.state in "Tt"


def living_group(group: int) -> Iterator[int]:
    """The processes of a process group that have not ended."""
    try:
        entries = os.listdir("/proc")
    except OSError:
        return
    for entry in entries:
        if entry.isdigit() and (found := _look(int(entry))) is not None and found.group == group and found.state not in "ZX":
            yield int(entry)


def oom_kills() -> int:
    """How often the kernel's out-of-memory killer has struck since boot, on the whole machine."""
    try:
        with open("/proc/vmstat", "rb") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(b"oom_kill ")), 0)
    except (OSError, ValueError, IndexError):
        return 0
