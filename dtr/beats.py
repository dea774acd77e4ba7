"""Beats: one thread and one connection for all members of a job that this process beats for.

A trainer without a launcher is the only member of its own; the launcher has one for each of its trainers, and their beats go out in one
write, so that Redis wakes once for a host and not once for a process. A thread outlives any outage of Redis with a jittered back-off; a
member's beats end when it may not go on.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence

from dtr.errors import DtrError, Recovering, StaleIncarnation, StateLost, Unavailable
from dtr.membership import BeatAnswer, BeatCall, Identity, beat_all, stall
from dtr.progress import Progress
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["Beats", "Member"]

log = logging.getLogger(__name__)

BACKOFF_CAP_S = 5.0


class Member:
    """What the beats of one registration say, and what their answers mean to it. Used by one thread.

    Args:
        who: the registration.
        ttl_ms, interval_ms: of the member.
        number: of the last acknowledged beat; -1 if another process beat before and its number is unknown.
        read_progress: the newest report of the trainer.
        on_news: called with (news, detail).
    """

    def __init__(
        self,
        who: Identity,
        *,
        ttl_ms: int,
        interval_ms: int,
        number: int,
        read_progress: Callable[[], Progress],
        on_news: Callable[[str, str], None],
    ) -> None:
        self.who, self.ttl_ms = who, ttl_ms
        self.on_news = on_news
        self.since: float | None = time.monotonic()  # waiting for its first beat; None once that was sent
        self._interval_ms, self._read_progress = interval_ms, read_progress
        self._number = number
        self._progress: Progress | None = None
        self._fields: dict[str, str | int] = {}
        self._shown: dict[str, str | int] = {}
        self._seen = (0, "")
        self._stalled = ""

    def call(self, state: JobState, late_ms: int) -> BeatCall:
        """The next beat, which is this one again until it is answered."""
        if self._number < 0:
            with translate(state.url):
                self._number = int(state.redis.hget(state.keys.worker(self.who.worker_id), "beat") or 0)
        self._progress = self._read_progress()
        self._fields = self._told(self._progress, late_ms)
        changed = {name: value for name, value in self._fields.items() if self._shown.get(name) != value}
        step, number = self._progress.step, self._number + 1
        return BeatCall(who=self.who, number=number, ttl_ms=self.ttl_ms, interval_ms=self._interval_ms, step=step, fields=changed)

    def heard(self, state: JobState, answer: BeatAnswer) -> tuple[str, str] | None:
        """The beat is on record; returns the news ("run", which one is open by now) if there is any."""
        self._number += 1
        self._shown = {} if answer.revived else self._fields
        if self._progress is not None and self._progress.stalled != self._stalled:
            self._tell_stall(state, self._progress)
        if (answer.generation, answer.run) == self._seen:
            return None
        self._seen = answer.generation, answer.run  # a run may form and end between two beats: its end counts up the generation
        return "run", answer.run

    def _told(self, progress: Progress, late_ms: int) -> dict[str, str | int]:
        """What people see; coarse, so that a trainer that is well sends nothing new."""
        idle_s = int(time.monotonic() - progress.at)
        fields: dict[str, str | int] = {} if math.isnan(progress.loss) else {"loss": f"{progress.loss:.4g}"}
        return fields | {
            "phase": "stalled" if progress.stalled else progress.phase,
            "idle_s": idle_s if idle_s > self._interval_ms / 500 else 0,
            "late_ms": late_ms if late_ms > self._interval_ms / 10 else 0,
            "host": self.who.host,
            "pid": self.who.pid,
            "address": self.who.address,
        }

    def _tell_stall(self, state: JobState, progress: Progress) -> None:
        """Put it among the events; what does not get through is tried again with the next beat, which says what else is the matter."""
        try:
            stall(state, self.who, step=progress.step, reason=progress.stalled)
        except DtrError as exc:
            log.info("that %s is stalled or goes on is not on record yet: %s", self.who.worker_id, exc)
        else:
            self._stalled = progress.stalled


class Beats:
    """Beats for the members that were added, all at once, from a daemon thread that runs while there are any.

    Args:
        url, job: where.
        interval_ms: between two beats of a member.
    """

    def __init__(self, url: str, job: str, *, interval_ms: int) -> None:
        self._url, self._job, self._interval_ms = url, job, interval_ms
        self._changed = threading.Condition()
        self._members: list[Member] = []
        self._thread: threading.Thread | None = None
        self._due = 0.0  # when all beat again; who was just added beats at once, and with the others from then on
        self._failures = 0

    def add(
        self,
        who: Identity,
        *,
        ttl_ms: int,
        number: int,
        read_progress: Callable[[], Progress],
        on_news: Callable[[str, str], None],
    ) -> Member:
        """Beat for this registration from now on.

        Args:
            who, ttl_ms, number, read_progress: see :class:`Member`.
            on_news: called from the thread with (news, detail): ``stale`` and ``state_lost`` end its beats, ``run`` tells which run is open
                by now.
        """
        member = Member(who, ttl_ms=ttl_ms, interval_ms=self._interval_ms, number=number, read_progress=read_progress, on_news=on_news)
        with self._changed:
            if self._thread is None:
                state = JobState(self._url, self._job, name="dtr-beat")
                thread = threading.Thread(target=self._loop, args=(state,), name="dtr-beat", daemon=True)
                thread.start()
                self._thread = thread
            self._members.append(member)
            self._changed.notify()
        return member

    def remove(self, member: Member) -> None:
        """End its beats; one that is under way may still arrive, and its news be told."""
        with self._changed:
            if member in self._members:
                self._members.remove(member)
                self._changed.notify()

    def stop(self, *, wait: bool = True) -> None:
        """End the beats of all, and wait for the end unless told otherwise or called from the thread itself."""
        with self._changed:
            self._members.clear()
            thread = self._thread
            self._changed.notify()
        if wait and thread is not None and threading.current_thread() is not thread:
            thread.join(timeout=10)

    def _loop(self, state: JobState) -> None:
        self._failures = 0
        self._due = time.monotonic() + self._pause_s()
        try:
            while turn := self._wait():
                self._round(state, *turn)
        finally:
            state.close()

    def _wait(self) -> tuple[list[Member], bool] | None:
        """Whose turn it is, when that comes, and whether it is everybody's; None when nobody is left, and the thread is to end."""
        with self._changed:
            while self._members:
                now = time.monotonic()
                if now >= self._due:
                    return list(self._members), True
                if new := [member for member in self._members if member.since is not None]:
                    return new, False
                self._changed.wait(self._due - now)
            self._thread = None
            return None

    def _round(self, state: JobState, members: Sequence[Member], everybody: bool) -> None:
        now = time.monotonic()
        calls: list[tuple[Member, BeatCall]] = []
        outage: DtrError | None = None
        for member in members:
            late_ms = int((now - (member.since or self._due)) * 1000)
            member.since = None
            try:
                calls.append((member, member.call(state, max(0, late_ms))))
            except Unavailable as exc:
                outage = exc
            except Exception as exc:  # whatever it is, it is the trouble of one member, and the others beat on
                self._end(member, exc)
        answered = False
        for (member, _), answer in zip(calls, beat_all(state, [call for _, call in calls]), strict=True):
            if isinstance(answer, (Unavailable, Recovering)):
                outage = answer
                continue
            answered = True
            if isinstance(answer, DtrError):
                self._end(member, answer)
                continue
            try:
                if news := member.heard(state, answer):
                    self._tell(member, *news)
            except Exception as exc:
                self._end(member, exc)
        self._note(members, outage, answered=answered)
        if everybody or self._failures:
            self._due = time.monotonic() + self._pause_s()

    def _note(self, members: Sequence[Member], outage: DtrError | None, *, answered: bool) -> None:
        """An outage is logged at its beginning and at its end; while it lasts for all, beats back off."""
        names = ", ".join(member.who.worker_id for member in members)
        if outage is None:
            if self._failures:
                log.warning("beats of %s get through again after %d failures", names, self._failures)
            self._failures = 0
        elif answered:
            log.info("not all beats of %s get through: %s", names, outage)
            self._failures = 0
        else:
            self._failures += 1
            if self._failures == 1:
                log.warning("beats of %s do not get through: %s", names, outage)

    def _tell(self, member: Member, news: str, detail: str) -> None:
        with self._changed:
            wanted = member in self._members
        if wanted:
            member.on_news(news, detail)

    def _end(self, member: Member, why: Exception) -> None:
        """It may not go on, or cannot: it is told, and the others are not concerned, whatever comes of that."""
        if isinstance(why, StateLost):
            news, detail = "state_lost", why.message
        elif isinstance(why, StaleIncarnation):
            news, detail = "stale", why.message
        else:
            log.error("beats of %s ended", member.who.worker_id, exc_info=why)
            news, detail = "stale", f"its beats ended: {why}"
        try:
            self._tell(member, news, detail)
        except Exception:
            log.exception("%s could not be told that its beats ended", member.who.worker_id)
        self.remove(member)

    def _pause_s(self) -> float:
        """Seconds until the next beats: the interval less up to a tenth, or a growing random wait while nothing gets through."""
        interval = self._interval_ms / 1000
        if self._failures:
            with self._changed:
                ttl_s = min((member.ttl_ms for member in self._members), default=0) / 1000
            return random.uniform(0.2, 1.0) * min(BACKOFF_CAP_S, ttl_s / 3, interval * 2.0 ** min(self._failures - 1, 6))
        return interval * random.uniform(0.9, 1.0)
