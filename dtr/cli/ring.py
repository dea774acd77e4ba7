"""``dtr ring``: how the ring is shared among the workers."""

from __future__ import annotations

from typing import Final

import rich_click as click

from dtr.cli.options import job_state, reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.table import Column, cell
from dtr.views import ring as view
from dtr.views.ring import RingView
from dtr.views.words import count_of

__all__ = ["ring"]

_SHARES: Final = (Column(title="worker", least=8, keep="ends"), Column(title="nodes", right=True), Column(title="share", right=True))
_POINTS: Final = (Column(title="point", right=True), Column(title="worker", least=8, keep="ends"), Column(title="node", right=True))


@click.command(short_help="How the ring is shared among the workers.")
@click.option("--points", is_flag=True, help="Every virtual node in the order of its point.")
@reading_options
def ring(url: str | None, job: str | None, as_json: bool, points: bool) -> None:
    """Each worker's share of the consistent-hash ring, and its virtual nodes.

    The ring says only whom a key prefers; shares differ by nature, and placement evens them out.
    """
    with job_state(target(url, job)) as state:
        found = view.read(state, points=points)
    show(found, json=as_json, human=_human)


def _human(screen: Screen, found: RingView) -> None:
    screen.line(f"job {found.job} · {count_of(len(found.workers), 'worker')} · {count_of(found.expected, 'virtual node')}", "bold")
    if found.workers:
        screen.line()
        screen.table(_SHARES, [[cell(one.worker), cell(one.virtual_nodes), cell(f"{100 * one.share:.2f} %")] for one in found.workers])
    if found.points:
        screen.line()
        screen.table(_POINTS, [[cell(one.point), cell(one.worker), cell(one.node)] for one in found.points])
    if found.stored != found.expected:
        screen.line(f"the key ring in Redis holds {found.stored} virtual nodes; agents do not read it", "yellow")
