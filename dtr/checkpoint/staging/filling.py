"""One slot while it fills: COPYING before the first byte changes, STAGED after the last one did.

What survives a kill at any point: before the COPYING record the slot is as it was; until the STAGED record it is torn, and the next
user of the folder frees it; afterwards it is a complete part that uploads without its trainer. Bytes may still be on their way from a
device when ``fill`` returns: the slot stays COPYING, and held, until ``seal``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from dtr.checkpoint.staging.device import Devices, Pending
from dtr.checkpoint.staging.locks import Hold
from dtr.checkpoint.staging.memory import WarmMaps
from dtr.checkpoint.staging.slots import SlotFiles, SlotRecord
from dtr.checkpoint.staging.space import space_of
from dtr.clock import Clock
from dtr.errors import CheckpointError, InvalidInput, StagingFull
from dtr.failpoints import failpoint

__all__ = ["COPY_THREADS", "Counters", "Slot"]

# Two saturate the memory of a small host, four that of a socket; the trainer waits meanwhile, so they are its own cores.
COPY_THREADS: Final = max(1, min(4, len(os.sched_getaffinity(0))))


class Layout(Protocol):
    """What staging asks of a layout (``dtr.checkpoint.format.tensors``)."""

    @property
    def size_bytes(self) -> int: ...

    def copy_into(self, buffer: memoryview, leaves: Mapping[str, Any], *, threads: int = 1) -> None: ...


@dataclass(slots=True, kw_only=True)
class Counters:
    """What happened so far, for status and metrics."""

    staged: int = 0
    staged_bytes: int = 0
    waited: int = 0
    waited_s: float = 0.0
    skipped: int = 0
    refused: int = 0


class Home(Protocol):
    """What a slot asks of the arena that it belongs to."""

    clock: Clock
    counters: Counters
    maps: WarmMaps

    def prepare(self, size_bytes: int) -> None: ...


class Slot:
    """One slot that the caller holds exclusively; ends with ``write``, ``seal`` or ``free``."""

    __slots__ = ("_arena", "_copying", "_hold", "files", "size_bytes")

    def __init__(self, arena: Home, files: SlotFiles, hold: Hold, size_bytes: int) -> None:
        self._arena, self.files, self._hold, self.size_bytes = arena, files, hold, size_bytes
        self._copying: SlotRecord | None = None

    def write(self, layout: Layout, leaves: Mapping[str, Any], record: SlotRecord) -> SlotRecord:
        """Copy the state and make it visible to uploaders; returns the record as staged, and lets the slot go.

        Raises:
            StagingFull: not even the record fits.
            Exception: whatever the copy raised; the slot is free again.
        """
        if layout.size_bytes != self.size_bytes:
            self.free()
            raise InvalidInput(f"the slot was acquired for {self.size_bytes} bytes, the layout has {layout.size_bytes}")
        self.fill(lambda buffer: layout.copy_into(buffer, leaves, threads=COPY_THREADS), record)
        return self.seal()

    def fill(self, copy: Callable[[memoryview], Pending | None], record: SlotRecord, *, pin: Devices | None = None) -> Pending | None:
        """Have ``copy`` fill the slot's bytes; what it returns is what is still under way. Then comes ``seal``, or ``free``.

        Args:
            copy: is given the slot's bytes, every page of them there.
            record: what it will hold.
            pin: the devices that copy into it.

        Raises:
            StagingFull: not even the record fits.
            Exception: whatever ``copy`` raised; the slot is free again.
        """
        copying = replace(record, state="COPYING", size_bytes=self.size_bytes)
        try:
            failpoint("stage.before_record")
            self._put(copying)
            failpoint("stage.after_copying_record")
            with self._arena.maps.buffer(self.files, self.size_bytes, pin=pin) as buffer:
                buffer[:8] = bytes(8)[: self.size_bytes]  # from here on not even the old header makes a whole part of it
                failpoint("stage.mid_copy")
                pending = copy(buffer)
        except BaseException:
            self.free()
            raise
        self._copying = copying
        return pending

    def seal(self) -> SlotRecord:
        """All bytes are there: make the part visible to uploaders; returns the record as staged, and lets the slot go.

        Raises:
            StagingFull: not even the record fits; the slot is free again.
        """
        if self._copying is None:
            raise CheckpointError("this slot was not filled")
        try:
            failpoint("stage.before_staged_record")
            staged = replace(self._copying, state="STAGED", staged_at=self._arena.clock.wall())
            self._put(staged)
            failpoint("stage.after_staged_record")
        except BaseException:
            self.free()
            raise
        self._hold.release()
        self._arena.counters.staged += 1
        self._arena.counters.staged_bytes += self.size_bytes
        self._arena.prepare(self.size_bytes)
        return staged

    def free(self) -> None:
        """Let the slot go unused; what it held is forgotten, its memory stays warm."""
        self.files.forget()
        self._hold.release()

    def _put(self, record: SlotRecord) -> None:
        try:
            self.files.write(record)
        except OSError as exc:
            if exc.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            free = space_of(self.files.folder).free_bytes
            raise StagingFull(
                f"the staging folder {self.files.folder} has no room for a slot's record: {exc.strerror}, {free} bytes free",
                needed_bytes=4096,
                free_bytes=free,
            ) from exc
