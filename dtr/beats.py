"""The thread that beats for a trainer without a launcher; its lateness is measured and shown.

It has a connection of its own, outlives any outage of Redis with a jittered back-off, and ends when the member may not go on.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable

from dtr.errors import DtrError, NotJoined, Recovering, StaleIncarnation, StateLost, Unavailable
from dtr.membership import Identity, beat, stall
from dtr.progress import Progress
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["BeatThread", "Beater"]

log = logging.getLogger(__name__)

BACKOFF_CAP_S = 5.0


class Beater:
    """Sends the beats of one registration and decides when the next is due. One beat at a time; no thread of its own.

    Args:
        state: the job; its client is used by this beater alone.
        who: the registration.
        ttl_ms, interval_ms: of the member.
        number: of the last acknowledged beat; -1 if another process beat before and its number is unknown.
    """

    def __init__(self, state: JobState, who: Identity, *, ttl_ms: int, interval_ms: int, number: int = 0) -> None:
        self.state, self.who = state, who
        self._ttl_ms, self._interval_ms = ttl_ms, interval_ms
        self._number = number
        self._failures = 0
        self._shown: dict[str, str | int] = {}
        self._seen = (0, "")
        self._stalled = ""

    def beat(self, progress: Progress | None, *, late_ms: int, phase: str | None = None) -> tuple[str, str] | None:
        """Beat once. Returns news, ("stale" | "state_lost" | "run", detail), or None; an outage is logged at its beginning and its end."""
        fields = self._fields(progress, late_ms, phase)
        changed = {name: value for name, value in fields.items() if self._shown.get(name) != value}
        try:
            if self._number < 0:
                self._number = self._last_number()
            answer = beat(
                self.state, self.who, number=self._number + 1, ttl_ms=self._ttl_ms, interval_ms=self._interval_ms,
                step=progress.step if progress else None, **changed,
            )  # fmt: skip
        except StaleIncarnation as exc:
            return "stale", exc.message
        except StateLost as exc:
            return "state_lost", exc.message
        except (Unavailable, Recovering) as exc:
            self._failures += 1
            if self._failures == 1:
                log.warning("beats of %s do not get through: %s", self.who.worker_id, exc)
            return None
        self._number += 1
        self._shown = {} if answer.revived else fields
        if self._failures:
            log.warning("beats of %s get through again after %d failures", self.who.worker_id, self._failures)
            self._failures = 0
        if progress is not None and progress.stalled != self._stalled:
            self._tell_stall(progress)
        if (answer.generation, answer.run) != self._seen:  # a run may form and end between two beats: its end counts up the generation
            self._seen = answer.generation, answer.run
            return "run", answer.run
        return None

    def _fields(self, progress: Progress | None, late_ms: int, phase: str | None) -> dict[str, str | int]:
        """What people see; coarse, so that a trainer that is well sends nothing new."""
        idle_s = 0 if progress is None else int(time.monotonic() - progress.at)
        fields: dict[str, str | int] = {} if progress is None or math.isnan(progress.loss) else {"loss": f"{progress.loss:.4g}"}
        return fields | {
            "phase": phase or _phase(progress),
            "idle_s": idle_s if idle_s > self._interval_ms / 500 else 0,
            "late_ms": late_ms if late_ms > self._interval_ms / 10 else 0,
            "host": self.who.host,
            "pid": self.who.pid,
            "address": self.who.address,
        }

    def _tell_stall(self, progress: Progress) -> None:
        """Put it among the events; what does not get through is tried again with the next beat, which says what else is the matter."""
        try:
            stall(self.state, self.who, step=progress.step, reason=progress.stalled)
        except DtrError as exc:
            log.info("that %s is stalled or goes on is not on record yet: %s", self.who.worker_id, exc)
        else:
            self._stalled = progress.stalled

    def _last_number(self) -> int:
        with translate(self.state.url):
            return int(self.state.redis.hget(self.state.keys.worker(self.who.worker_id), "beat") or 0)

    def pause_s(self) -> float:
        """Seconds until the next beat: the interval less up to a tenth, or a growing random wait while nothing gets through."""
        interval = self._interval_ms / 1000
        if self._failures:
            return random.uniform(0.2, 1.0) * min(BACKOFF_CAP_S, self._ttl_ms / 3000, interval * 2.0 ** min(self._failures - 1, 6))
        return interval * random.uniform(0.9, 1.0)


def _phase(progress: Progress | None) -> str:
    if progress is None:
        return "alive"
    return "stalled" if progress.stalled else progress.phase


class BeatThread:
    """Beats from a daemon thread until stopped or until the member may not go on.

    Args:
        url, job: where.
        who, ttl_ms, interval_ms, number: see :class:`Beater`.
        read_progress: the newest report of the trainer.
        on_news: called from the thread: ``stale`` and ``state_lost`` end it, ``run`` tells which run is open by now.
    """

    def __init__(
        self,
        url: str,
        job: str,
        who: Identity,
        *,
        ttl_ms: int,
        interval_ms: int,
        number: int,
        read_progress: Callable[[], Progress],
        on_news: Callable[[str, str], None],
    ) -> None:
        self._beater = Beater(JobState(url, job, name="dtr-beat"), who, ttl_ms=ttl_ms, interval_ms=interval_ms, number=number)
        self._read_progress, self._on_news = read_progress, on_news
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="dtr-beat", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, *, wait: bool = True) -> None:
        """End, and wait for the end unless told otherwise or called from the thread itself."""
        self._stop.set()
        if wait and self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def _loop(self) -> None:
        due = time.monotonic()
        try:
            while not self._stop.is_set():
                late_ms = max(0, int((time.monotonic() - due) * 1000))
                news = self._beater.beat(self._read_progress(), late_ms=late_ms)
                if news is not None and not self._stop.is_set():
                    self._on_news(*news)
                    if news[0] != "run":
                        return
                pause = self._beater.pause_s()
                due = time.monotonic() + pause
                self._stop.wait(pause)
        except (DtrError, NotJoined, ValueError, OSError) as exc:
            log.error("beats of %s ended: %s", self._beater.who.worker_id, exc)
            self._on_news("stale", f"its beats ended: {exc}")
        finally:
            self._beater.state.close()
