"""``dtr events``: what happened, and with ``--follow`` what happens."""

from __future__ import annotations

import sys
from dataclasses import asdict

import rich_click as click

from dtr.cli.options import job_state, reading_options, target
from dtr.cli.screen import Screen, document, show
from dtr.cli.sentences import moment, sentence, style
from dtr.cli.table import Column, cell
from dtr.views import events as view
from dtr.views.events import Event, EventsView, Interruption

__all__ = ["events", "show_events"]

_COLUMNS = (Column(title="time"), Column(title="event"), Column(title="what"))


@click.command(short_help="What happened, and what happens now.")
@click.option("--count", "-n", type=click.IntRange(0, 10_000), default=20, show_default=True, help="How many of the newest.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens, until Ctrl-C (exit 130); outlives a restart of Redis.")
@reading_options
def events(url: str | None, job: str | None, as_json: bool, count: int, follow: bool) -> None:
    """The events of a job: members, runs, barriers that failed, checkpoints, recovery. Not beats, arrivals or leases.

    Times are this machine's local time. With --follow, --json prints one document a line.
    """
    with job_state(target(url, job)) as state:
        found = view.read(state, count=count)
        if not follow:
            show(found, json=as_json, human=_human)
            return
        screen = Screen()
        if not as_json:
            screen.line(f"job {found.job}", "bold")
        for event in found.events:
            _tell(event, screen, json=as_json)
        newest = found.events[-1].id if found.events else view.newest(state)
        for news in view.follow(state, newest):
            _tell(news, screen, json=as_json)


def _tell(news: Event | Interruption, screen: Screen, *, json: bool) -> None:
    if isinstance(news, Interruption):
        print(f"dtr: {'Redis answers again' if news.back else news.reason}", file=sys.stderr, flush=True)
    elif json:
        document(asdict(news), lines=True)
    else:
        show_events(screen, [news])


def _human(screen: Screen, found: EventsView) -> None:
    screen.line(f"job {found.job}", "bold")
    show_events(screen, found.events)


def show_events(screen: Screen, found: tuple[Event, ...] | list[Event]) -> None:
    """One line an event, wrapped below its own text."""
    for event in found:
        screen.entry([cell(moment(event.at_ms), "dim"), cell(f"{event.event:<14}", style(event))], sentence(event))
