"""The whole of a job on one page: is it alive, what is it waiting for, what would it lose if it died now, and who ended it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dtr import counters
from dtr.errors import CoordinatorRefused
from dtr.state.job import JobState
from dtr.views import checkpoints, events, failures, jobs, rounds, server, uploaders, workers
from dtr.views.checkpoints import CheckpointView
from dtr.views.events import Event
from dtr.views.failures import FailedSave
from dtr.views.jobs import JobSummary
from dtr.views.reading import Fields, reading
from dtr.views.rounds import RoundView
from dtr.views.server import ServerView
from dtr.views.uploaders import UploaderView
from dtr.views.verdict import verdict, warnings
from dtr.views.workers import DepartedView, WorkerView

__all__ = ["Ended", "JobView", "PageView", "read", "read_page"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageView:
    """A server and one of its jobs; ``job`` is None where several could be meant. ``chosen`` says why it is this one."""

    server: ServerView
    jobs: tuple[JobSummary, ...]
    chosen: str
    job: JobView | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The end of the newest run that ended: who departed, and why."""

    run: str
    worker: str
    rank: int | None
    reason: str
    ago_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job. ``verdict`` is one word (see :mod:`dtr.views.verdict`), ``sentence`` says it in full; ``run`` is empty between runs."""

    job: str
    verdict: str
    sentence: str
    warnings: tuple[str, ...]
    phase: str  # READY, RECOVERING, or empty if there is no such job
    run: str
    last_run: str
    world_size: int | None
    generation: int
    formed_ago_s: float | None
    beat_ago_s: float | None  # since the last beat of anyone
    arrived: tuple[str, ...]  # workers that have arrived for the next run
    workers: tuple[WorkerView, ...]
    departed: tuple[DepartedView, ...]
    ended: Ended | None
    barriers: tuple[RoundView, ...] | None  # open rounds; None if this user may not look for them
    latest: CheckpointView | None
    unsaved_steps: int | None  # how far the trainers are ahead of it
    open_checkpoints: tuple[CheckpointView, ...]
    failed_saves: tuple[FailedSave, ...]  # the newest first
    uploaders: tuple[UploaderView, ...]
    counters: dict[str, int]
    events: tuple[Event, ...]


def read_page(state: JobState, *, asked: bool, event_count: int = 6) -> PageView:
    """The server and the job of ``state``, or if nobody ``asked`` for that one, the job that is meant.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    seen = server.read(state)
    try:
        listed = jobs.read(state)
    except CoordinatorRefused:
        if not asked:
            raise
        listed = ()  # a tenant may not see the others
    name, why = jobs.pick(listed, state.job, asked=asked)
    found = None if name is None else read(JobState(state.url, name, client=state.redis), event_count=event_count)
    return PageView(server=seen, jobs=listed, chosen=why, job=found)


def read(state: JobState, *, event_count: int = 6) -> JobView:
    """Everything about one job; a view without phase if there is no such job.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    keys = state.keys
    people = workers.read(state)
    with reading(state):
        pipeline = state.redis.pipeline()
        pipeline.hgetall(keys.meta)
        pipeline.time()
        meta_fields, (seconds, microseconds) = pipeline.execute()
    meta = Fields(keys.meta, meta_fields)
    now_ms = int(seconds) * 1000 + int(microseconds) // 1000
    run = meta.text("run") or meta.text("last_run")
    with reading(state):
        roster = Fields(keys.run(run), state.redis.hgetall(keys.run(run)) if run else {})
    index = checkpoints.read_open(state)
    latest = checkpoints.read_one(state, *checkpoints.split(index.latest, keys.meta)) if index.latest else None
    failed = failures.read(state, latest, now_ms=now_ms)
    uploading = uploaders.read(state, people.workers, index.checkpoints)
    with reading(state):
        counted = counters.read(state)
    word, sentence = verdict(meta, people, now_ms=now_ms)
    return JobView(
        job=state.job,
        verdict=word,
        sentence=sentence,
        warnings=warnings(people, uploaders=uploading, checkpoints=index.checkpoints, last_run=run, failed=failed),
        phase=meta.text("phase"),
        run=meta.text("run"),
        last_run=meta.text("last_run"),
        world_size=roster.number("world_size"),
        generation=people.generation,
        formed_ago_s=_ago_s(roster.number("formed_at"), now_ms),
        beat_ago_s=_ago_s(meta.number("beat_at"), now_ms),
        arrived=tuple(worker.worker for worker in people.workers if worker.forming),
        workers=people.workers,
        departed=people.departed,
        ended=_ended(meta, people.departed),
        barriers=_open_rounds(state),
        latest=latest,
        unsaved_steps=_unsaved(latest, people.workers),
        open_checkpoints=index.checkpoints,
        failed_saves=failed,
        uploaders=uploading,
        counters=counted,
        events=events.read(state, count=event_count).events,
    )


def _unsaved(latest: CheckpointView | None, members: Collection[WorkerView]) -> int | None:
    steps = [worker.step for worker in members if worker.step is not None]
    return max(0, max(steps) - latest.step) if steps and latest is not None else None


def _ago_s(at_ms: int | None, now_ms: int) -> float | None:
    return None if at_ms is None else max(0, now_ms - at_ms) / 1000


def _ended(meta: Fields, departed: Collection[DepartedView]) -> Ended | None:
    if not meta.text("ended_run"):
        return None
    worker, reason = meta.text("ended_worker"), meta.text("ended_reason")
    ages = [gone.ago_s for gone in departed if gone.worker == worker and gone.reason == reason]
    return Ended(run=meta.text("ended_run"), worker=worker, rank=meta.number("ended_rank"), reason=reason, ago_s=ages[0] if ages else None)


def _open_rounds(state: JobState) -> tuple[RoundView, ...] | None:
    try:
        return tuple(found for found in rounds.read(state).rounds if found.state == rounds.OPEN)
    except CoordinatorRefused:
        return None  # the rest of the page is worth showing without them
