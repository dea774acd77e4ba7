"""Saves of a job that came to nothing, the newest first: what ``failed_saves`` keeps of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dtr.runs import run_number
from dtr.state.job import JobState
from dtr.views.checkpoints import CheckpointView
from dtr.views.reading import Fields, reading

__all__ = ["FailedSave", "read"]

_MOST: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedSave:
    """One of them. ``state``: ABORTED or ABANDONED, of the whole checkpoint; or CONFLICT or FAILED, of one rank's save alone.

    ``since_latest``: no commit of a later state has come, so that it is not made good. An abort may be on record after such a commit.
    """

    run: str
    step: int
    state: str
    reason: str
    rank: int | None
    worker: str
    at_ms: int
    ago_s: float
    since_latest: bool


def read(state: JobState, latest: CheckpointView | None, *, now_ms: int) -> tuple[FailedSave, ...]:
    """The newest, up to 16; ``latest`` is the newest commit.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    key = state.keys.failed_saves
    with reading(state):
        entries = state.redis.xrevrange(key, count=_MOST)
    good_ms = latest.decided_at_ms or 0 if latest is not None else 0
    found = []
    for entry_id, values in entries:
        fields, at_ms = Fields(f"{key} {entry_id}", values), int(entry_id.partition("-")[0])
        run, step = fields.text("run"), fields.integer("step")
        found.append(
            FailedSave(
                run=run,
                step=step,
                state=fields.text("state"),
                reason=fields.text("reason"),
                rank=fields.number("rank"),
                worker=fields.text("worker"),
                at_ms=at_ms,
                ago_s=max(0, now_ms - at_ms) / 1000,
                since_latest=at_ms >= good_ms and not (latest is not None and _is_later(latest, run, step)),
            )
        )
    return tuple(found)


def _is_later(latest: CheckpointView, run: str, step: int) -> bool:
    """Whether the newest commit is of a later state than a save: of a later run, or of a later step of the same."""
    return (run_number(latest.run), latest.step) > (run_number(run), step)
