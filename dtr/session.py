"""A session: this process's membership of one job, with its run and its barriers. The agent and managers stand on it.

Guarantees: no thread or socket before ``start()``; nothing of a session works in a forked child; what a beat learns (another process
took this worker_id, Redis lost the state, the run ended) is raised by the next call, never swallowed.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dtr import names
from dtr.barrier import Barriers
from dtr.clock import SYSTEM, Clock
from dtr.config import Settings
from dtr.errors import BarrierBroken, DtrError, ForkedProcess, NotJoined, RosterChanged, StaleIncarnation, StateLost, Unavailable
from dtr.host import host_id
from dtr.membership import Identity, why_departed
from dtr.presence import Presence
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
        self.worker_id = names.name(f"{socket.gethostname().split('.')[0]}-{os.getpid()}" if worker_id is None else worker_id, "worker_id")
        names.positive(world.high, "world_size", 100_000)
        names.positive(world.low, "world_size", world.high)
        self.asked_rank = None if rank is None else names.rank(rank, world.high)
        self.world = world
        self.state = JobState(settings.redis_url, settings.job, name="dtr-agent")
        self.clock = clock
        self.address = address
        self.host = ""
        self.pid = os.getpid()
        self._exchange = Exchange(settings.redis_url, f"dtr-wait-{self.worker_id}")
        self._presence = Presence(
            self.state, settings, self.worker_id, launcher=launcher, beat_process=beat_process, recover=recover,
            on_news=self._on_news, clock=clock,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._writes = _Writes()
        self._forming = False
        self._run: Run | None = None
        self._last_run = ""
        self._barriers: Barriers | None = None
        self._ended: RosterChanged | StaleIncarnation | None = None
        self._closed = False
        self.attached: dict[str, Any] = {}  # what stands on this membership and ends with it, such as the data plane

    # --- life -------------------------------------------------------------------------------------------------------

    @staticmethod
    def current(redis_url: str, job: str) -> Session | None:
        """The live session of this process for the same server and job."""
        found = _live.get((redis_url, job))
        return found if found is not None and found.pid == os.getpid() else None

    def start(self) -> Session:
        """Join the job and begin to beat. Does nothing if it has started."""
        self._check_open()
        self.host = host_id(self.settings.staging)
        self._announce()
        _live[(self.settings.redis_url, self.settings.job)] = self
        return self

    def close(self, reason: str = "left") -> None:
        """Leave the job: the run ends for the others, with this reason. Safe to call twice."""
        if self.pid != os.getpid():
            return
        self._closed = True
        if Session.current(self.settings.redis_url, self.settings.job) is self:
            _live.pop((self.settings.redis_url, self.settings.job), None)
        self._presence.close(reason, depart_now=not isinstance(self._ended, StaleIncarnation))
        self._exchange.close()
        self.state.close()

    def _announce(self) -> Identity:
        return self._presence.announce(host=self.host, address=self.address, counter=run_number(self._last_run))

    # --- news from the beats ----------------------------------------------------------------------------------------

    def _on_news(self, about: Identity, news: str, detail: str) -> None:
        """Called from the thread that beats, or that listens to the launcher."""
        if not self._presence.stands(about):
            return
        if news == "stale":
            self._ended = StaleIncarnation(f"{self.worker_id} must not go on: {detail}", worker=self.worker_id)
        elif news == "state_lost":
            self._state_lost(detail, about)
        elif news == "run":
            self._look_at_run(detail)
        else:
            log.warning("unknown news from the launcher: %s %s", news, detail)

    def _look_at_run(self, answered: str) -> None:
        """A beat was answered with another run than this process is in: find out whether its run has ended."""
        run = self._run
        if run is None or answered == run.id or self._forming or self._ended is not None:
            return
        try:
            ended = self._why_ended(run)
        except Unavailable:
            return  # the next call under the run will learn it
        with self._lock:
            if ended is not None and self._run is run and not self._forming and self._ended is None:
                self._ended = ended

    def _why_ended(self, run: Run) -> RosterChanged | StaleIncarnation | None:
        """Who departed from ``run``, and why; None if it is open. If that was this very process, it must not go on.

        One that registered again since, because Redis had lost writes, is its own successor, and goes on.
        """
        ended, who = why_ended(self.state, run.id), self._presence.identity
        its_own = who is None or not self._presence.stands(who) or who.incarnation != run.roster[self.worker_id].incarnation
        if ended is not None and ended.worker == self.worker_id and not its_own:
            return self._stale(StaleIncarnation(f"{self.worker_id} must not go on: it departed from run {run.id}"))
        return ended

    def _state_lost(self, detail: str, known: Identity) -> RosterChanged:
        """Redis forgot this member: it registers again; the run is over, as the error says, and the next form() makes another."""
        ended = RosterChanged(
            f"run {self._last_run or '-'} ended: Redis lost the state of the job ({detail}). Call form() to join the next run.",
            run=self._last_run, worker=None, rank=None, reason="state lost",
        )  # fmt: skip
        if self._presence.lost(known, self._announce):
            self._ended = ended
            self._writes.forget()
            log.warning("Redis lost the state of job %s (%s): %s registers again", self.settings.job, detail, self.worker_id)
        return ended

    def _stale(self, exc: StaleIncarnation) -> StaleIncarnation:
        """The error that says why this registration ended; nothing of this process may go on."""
        why = why_departed(self.state, self.worker_id)
        self._ended = StaleIncarnation(f"{exc.message}{f': {why}' if why else ''}", worker=self.worker_id, reason=why)
        return self._ended

    # --- what callers use -------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if self.pid != os.getpid():
            raise ForkedProcess(f"this session belongs to process {self.pid}; create a new one in process {os.getpid()}")

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise NotJoined(f"{self.worker_id} has left job {self.settings.job}: make a new agent to join it again")

    def check(self) -> None:
        """Raise what is known to stand against going on: ForkedProcess, NotJoined after close(), StaleIncarnation, RosterChanged."""
        self._check_open()
        if self._ended is not None:
            raise self._ended

    @property
    def identity(self) -> Identity:
        """The registration; raises NotJoined before start()."""
        identity = self._presence.identity
        if identity is None:
            raise NotJoined(f"{self.worker_id} has not joined job {self.settings.job}: call start() first")
        return identity

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
        return self._presence.page

    @property
    def formed(self) -> bool:
        """Whether this process has been in a run."""
        return self._run is not None

    def form(self, timeout_s: float | None = None) -> Run:
        """Become part of the next run, together with every other member; see :func:`dtr.runs.form`."""
        self._check_open()
        if isinstance(self._ended, StaleIncarnation):
            raise self._ended
        _ = self.identity
        deadline = self.clock.monotonic() + (self.settings.form_timeout_s if timeout_s is None else names.seconds(timeout_s, "timeout_s"))
        self._forming = True
        try:
            with self.page.waiting("forming"):
                while (run := self._form_once(deadline)) is None:
                    self.clock.sleep(0.05)
        finally:
            self._forming = False
        log.info("run %s: rank %d of %d", run.id, run.rank, run.world_size)
        return run

    def _form_once(self, deadline: float) -> Run | None:
        """One attempt under one registration; None if that was lost meanwhile."""
        left_s = deadline - self.clock.monotonic()
        try:
            identity = self._announce()
        except Unavailable:
            if left_s <= 0:
                raise
            return None
        try:
            run = form(
                self.state, self._exchange, identity, world=self.world, asked_rank=self.asked_rank, settle_s=self.settings.settle_s,
                after_run=self._last_run, clock=self.clock, timeout_s=max(0.0, left_s),
            )  # fmt: skip
        except StateLost as exc:
            self._state_lost(str(exc), identity)
            return None
        except StaleIncarnation as exc:
            if not self._presence.stands(identity):
                return None  # this process has registered again: it was its own successor
            raise self._stale(exc) from None
        with self._lock:
            if not self._presence.stands(identity):
                return None
            self._run, self._last_run, self._ended = run, run.id, None
            self._barriers = Barriers(self.state, self._exchange, identity, run, clock=self.clock)
        return run

    def barrier(self, name: str, *, timeout_s: float | None = None, members: Collection[str] | None = None) -> None:
        """Wait for the others; see :meth:`dtr.barrier.Barriers.wait`.

        Raises RosterChanged, for all members in the same round, when a newcomer waits for the next run.
        """
        self.check()
        run, barriers = self.run, self._barriers
        if barriers is None:
            raise NotJoined(f"{self.worker_id} is in no run: call form() first")
        timeout = self.settings.barrier_timeout_s if timeout_s is None else names.seconds(timeout_s, "timeout_s")
        with self.page.waiting(f"barrier {name}"):
            wanted = self.guarded(lambda: barriers.wait(name, timeout_s=timeout, members=members))
        if wanted == "form":
            self._ended = RosterChanged(
                f"run {run.id} makes room: a newcomer waits for the next run. Call form().",
                run=run.id, worker=None, rank=None, reason="newcomer",
            )  # fmt: skip
            raise self._ended

    def guarded(self, call: Callable[[], Any], under: Run | None = None) -> Any:
        """Do ``call`` under this run: what it learns about the run's end is kept and raised in full.

        ``under``: the run that the call is about, for a thread that may come late: the end of that one does not end the next.
        """
        self.check()
        known, about = self.identity, under or self._run
        try:
            return call()
        except StateLost as exc:
            lost = self._state_lost(str(exc), known)
            self.check()
            raise lost from None  # the thread that beats has heard of it first, and is about to say so
        except StaleIncarnation as exc:
            if not self._presence.stands(known):
                self.check()
            raise self._stale(exc) from None
        except BarrierBroken as exc:
            self._ended = self._why_ended(self.run) or exc
            if isinstance(self._ended, StaleIncarnation):
                raise self._ended from None
            raise
        except RosterChanged as exc:
            if about is None or self._run is not about:
                raise
            ended = self._why_ended(about) or exc
            with self._lock:
                if self._run is about:
                    self._ended = ended
            raise ended from None

    def numbered(
        self, channel: str, script: str, keys: Sequence[str], args: Sequence[Any], *, on_answer: Callable[[Any], None] | None = None
    ) -> Any:
        """Run a script whose writes are not idempotent by nature: its last argument is the number of this write in ``channel``.

        One whose outcome is unknown is sent again, with its number, before the next of its channel; ``on_answer`` is told its answer
        then, for whoever must not lose what was granted to it.
        """
        run = self._run

        def write(number: int) -> Any:
            answer = self.guarded(lambda: self.state.call(script, keys, [*args, number]), run)
            if on_answer is not None:
                on_answer(answer)
            return answer

        return self._writes.send(channel, write)


class _Writes:
    """Numbers the writes of each channel from 1, per registration."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, int] = {}
        self._open: dict[str, Callable[[int], Any]] = {}

    def send(self, channel: str, write: Callable[[int], Any]) -> Any:
        """Send ``write`` under the next number, after what is still open in this channel."""
        with self._lock:
            if channel in self._open:
                try:
                    self._settle(channel, self._open[channel])
                except Unavailable:
                    raise
                except DtrError as exc:  # its own caller has gone, and the next write is told for itself what stands against it
                    log.info("an earlier write of channel %s was refused: %s", channel, exc)
            self._open[channel] = write
            return self._settle(channel, write)

    def _settle(self, channel: str, write: Callable[[int], Any]) -> Any:
        number = self._last.get(channel, 0) + 1
        try:
            answer = write(number)
        except Unavailable:
            raise  # nobody knows whether it was done: it stays open
        except DtrError:
            self._open.pop(channel, None)  # refused: it was not done
            raise
        self._last[channel] = number
        self._open.pop(channel, None)
        return answer

    def forget(self) -> None:
        """A new registration counts from 1."""
        self._last, self._open = {}, {}
