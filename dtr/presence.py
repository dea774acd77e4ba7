"""Being a member: one registration at a time, the beats that keep it, and a new one whenever Redis forgot it.

Guarantees: while this process lives and Redis can be reached, it is registered; what was learned about an older registration is never
taken for the present one; a registration whose reply was lost is sent again, not made twice. Three ways to beat: the launcher, a small
child, a thread; when one of the first two goes away, the thread takes over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import tempfile
import threading
from collections.abc import Callable
from functools import partial

from dtr.beats import Beats
from dtr.clock import Clock
from dtr.config import Settings
from dtr.errors import DtrError, NotJoined, StateLost, Unavailable
from dtr.launcherlink import LauncherLink, registration
from dtr.membership import Identity, depart, join, new_incarnation, open_state
from dtr.progress import ProgressPage
from dtr.state.job import JobState

__all__ = ["Presence"]

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 2.0
_MOST_LOSSES = 10  # of the state in a row while one registers


class Presence:
    """The membership of this process in one job.

    Args:
        state: the job.
        settings: times, and where Redis is.
        worker_id: who.
        launcher: Unix socket of a launcher that beats for this process.
        beat_process: without a launcher, a small child beats.
        recover: rebuilds Redis's state when this process is the one to do it.
        on_news: called from some thread with (registration, news, detail), news being ``stale``, ``state_lost`` or ``run``.
        clock: for waits.
    """

    def __init__(
        self,
        state: JobState,
        settings: Settings,
        worker_id: str,
        *,
        launcher: str | None,
        beat_process: bool,
        recover: Callable[[str], int] | None,
        on_news: Callable[[Identity, str, str], None],
        clock: Clock,
    ) -> None:
        self._state, self._settings, self._worker_id = state, settings, worker_id
        self._launcher, self._beat_process = launcher, beat_process and launcher is None
        self._recover, self._on_news, self._clock = recover, on_news, clock
        self._lock = threading.Lock()  # held for moments: what is known
        self._announcing = threading.Lock()  # held while one thread registers
        self._identity: Identity | None = None
        self._registered = False
        self._pending = ""  # an incarnation whose join may have had its effect
        self._closed = threading.Event()
        self._beats: Beats | None = None
        self._link: LauncherLink | None = None
        self._page: ProgressPage | None = None

    @property
    def identity(self) -> Identity | None:
        """The newest registration, also when Redis has forgotten it; None before the first."""
        return self._identity

    @property
    def page(self) -> ProgressPage:
        """Where the trainer reports; raises NotJoined before the start."""
        if self._page is None:
            raise NotJoined(f"{self._worker_id} has not joined job {self._settings.job}: call start() first")
        return self._page

    def stands(self, known: Identity) -> bool:
        """Whether ``known`` is the present registration, as far as this process has heard."""
        return self._registered and self._identity is known

    # --- registering ------------------------------------------------------------------------------------------------

    def announce(self, *, host: str, address: str, counter: int) -> Identity:
        """Register, unless that stands; ``counter`` is the highest number of a run that this process knows. Waits for a rebuild.

        Raises:
            CoordinatorUnavailable, StoreUnavailable, ...: it is not registered; calling again goes on where it was.
        """
        with self._announcing:
            if self._registered and self._identity is not None:
                return self._identity
            self._page = self._page or self._new_page()
            identity = self._registered_anew(host, address, counter)
            with self._lock:
                self._identity, self._registered, self._pending = identity, True, ""
            self._begin_beats(identity)
            return identity

    def _registered_anew(self, host: str, address: str, counter: int) -> Identity:
        for _ in range(_MOST_LOSSES):
            with contextlib.suppress(StateLost):  # Redis was emptied once more, under our hands: begin again
                state_id = open_state(self._state, recover=self._recover, counter=counter, clock=self._clock)
                self._pending = self._pending or new_incarnation()
                identity = Identity(
                    state_id=state_id, worker_id=self._worker_id, incarnation=self._pending, host=host, pid=os.getpid(), address=address
                )
                join(self._state, identity, ttl_ms=self._ttl_ms)
                return identity
        raise StateLost(
            f"Redis lost the state of job {self._settings.job} {_MOST_LOSSES} times in a row while {self._worker_id} registered"
        )

    def lost(self, known: Identity, announce: Callable[[], object]) -> bool:
        """Redis forgot ``known``: its beats end, and a thread calls ``announce`` until that succeeds.

        Returns False when ``known`` is not the present registration: then it is old news.
        """
        with self._lock:
            if not self.stands(known) or self._closed.is_set():
                return False
            self._registered = False
            beats, self._beats = self._beats, None
        if beats is not None:
            beats.stop(wait=False)  # this may be the thread that waits for us
        threading.Thread(target=self._announce_until_done, args=(announce,), name="dtr-announce", daemon=True).start()
        return True

    def _announce_until_done(self, announce: Callable[[], object]) -> None:
        pause_s, failed = 0.1, False
        while not self._closed.is_set() and not self._registered:
            try:
                announce()
            except (DtrError, OSError) as exc:
                if not failed:
                    failed = True
                    log.warning("%s cannot register again yet: %s", self._worker_id, exc)
                self._closed.wait(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    def close(self, reason: str, *, depart_now: bool) -> None:
        """End the beats, and say that this process left, unless it must not."""
        with self._lock:
            self._closed.set()
            identity, registered, self._registered = self._identity, self._registered, False
            beats, self._beats = self._beats, None
            link, self._link = self._link, None
        if beats is not None:
            beats.stop()
        if identity is not None and registered and depart_now:
            facts = {"state_id": identity.state_id, "worker_id": identity.worker_id, "incarnation": identity.incarnation}
            try:
                depart(self._state, **facts, reason=reason)
            except (Unavailable, StateLost) as exc:
                log.warning("could not tell Redis that %s left: %s", self._worker_id, exc)
        if link is not None:
            link.close()
        if self._page is not None:
            self._page.close()
            self._page = None

    # --- beats ------------------------------------------------------------------------------------------------------

    @property
    def _ttl_ms(self) -> int:
        return int(self._settings.ttl_s * 1000)

    @property
    def _interval_ms(self) -> int:
        return int(self._settings.beat_interval_s * 1000)

    def _new_page(self) -> ProgressPage:
        if self._launcher or self._beat_process:
            folder = os.path.dirname(self._launcher or "") or tempfile.gettempdir()
            try:
                return ProgressPage(os.path.join(folder, f"page-{os.getpid()}-{new_incarnation()}"))
            except OSError as exc:  # a full tmpfs must not keep a trainer from training
                log.warning("no page of progress for the launcher (%s): this process beats for itself", exc)
                self._launcher, self._beat_process = None, False
        return ProgressPage()

    def _begin_beats(self, identity: Identity) -> None:
        if self._launcher is not None or self._beat_process:
            settings = self._settings
            try:
                if self._link is None:
                    self._link = LauncherLink(self._launcher, on_news=self._hear, on_lost=self._on_launcher_lost)
                self._link.register(
                    registration(
                        identity, redis_url=settings.redis_url, job=settings.job, ttl_ms=self._ttl_ms, interval_ms=self._interval_ms,
                        number=0, page=self.page.path or "",
                    )
                )  # fmt: skip
                return
            except Unavailable as exc:
                log.warning("%s; this process beats for itself", exc)
                self._launcher, self._link, self._beat_process = None, None, False
        self._beat_here(identity, 0)

    def _beat_here(self, identity: Identity, number: int) -> None:
        beats = Beats(self._settings.redis_url, self._settings.job, interval_ms=self._interval_ms)
        with self._lock:
            if self._closed.is_set():
                return
            older, self._beats = self._beats, beats
            beats.add(
                identity, ttl_ms=self._ttl_ms, number=number, read_progress=self.page.read, on_news=partial(self._on_news, identity)
            )  # fmt: skip
        if older is not None:
            older.stop(wait=False)

    def _hear(self, incarnation: str, news: str, detail: str) -> None:
        """News from whoever beats for this process, about the registration that it was given."""
        identity = self._identity
        if identity is not None and identity.incarnation == incarnation:
            self._on_news(identity, news, detail)

    def _on_launcher_lost(self) -> None:
        log.warning("the launcher has gone: %s beats for itself from now on", self._worker_id)
        with self._lock:
            self._link, self._launcher, self._beat_process = None, None, False
            identity = self._identity if self._registered else None
        if identity is not None:
            self._beat_here(identity, number=-1)  # the launcher's last number is not known here
