"""``dtr workers``: who is there, and who has gone and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import rich_click as click

from dtr.cli.options import job_state, reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.table import LUXURY, Cell, Column, cell
from dtr.views import workers as view
from dtr.views.words import count_of, duration
from dtr.views.workers import DepartedView, WorkersView, WorkerView

__all__ = ["show_departed", "show_members", "workers"]

STYLES: Final = {"alive": "green", "late": "yellow", "stalled": "red", "overdue": "red"}
_MEMBERS: Final = (
    Column(title="rank", right=True),
    Column(title="worker", least=8, keep="ends"),
    Column(title="is"),
    Column(title="step", right=True),
    Column(title="loss", right=True, spare=LUXURY),
    Column(title="phase", least=8, spare=2),
    Column(title="beat", right=True, spare=1),
    Column(title="due in", right=True, spare=5),
    Column(title="pid", right=True, spare=4),
    Column(title="host", least=10, keep="ends", spare=3),
    Column(title="late", right=True, spare=LUXURY),
    Column(title="address", least=12, spare=LUXURY),
)
_DEPARTED: Final = (
    Column(title="rank", right=True),
    Column(title="worker", least=8, keep="ends"),
    Column(title="ago", right=True),
    Column(title="reason", least=12),
    Column(title="back", spare=1),
)


@click.command(short_help="Who is there, and who has gone and why.")
@reading_options
def workers(url: str | None, job: str | None, as_json: bool) -> None:
    """The members of a job: rank, step, phase, the age of the last beat, and the deadline for the next; then the departed.

    A member is alive; late: half of its time is over without a beat; stalled: its launcher beats, the trainer does not move; overdue: its
    deadline has passed, the next beat of anyone records its death.
    """
    with job_state(target(url, job)) as state:
        found = view.read(state)
    show(found, json=as_json, human=_human)


def _human(screen: Screen, found: WorkersView) -> None:
    run = f"run {found.run}" if found.run else f"no run is open, the last was {found.last_run or '-'}"
    screen.line(f"job {found.job} · {run} · generation {found.generation} · {count_of(len(found.workers), 'member')}", "bold")
    if found.workers:
        screen.line()
        show_members(screen, found.workers)
    if found.departed:
        screen.line()
        screen.line("departed", "bold")
        show_departed(screen, found.departed)


def show_members(screen: Screen, members: Sequence[WorkerView]) -> None:
    """The table of members."""
    screen.table(_MEMBERS, [_member(member) for member in members])


def show_departed(screen: Screen, departed: Sequence[DepartedView]) -> None:
    """The table of the departed."""
    screen.table(_DEPARTED, [_departed(gone) for gone in departed])


def _member(member: WorkerView) -> list[Cell]:
    return [
        cell("new" if member.rank is None else member.rank),
        cell(member.worker),
        cell(member.condition, STYLES[member.condition]),
        cell(member.step),
        cell(None if member.loss is None else f"{member.loss:.4g}"),
        cell(member.phase),
        cell(None if member.beat_age_s is None else duration(member.beat_age_s)),
        cell(f"-{duration(-member.deadline_s)}" if member.deadline_s < 0 else duration(member.deadline_s)),
        cell(member.pid),
        cell(member.host),
        cell(f"{member.late_ms} ms" if member.late_ms else None),
        cell(member.address),
    ]


def _departed(gone: DepartedView) -> list[Cell]:
    return [
        cell("-" if gone.rank is None else gone.rank),
        cell(gone.worker),
        cell(duration(gone.ago_s)),
        cell(gone.reason),
        cell("yes" if gone.returned else None, "green"),
    ]
