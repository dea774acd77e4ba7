"""``dtr rebuild``: fill Redis's index of runs and checkpoints from the store."""

from __future__ import annotations

import contextlib

import rich_click as click

from dtr.checkpoint.keeping.rebuild import rebuild as fill
from dtr.checkpoint.survey import survey
from dtr.cli.ckpt import show_list
from dtr.cli.options import reading_options, server_state, target
from dtr.cli.screen import show
from dtr.errors import ConfigError, NoCheckpoint
from dtr.membership import open_state
from dtr.store import open_store
from dtr.views import stored as view
from dtr.views.stored import Sources

__all__ = ["rebuild"]


@click.command(short_help="Fill an emptied Redis from the store.")
@click.option("--from", "--store", "store", metavar="URL", help="Where the checkpoints are; default: DTR_STORE, dtr.toml.")
@reading_options
def rebuild(url: str | None, job: str | None, as_json: bool, store: str | None) -> None:
    """Tell Redis every run, the lineage and every commit that the store holds of this job, and list them.

    For a Redis that was emptied, or is older than the store. What Redis has decided already is never changed, so it may run beside a live
    job, and twice.
    """
    where = target(url, job, store=store)
    place = where.settings.store
    if place is None:
        raise ConfigError("store is not set: give --from, or set DTR_STORE", setting="store")
    with server_state(where) as state:
        _check_holds_something(place, state.job)
        filled = []

        def recover(state_id: str) -> int:
            filled.append(fill(state, place, state_id=state_id))
            return filled[-1]

        open_state(state, recover=recover)
        if not filled:  # there was a state already
            fill(state, place)
        found = view.read(Sources.open(state, place))
    show(found, json=as_json, human=show_list)


def _check_holds_something(place: str, job: str) -> None:
    """Refuse a misspelt store or job before Redis is told that there is nothing."""
    base = open_store(place)
    with contextlib.closing(base):
        if not survey(base.child(job)).every_run:
            raise NoCheckpoint(f"{base.url} holds no run of job {job}: check the URL (--from) and the job (--job); nothing was changed")
