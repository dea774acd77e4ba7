"""``dtr data``: the data sets of a job; its other commands are in modules of their own, registered here."""

from __future__ import annotations

from typing import Final

import rich_click as click

from dtr.cli.data_history import replay, skip, which
from dtr.cli.data_progress import progress, show_one
from dtr.cli.data_release import release
from dtr.cli.options import job_state, reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.sentences import moment
from dtr.cli.table import LUXURY, Column, cell
from dtr.views import datasets as view
from dtr.views.datasets import DatasetsView
from dtr.views.words import count_of

__all__ = ["data"]

_COLUMNS: Final = (
    Column(title="data set", least=8, keep="ends"),
    Column(title="version", right=True),
    Column(title="format", spare=LUXURY),
    Column(title="samples", right=True),
    Column(title="shards", right=True, spare=1),
    Column(title="files", right=True, spare=LUXURY),
    Column(title="registered", spare=3),
    Column(title="path", least=12, keep="ends", spare=2),
)


@click.group(short_help="List data sets, and ask what a step consumed.")
def data() -> None:
    """The data sets of a job: what they are, how far training has come with them, and what each step consumed.

    The newest steps are in Redis, all up to the newest commit in the store, whether or not Redis is there.
    """


for _command in (show_one, progress, which, replay, skip, release):
    data.add_command(_command)


@data.command(short_help="The current version of each data set.")
@reading_options
def ls(url: str | None, job: str | None, as_json: bool) -> None:
    """The current version of each data set that is registered for the job."""
    with job_state(target(url, job)) as state:
        found = view.read(state)
    show(found, json=as_json, human=_human)


def _human(screen: Screen, found: DatasetsView) -> None:
    screen.line(f"job {found.job} · {count_of(len(found.datasets), 'data set')}", "bold")
    if not found.datasets:
        return
    screen.line()
    screen.table(
        _COLUMNS,
        [
            [
                cell(one.name),
                cell(one.version),
                cell(one.format),
                cell(one.total_samples),
                cell(one.shards),
                cell(one.files),
                cell(moment(one.registered_at_ms)),
                cell(one.path),
            ]
            for one in found.datasets
        ],
    )
