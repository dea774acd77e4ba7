"""Saves and restores of one process: what a trainer, an evaluation or a script holds in its hand."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from dtr import names
from dtr.checkpoint import base
from dtr.checkpoint.format.paths import Patterns
from dtr.checkpoint.keeping.catalogue import Listed, Verified, catalogue, verify_parts
from dtr.checkpoint.keeping.rebuild import rebuild
from dtr.checkpoint.lineage import Lineage
from dtr.checkpoint.restoring.candidates import Wish
from dtr.checkpoint.restoring.restore import Reader, Restored, read_newest, restore_run
from dtr.checkpoint.saving.first_save import FirstSave
from dtr.checkpoint.saving.handle import SaveHandle
from dtr.checkpoint.saving.metrics import checked
from dtr.checkpoint.saving.progress import SaveProgress
from dtr.checkpoint.saving.saves import Asked, Saves
from dtr.checkpoint.survey import lineage_of, read_manifest, survey
from dtr.config import LauncherEnvironment, Settings
from dtr.datasets.plane import plane_of
from dtr.errors import (
    CheckpointError,
    ConfigError,
    DtrError,
    ForkedProcess,
    InvalidInput,
    RosterChanged,
)
from dtr.runs import World
from dtr.session import Session
from dtr.state.job import JobState
from dtr.store import open_store

__all__ = ["CheckpointManager"]

log = logging.getLogger(__name__)

REJOIN_S: Final = 10.0  # how long a single process waits for a new run, when it has lost its own


class CheckpointManager:
    """Checkpoints of one job in one store.

    Guarantees: no thread and no connection before they are needed; a save costs the trainer one copy of its state, never a round trip to
    Redis or the store, the first save of a run excepted; nothing that a save meets afterwards is raised into the training loop: it is on
    the handle. Reading (``restore`` of a run that continues something, ``list``, ``verify``) never starts a run and needs no Redis.

    Args:
        store: a folder, ``file:///folder``, ``s3://``, ``gs://`` or ``az://``; the job has a folder of its own in it.
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
        self._first = FirstSave(self._store, self.url, fresh=fresh)
        self._saves = Saves(self._store, self.url, self._first)
        self._mutex = threading.RLock()
        self._attempts: dict[str, int] = {}
        self._pid, self._closed = os.getpid(), False

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_async(
        self,
        state: Any,
        step: int,
        *,
        replicated: bool | str | Sequence[str] = False,
        metrics: Mapping[str, Any] | None = None,
        on_progress: Callable[[SaveProgress], object] | None = None,
    ) -> SaveHandle:
        """Copy ``state`` into a staging slot and return; it is committed in the background.

        Args:
            state: bytes, or nested dicts, lists and tuples of arrays, numbers, strings, booleans and None. May be changed once this
                returns.
            step: of the checkpoint. Every rank of the run must save it. A step saved twice must have the same bytes.
            replicated: True: every rank holds the same state, rank 0 writes it, and any world size restores it. Path patterns like
                ``"optimizer/*"``: what they select is alike on all ranks, so each writes an even share of it, and any world size
                restores that; the rest is each rank's own.
            metrics: numbers about this step, ``{"loss": 1.2}``, kept in the manifest: for people, and for ``keep_best``. Where ranks
                differ, the lowest rank that writes a part counts.
            on_progress: called with a SaveProgress whenever something has moved, and a last time before ``durable`` is done; in a
                background thread that all saves share, so it must be quick and must not wait for a save. What it raises is logged once.

        Returns:
            A handle: ``await`` it for the copy, ``handle.durable.result()`` for the commit.

        Raises:
            InvalidInput, UnsupportedLeaf: the step or a value of the state is wrong.
            UnsavedLineage: the first save of a run that restored nothing, into a store that holds checkpoints of the job.
            RosterChanged, StaleIncarnation: the run ended, or this process may not go on.
            StagingFull, NoFreeSlot: there is no room for the copy (policy ``fail``, or ``wait`` for too long).
            SaveFailed: an earlier save came to nothing, and the setting ``on_failed_save`` says to raise; nothing was staged.
        """
        asked = Asked(
            state=state, step=names.step(step), metrics=checked(metrics), on_progress=on_progress,
            replicated=replicated if isinstance(replicated, bool) else Patterns.of(replicated, "replicated"),
        )  # fmt: skip
        self._check()
        return self._saves.save(self._joined(), self.settings, asked)

    # --- restoring --------------------------------------------------------------------------------------------------

    def restore(
        self, step: int | None = None, *, fresh: bool = False, into: Any = None, only: str | Sequence[str] | None = None
    ) -> Restored | None:
        """Read the newest checkpoint of the lineage that verifies, from the nearest place: a slot still in memory, the cache, the store.

        In a run that does not continue anything yet (a started agent, before its first save) this is collective: every rank calls it, all
        get the same checkpoint, and it becomes what the run continues. Otherwise it only reads, from the store alone if Redis is away.

        Args:
            step: only a checkpoint of this step, also one that is quarantined. Default: the newest.
            fresh: None is an answer if there is no checkpoint at all; otherwise that is an error.
            into: a state like the saved one, to be filled: its arrays in place, its other values replaced. Default: a new state.
            only: read nothing but what these path patterns select, like ``"model/*"``; a list keeps its length, with None for the rest.

        Raises:
            NoCheckpoint: there is none, and ``fresh`` was not given.
            RestoreFailed: there are some, and none can be restored; the message has each one's reason.
            WorldSizeMismatch: the newest one is sharded over another number of ranks.
            StateMismatch: ``into`` is built differently; names the first path that differs, and nothing was changed.
            InvalidInput: ``only`` selects nothing.
            DataConflict: the run has no base yet and has handed out batches: restore before the first batch.
            RosterChanged: a member departed in mid-restore; call ``form()``.
        """
        step = None if step is None else names.step(step)
        patterns = None if only is None else Patterns.of(only, "only")
        if into is not None and not isinstance(into, dict | builtins.list | tuple):
            raise InvalidInput(f"into must be a state to be filled (a dict, list or tuple), got {type(into).__name__}", field="into")
        self._check()
        session = self._known_session()
        rank, world_size = (session.run.rank, session.run.world_size) if session is not None else (self._rank, self._world_size)
        reader = Reader(
            store=self._store, url=self.url, settings=self.settings, fresh=fresh, into=into,
            wish=Wish(rank=rank, world_size=world_size, step=step, only=patterns),
        )  # fmt: skip
        if session is not None and not base.is_known(session, session.run.id, self.url):
            session.check()
            plane_of(session).check_unbegun()
            return self._restore_run(session, session.run.id, reader)
        found = read_newest(reader, session.state if session is not None else self._own_state())
        self._first.restored = (found.run, found.step) if found is not None else None
        return found

    def _restore_run(self, session: Session, run: str, reader: Reader) -> Restored | None:
        attempt = self._attempts.get(run, 0)
        try:
            found = restore_run(session, reader, attempt=attempt)
        except DtrError as exc:
            if exc.facts.get("final"):
                self._attempts[run] = attempt + 1
            raise
        plane_of(session).restored({} if found is None else found.data)
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
        self._saves.close(timeout_s)
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
