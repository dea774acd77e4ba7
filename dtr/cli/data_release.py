"""``dtr data release``: shards out of quarantine."""

from __future__ import annotations

import rich_click as click

from dtr.cli.options import job_state, reading_options, target
from dtr.cli.screen import Screen, show
from dtr.views import data_show as view
from dtr.views.data_show import ReleaseView
from dtr.views.words import count_of

__all__ = ["release"]


@click.command(short_help="Have quarantined shards read again.")
@click.argument("name")
@click.argument("shards", nargs=-1, type=click.IntRange(min=0), metavar="[SHARD]...")
@reading_options
def release(url: str | None, job: str | None, as_json: bool, name: str, shards: tuple[int, ...]) -> None:
    """Let shards of a data set out of quarantine, by their numbers in `dtr data show`; all of them if none is named.

    Do it once their files are as they were again. From the next epoch on, or the next run if that comes first, they are leased and read
    like any other; one that still cannot be read goes back. Repeating it changes nothing.
    """
    with job_state(target(url, job)) as state:
        found = view.release(state, name, shards)
    show(found, json=as_json, human=_human)


def _human(screen: Screen, found: ReleaseView) -> None:
    for one in found.released:
        what = f"shard {one.shard}, {one.file}:{one.start}-{one.stop}, {count_of(one.samples, 'sample')}"
        screen.line(f"read again from the next epoch or run on: {what}; it was left out for: {one.error}")
    if found.not_there:
        screen.line(f"not in quarantine: {', '.join(map(str, found.not_there))}", "dim")
    if not found.released and not found.not_there:
        screen.line(f"no shard of {found.dataset} is in quarantine", "dim")
