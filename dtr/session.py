"""A session: this process's membership of one job, with its beats, its run and its barriers. The agent and managers stand on it.

Guarantees: no thread or socket before ``start()``; nothing of a session works in a forked child; what a beat learns (another process
took this worker_id, Redis lost the state, the run ended) is raised by the next call, never swallowed.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dtr import names
from dtr.barrier import Barriers
from dtr.beats import BeatThread
from dtr.clock import SYSTEM, Clock
from dtr.config import Settings
from dtr.errors import CoordinatorUnavailable, ForkedProcess, NotJoined, RosterChanged, StaleIncarnation, StateLost, Unavailable
from dtr.host import host_id
from dtr.launcherlink import LauncherLink, registration
from dtr.membership import Identity, depart, join, new_incarnation, open_state, why_departed
from dtr.progress import ProgressPage
from dtr.runs import Run, World, form, run_number, why_ended
from dtr.state.exchange import Exchange
from dtr.state.job import JobState

__all__ = ["Session"]

log = logging.getLogger(__name__)

_live: weakref.WeakValueDictionary[tuple[str, str], Session] = weakref.WeakValueDictionary()


class Session:
    """This process's membership of one job.

    Args:
        settings: job, Redis, staging, times.
        worker_id: default: host name and process id.
        rank: the rank to ask for.
        world: how many ranks a run of this job has.
        launcher: Unix socket of a launcher that beats for this process.
        beat_process: without a launcher, a small child beats instead of a thread.
        recover: called with the state id when this process has to rebuild Redis's state; returns the highest known run number.
        address: ``ip:port`` of the trainer, for people.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        worker_id: str | None = None,
        rank: int | None = None,
        world: World = World(low=1, high=1),  # noqa: B008 - frozen
        launcher: str | None = None,
        beat_process: bool = False,
        recover: Callable[[str], int] | None = None,
        address: str = "",
        clock: Clock = SYSTEM,
    ) -> None:
        self.settings = settings
        self.worker_id = names.name(worker_id or f"{socket.gethostname().split('.')[0]}-{os.getpid()}", "worker_id")
        names.positive(world.high, "world_size", 100_000)
        names.positive(world.low, "world_size", world.high)
        self.asked_rank = None if rank is None else names.rank(rank, world.high)
        self.world = world
        self.state = JobState(settings.redis_url, settings.job, name="dtr-agent")
        self.clock = clock
        self.address = address
        self._launcher, self._recover = launcher, recover
        self._beat_process = beat_process and launcher is None
        self._exchange = Exchange(settings.redis_url, f"dtr-wait-{self.worker_id}")
        self.pid = os.getpid()
        self._lock = threading.RLock()
        self._numbers: dict[str, int] = {}
        self._identity: Identity | None = None
        self._run: Run | None = None
        self._last_run = ""
        self._barriers: Barriers | None = None
        self._ended: RosterChanged | StaleIncarnation | None = None
        self._beats: BeatThread | None = None
        self._link: LauncherLink | None = None
        self._page: ProgressPage | None = None
        self.host = ""

    # --- life -------------------------------------------------------------------------------------------------------

    @staticmethod
    def current(redis_url: str, job: str) -> Session | None:
        """The live session of this process for the same server and job."""
        found = _live.get((redis_url, job))
        return found if found is not None and found.pid == os.getpid() else None

    def start(self) -> Session:
        """Join the job and begin to beat. Does nothing if it has started."""
        self._check_process()
        with self._lock:
            if self._identity is not None:
                return self
            self.host = host_id(self.settings.staging)
            self._page = self._new_page()
            self._announce()
            _live[(self.settings.redis_url, self.settings.job)] = self
        return self

    def close(self, reason: str = "left") -> None:
        """Leave the job: the run ends for the others, with this reason. Safe to call twice."""
        if self.pid != os.getpid():
            return
        with self._lock:
            identity, self._identity = self._identity, None
            beats, self._beats = self._beats, None
            link, self._link = self._link, None
        _live.pop((self.settings.redis_url, self.settings.job), None)
        if beats is not None:
            beats.stop()
        if identity is not None and not isinstance(self._ended, StaleIncarnation):
            try:
                depart(
                    self.state,
                    state_id=identity.state_id,
                    worker_id=identity.worker_id,
                    incarnation=identity.incarnation,
                    reason=reason,
                )
            except (Unavailable, StateLost) as exc:
                log.warning("could not tell Redis that %s left: %s", self.worker_id, exc)
        if link is not None:
            link.close()
        if self._page is not None:
            self._page.close()
            self._page = None
        self._exchange.close()
        self.state.close()

    def _new_page(self) -> ProgressPage:
        if self._launcher or self._beat_process:
            try:
                return ProgressPage(self._page_path())
            except OSError as exc:  # a full tmpfs must not keep a trainer from training
                log.warning("no page of progress for the launcher (%s): this process beats for itself", exc)
                self._launcher, self._beat_process = None, False
        return ProgressPage()

    def _page_path(self) -> str:
        folder = os.path.dirname(self._launcher or "") or tempfile.gettempdir()
        return os.path.join(folder, f"page-{os.getpid()}-{new_incarnation()}")

    def _announce(self) -> None:
        """Register anew: at the start, and whenever Redis lost what it knew of this member."""
        settings = self.settings
        state_id = open_state(self.state, recover=self._recover, counter=run_number(self._last_run), clock=self.clock)
        identity = Identity(
            state_id=state_id,
            worker_id=self.worker_id,
            incarnation=new_incarnation(),
            host=self.host,
            pid=os.getpid(),
            address=self.address,
        )
        join(self.state, identity, ttl_ms=self.ttl_ms)
        self._identity, self._ended = identity, None
        self._numbers.clear()
        if (self._launcher is not None or self._beat_process) and self._page is not None:
            try:
                self._link = self._link or LauncherLink(self._launcher, on_news=self._on_news, on_lost=self._on_launcher_lost)
                self._link.register(
                    registration(
                        identity, redis_url=settings.redis_url, job=settings.job, ttl_ms=self.ttl_ms, interval_ms=self.interval_ms,
                        number=0, page=self._page.path or "",
                    )
                )  # fmt: skip
                return
            except Unavailable as exc:
                log.warning("%s; this process beats for itself", exc)
                self._launcher, self._link, self._beat_process = None, None, False
        self._beat_here(0)

    def _beat_here(self, number: int) -> None:
        identity, page = self._identity, self._page
        if identity is None or page is None:
            return
        if self._beats is not None:
            self._beats.stop()
        self._beats = BeatThread(
            self.settings.redis_url, self.settings.job, identity, ttl_ms=self.ttl_ms, interval_ms=self.interval_ms, number=number,
            read_progress=page.read, on_news=self._on_news,
        )  # fmt: skip
        self._beats.start()

    @property
    def ttl_ms(self) -> int:
        return int(self.settings.ttl_s * 1000)

    @property
    def interval_ms(self) -> int:
        return int(self.settings.beat_interval_s * 1000)

    # --- news from the beats ----------------------------------------------------------------------------------------

    def _on_news(self, news: str, detail: str) -> None:
        """Called from the thread that beats, or that listens to the launcher."""
        if news == "stale":
            self._ended = StaleIncarnation(f"{self.worker_id} must not go on: {detail}", worker=self.worker_id)
        elif news == "state_lost":
            self._state_lost(detail, self._identity)
        else:
            log.warning("unknown news from the launcher: %s %s", news, detail)

    def _on_launcher_lost(self) -> None:
        log.warning("the launcher has gone: %s beats for itself from now on", self.worker_id)
        with self._lock:
            self._link, self._launcher, self._beat_process = None, None, False
            # The launcher's last number is unknown here; joining again with the same incarnation starts no new registration.
            self._beat_here(number=-1)

    def _state_lost(self, detail: str, known: Identity | None) -> None:
        """Redis forgot this member: register again; the run is over and the next form() makes another."""
        with self._lock:
            if known is None or self._identity is not known or self._ended is not None:
                return  # another thread has done it
            log.warning("Redis lost the state of job %s (%s): %s registers again", self.settings.job, detail, self.worker_id)
            ended = RosterChanged(
                f"run {self._last_run or '-'} ended: Redis lost the state of the job ({detail}). Call form() to join the next run.",
                run=self._last_run, worker=None, rank=None, reason="state lost",
            )  # fmt: skip
            if self._beats is not None:
                self._beats.stop()
                self._beats = None
            try:
                self._announce()
            except CoordinatorUnavailable as exc:
                log.warning("cannot register again yet: %s", exc)
                self._beat_here(0)
            self._ended = ended

    # --- what callers use -------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if self.pid != os.getpid():
            raise ForkedProcess(f"this session belongs to process {self.pid}; create a new one in process {os.getpid()}")

    def check(self) -> None:
        """Raise what is known to stand against going on: ForkedProcess, StaleIncarnation, RosterChanged."""
        self._check_process()
        if self._ended is not None:
            raise self._ended

    @property
    def identity(self) -> Identity:
        """The registration; raises NotJoined before start()."""
        if self._identity is None:
            raise NotJoined(f"{self.worker_id} has not joined job {self.settings.job}: call start() first")
        return self._identity

    @property
    def run(self) -> Run:
        """The run that this process is in; raises NotJoined before form()."""
        self._check_process()
        if self._run is None:
            raise NotJoined(f"{self.worker_id} is in no run: call start() and form() first")
        return self._run

    @property
    def page(self) -> ProgressPage:
        """Where the trainer reports its step and phase."""
        if self._page is None:
            raise NotJoined(f"{self.worker_id} has not joined job {self.settings.job}: call start() first")
        return self._page

    @property
    def formed(self) -> bool:
        """Whether this process has been in a run."""
        return self._run is not None

    def form(self, timeout_s: float | None = None) -> Run:
        """Become part of the next run, together with every other member; see :func:`dtr.runs.form`."""
        self._check_process()
        if isinstance(self._ended, StaleIncarnation):
            raise self._ended
        while True:
            identity = self.identity
            self._ended = None
            try:
                with self.page.waiting("forming"):
                    run = form(
                        self.state, self._exchange, identity, world=self.world, asked_rank=self.asked_rank,
                        settle_s=self.settings.settle_s, after_run=self._last_run, clock=self.clock,
                        timeout_s=self.settings.form_timeout_s if timeout_s is None else timeout_s,
                    )  # fmt: skip
            except StateLost as exc:
                self._state_lost(str(exc), identity)
                continue
            except StaleIncarnation as exc:
                raise self._stale(exc) from exc
            with self._lock:
                self._run, self._last_run = run, run.id
                self._barriers = Barriers(self.state, self._exchange, identity, run, clock=self.clock)
            log.info("run %s: rank %d of %d", run.id, run.rank, run.world_size)
            return run

    def barrier(self, name: str, *, timeout_s: float | None = None, members: Collection[str] | None = None) -> None:
        """Wait for the others; see :meth:`dtr.barrier.Barriers.wait`.

        Raises RosterChanged, for all members in the same round, when a newcomer waits for the next run.
        """
        self.check()
        run, barriers = self.run, self._barriers
        if barriers is None:
            raise NotJoined(f"{self.worker_id} is in no run: call form() first")
        timeout = self.settings.barrier_timeout_s if timeout_s is None else timeout_s
        with self.page.waiting(f"barrier {name}"):
            wanted = self.guarded(lambda: barriers.wait(name, timeout_s=timeout, members=members))
        if wanted == "form":
            self._ended = RosterChanged(
                f"run {run.id} makes room: a newcomer waits for the next run. Call form().",
                run=run.id, worker=None, rank=None, reason="newcomer",
            )  # fmt: skip
            raise self._ended

    def _stale(self, exc: StaleIncarnation) -> StaleIncarnation:
        """The error that says why this registration ended; nothing of this process may go on."""
        why = why_departed(self.state, self.worker_id)
        self._ended = StaleIncarnation(f"{exc.message}{f': {why}' if why else ''}", worker=self.worker_id, reason=why)
        return self._ended

    def guarded(self, call: Callable[[], Any]) -> Any:
        """Do ``call`` under this run: what it learns about the run's end is kept and raised in full."""
        self.check()
        known = self._identity
        try:
            return call()
        except StateLost as exc:
            self._state_lost(str(exc), known)
            self.check()
            raise
        except StaleIncarnation as exc:
            raise self._stale(exc) from exc
        except RosterChanged as exc:
            self._ended = why_ended(self.state, self.run.id)
            raise self._ended from exc

    def numbered(self, channel: str, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script whose writes are not idempotent by nature: its last argument is the number of this write in ``channel``."""
        with self._lock:
            number = self._numbers.get(channel, 0) + 1
            answer = self.guarded(lambda: self.state.call(script, keys, [*args, number]))
            self._numbers[channel] = number
            return answer
