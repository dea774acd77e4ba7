"""Which registrations the launcher looks after, seat by seat: from a trainer's first line until it leaves or ends.

One process may register for several jobs, and anew after Redis lost its state: the newest registration of a member counts. When a
trainer leaves, or its connection ends without a word, the beats end, and nothing else: the registration stays on record until the
process has ended, so that Redis is told how, and asked whether another process has taken the name.
"""

from __future__ import annotations

import logging
import os
import selectors
from collections.abc import Callable
from functools import partial
from typing import Final

from dtr.beats import Beats
from worker_agent.launcher.desk import Visitor
from worker_agent.launcher.inbox import Inbox
from worker_agent.launcher.outcome import Outcome
from worker_agent.launcher.stall import StallRule, Watch
from worker_agent.launcher.ward import Departures, Ward
from worker_agent.registration import Registration, news_line

__all__ = ["Care"]

log = logging.getLogger(__name__)

_ENDED_ELSEWHERE: Final = "it ended; how is known to its parent, which is not the launcher"


class Care:
    """Told by the desk what trainers say, and by the loop when they end. All methods are for the loop's thread.

    Args:
        selector, inbox: of the loop.
        rule: when a trainer counts as stalled.
        pid_of: the process that the launcher started in a seat, None if there is none.
        on_stall: called with (seat, watch, step, job) when a trainer stalls, becomes overdue, or goes on; step and job as ``last_step``.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        inbox: Inbox,
        *,
        rule: StallRule,
        pid_of: Callable[[int], int | None],
        on_stall: Callable[[int, Watch, int, str], None],
    ) -> None:
        self._departures = Departures()
        self._selector, self._inbox, self._rule = selector, inbox, rule
        self._pid_of, self._on_stall = pid_of, on_stall
        self._wards: dict[int, dict[tuple[str, str, str], Ward]] = {}  # by seat and member
        self._of: dict[Visitor, Ward] = {}
        self._beats: dict[tuple[str, str, int], Beats] = {}  # by server, job and interval
        self._strangers: dict[Ward, int] = {}  # pidfds of trainers that are not the launcher's own children

    # --- what the desk tells ----------------------------------------------------------------------------------------

    def registered(self, visitor: Visitor, registration: Registration) -> None:
        """Beat for this member from now on."""
        seat = visitor.seat
        older = self._of.pop(visitor, None)
        if older is not None:
            self._drop(seat, older)
        same = self._wards.setdefault(seat, {}).get(registration.member)
        if same is not None:
            self._drop(seat, same)
        ward = Ward(
            registration,
            beats=self._beats_for(registration),
            pid=visitor.pid,
            rule=self._rule,
            on_news=lambda news, detail: self._inbox.post(partial(self._news, visitor, ward, news, detail)),
            on_stall=lambda watch: self._inbox.post(partial(self._stalled, seat, ward, watch)),
        )
        self._wards[seat][registration.member] = self._of[visitor] = ward
        if visitor.pid not in {0, self._pid_of(seat)}:
            self._watch_stranger(seat, ward, visitor.pid)
        ward.start()

    def left(self, visitor: Visitor) -> None:
        """The trainer has told Redis itself, unless it was replaced."""
        ward = self._of.pop(visitor, None)
        if ward is not None:
            ward.left = True
            ward.release()

    def gone(self, visitor: Visitor) -> None:
        """The connection ended without a word."""
        ward = self._of.pop(visitor, None)
        if ward is not None:
            ward.release()

    # --- what the loop tells ----------------------------------------------------------------------------------------

    def last_step(self, seat: int) -> tuple[int, str]:
        """The last step that the trainer in this seat reported, -1 if none, and of which job, empty if it has been in one alone.

        Of several jobs, the one that it joined last and has not left: its steps are no steps of another's.
        """
        wards = list(self._wards.get(seat, {}).values())
        current = ([ward for ward in wards if not ward.left] or wards)[-1:]
        return self._step_of(seat, current[0]) if current else (-1, "")

    def _step_of(self, seat: int, ward: Ward) -> tuple[int, str]:
        jobs = {other.registration.job for other in self._wards.get(seat, {}).values()}
        return ward.progress().step, ward.registration.job if len(jobs) > 1 else ""

    def ended(self, seat: int, outcome: Outcome, on_told: Callable[[bool], None]) -> bool:
        """The process in this seat has ended: tell Redis of each of its registrations; whether there was one to tell.

        ``on_told`` is called in the loop's thread when all are told, with whether another process holds one of their names by now.
        """
        registered = list(self._wards.pop(seat, {}).values())
        wards = [ward for ward in registered if not (ward.left and outcome.ok)]
        answers: list[bool] = []

        def told(replaced: bool) -> None:
            answers.append(replaced)
            if len(answers) == len(wards):
                on_told(any(answers))

        for ward in registered:
            if ward in wards:
                self._tell(ward, outcome.reason, told)
            self._forget(ward)
        return bool(wards)

    def close(self, within_s: float) -> None:
        """Wait for the departures that are still to be told, then give them up."""
        for wards in self._wards.values():
            for ward in wards.values():
                self._forget(ward)
        self._wards.clear()
        for worker in self._departures.settle(within_s):
            log.warning("Redis could not be told that %s is gone; it finds out when the ttl has passed", worker)

    def _beats_for(self, told: Registration) -> Beats:
        which = told.redis_url, told.job, told.interval_ms
        return self._beats.setdefault(which, Beats(told.redis_url, told.job, interval_ms=told.interval_ms))

    # --- how --------------------------------------------------------------------------------------------------------

    def _tell(self, ward: Ward, reason: str, on_told: Callable[[bool], None]) -> None:
        self._departures.tell(ward.registration, reason, lambda replaced: self._inbox.post(partial(on_told, replaced)))

    def _drop(self, seat: int, ward: Ward) -> None:
        if self._is_current(seat, ward):
            del self._wards[seat][ward.registration.member]
            self._forget(ward)

    def _forget(self, ward: Ward) -> None:
        ward.release()
        pidfd = self._strangers.pop(ward, None)
        if pidfd is not None:
            self._selector.unregister(pidfd)
            os.close(pidfd)

    def _watch_stranger(self, seat: int, ward: Ward, pid: int) -> None:
        """A trainer behind a wrapper (a shell, a container): its end is seen as well, though not how it ended."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return  # it has ended already: its connection says so
        self._strangers[ward] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, partial(self._stranger_ended, seat, ward))

    def _stranger_ended(self, seat: int, ward: Ward) -> None:
        if not ward.left:
            self._tell(ward, _ENDED_ELSEWHERE, lambda replaced: None)
        self._drop(seat, ward)

    def _is_current(self, seat: int, ward: Ward) -> bool:
        return self._wards.get(seat, {}).get(ward.registration.member) is ward

    def _news(self, visitor: Visitor, ward: Ward, news: str, detail: str) -> None:
        if self._of.get(visitor) is ward:
            who = ward.registration.who
            if news != "run":
                log.warning("%s: %s", who.worker_id, detail)
            visitor.send(news_line(who.incarnation, news, detail))

    def _stalled(self, seat: int, ward: Ward, watch: Watch) -> None:
        if self._is_current(seat, ward):
            self._on_stall(seat, watch, *self._step_of(seat, ward))
