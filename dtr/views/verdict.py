"""What a job's condition is in one word and one sentence, and what about it needs a person. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from dtr.views.checkpoints import CheckpointView
from dtr.views.failures import FailedSave
from dtr.views.reading import Fields
from dtr.views.uploaders import UploaderView
from dtr.views.words import count_of, duration, some
from dtr.views.workers import DepartedView, WorkersView, WorkerView

__all__ = ["named", "verdict", "warnings"]

_CLEAN: Final = frozenset({"left", "exit 0"})
_LATE_BEATS_MS: Final = 1000


def verdict(meta: Fields, people: WorkersView, *, now_ms: int) -> tuple[str, str]:
    """The word and the sentence for a job.

    ``unknown``: there is no such job. ``recovering``: its state is being rebuilt. ``running``: a run is open and every rank of it is
    alive; ``degraded``: open, but not every rank is well. ``forming``: members are alive, and no run is open. ``dead``: nobody is
    alive, and not everybody left of their own accord. ``over``: nobody is there, and everybody left.
    """
    if not meta:
        return "unknown", "nobody has joined this job on this server"
    living = [worker for worker in people.workers if worker.condition != "overdue"]
    if meta.text("phase") != "READY":
        return "recovering", _recovering(meta, now_ms)
    if not living:
        return _nobody(meta, people, now_ms)
    if people.run:
        return _running(people)
    return "forming", _forming(meta, living)


def _recovering(meta: Fields, now_ms: int) -> str:
    left_ms = meta.integer("recover_until") - now_ms
    if left_ms > 0:
        return f"one member rebuilds the state from the store, for up to {duration(left_ms / 1000)} more; the others wait"
    return "the state is to be rebuilt from the store, and whoever did that has gone: the next process that joins takes over"


def _nobody(meta: Fields, people: WorkersView, now_ms: int) -> tuple[str, str]:
    beat_at = meta.number("beat_at")
    last = "" if beat_at is None else f"; the last beat came {duration(max(0, now_ms - beat_at) / 1000)} ago"
    if people.workers:
        return "dead", f"nobody is alive: {count_of(len(people.workers), 'member is', 'members are')} overdue{last}"
    seated = [gone for gone in people.departed if gone.rank is not None] or list(people.departed)
    failed = [gone for gone in seated if gone.reason not in _CLEAN]
    if failed:
        first = failed[-1]  # the newest stands first; whoever failed first is the likely cause
        return "dead", f"nobody is alive: {named(first)} departed {duration(first.ago_s)} ago: {first.reason}"
    if seated:
        latest = meta.text("latest")
        saved = f"; the last commit is {latest}" if latest else ""
        return "finished", f"all left in good order, the last one {duration(seated[0].ago_s)} ago{saved}"
    return "over", f"nobody is there, and nobody has departed{last}"


def _running(people: WorkersView) -> tuple[str, str]:
    seated = [worker for worker in people.workers if worker.rank is not None]
    unwell = [worker for worker in seated if worker.condition != "alive"]
    run = f"run {people.run}: {len(seated) - len(unwell)} of {len(seated)} ranks alive"
    if not unwell:
        return "running", run
    return "degraded", f"{run}; " + some([f"{named(worker)} is {worker.condition}" for worker in unwell])


def _forming(meta: Fields, living: Sequence[WorkerView]) -> str:
    arrived = sum(worker.forming for worker in living)
    low, _, high = meta.text("forming_world").partition(" ")
    wanted = "" if not arrived or not low else f"; {low if low == high else f'{low} to {high}'} are wanted"
    return f"no run is open: {arrived} of {len(living)} living members {'has' if arrived == 1 else 'have'} arrived for the next one{wanted}"


def warnings(
    people: WorkersView,
    *,
    uploaders: Collection[UploaderView],
    checkpoints: Collection[CheckpointView],
    last_run: str,
    failed: Collection[FailedSave] = (),
) -> tuple[str, ...]:
    """What needs a person, one sentence each, with what to do about it. ``failed``: saves that came to nothing, the newest first."""
    found = [_of_worker(worker) for worker in people.workers]
    found.append(_of_uploaders([uploader for uploader in uploaders if not uploader.present]))
    found.append(_of_stuck([uploader for uploader in uploaders if uploader.present and uploader.stuck_s]))
    found += [_of_checkpoint(ckpt, last_run) for ckpt in checkpoints]
    found.append(_of_failed([one for one in failed if one.since_latest]))
    return tuple(text for text in found if text)


def _of_worker(worker: WorkerView) -> str:
    if worker.condition == "stalled":
        still = "" if worker.idle_s is None else f" for {duration(worker.idle_s)}"
        why = f" ({worker.stalled})" if worker.stalled else ""
        return (
            f"{named(worker)} on {worker.host} is stalled: its launcher beats, the trainer has not moved{still}{why}; "
            f"see process {worker.pid}"
        )
    if worker.condition == "late" and worker.beat_age_s is not None:
        return (
            f"{named(worker)} on {worker.host} has not beaten for {duration(worker.beat_age_s)}, it has {duration(worker.deadline_s)} left"
        )
    if (worker.late_ms or 0) >= _LATE_BEATS_MS and worker.condition == "alive":
        late = duration((worker.late_ms or 0) / 1000)
        return f"{named(worker)} beats {late} late: its threads do not get to run; start it with `dtr run`, which beats from outside"
    return ""


def _of_uploaders(missing: Sequence[UploaderView]) -> str:
    if not missing:
        return ""
    waiting = sum(uploader.waiting_parts for uploader in missing)
    waits = f", {count_of(waiting, 'staged part waits', 'staged parts wait')}" if waiting else ""
    members = count_of(sum(uploader.members for uploader in missing), "member")
    hosts = some([uploader.host for uploader in missing])
    return f"no uploader on {hosts} ({members}{waits}): start `celery -A tasks worker` or `dtr up` there"


def _of_stuck(stuck: Sequence[UploaderView]) -> str:
    if not stuck:
        return ""
    longest_s = max(uploader.stuck_s for uploader in stuck)
    return (
        f"the uploader on {some([one.host for one in stuck])} has taken up no part for {duration(longest_s)}: see its log, or start it anew"
    )


def _of_checkpoint(ckpt: CheckpointView, last_run: str) -> str:
    name = f"checkpoint {ckpt.run}/{ckpt.step}"
    if ckpt.state == "ABORTING":
        return f"{name} is being aborted: {ckpt.reason}"
    failing = [f"rank {part.rank}: {part.error}" for part in ckpt.parts or () if part.error and part.state == "staged"]
    if failing:
        return f"{name} does not get through: {some(failing)}"
    absent = [f"rank {part.rank}" for part in ckpt.parts or () if part.state == "absent"]
    if absent and ckpt.run != last_run:
        return f"{name} waits for {some(absent)}, which will not come: its run is over; an uploader aborts it"
    return ""


def _of_failed(failed: Sequence[FailedSave]) -> str:
    """Of saves since the latest commit."""
    if not failed:
        return ""
    number = "1 save has" if len(failed) == 1 else f"{len(failed)} saves have"
    newest = failed[0]
    return f"{number} failed since the latest commit; the newest, step {newest.step} of run {newest.run}, {duration(newest.ago_s)} ago"


def named(who: WorkerView | DepartedView) -> str:
    """``rank 2 (host-2)``, or the name of one that has no seat."""
    return who.worker if who.rank is None else f"rank {who.rank} ({who.worker})"
