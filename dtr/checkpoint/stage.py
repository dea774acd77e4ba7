"""The synchronous half of ``save_async``: place the state, take a slot, copy. It meets neither Redis nor the store."""

from __future__ import annotations

import logging
import threading
from typing import Any

from dtr.checkpoint.announce import Save
from dtr.checkpoint.parts import StagedPart
from dtr.checkpoint.payload import lay_out
from dtr.checkpoint.slots import Found, SlotRecord
from dtr.checkpoint.staging import Arena
from dtr.config import Settings
from dtr.errors import CheckpointAborted
from dtr.session import Session

__all__ = ["Stage"]

log = logging.getLogger(__name__)


class Stage:
    """The slots of one manager. Makes its arena at the first save."""

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self._mutex = threading.Lock()

    def put(self, session: Session, settings: Settings, save: Save, state: Any) -> None:
        """Copy ``state`` into a slot and note that in ``save``; by policy ``skip``, note that there was none.

        Raises:
            UnsupportedLeaf, StagingFull, NoFreeSlot: nothing was staged.
        """
        spec, fence = save.spec, save.fence
        about = {"job": settings.job, "run": spec.run, "step": str(spec.step), "rank": f"{fence.rank} of {spec.world_size}"}
        layout, leaves = lay_out(state, about)
        slot = self._arena_of(session, settings).acquire(layout.size_bytes)
        if slot is None:
            save.failed, save.counter = "skipped: every staging slot still waits for its upload", "saves_skipped"
            why = f"run {spec.run} step {spec.step}: rank {fence.rank} {save.failed}"
            save.handle.fail("SKIPPED", CheckpointAborted(why, run=spec.run, step=spec.step, reason=save.failed))
            log.warning("%s", why)
            return
        record = slot.write(
            layout,
            leaves,
            SlotRecord(
                job=settings.job, run=spec.run, step=spec.step, rank=fence.rank, world_size=spec.world_size, worker=fence.worker,
                incarnation=fence.incarnation, host=fence.host, store=spec.store, replicated=spec.replicated,
            ),
        )  # fmt: skip
        save.part = StagedPart(size_bytes=record.size_bytes, save=record.save)
        save.slot = Found(files=slot.files, record=record, kind="STAGED")

    def _arena_of(self, session: Session, settings: Settings) -> Arena:
        with self._mutex:
            if self._arena is None:
                # The folder is the session's, whatever else was chosen: it says which host this is.
                self._arena = Arena(
                    session.settings.staging, job=settings.job, worker=session.worker_id, slots=settings.slots,
                    budget_bytes=settings.staging_budget_bytes, policy=settings.slot_policy, wait_s=settings.slot_wait_s,
                )  # fmt: skip
            return self._arena

    def close(self) -> None:
        """Give back the memory of every slot that is not waiting for its upload."""
        with self._mutex:
            arena, self._arena = self._arena, None
        if arena is not None:
            arena.close()
