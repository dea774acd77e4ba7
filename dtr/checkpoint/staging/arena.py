"""The trainer's side of staging: slots that are reserved, kept warm, and filled at the speed of memory.

``Arena.acquire`` finds a slot and reserves its bytes; how it fills, and what survives a kill meanwhile: ``filling``.
Neither talks to Redis or the store.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable
from typing import Final

from dtr import names
from dtr.checkpoint.staging.filling import Counters, Slot
from dtr.checkpoint.staging.locks import Hold, try_lock
from dtr.checkpoint.staging.memory import Stopped, WarmMaps, grow, is_reserved
from dtr.checkpoint.staging.reclaim import close_folder, reclaim
from dtr.checkpoint.staging.slots import FALLBACK, OWNER_LOCK, SlotFiles, fallback, look, slots_in, worker_folder
from dtr.checkpoint.staging.space import space_of
from dtr.clock import SYSTEM, Clock
from dtr.errors import CheckpointError, ForkedProcess, InvalidInput, NoFreeSlot, StagingFull
from dtr.host import host_id

__all__ = ["Arena"]

_log = logging.getLogger(__name__)
_LONGEST_PAUSE_S: Final = 0.02
_SAY_AFTER_S: Final = 5.0
POLICIES: Final = ("wait", "skip", "fail")


class Arena:
    """The slots of one worker. Makes its folder at the first ``acquire``; close it to give the memory back.

    Args:
        staging: the staging folder of this host.
        job: whose slots.
        worker: whose slots.
        slots: how many at most; from 2, so that one fills while another uploads.
        budget_bytes: upper bound of all slots in the staging folder, of all workers; None: what is free.
        policy: no slot is free: ``wait`` for one, ``skip`` this save, or ``fail`` it.
        wait_s: how long ``wait`` waits.
        fallback: folder on disk for when shared memory is too small, be it for two slots, or for the first beside those of others while
            no budget is given; None: one in /var/tmp that is named after this host.
        trouble: says why uploads are behind, if that is known; quoted where no slot is free.
    """

    def __init__(
        self,
        staging: str,
        *,
        job: str,
        worker: str,
        slots: int = 2,
        budget_bytes: int | None = None,
        policy: str = "wait",
        wait_s: float = 600.0,
        fallback: str | None = None,
        trouble: Callable[[], str] = lambda: "",
        clock: Clock = SYSTEM,
    ) -> None:
        names.job_name(job)
        names.name(worker, "worker")
        if policy not in POLICIES:
            raise InvalidInput(f"slot_policy must be wait, skip or fail, got {policy!r}", field="slot_policy")
        self.staging = os.path.realpath(staging)
        self.folder = worker_folder(self.staging, job, worker)
        self.slots, self.budget_bytes, self.policy, self.wait_s = slots, budget_bytes, policy, wait_s
        self.clock, self._trouble = clock, trouble
        self.counters = Counters()
        self.maps = WarmMaps()
        self._job, self._worker, self._fallback_root = job, worker, fallback
        self._no_room_bytes: float = math.inf  # slots from this size on are made on disk: memory had no room for the first
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._owners: dict[str, Hold] = {}
        self._warming: threading.Thread | None = None
        self._closed = False

    # --- acquiring ---

    def acquire(self, size_bytes: int) -> Slot | None:
        """A slot of exactly ``size_bytes`` that is reserved on the file system and held exclusively; None: skipped, by policy.

        Waits, under the policy ``wait``, until an upload frees a slot, ``wait_s`` at most.

        Raises:
            StagingFull: not even one slot of this size fits; nothing was changed.
            NoFreeSlot: every slot still waits for its upload (policy ``fail``, or ``wait`` for too long).
        """
        self._check()
        started, pause, said = self.clock.monotonic(), 0.001, None
        while True:
            slot = self._try_acquire(size_bytes)
            waited = self.clock.monotonic() - started
            if slot is not None:
                if pause > 0.001:
                    self.counters.waited += 1
                    self.counters.waited_s += waited
                return slot
            warming = self._warming
            if warming is not None and warming.is_alive():
                warming.join(_LONGEST_PAUSE_S)  # a slot is being made; that is no reason to skip a save
                continue
            if self.policy == "skip":
                self.counters.skipped += 1
                return None
            if self.policy == "fail" or waited >= self.wait_s:
                self.counters.refused += 1
                raise NoFreeSlot(self._why_none(waited))
            if waited > _SAY_AFTER_S and said != (why := self._trouble()):
                said = why
                _log.warning("%s", self._why_none(waited))
            self.clock.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def prepare(self, size_bytes: int) -> None:
        """Make the slots that are still missing in the background, their pages touched, so that no later save waits for memory."""
        with self._mutex:
            if self._closed or (self._warming is not None and self._warming.is_alive()) or len(self._existing()) >= self.slots:
                return
            warming = threading.Thread(target=self._warm, args=(size_bytes,), name="dtr-prefault", daemon=True)
            try:
                warming.start()
            except RuntimeError as exc:  # no thread can be had: the next save makes its slot itself
                _log.info("no slot is made ahead: %s", exc)
            else:
                self._warming = warming

    def close(self) -> None:
        """Give back the memory of every slot that is not waiting for its upload. Idempotent."""
        if self._pid != os.getpid():  # and the mutex may have been held by another thread at the fork
            return
        with self._mutex:
            if self._closed:
                return
            self._closed = True
        if self._warming is not None:
            self._warming.join()
        self.maps.close()
        for folder, owner in list(self._owners.items()):
            owner.release()
            close_folder(folder)
        self._owners.clear()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ForkedProcess
        if self._closed:
            raise CheckpointError("the staging arena is closed")

    def _try_acquire(self, size_bytes: int) -> Slot | None:
        try:
            return self._pick(size_bytes)
        except StagingFull:
            raise
        except OSError as exc:
            if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
                free = space_of(self.staging).free_bytes
                raise StagingFull(
                    f"the staging folder {self.staging} has no room for a slot of {size_bytes} bytes: {exc.strerror}, {free} bytes free",
                    needed_bytes=size_bytes, free_bytes=free, budget_bytes=self.budget_bytes,
                ) from exc  # fmt: skip
            raise CheckpointError(f"the staging folder {self.staging} cannot be used: {exc}") from exc

    def _pick(self, size_bytes: int) -> Slot | None:
        with self._mutex:
            self._own(self.folder)
            existing = self._existing()  # its owner lock is ours from here on, so no reclaimer touches the folder
            usable = [files for files in existing if look(files).kind in {"FREE", "DONE", "TORN"}]
            # The slot that is already of this size needs no new page; else the smallest that is large enough; else the largest.
            usable.sort(key=lambda files: _misfit(files.size_bytes(), size_bytes))
            try:
                for files in usable:
                    slot = self._take(files, size_bytes)
                    if slot is not None:
                        return slot
                if len(existing) >= self.slots:
                    return None
                index = min(set(range(self.slots)) - {files.index for files in existing})
                return self._make(index, size_bytes, others=bool(existing))
            except StagingFull:
                if not self._leaves_memory(size_bytes):
                    raise
            return self._pick(size_bytes)

    def _take(self, files: SlotFiles, size_bytes: int) -> Slot | None:
        hold = try_lock(files.lock)
        if hold is None:
            return None
        try:
            kind = look(files).kind
            if kind in {"STAGED", "FOREIGN"}:  # staged by another process since we looked
                hold.release()
                return None
            if kind == "TORN":  # before its file has the right size again: killed between the two, it would pass for staged
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(files.record)
            self._resize(files, size_bytes)
        except BaseException:
            hold.release()
            raise
        return Slot(self, files, hold, size_bytes)

    def _make(self, index: int, size_bytes: int, *, others: bool) -> Slot | None:
        """A new slot; None if it does not fit, but another slot will be free some time."""
        try:
            return self._take(self._place(index, size_bytes), size_bytes)
        except StagingFull as exc:
            if not others:
                raise
            _log.warning("staging goes on with fewer than %d slots: %s", self.slots, exc.message)
            return None

    def _place(self, index: int, size_bytes: int) -> SlotFiles:
        """Where a new slot belongs: in the staging folder, or on disk if that is memory and could never hold two, or not even the first."""
        space = space_of(self.staging)
        if not space.in_memory or (space.total_bytes >= 2 * size_bytes and size_bytes < self._no_room_bytes):
            return SlotFiles(folder=self.folder, index=index)
        root = self._fallback()
        folder = worker_folder(root, self._job, self._worker)
        if folder not in self._owners:
            _log.warning(
                "shared memory is too small for staging: %s holds %d bytes and two slots need %d (%d bytes are free); staging goes to the "
                "disk folder %s (slower; with Docker, raise --shm-size, and share that folder with the uploader)",
                self.staging, space.total_bytes, 2 * size_bytes, space.free_bytes, root,
            )  # fmt: skip
        self._own(folder)
        return SlotFiles(folder=folder, index=index)

    def _leaves_memory(self, size_bytes: int) -> bool:
        """Give up memory that has no room for our only slot, if disk may be used instead; False: that would change nothing."""
        if self.budget_bytes is not None or not space_of(self.staging).in_memory:
            return False
        before, self._no_room_bytes = self._no_room_bytes, min(self._no_room_bytes, size_bytes)
        return bool(self._shed([files for files in self._existing() if files.folder == self.folder])) or size_bytes < before

    def _resize(self, files: SlotFiles, size_bytes: int) -> None:
        """Bring the data file to exactly this size, every byte of it allocated; at worst it is as before."""
        if is_reserved(files.data, size_bytes):
            return
        try:
            grow(files.data, size_bytes, root=self.staging, budget_bytes=self._budget_of(files))
        except StagingFull:
            self._shed([other for other in self._existing() if other != files])  # one save now is worth more than two warm slots
            reclaim(self.staging)
            grow(files.data, size_bytes, root=self.staging, budget_bytes=self._budget_of(files))

    def _shed(self, slots: Iterable[SlotFiles]) -> int:
        """Give up the memory of those that are free; how many were."""
        given_up = 0
        for files in slots:
            if look(files).kind in {"FREE", "DONE", "TORN"} and (hold := try_lock(files.lock)) is not None:
                with hold:
                    if look(files).kind not in {"STAGED", "FOREIGN"}:
                        self.maps.drop(files)
                        files.forget()
                        os.unlink(files.data)
                        given_up += 1
        return given_up

    def _budget_of(self, files: SlotFiles) -> int | None:
        return self.budget_bytes if files.folder == self.folder else None

    # --- background ---

    def _warm(self, size_bytes: int) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            while not self._closed:
                with self._mutex:
                    existing = self._existing()
                    if len(existing) >= self.slots:
                        return
                    index = min(set(range(self.slots)) - {files.index for files in existing})
                    files = self._place(index, size_bytes)
                    if files.folder == self.folder and _takes_the_last(self.staging, size_bytes):
                        _log.info("no slot of %d bytes is made ahead: the room may be needed for another rank's first", size_bytes)
                        return
                    hold = try_lock(files.lock)
                if hold is None:
                    return
                with hold:
                    if look(files).kind not in {"FREE", "DONE"}:  # someone removed its bytes: new ones would pass for what was staged
                        return
                    grow(files.data, size_bytes, root=self.staging, budget_bytes=self._budget_of(files), stop=lambda: self._closed)
                    self.maps.warm(files, size_bytes, stop=lambda: self._closed)
        except Stopped:
            pass
        except StagingFull as exc:
            _log.warning("staging goes on with fewer than %d slots: %s", self.slots, exc.message)
        except Exception:
            _log.exception("preparing a staging slot failed; the next save makes it itself")

    # --- folders ---

    def _existing(self) -> list[SlotFiles]:
        return [files for folder in self._owners for files in slots_in(folder) if os.path.exists(files.data)]

    def _own(self, folder: str) -> None:
        """Hold the folder's owner lock, so that nobody takes us for dead; makes the folder if need be."""
        if folder in self._owners:
            if os.path.exists(f"{folder}/{OWNER_LOCK}"):
                return
            _log.warning("the staging folder %s was removed under this trainer; it is made anew", folder)
            self._owners.pop(folder).release()
        deadline = self.clock.monotonic() + 10
        while True:
            with contextlib.suppress(FileNotFoundError):  # a reclaimer removed the folder between the two calls
                os.makedirs(folder, mode=0o700, exist_ok=True)
                hold = try_lock(f"{folder}/{OWNER_LOCK}", shared=True)
                if hold is not None:
                    self._owners[folder] = hold
                    return
            if self.clock.monotonic() > deadline:
                raise CheckpointError(f"the staging folder {folder} is held by another process that is reclaiming it")
            self.clock.sleep(0.002)

    def _fallback(self) -> str:
        """The disk folder, announced in the staging folder so that uploaders scan it as well."""
        root = self._fallback_root or f"/var/tmp/dtr-{os.getuid()}/{host_id(self.staging)}"  # noqa: S108 - mode 0700, named per user
        os.makedirs(root, mode=0o700, exist_ok=True)
        if fallback(self.staging) == root:
            return root
        temporary = f"{self.staging}/{FALLBACK}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(root + "\n")
        os.rename(temporary, f"{self.staging}/{FALLBACK}")
        return root

    def _why_none(self, waited_s: float) -> str:
        waiting = []
        for files in self._existing():
            record = look(files).record
            waiting.append(f"slot {files.index} holds {f'run {record.run} step {record.step} ({record.state})' if record else 'nothing'}")
        behind = self._trouble() or "is an uploader running (celery -A tasks worker)?"
        return (
            f"no staging slot is free after {waited_s:.1f} s: {'; '.join(waiting)}. Uploads are behind: {behind} "
            f"More slots (slots={self.slots}) or fewer saves help as well"
        )


def _takes_the_last(staging: str, size_bytes: int) -> bool:
    """Whether a slot more would leave memory without room for another of its size."""
    space = space_of(staging)
    return space.in_memory and space.free_bytes < 2 * size_bytes


def _misfit(has_bytes: int, needed_bytes: int) -> tuple[int, int]:
    if has_bytes == needed_bytes:
        return 0, 0
    return (1, has_bytes) if has_bytes > needed_bytes else (2, -has_bytes)
