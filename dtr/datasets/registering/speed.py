"""How fast each worker consumes a data set, for people and for placement. Owns the fields ``samples_per_s/NAME`` of ``worker:ID``.

Who says what, and when::

    trainer     counts its samples at every step; every TELL_S seconds one script that nobody waits for writes its samples per second
    run forms   the one member that computes the data set's placement (:mod:`dtr.datasets.registering.assignment`) reads all of them once
                -> weights (:mod:`dtr.weights`) -> placement (:mod:`dtr.placement`): pure functions
                -> placement and weights are installed by one compare-and-set
    the others  read their shards from there; nobody places by a reading of its own, so ranks cannot disagree

Weights stand as long as the run does. A trainer killed between counting and telling leaves an older speed; a member killed between reading
and installing leaves nothing, and the next one reads anew. Deterministic mode places no shards: there the field is for people alone.

The speed is what a worker gets through, all its waiting included, since that is how long its shards will take it. So ranks that meet in a
collective at every step are equally fast, and their placement stays even; those that do not, or whose batches differ, get their due.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Final

from dtr.datasets.consuming.reports import Reports
from dtr.datasets.loading.batch import Batch
from dtr.runs import Run
from dtr.session import Session
from dtr.state.client import translate

__all__ = ["Pace", "Speed", "pace_of", "speeds"]

WINDOW: Final = 256  # batches
LEAST: Final = (8, 0.5)  # batches and seconds before a speed is one
TELL_S: Final = 2.0
READ_AT_ONCE: Final = 1000


class Speed:
    """Samples per second over the newest `WINDOW` batches. Pure: it is told the time.

    What counts is the time from one batch to the next of the same epoch. The wait for the end of an epoch is not a worker's own, nor is
    what passes between batches without samples, which a rank gets when there is nothing left for it.
    """

    def __init__(self) -> None:
        self._spans: deque[tuple[int, float]] = deque()  # samples, seconds
        self._samples, self._seconds = 0, 0.0
        self._last: tuple[Any, float] | None = None

    def consumed(self, epoch: object, samples: int, now_s: float) -> None:
        """A batch was consumed; ``epoch`` is anything that is equal within an epoch of a run."""
        last, self._last = self._last, (epoch, now_s) if samples else None
        if last is None or not samples or last[0] != epoch:
            return
        self._spans.append((samples, now_s - last[1]))
        self._samples, self._seconds = self._samples + samples, self._seconds + now_s - last[1]
        if len(self._spans) > WINDOW:
            samples, seconds = self._spans.popleft()
            self._samples, self._seconds = self._samples - samples, self._seconds - seconds

    @property
    def samples_per_s(self) -> float | None:
        """None while there were too few batches, or in too short a time, to tell."""
        batches, seconds = LEAST
        return self._samples / self._seconds if len(self._spans) >= batches and self._seconds >= seconds else None


class Pace:
    """One process's speed on one data set, from run to run, and when it is told.

    Args:
        session: of this process.
        name: of the data set.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.speed = Speed()
        self._session, self._field = session, _field(name)
        self._tell_at_s = -math.inf

    def consumed(self, batch: Batch, run: Run, reports: Reports) -> None:
        """The trainer consumed a batch in ``run``; costs microseconds."""
        now_s = self._session.clock.monotonic()
        self.speed.consumed((run.id, batch.epoch), sum(stop - start for _, start, stop in batch.ranges), now_s)
        found = self.speed.samples_per_s
        if found is None or now_s < self._tell_at_s:
            return
        self._tell_at_s = now_s + TELL_S
        keys, who = self._session.state.keys, self._session.identity
        fence = [f"{who.state_id} {run.id}", who.worker_id, run.rank, run.roster[who.worker_id].incarnation]
        reports.send("speed_note", [keys.roster, keys.worker(who.worker_id)], [*fence, self._field, f"{found:.4g}"], at_once=False)


def pace_of(session: Session, name: str) -> Pace:
    """The pace of this process on the data set ``name``; loaders come and go with the runs, this stays."""
    pace: Pace = session.attached.setdefault(_field(name), Pace(session, name))
    return pace


def speeds(session: Session, name: str, workers: Collection[str]) -> dict[str, float]:
    """What these workers told last, of those that told anything. Raises CoordinatorUnavailable if Redis cannot be reached."""
    state, field, asked = session.state, _field(name), sorted(workers)
    told: list[Any] = []
    for first in range(0, len(asked), READ_AT_ONCE):
        with translate(state.url), state.redis.pipeline(transaction=False) as pipe:
            for worker in asked[first : first + READ_AT_ONCE]:
                pipe.hget(state.keys.worker(worker), field)
            told += pipe.execute()
    return _numbers(asked, told)


def _numbers(workers: Sequence[str], told: Sequence[str | None]) -> dict[str, float]:
    """Numbers above 0; anything else is as if it had not been told."""
    found = {}
    for worker, text in zip(workers, told, strict=True):
        try:
            speed = float(text or 0)
        except ValueError:
            continue
        if 0 < speed < math.inf:
            found[worker] = speed
    return found


def _field(name: str) -> str:
    return f"samples_per_s/{name}"
