"""The saves of one manager: from the trainer's call to the publisher that sees them through.

The call costs the trainer one copy of its state. What a save meets afterwards is on its handle, and the next save tells of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from dtr.checkpoint import handover
from dtr.checkpoint.format.paths import Patterns
from dtr.checkpoint.format.replication import Shares
from dtr.checkpoint.keeping.rebuild import index_checkpoint, index_run
from dtr.checkpoint.manifest import Replicated
from dtr.checkpoint.parts import Fence, Spec
from dtr.checkpoint.saving.announce import Save
from dtr.checkpoint.saving.failures import ECHO, Failed, Failures
from dtr.checkpoint.saving.first_save import FirstSave
from dtr.checkpoint.saving.handle import SaveHandle
from dtr.checkpoint.saving.progress import PartProgress, SaveProgress, Sight
from dtr.checkpoint.saving.publisher import Publisher
from dtr.checkpoint.staging.stage import Stage
from dtr.checkpoint.survey import read_manifest
from dtr.config import Settings
from dtr.datasets import plane
from dtr.errors import CheckpointAborted, CheckpointError, DtrError, NotFound, SaveFailed
from dtr.failpoints import failpoint
from dtr.session import Session
from dtr.state.job import JobState
from dtr.store import Store

__all__ = ["Asked", "Saves"]

WRITER: Final = 0  # of replicated state: every rank knows it without asking, and a run always has one


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One call of ``save_async``, checked."""

    state: Any
    step: int
    replicated: bool | Patterns = False
    metrics: dict[str, float | None] = field(default_factory=dict)
    on_progress: Callable[[SaveProgress], object] | None = None


class Saves:
    """Stages and publishes. No thread and no folder before the first save.

    Args:
        store: of the job.
        url: of the store as users name it.
        first: fixes what a run continues.
    """

    def __init__(self, store: Store, url: str, first: FirstSave) -> None:
        self._store, self._url, self._first = store, url, first
        self._stage = Stage(trouble=self._trouble)
        self._failures = Failures()
        self._mutex = threading.Lock()
        self._publisher: Publisher | None = None

    def save(self, session: Session, settings: Settings, asked: Asked) -> SaveHandle:
        """Stage and publish one save; see ``CheckpointManager.save_async``."""
        run, who, now_s = session.run, session.identity, session.clock.monotonic()
        handle = SaveHandle(run.id, asked.step, on_progress=asked.on_progress, nudge=self._nudge)
        patterns = asked.replicated if isinstance(asked.replicated, Patterns) else None
        kind: Replicated = "some" if patterns is not None else "all" if asked.replicated else "none"
        self._first.prepare(session)
        handle.durable.add_done_callback(partial(_committed, session, handle))
        save = Save(
            handle=handle,
            spec=Spec(run=run.id, step=asked.step, world_size=run.world_size, store=self._url, replicated=kind, writer=WRITER),
            fence=Fence(rank=run.rank, worker=who.worker_id, incarnation=run.roster[who.worker_id].incarnation, host=who.host),
            state_id=who.state_id, settle=partial(self._first.finish, session, run.id), started_s=now_s, metrics=asked.metrics,
            data=plane.captured(session, asked.step),
            shares=None if patterns is None else Shares(patterns=patterns, world_size=run.world_size, rank=run.rank),
        )  # fmt: skip
        try:
            self._failures.tell(settings, run.id, now_s)
            arriving = self._stage.put(session, settings, save, asked.state) if kind != "all" or run.rank == WRITER else None
        except BaseException as exc:
            self._give_up(session, save, exc)
            raise
        if arriving is None:
            self._go_on(session, save)
        else:
            arriving.add_done_callback(partial(self._arrived, session, save))
        return handle

    def _arrived(self, session: Session, save: Save, arriving: Future[None]) -> None:
        """What was still on its way from a device is in the slot, or never will be."""
        if (exc := arriving.exception()) is not None:
            self._give_up(session, save, exc)
        else:
            self._go_on(session, save)

    def _go_on(self, session: Session, save: Save) -> None:
        self._staged(save)
        failpoint("save.before_share")
        if save.data:  # told to nobody but the kernel: from now on this rank may die
            plane.tell(session, "ckpt_data", *handover.call_of(session.state.keys, save.spec.run, save.spec.step, save.fence, save.data))
        failpoint("save.after_stage")
        self._publishing(session).submit(save)

    def _staged(self, save: Save) -> None:
        save.handle.staged.set_result(None)
        self._failures.begun(save.handle, save.started_s)
        if save.failed:
            spec = save.spec
            self._failures.failed(Failed(run=spec.run, step=spec.step, state=save.handle.state, reason=save.failed, begun_s=save.started_s))
        elif save.part is not None:
            who, size_bytes = save.fence, save.part.size_bytes
            save.handle.begin(PartProgress(rank=who.rank, worker=who.worker, host=who.host, state="staged", total_bytes=size_bytes))

    def _give_up(self, session: Session, save: Save, exc: BaseException) -> None:
        """This rank has no part: the others are told, so that nobody waits for it."""
        what = ECHO if isinstance(exc, SaveFailed) else type(exc).__name__
        save.failed, save.counter = f"{what}: {exc}", "saves_failed"
        save.handle.fail("FAILED", exc if isinstance(exc, DtrError) else CheckpointError(save.failed))
        save.handle.staged.set_exception(exc)
        self._publishing(session).submit(save)

    def close(self, timeout_s: float) -> None:
        """Let go of thread and slots; waits for what is staged to be published, ``timeout_s`` at most."""
        self._stage.settle()
        if self._publisher is not None:
            self._publisher.close(timeout_s)
            self._failures.last_word(self._publisher.clock.monotonic())
        self._stage.close()

    # --- the publisher ----------------------------------------------------------------------------------------------

    def _publishing(self, session: Session) -> Publisher:
        with self._mutex:
            if self._publisher is None:
                self._publisher = Publisher(
                    session, failures=self._failures, recover_run=self._recover_run, find_decision=self._find_decision, clock=session.clock
                )
            return self._publisher

    def _nudge(self) -> None:
        if self._publisher is not None:
            self._publisher.nudge()

    def _trouble(self) -> str:
        return self._publisher.trouble() if self._publisher is not None else ""

    def _recover_run(self, state: JobState, save: Save) -> None:
        """Redis does not know the run of a staged save: tell it from the store."""
        if not index_run(state, self._store, self._url, save.spec.run):
            raise CheckpointAborted(f"neither Redis nor the store knows run {save.spec.run}", run=save.spec.run)

    def _find_decision(self, state: JobState, save: Save) -> Sight | None:
        """What the store decided about a checkpoint that Redis does not know; None: nothing."""
        run, step = save.spec.run, save.spec.step
        try:
            manifest = read_manifest(self._store, run, step)
        except NotFound:
            return None
        # A tombstone stands for a commit that retention let go before anyone here looked.
        found = index_checkpoint(state, self._store, self._url, run, step) or "COMMITTED"
        checksum = next((part.state_checksum for part in manifest.parts if part.rank == save.part_rank), "")
        size_bytes = sum(part.state_bytes for part in manifest.parts)
        return Sight(state=found, reason=manifest.reason or "", size_bytes=size_bytes, checksum=checksum)


def _committed(session: Session, handle: SaveHandle, durable: Future[Any]) -> None:
    """What the steps consumed is in the store with the checkpoint, so this process need not tell it again."""
    if not durable.cancelled() and durable.exception() is None:
        plane.committed(session, handle.run, handle.step)
