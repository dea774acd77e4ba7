"""The synchronous half of ``save_async``: place the state, take a slot, copy. It meets neither Redis nor the store.

What is in this machine's memory is copied before ``put`` returns. Tensors on devices are still on their way then: a thread waits for
them, and only then the part becomes visible.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from dtr.checkpoint.format.structure import Structures
from dtr.checkpoint.parts import StagedPart
from dtr.checkpoint.saving.announce import Save
from dtr.checkpoint.saving.failures import SKIPPED
from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.device import Cuda, Devices, Pending
from dtr.checkpoint.staging.filling import COPY_THREADS, Slot
from dtr.checkpoint.staging.slots import Found, SlotRecord
from dtr.config import Settings
from dtr.errors import CheckpointAborted, CheckpointError, DtrError, StagingFull
from dtr.failpoints import failpoint
from dtr.session import Session

__all__ = ["Stage"]

log = logging.getLogger(__name__)


class Stage:
    """The slots of one manager. Makes its arena at the first save.

    Args:
        trouble: says why uploads are behind, if that is known.
        devices: what copies from devices; default: torch's CUDA.
    """

    def __init__(self, *, trouble: Callable[[], str] = lambda: "", devices: Devices | None = None) -> None:
        self._trouble = trouble
        self._devices: Devices = devices or Cuda()
        self._structures = Structures()
        self._arena: Arena | None = None
        self._waiter: ThreadPoolExecutor | None = None
        self._mutex = threading.Lock()

    def put(self, session: Session, settings: Settings, save: Save, state: Any) -> Future[None] | None:
        """Copy ``state`` into a slot and note that in ``save``; by policy ``skip``, note that there was none.

        Returns:
            None when that is done. Otherwise something is still on its way from a device: the result is there when it is staged, or why
            it is not (CheckpointError).

        Raises:
            UnsupportedLeaf, StagingFull, NoFreeSlot: nothing was staged.
            CheckpointError: nothing was staged, since the folder cannot be used.
        """
        try:
            return self._put(session, settings, save, state)
        except DtrError:
            raise
        except MemoryError as exc:
            raise StagingFull(f"no memory is left for the save: {exc}", needed_bytes=0, free_bytes=0) from exc
        except OSError as exc:
            raise CheckpointError(f"the staging folder {session.settings.staging} cannot be used: {exc}") from exc

    def _put(self, session: Session, settings: Settings, save: Save, state: Any) -> Future[None] | None:
        spec, fence = save.spec, save.fence
        about = {"job": settings.job, "run": spec.run, "step": str(spec.step), "rank": f"{fence.rank} of {spec.world_size}"}
        if save.data:
            about["dtr_data"] = save.data
        laid = self._structures.lay_out(state, about, save.shares)
        if laid.structure:
            save.spec = replace(spec, structure=laid.structure)
        slot = self._slot(session, settings, save, laid.size_bytes)
        if slot is None:
            return None
        pending = slot.fill(
            lambda buffer: laid.copy_into(buffer, self._devices, threads=COPY_THREADS),
            _record(settings, save),
            pin=self._devices if laid.on_device else None,
        )
        if pending is None:
            _note(save, slot, slot.seal())
            return None
        return self._arrivals().submit(_arrive, save, slot, pending)

    def _slot(self, session: Session, settings: Settings, save: Save, size_bytes: int) -> Slot | None:
        arena = self._arena_of(session, settings)
        waited = arena.counters.waited
        slot = arena.acquire(size_bytes)
        if slot is not None:
            if arena.counters.waited > waited:
                save.counter = "saves_waited"
            return slot
        save.failed, save.counter = SKIPPED, "saves_skipped"
        why = f"run {save.spec.run} step {save.spec.step}: rank {save.fence.rank} {save.failed}"
        save.handle.fail("SKIPPED", CheckpointAborted(why, run=save.spec.run, step=save.spec.step, reason=save.failed))
        log.warning("%s", why)
        return None

    def _arena_of(self, session: Session, settings: Settings) -> Arena:
        with self._mutex:
            if self._arena is None:
                # The folder is the session's, whatever else was chosen: it says which host this is.
                self._arena = Arena(
                    session.settings.staging, job=settings.job, worker=session.worker_id, slots=settings.slots,
                    budget_bytes=settings.staging_budget_bytes, policy=settings.slot_policy, wait_s=settings.slot_wait_s,
                    trouble=self._trouble,
                )  # fmt: skip
            return self._arena

    def _arrivals(self) -> ThreadPoolExecutor:
        with self._mutex:
            if self._waiter is None:
                self._waiter = ThreadPoolExecutor(1, thread_name_prefix="dtr-arrivals")
            return self._waiter

    def settle(self) -> None:
        """Wait until nothing is on its way from a device any more."""
        with self._mutex:
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.shutdown()

    def close(self) -> None:
        """Give back the memory of every slot that is not waiting for its upload."""
        self.settle()
        with self._mutex:
            arena, self._arena = self._arena, None
        if arena is not None:
            arena.close()


def _record(settings: Settings, save: Save) -> SlotRecord:
    spec, fence = save.spec, save.fence
    return SlotRecord(
        job=settings.job, run=spec.run, step=spec.step, rank=fence.rank, world_size=spec.world_size, worker=fence.worker,
        incarnation=fence.incarnation, host=fence.host, store=spec.store, replicated=spec.replicated, structure=spec.structure,
        delta=settings.delta, metrics=save.metrics, data=save.data,
    )  # fmt: skip


def _arrive(save: Save, slot: Slot, pending: Pending) -> None:
    """Wait until the devices have copied, and make the part visible."""
    try:
        failpoint("stage.before_arrival")
        pending.wait()
        failpoint("stage.after_arrival")
    except BaseException as exc:
        slot.free()
        raise CheckpointError(f"the copy from a device failed: {exc}") from exc
    _note(save, slot, slot.seal())


def _note(save: Save, slot: Slot, record: SlotRecord) -> None:
    save.part = StagedPart(size_bytes=record.size_bytes, save=record.save, metrics=record.metrics)
    save.slot = Found(files=slot.files, record=record, kind="STAGED")
