"""The agent: what a trainer holds in its hand. Joins a job, forms runs, meets at barriers, reports steps, saves and restores.

Everything that a trainer calls goes through here; each piece (session, data sets, checkpoints) can also be used alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dtr import names
from dtr.config import LauncherEnvironment, Settings
from dtr.errors import ConfigError, DataConflict, InvalidInput
from dtr.runs import World
from dtr.session import Session
from worker_agent.loading import Loading

if TYPE_CHECKING:
    from dtr.checkpoint.manager import CheckpointManager
    from dtr.checkpoint.restoring.restore import Restored
    from dtr.checkpoint.saving.handle import SaveHandle
    from dtr.checkpoint.saving.progress import SaveProgress

__all__ = ["Agent"]

log = logging.getLogger(__name__)


class Agent(Loading):
    """One training process's membership of a job.

    Guarantees: no connection and no thread before :meth:`start`; a call under a run that has ended raises RosterChanged, and one by
    a process that was replaced or declared dead raises StaleIncarnation; nothing of Redis's or the store's trouble ends the trainer.

    Args:
        worker_id: name of this process in the job, the same after a restart. Default: DTR_WORKER_ID, else host name and process id.
        coordinator_url: the Redis server. Default: DTR_REDIS_URL, ``dtr.toml``, else the local one.
        world_size: how many ranks a run has; ``(low, high)`` for an elastic job. Default: WORLD_SIZE (and DTR_WORLD_MIN), else 1.
        rank: the rank to ask for. Default: RANK; without one, forming gives a rank.
        job: ``name`` or ``tenant/name``. Default: DTR_JOB, else ``default``.
        store: where checkpoints go: a folder, ``file:///folder``, ``s3://``, ``gs://`` or ``az://``. Default: DTR_STORE.
        beat: who beats without a launcher: a ``"thread"``, or a ``"process"`` that goes on while C code holds the GIL.
        environ: the environment to read; default ``os.environ``.
        settings: any other setting of :class:`dtr.config.Settings`.

    Raises:
        ConfigError, InvalidInput: a setting or an argument is wrong; the message names it.
    """

    def __init__(
        self,
        worker_id: str | None = None,
        coordinator_url: str | None = None,
        world_size: int | tuple[int, int] | None = None,
        rank: int | None = None,
        *,
        job: str | None = None,
        store: str | None = None,
        beat: str = "thread",
        environ: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        launcher = LauncherEnvironment.load(environ)
        self.settings = Settings.load(environ=environ, redis_url=coordinator_url, job=job, store=store, **settings)
        if beat not in {"thread", "process"}:
            raise ConfigError(f"beat must be 'thread' or 'process', got {beat!r}", setting="beat")
        world = _world(world_size, launcher)
        # A rank from the environment is the launcher's; one that does not fit an explicit world_size is a mistake in either.
        asked = rank if rank is not None else (launcher.rank if world_size is None else None)
        self._session = Session(
            self.settings,
            worker_id=launcher.worker_id if worker_id is None else worker_id,
            rank=asked,
            world=world,
            launcher=launcher.socket,
            beat_process=beat == "process",
            recover=self._rebuild if self.settings.store else None,
        )
        self._checkpoints: CheckpointManager | None = None
        self._step = -1
        self._stepped = False  # in this run
        self._saves: list[SaveHandle] = []

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """An agent set up by its launcher: RANK, WORLD_SIZE and the DTR_* variables; ``options`` as for the class."""
        return cls(**options)

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Join the job and form a run with the other members; waits for them. Does nothing if it has started.

        Raises:
            CoordinatorUnavailable: Redis cannot be reached.
            FormTimeout: too few members came within ``form_timeout_s``.
        """
        self._session.start()
        if not self._session.formed:
            self._session.form()
        return self

    async def register_worker(self, ip: str = "", port: int = 0) -> Self:
        """:meth:`start` for asyncio users, with the trainer's address for people; the event loop goes on meanwhile."""
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65_535:
            raise InvalidInput(f"port must be an integer from 0 to 65535, got {port!r}", field="port")
        self._session.address = "" if ip == "" else f"{names.host(ip, 'ip')}:{port}"
        return await asyncio.to_thread(self.start)

    def form(self, timeout_s: float | None = None) -> Self:
        """Join the next run; call it after RosterChanged or BarrierBroken. Waits for every other living member.

        Args:
            timeout_s: default ``form_timeout_s``.
        """
        if self._checkpoints is not None:
            self._checkpoints.end_run()
        if (plane := self._plane) is not None:
            plane.end_run()
        self._session.form(timeout_s)
        self._step, self._stepped = -1, False
        return self

    def close(self) -> None:
        """Leave the job. Safe to call twice.

        First waits, up to ``leave_timeout_s``, until the saves of this process are decided: whoever leaves ends the run, and a save that
        another rank has not staged by then could never become complete.
        """
        if self._checkpoints is not None:
            self._see_saves_through()
            self._checkpoints.close()
            self._checkpoints = None
        if (plane := self._plane) is not None:
            plane.close()
        self._session.close()

    def _see_saves_through(self) -> None:
        undecided = [handle for handle in self._saves if not handle.durable.done()]
        if undecided:
            log.info("%s leaves when its saves are decided: %s", self.worker_id, ", ".join(str(handle.step) for handle in undecided))
            wait([handle.durable for handle in undecided], timeout=self.settings.leave_timeout_s)
        for handle in self._saves:
            if not handle.durable.done():
                log.warning(
                    "%s leaves, and the save of step %d is not decided after %g s; `dtr ckpt show %s %d` tells what it waits for",
                    self.worker_id, handle.step, self.settings.leave_timeout_s, handle.run, handle.step,
                )  # fmt: skip

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # the trainer's own error is the one to show
            if (plane := self._plane) is not None:
                plane.close()
            if self._checkpoints is not None:
                self._checkpoints.close()
        self._session.close(reason=f"left with {type(error).__name__}")

    # --- where this process stands ----------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The membership under this agent."""
        return self._session

    @property
    def run(self) -> str:
        """The run that this process is in, such as ``0007-k3f9``."""
        return self._session.run.id

    @property
    def rank(self) -> int:
        """From 0 to world_size - 1."""
        return self._session.run.rank

    @property
    def world_size(self) -> int:
        """How many ranks the run has."""
        return self._session.run.world_size

    @property
    def worker_id(self) -> str:
        """The name of this process in the job."""
        return self._session.worker_id

    @property
    def current_step(self) -> int:
        """The last step that was reported or restored; -1 before the first."""
        return self._step

    # --- training ---------------------------------------------------------------------------------------------------

    def barrier(self, name: str, *, timeout_s: float | None = None, members: Collection[str] | None = None) -> None:
        """Wait until every rank of the run (or every worker of ``members``) has called it with this name.

        Args:
            name: of the barrier; its n-th use in a run is round n.
            timeout_s: default ``barrier_timeout_s``.
            members: worker ids, the same for every caller; default: the whole run.

        Raises:
            BarrierBroken: a member departed; ``missing`` names who had not arrived, ``reason`` who departed and why.
            BarrierTimeout: likewise, when the time was up.
            RosterChanged: the run has ended, or a newcomer waits; call :meth:`form`.
        """
        self._session.barrier(name, timeout_s=timeout_s, members=members)

    def step(self, batch: Any = None, *, step: int | None = None, loss: float | None = None) -> int:
        """Report that an optimizer step is done; costs microseconds and never waits for Redis.

        Args:
            batch: what the step consumed, as the loader gave it: a batch, or a list of them. From now on a save has it as consumed. In
                deterministic mode every batch in its order, also one that was left out of the optimizer step.
            step: its number; default: one more than the last.
            loss: shown to people with the member.

        Returns the number of the step: on after the restored one, from 0 in a fresh run.

        Raises:
            StaleIncarnation, RosterChanged: this process may not go on, as a beat learned.
            InvalidInput: a batch was reported before, is none of this run's, or, in deterministic mode, is not the next; the step does not
                grow; the loss is no number. Nothing was reported then.
        """
        self._session.check()
        shown = _loss(loss)
        number = self._step + 1 if step is None else names.step(step)
        if number <= self._step:
            raise InvalidInput(f"step must grow: got {number} after {self._step}", field="step")
        if batch is not None and (plane := self._plane) is not None:
            plane.consumed(batch, number)
        self._step, self._stepped = number, True
        self._session.page.write(number, "training", shown)
        return number

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Announce a longer phase, such as ``"evaluating"``, so that nobody takes it for a stall."""
        self._session.page.write(self._step, what)
        try:
            yield
        finally:
            self._session.page.write(self._step, "training")

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> CheckpointManager:
        """Saves and restores of this run; needs ``store``."""
        if self._checkpoints is None:
            from dtr.checkpoint.manager import CheckpointManager

            if not self.settings.store:
                raise ConfigError("store is not set: pass store=, or set DTR_STORE, to save and restore checkpoints", setting="store")
            self._checkpoints = CheckpointManager(self.settings.store, session=self._session)
        return self._checkpoints

    def save_async(
        self,
        state: Any,
        step: int | None = None,
        *,
        replicated: bool | str | Sequence[str] = False,
        metrics: Mapping[str, Any] | None = None,
        on_progress: Callable[[SaveProgress], object] | None = None,
    ) -> SaveHandle:
        """Copy ``state`` into a staging slot and return; the uploader makes it durable. See :meth:`CheckpointManager.save_async`.

        Args:
            state: bytes, or nested dicts, lists and tuples of arrays, numbers, strings, booleans and None.
            step: default: the last reported one.
            replicated: True: every rank holds the same state, so one rank writes it and any world size can restore it; or path patterns
                of what is alike on all ranks, ``"optimizer/*"``: each rank writes a share of it.
            metrics: numbers about this step, ``{"loss": 1.2}``, kept with the checkpoint: for people, and for ``keep_best``.
            on_progress: called from a background thread with how far the save is: bytes of each rank, MB/s, seconds left.
        """
        if step is None and self._step < 0:
            raise InvalidInput("there is no step to save yet: call step() first, or pass step=", field="step")
        step = self._step if step is None else step
        handle = self.checkpoints.save_async(state, step, replicated=replicated, metrics=metrics, on_progress=on_progress)
        self._saves = [*(older for older in self._saves if not older.durable.done()), handle]
        return handle

    def restore(self, *, fresh: bool = False, into: Any = None, only: str | Sequence[str] | None = None) -> Restored | None:
        """Restore the newest checkpoint that every rank can read; collective: every rank of the run calls it before its first batch.

        A run goes forward only: to go back to a checkpoint in mid-run, every rank calls :meth:`form`, then this, then :meth:`loader`.
        To read one and change nothing: ``agent.checkpoints.restore()``.

        Args:
            fresh: go on with None when the lineage has no checkpoint at all; otherwise that is an error.
            into: a state to be filled in place; see :meth:`dtr.checkpoint.manager.CheckpointManager.restore`.
            only: path patterns like ``"model/*"``; see there.

        Raises:
            NoCheckpoint: there is none, and ``fresh`` was not given.
            RestoreFailed: there are some, and none can be restored; the message has each one's reason.
            StateMismatch: ``into`` is built differently; nothing was changed.
            DataConflict: this run has handed out a batch or reported a step; nothing was changed.
            RosterChanged: a member departed meanwhile; call :meth:`form`.
        """
        if (plane := self._plane) is not None:
            plane.check_unbegun()
        if self._stepped:
            raise DataConflict(
                f"restore() must come before the first step of a run, and run {self.run} stands at step {self._step}: to go back, call "
                "form(), then restore()"
            )
        found = self.checkpoints.restore(fresh=fresh, into=into, only=only)
        self._step = -1 if found is None else found.step
        return found

    def lineage(self) -> list[tuple[str, int]]:
        """The runs that led here with the last step taken from each, inclusive; oldest first, the current run last."""
        past = self.checkpoints.lineage()
        return [*past, (self.run, self._step)]

    def _rebuild(self, state_id: str) -> int:
        from dtr.checkpoint.keeping.rebuild import rebuild

        return rebuild(self._session.state, str(self.settings.store), state_id=state_id)


def _loss(given: Any) -> float:
    """What is shown; a tensor or array of one value is a number too."""
    if given is None:
        return math.nan
    if not isinstance(given, str | bytes):
        with contextlib.suppress(TypeError, ValueError):
            return float(given)
    raise InvalidInput(f"loss must be a number, got {given!r:.60}", field="loss")


def _world(given: int | tuple[int, int] | None, launcher: LauncherEnvironment) -> World:
    if given is None:
        high = launcher.world_size or 1
        low = launcher.world_min or high
    elif isinstance(given, tuple):
        if len(given) != 2:
            raise InvalidInput(f"world_size must be an integer or (low, high), got {given!r}", field="world_size")
        low, high = given
    else:
        low = high = given
    names.positive(high, "world_size", 100_000)
    names.positive(low, "world_size", high)
    return World(low=low, high=high)
