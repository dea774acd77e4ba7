"""A trainer that registered with this launcher: beats for it, watches its progress, and tells Redis when it has ended.

Nothing here makes the launcher's loop wait: beats and departures run in threads of their own, with connections of their own, so that a
slow Redis does not hold back the detection of an exit. All trainers of a job share one thread of beats, and one write for each round.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from dtr.beats import Beats, Member
from dtr.errors import CoordinatorRefused, DtrError, Recovering, StateLost, Unavailable
from dtr.membership import depart
from dtr.progress import Progress, read_page
from dtr.state.client import translate
from dtr.state.job import JobState
from worker_agent.launcher.procfs import is_stopped
from worker_agent.launcher.stall import StallRule, Watch, observe
from worker_agent.registration import Registration

__all__ = ["Departures", "Ward"]

log = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0


class Ward:
    """One registration under care.

    Args:
        registration: what the trainer handed over.
        beats: of its job at this launcher.
        pid: the trainer's, as the launcher's own host numbers it; 0 if it cannot be seen from here.
        rule: when it counts as stalled.
        on_news: called from a thread with (news, detail) when the beats ended because the member may not go on.
        on_stall: called from a thread with the watch when the trainer stalls, becomes overdue, or goes on.
    """

    def __init__(
        self,
        registration: Registration,
        *,
        beats: Beats,
        pid: int,
        rule: StallRule,
        on_news: Callable[[str, str], None],
        on_stall: Callable[[Watch], None],
    ) -> None:
        self.registration = registration
        self.left = False  # it said so itself
        self._pid, self._rule, self._on_stall = pid, rule, on_stall
        self._watch: Watch | None = None
        self._progress = Progress(step=-1, phase="alive", at=time.monotonic())  # until the page can be read
        self._beats, self._on_news = beats, on_news
        self._member: Member | None = None

    def start(self) -> None:
        """Begin to beat."""
        told = self.registration
        self._member = self._beats.add(
            told.who, ttl_ms=told.ttl_ms, number=told.number, read_progress=self._look, on_news=self._on_news
        )  # fmt: skip

    def release(self) -> None:
        """End the beats; does not wait for one that is under way."""
        if self._member is not None:
            self._beats.remove(self._member)

    def progress(self) -> Progress:
        """The newest report, read now."""
        # A page that is being written at this moment is read at the next look.
        self._progress = read_page(self.registration.page) or self._progress
        return self._progress

    def _look(self) -> Progress:
        """Called before each beat: what the beat is to report."""
        progress = self.progress()
        before = self._watch
        after = observe(before, progress, time.monotonic(), stopped=is_stopped(self._pid), rule=self._rule)
        self._watch = after
        if (after.stalled, after.overdue) != ((before.stalled, before.overdue) if before else ("", False)):
            self._on_stall(after)
        return replace(progress, stalled=after.stalled)


class Departures:
    """Tells Redis who has ended, each in a thread of its own that tries until it gets through."""

    def __init__(self) -> None:
        self._giving_up = threading.Event()
        self._open: dict[threading.Thread, str] = {}

    def tell(self, registration: Registration, reason: str, on_told: Callable[[bool], None]) -> None:
        """Record that this incarnation is gone.

        Args:
            registration: of the process that ended.
            reason: for people.
            on_told: called from a thread once that is settled, with whether another process holds the worker_id by now.
        """
        thread = threading.Thread(target=self._tell, args=(registration, reason, on_told), name="dtr-depart", daemon=True)
        self._open = {other: worker for other, worker in self._open.items() if other.is_alive()}
        self._open[thread] = registration.who.worker_id
        thread.start()

    def settle(self, within_s: float) -> list[str]:
        """Wait for what is still to be told, then give up; the workers that Redis was not told of: it finds out by their ttl."""
        deadline = time.monotonic() + within_s
        for thread in self._open:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._giving_up.set()
        return sorted(worker for thread, worker in self._open.items() if thread.is_alive())

    def _tell(self, registration: Registration, reason: str, on_told: Callable[[bool], None]) -> None:
        state = JobState(registration.redis_url, registration.job, name="dtr-depart")
        replaced, pause_s = False, _FIRST_PAUSE_S
        try:
            while not self._giving_up.is_set():
                try:
                    replaced = _depart(state, registration, reason)
                    break
                except CoordinatorRefused:
                    raise
                except (Unavailable, Recovering) as exc:
                    if pause_s == _FIRST_PAUSE_S:
                        log.warning("Redis is told later that %s is gone (%s): %s", registration.who.worker_id, reason, exc)
                self._giving_up.wait(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)
        except StateLost:
            log.info("Redis lost the state of job %s: it need not be told that %s is gone", registration.job, registration.who.worker_id)
        except DtrError as exc:
            log.warning("Redis cannot be told that %s is gone (%s): %s", registration.who.worker_id, reason, exc)
        finally:
            state.close()
            on_told(replaced)


def _depart(state: JobState, registration: Registration, reason: str) -> bool:
    """Record the departure; whether this incarnation had been replaced by one that lives."""
    who = registration.who
    if depart(state, state_id=who.state_id, worker_id=who.worker_id, incarnation=who.incarnation, reason=reason):
        return False
    with translate(state.url):
        return bool(state.redis.hget(state.keys.fences, who.worker_id))
