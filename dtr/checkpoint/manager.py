"""Saves and restores of one process: what a trainer, an evaluation or a script holds in its hand."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import threading
import weakref
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from dtr import names
from dtr.checkpoint import base
from dtr.checkpoint.announce import Save, Sight
from dtr.checkpoint.catalogue import Listed, Verified, catalogue, verify_parts
from dtr.checkpoint.first_save import FirstSave
from dtr.checkpoint.handle import SaveHandle
from dtr.checkpoint.lineage import Lineage
from dtr.checkpoint.parts import Fence, Spec
from dtr.checkpoint.publisher import Publisher
from dtr.checkpoint.rebuild import index_checkpoint, index_run, rebuild
from dtr.checkpoint.restore import Restored, read_newest, restore_run
from dtr.checkpoint.stage import Stage
from dtr.checkpoint.survey import lineage_of, read_manifest, survey
from dtr.config import LauncherEnvironment, Settings
from dtr.errors import (
    CheckpointAborted,
    CheckpointError,
    ConfigError,
    DtrError,
    ForkedProcess,
    InvalidInput,
    NotFound,
    RosterChanged,
)
from dtr.failpoints import failpoint
from dtr.runs import Run, World
from dtr.session import Session
from dtr.state.job import JobState
from dtr.store import open_store

__all__ = ["CheckpointManager"]

log = logging.getLogger(__name__)

REJOIN_S: Final = 10.0  # how long a single process waits for a new run, when it has lost its own
WRITER: Final = 0  # of replicated state: every rank knows it without asking, and a run always has one


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
        chosen = settings or (session.settings if session is not None else None)
        self.settings = chosen or Settings.load(redis_url=coordinator_url, job=job)
        for name, given, held in (("coordinator_url", coordinator_url, self.settings.redis_url), ("job", job, self.settings.job)):
            if given is not None and given != held:
                raise ConfigError(f"{name} is not that of the given settings or session: leave it out", setting=name)
        launcher = LauncherEnvironment.load()
        self._world_size = names.positive(world_size if world_size is not None else launcher.world_size or 1, "world_size", 100_000)
        asked = rank if rank is not None else (launcher.rank if world_size is None else None)
        self._rank = names.rank(0 if asked is None else asked, self._world_size)
        self._launcher = launcher
        base_store = open_store(store)
        self.url = base_store.url
        self._store = base_store.child(self.settings.job)
        self._given, self._session, self._own = session is not None, session, False
        self._chosen = chosen is not None
        self._state: JobState | None = None
        self._stage = Stage()
        self._first = FirstSave(self._store, self.url, fresh=fresh)
        self._mutex = threading.RLock()
        self._publisher: Publisher | None = None
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
        if not isinstance(replicated, bool):
            raise InvalidInput(f"replicated must be True or False, got {replicated!r}", field="replicated")
        self._check()
        session = self._joined()
        run, who = session.run, session.identity
        spec = Spec(
            run=run.id, step=step, world_size=run.world_size, store=self.url, replicated="all" if replicated else "none", writer=WRITER
        )
        seat = run.roster[who.worker_id]
        fence = Fence(rank=run.rank, worker=who.worker_id, incarnation=seat.incarnation, host=who.host)
        started_s = session.clock.monotonic()
        self._first.prepare(session)
        handle = SaveHandle(run.id, step)
        save = Save(
            handle=handle, spec=spec, fence=fence, state_id=who.state_id, settle=partial(self._first.finish, session, run.id),
            started_s=started_s,
        )  # fmt: skip
        try:
            if not replicated or run.rank == WRITER:
                self._stage.put(session, self.settings, save, state)
        except BaseException as exc:
            self._give_up(session, save, exc)
            raise
        handle.staged.set_result(None)
        failpoint("save.after_stage")
        self._publishing(session).submit(save)
        return handle

    def _give_up(self, session: Session, save: Save, exc: BaseException) -> None:
        """This rank has no part: the others are told, so that nobody waits for it."""
        save.failed, save.counter = f"{type(exc).__name__}: {exc}", "saves_failed"
        save.handle.fail("FAILED", exc if isinstance(exc, DtrError) else CheckpointError(save.failed))
        save.handle.staged.set_exception(exc)
        self._publishing(session).submit(save)

    def _publishing(self, session: Session) -> Publisher:
        with self._mutex:
            if self._publisher is None:
                self._publisher = Publisher(session, recover_run=self._recover_run, find_decision=self._find_decision, clock=session.clock)
            return self._publisher

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

    # --- restoring --------------------------------------------------------------------------------------------------

    def restore(self, step: int | None = None, *, fresh: bool = False) -> Restored | None:
        """Read the newest checkpoint of the lineage that verifies.

        In a run that does not continue anything yet (a started agent, before its first save) this is collective: every rank calls it, all
        get the same checkpoint, and it becomes what the run continues. Otherwise it only reads, from the store alone if Redis is away.

        Args:
            step: only a checkpoint of this step. Default: the newest.
            fresh: None is an answer if there is no checkpoint at all; otherwise that is an error.

        Raises:
            NoCheckpoint: there is none, and ``fresh`` was not given.
            RestoreFailed: there are some, and none can be restored; the message has each one's reason.
            WorldSizeMismatch: the newest one is sharded over another number of ranks.
            RosterChanged: a member departed in mid-restore; call ``form()``.
        """
        step = None if step is None else names.step(step)
        self._check()
        session = self._known_session()
        if session is not None:
            run = session.run
            if not base.is_known(session, run.id, self.url):
                session.check()
                return self._restore_run(session, run, step, fresh)
        rank, world_size = (session.run.rank, session.run.world_size) if session is not None else (self._rank, self._world_size)
        state = session.state if session is not None else self._own_state()
        found = read_newest(self._store, self.url, state, rank=rank, world_size=world_size, step=step, fresh=fresh)
        self._first.restored = (found.run, found.step) if found is not None else None
        return found

    def _restore_run(self, session: Session, run: Run, step: int | None, fresh: bool) -> Restored | None:
        attempt = self._attempts.get(run.id, 0)
        try:
            found = restore_run(session, self._store, self.url, attempt=attempt, step=step, fresh=fresh)
        except CheckpointError as exc:
            if exc.facts.get("final"):
                self._attempts[run.id] = attempt + 1
            raise
        return found

    # --- looking ----------------------------------------------------------------------------------------------------

    def list(self) -> tuple[Listed, ...]:
        """Every decided checkpoint of the job in this store, the lineage's first, the newest first; read from the store."""
        holdings = survey(self._store)
        return catalogue(self._store, self._lineage(), holdings)

    def latest(self) -> Listed | None:
        """The newest commit of the lineage; None if there is none."""
        return next((listed for listed in self.list() if listed.state == "COMMITTED"), None)

    def verify(self, run: str, step: int) -> Verified:
        """Read every byte of a checkpoint; raises IntegrityError that names what is wrong, NotFound if it was never decided."""
        return verify_parts(self._store, read_manifest(self._store, names.name(run, "run"), names.step(step)))

    def lineage(self) -> builtins.list[tuple[str, int]]:
        """The runs before the current one with the last step that was taken from each, inclusive; oldest first."""
        return self._lineage().ancestors()

    def _lineage(self) -> Lineage:
        session = self._known_session()
        return lineage_of(self._store, self.url, survey(self._store), session.state if session is not None else self._own_state())

    # --- life -------------------------------------------------------------------------------------------------------

    def end_run(self) -> None:
        """The run is over for this process: what it restored before is not what the next run continues."""
        self._first.restored = None

    def close(self, timeout_s: float = 2.0) -> None:
        """Let go of threads, slots and connections. Safe to call twice.

        Args:
            timeout_s: how long staged saves may take to be published; it never waits for their commit. What is staged is committed all
                the same, by the uploader; handles that are undecided raise.
        """
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        if self._publisher is not None:
            self._publisher.close(timeout_s)
        self._stage.close()
        if self._own and self._session is not None:
            self._session.close()
        if self._state is not None:
            self._state.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ForkedProcess(f"this manager belongs to process {self._pid}; create a new one in process {os.getpid()}")
        if self._closed:
            raise CheckpointError("this manager is closed; create a new one")

    def _own_state(self) -> JobState:
        if self._state is None:
            self._state = JobState(self.settings.redis_url, self.settings.job, name="dtr-read")
        return self._state

    def _known_session(self) -> Session | None:
        """The membership that this process has: the one given, our own, or its agent's while that is in a run."""
        if self._given:
            return self._session
        if self._own:
            return self._session if self._session is not None and self._session.formed else None
        current = Session.current(self.settings.redis_url, self.settings.job)
        if current is not None and current.formed:
            self._session = current
            if not self._chosen:
                self.settings = current.settings
            return current
        return None

    def _joined(self) -> Session:
        """The membership to save under; without an agent, one of our own."""
        with self._mutex:
            session = self._known_session() or self._join()
            try:
                session.check()
            except RosterChanged as exc:
                if not self._own or self._world_size > 1:
                    raise
                log.warning("%s; a single process does so by itself", exc)
                session.form(timeout_s=REJOIN_S)
                self._first.goes_on = True
            return session

    def _join(self) -> Session:
        if self._session is None or not self._own:
            world, launcher = World(low=self._world_size, high=self._world_size), self._launcher
            session = Session(
                self.settings, worker_id=launcher.worker_id, rank=self._rank, world=world, launcher=launcher.socket,
                recover=partial(_rebuild, self.settings, self.url),
            )  # fmt: skip
            session.start()
            self._session, self._own = session, True
            # For whoever forgets to close: the next process need not wait until we are taken for dead.
            weakref.finalize(self, session.close)
        self._session.form()
        return self._session


def _rebuild(settings: Settings, url: str, state_id: str) -> int:
    with contextlib.closing(JobState(settings.redis_url, settings.job, name="dtr-rebuild")) as state:
        return rebuild(state, url, state_id=state_id)
