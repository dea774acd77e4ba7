"""Saves and restores of one process: what a trainer, an evaluation or a script holds in its hand."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from dtr import names
from dtr.checkpoint import base
from dtr.checkpoint.announce import Save, Sight
from dtr.checkpoint.catalogue import Listed, catalogue, verify_parts
from dtr.checkpoint.handle import SaveHandle
from dtr.checkpoint.lineage import Checkpoint
from dtr.checkpoint.parts import Fence, Spec, StagedPart
from dtr.checkpoint.payload import lay_out
from dtr.checkpoint.publisher import Publisher
from dtr.checkpoint.rebuild import index_checkpoint, index_run, rebuild
from dtr.checkpoint.restore import BaseIsSet, Restored, read_newest, restore_run
from dtr.checkpoint.slots import Found, SlotRecord
from dtr.checkpoint.staging import Arena
from dtr.checkpoint.survey import lineage_of, read_manifest, survey
from dtr.config import LauncherEnvironment, Settings
from dtr.errors import (
    CheckpointAborted,
    CheckpointError,
    CoordinatorRefused,
    DtrError,
    ForkedProcess,
    NotFound,
    StoreRefused,
    Unavailable,
)
from dtr.failpoints import failpoint
from dtr.runs import Run, World
from dtr.session import Session
from dtr.state.job import JobState
from dtr.store import open_store

__all__ = ["CheckpointManager"]

log = logging.getLogger(__name__)

WRITER: int = 0  # of replicated state: every rank knows it without asking, and a run always has one


class CheckpointManager:
    """Checkpoints of one job in one store.

    Guarantees: no thread and no connection before they are needed; a save costs the trainer one copy of its state, never a round trip to
    Redis or the store, the first save of a run excepted; nothing that a save meets afterwards is raised into the training loop: it is on
    the handle. Reading (``restore`` of a run that continues something, ``list``, ``verify``) never starts a run and needs no Redis.

    Args:
        store: a folder, ``file:///folder`` or ``s3://bucket/prefix``; the job has a folder of its own in it.
        coordinator_url: the Redis server. Default: DTR_REDIS_URL, ``dtr.toml``, else the local one.
        job: ``name`` or ``tenant/name``. Default: DTR_JOB, else ``default``.
        rank, world_size: of this process where it has no agent. Default: RANK and WORLD_SIZE, else 0 of 1.
        session: the membership to use. Default: that of this process's agent for the same server and job; without one the first save
            joins the job, as a roster of ``world_size``.
        settings: any other setting. Default: the session's, or the environment's.
        fresh: the first save may start a new lineage, though the store holds checkpoints of the job that nobody restored.

    Raises:
        ConfigError, InvalidInput: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        *,
        coordinator_url: str | None = None,
        job: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        session: Session | None = None,
        settings: Settings | None = None,
        fresh: bool = False,
    ) -> None:
        given = settings or (session.settings if session is not None else None)
        self.settings = given or Settings.load(redis_url=coordinator_url, job=job)
        launcher = LauncherEnvironment.load()
        self._world_size = names.positive(world_size or launcher.world_size or 1, "world_size", 100_000)
        asked = rank if rank is not None else (launcher.rank if world_size is None else None)
        self._rank = names.rank(asked or 0, self._world_size)
        self._launcher, self._fresh = launcher, fresh
        base_store = open_store(store)
        self.url = base_store.url
        self._store = base_store.child(self.settings.job)
        self._session, self._owns_session = session, False
        self._state: JobState | None = None
        self._arena: Arena | None = None
        self._publisher: Publisher | None = None
        self._based: set[str] = set()  # runs whose base is known to be SET
        self._restored: Checkpoint | None = None
        self._attempts: dict[str, int] = {}
        self._pid, self._closed = os.getpid(), False

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_async(self, state: Any, step: int, *, replicated: bool = False) -> SaveHandle:
        """Copy ``state`` into a staging slot and return; it is committed in the background.

        Args:
            state: bytes, or nested dicts, lists and tuples of arrays, numbers, strings, booleans and None. May be changed once this
                returns.
            step: of the checkpoint. Every rank of the run must save it. A step saved twice must have the same bytes.
            replicated: every rank holds the same state: rank 0 writes it, and any world size restores it.

        Returns:
            A handle: ``await`` it for the copy, ``handle.durable.result()`` for the commit.

        Raises:
            InvalidInput, UnsupportedLeaf: the step or a value of the state is wrong.
            UnsavedLineage: the first save of a run that restored nothing, into a store that holds checkpoints of the job.
            RosterChanged, StaleIncarnation: the run ended, or this process may not go on.
            StagingFull, NoFreeSlot: there is no room for the copy (policy ``fail``, or ``wait`` for too long).
        """
        step = names.step(step)
        self._check()
        session = self._joined()
        session.check()
        run, who = session.run, session.identity
        spec = Spec(run=run.id, step=step, world_size=run.world_size, store=self.url, replicated=replicated, writer=WRITER)
        seat = run.roster[who.worker_id]
        fence = Fence(rank=run.rank, worker=who.worker_id, incarnation=seat.incarnation, host=who.host)
        started_s = session.clock.monotonic()
        self._fix_base(session)
        handle = SaveHandle(run.id, step)
        save = Save(
            handle=handle, spec=spec, fence=fence, state_id=who.state_id, settle=partial(self._settle, session, run.id), started_s=started_s
        )  # fmt: skip
        try:
            if not replicated or run.rank == WRITER:
                self._stage(session, save, state)
        except BaseException as exc:
            self._give_up(session, save, exc)
            raise
        handle.staged.set_result(None)
        failpoint("save.after_stage")
        self._publishing(session).submit(save)
        return handle

    def _stage(self, session: Session, save: Save, state: Any) -> None:
        spec, fence, settings = save.spec, save.fence, self.settings
        about = {"job": settings.job, "run": spec.run, "step": str(spec.step), "rank": f"{fence.rank} of {spec.world_size}"}
        layout, leaves = lay_out(state, about)
        if self._arena is None:
            self._arena = Arena(
                settings.staging, job=settings.job, worker=fence.worker, slots=settings.slots, budget_bytes=settings.staging_budget_bytes,
                policy=settings.slot_policy, wait_s=settings.slot_wait_s,
            )  # fmt: skip
        slot = self._arena.acquire(layout.size_bytes)
        if slot is None:
            reason = "skipped: every staging slot still waits for its upload"
            save.failed, save.counter = reason, "saves_skipped"
            save.handle.fail("SKIPPED", CheckpointAborted(f"run {spec.run} step {spec.step}: rank {fence.rank} {reason}", reason=reason))
            log.warning("step %d is skipped: every staging slot still waits for its upload", spec.step)
            return
        record = slot.write(
            layout,
            leaves,
            SlotRecord(
                job=settings.job, run=spec.run, step=spec.step, rank=fence.rank, world_size=spec.world_size, worker=fence.worker,
                incarnation=fence.incarnation, host=fence.host, store=self.url, replicated=spec.replicated,
            ),
        )  # fmt: skip
        save.part = StagedPart(size_bytes=record.size_bytes, save=record.save)
        save.slot = Found(files=slot.files, record=record, kind="STAGED")

    def _give_up(self, session: Session, save: Save, exc: BaseException) -> None:
        """This rank has no part: the others are told, so that nobody waits for it."""
        save.failed, save.counter = f"{type(exc).__name__}: {exc}", "saves_failed"
        save.handle.fail("FAILED", exc if isinstance(exc, DtrError) else CheckpointError(save.failed))
        save.handle.staged.set_exception(exc)
        self._publishing(session).submit(save)

    def _publishing(self, session: Session) -> Publisher:
        if self._publisher is None:
            self._publisher = Publisher(session, recover_run=self._recover_run, find_decision=self._find_decision, clock=session.clock)
        return self._publisher

    # --- what the run continues -------------------------------------------------------------------------------------

    def _fix_base(self, session: Session) -> None:
        """At the first save of a run: fix what it continues. With Redis or the store away, the background does it later."""
        run = session.run.id
        if run in self._based:
            return
        try:
            self._settle(session, run)
        except (CoordinatorRefused, StoreRefused):
            raise
        except Unavailable as exc:
            log.warning("what run %s continues is not on record yet; its saves are staged meanwhile: %s", run, exc)

    def _settle(self, session: Session, run: str) -> None:
        """Return when the base of ``run`` is SET; in the publisher's thread as well."""
        if run in self._based:
            return
        if not session.formed or session.run.id != run:
            raise CheckpointAborted(f"run {run} ended before it was on record what it continues, so nothing of it can be committed", run=run)
        base.settle(session, self._store, self.url, restored=self._restored, fresh=self._fresh)
        self._based.add(run)

    def _recover_run(self, state: JobState, save: Save) -> None:
        """Redis does not know the run of a staged save: tell it from the store."""
        if not index_run(state, self._store, self.url, save.spec.run):
            raise CheckpointAborted(f"neither Redis nor the store knows run {save.spec.run}", run=save.spec.run)

    def _find_decision(self, state: JobState, save: Save) -> Sight | None:
        """What the store decided about a checkpoint that Redis does not know; None: nothing."""
        run, step = save.spec.run, save.spec.step
        try:
            manifest = read_manifest(self._store, run, step)
        except NotFound:
            return None
        size_bytes = sum(part.size_bytes for part in manifest.parts)
        # A tombstone stands for a commit that retention let go before anyone here looked.
        found = index_checkpoint(state, self._store, self.url, run, step) or "COMMITTED"
        checksum = next((part.checksum for part in manifest.parts if part.rank == save.fence.rank), "")
        return Sight(state=found, reason=manifest.reason or "", size_bytes=size_bytes, checksum=checksum)
