"""``dtr barriers``: barrier rounds, and who is missing."""

from __future__ import annotations

from typing import Final

import rich_click as click

from dtr.cli.options import job_state, reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.table import Cell, Column, cell
from dtr.views import rounds as view
from dtr.views.rounds import RoundsView, RoundView
from dtr.views.words import count_of, duration, some

__all__ = ["barriers", "missing"]

_STYLES: Final = {"OPEN": "yellow", "RELEASED": "green", "BROKEN": "red", "TIMEDOUT": "red"}
_COLUMNS: Final = (
    Column(title="barrier", least=8),
    Column(title="round", right=True),
    Column(title="is"),
    Column(title="arrived", right=True),
    Column(title="age", right=True, spare=1),
    Column(title="missing", least=16),
    Column(title="run", spare=2),
    Column(title="reason", least=16, spare=3),
)


@click.command(short_help="Barrier rounds, and who is missing.")
@click.option("--all", "everything", is_flag=True, help="Released rounds, too (kept for a minute).")
@reading_options
def barriers(url: str | None, job: str | None, as_json: bool, everything: bool) -> None:
    """Open barrier rounds and those that failed within the hour, with the names of those who are or were missing.

    Rounds are found by SCAN, so this looks at every key of the server, a thousand at a time.
    """
    with job_state(target(url, job)) as state:
        found = view.read(state, released=everything)
    show(found, json=as_json, human=_human)


def _human(screen: Screen, found: RoundsView) -> None:
    screen.line(f"job {found.job} · run {found.run or 'none is open'} · {count_of(len(found.rounds), 'round')}", "bold")
    if found.rounds:
        screen.line()
        screen.table(_COLUMNS, [_row(one) for one in found.rounds])


def _row(one: RoundView) -> list[Cell]:
    return [
        cell(one.name),
        cell(one.seq),
        cell(one.state.lower(), _STYLES.get(one.state, "")),
        cell(f"{one.arrived}/{one.expected}"),
        cell(None if one.age_s is None else duration(one.age_s)),
        cell(missing(one)),
        cell(one.run),
        cell(one.reason),
    ]


def missing(one: RoundView) -> str:
    """Who has not arrived: ``2 (host-2), 3 (host-3) and 4 more``."""
    return some([seat.worker if seat.rank is None else f"{seat.rank} ({seat.worker})" for seat in one.missing], 8)
