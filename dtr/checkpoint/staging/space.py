"""How much room a folder has: on its file system, and in memory when that file system is memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

__all__ = ["Space", "available_memory_bytes", "space_of"]

_IN_MEMORY: Final = {"tmpfs", "ramfs", "devtmpfs"}
_CGROUP: Final = "/sys/fs/cgroup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Room as seen now; ``free_bytes`` of a file system in memory is also bounded by the memory that is left."""

    total_bytes: int
    free_bytes: int
    in_memory: bool


def space_of(folder: str) -> Space:
    """The room in ``folder``.

    A tmpfs promises half the machine's memory by default; filling it past what is really there, or past the limit of the control
    group, wakes the kernel's killer, which would take the trainer.
    """
    status = os.statvfs(folder)
    free, in_memory = status.f_bavail * status.f_frsize, _file_system(folder) in _IN_MEMORY
    return Space(
        total_bytes=status.f_blocks * status.f_frsize,
        free_bytes=min(free, available_memory_bytes()) if in_memory else free,
        in_memory=in_memory,
    )


def available_memory_bytes() -> int:
    """Memory that can be had without killing anyone: of the machine, and of each control group above this process."""
    available = 2**63 - 1
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
                    break
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            groups = [line.strip().partition("::")[2] for line in file if line.startswith("0::")]
    except OSError:
        return available
    path = groups[0].rstrip("/") if groups else ""
    while True:
        available = min(available, _left_in_group(_CGROUP + path))
        if not path:
            return max(available, 0)
        path = path.rpartition("/")[0]


def _left_in_group(folder: str) -> int:
    try:
        with open(f"{folder}/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        if limit == "max":
            return 2**63 - 1
        with open(f"{folder}/memory.current", encoding="ascii") as file:
            used = int(file.read())
        with open(f"{folder}/memory.stat", encoding="ascii") as file:
            reclaimable = sum(int(value) for name, _, value in (line.partition(" ") for line in file) if name == "inactive_file")
    except (OSError, ValueError):
        return 2**63 - 1  # no such group here, or control groups of the older kind
    return int(limit) - used + reclaimable


def _file_system(folder: str) -> str:
    """The type of the file system that holds ``folder``, by the longest mount point above it."""
    real = os.path.realpath(folder)
    best, kind = -1, ""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                left, _, right = line.partition(" - ")
                point = left.split()[4].encode("utf-8", "surrogateescape").decode("unicode_escape") if "\\" in left else left.split()[4]
                inside = real == point or real.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= best:  # of two on one point, the later hides the earlier
                    best, kind = len(point), right.split()[0]
    except OSError:
        return ""
    return kind
