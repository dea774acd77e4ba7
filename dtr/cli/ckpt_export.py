"""``dtr ckpt export`` and ``import``: checkpoints as folders that need no dtr."""

from __future__ import annotations

import time
from pathlib import Path

import rich_click as click

from dtr.cli.ckpt_options import open_sources, store_option, usage
from dtr.cli.options import reading_options, target
from dtr.cli.screen import Screen, show
from dtr.views import transfer as view
from dtr.views.transfer import TransferView
from dtr.views.words import count_of, size

__all__ = ["export", "import_"]

_FOLDER = click.Path(path_type=Path)


@click.command(short_help="Write a checkpoint into a folder that needs no dtr.")
@click.argument("name", metavar="RUN/STEP|latest")
@click.argument("folder", type=_FOLDER, metavar="DIR")
@store_option
@reading_options
def export(url: str | None, job: str | None, as_json: bool, store: str | None, name: str, folder: Path) -> None:
    """Write a checkpoint into DIR, which must be new or empty: one safetensors file for each rank, and JSON beside them.

    Every byte is verified on the way. DIR appears when all of it is on disk, or not at all.
    """
    with open_sources(target(url, job, store=store)) as sources:
        with usage():
            wanted = view.target(sources, name)
        found = view.export(sources, *wanted, folder)
    show(found, json=as_json, human=_exported)


@click.command("import", short_help="Make an exported folder a job's first checkpoint.")
@click.argument("folder", type=_FOLDER, metavar="DIR")
@store_option
@reading_options
def import_(url: str | None, job: str | None, as_json: bool, store: str | None, folder: Path) -> None:
    """Make a folder that `export` wrote the first checkpoint of --job, which must have none: the next training of that job restores it.

    Every byte is compared with what was exported, before the first one is put into the store.
    """
    where = target(url, job, store=store)
    found = view.take_in(where.settings, folder, wall_ms=int(time.time() * 1000))
    show(found, json=as_json, human=_imported)


def _exported(screen: Screen, found: TransferView) -> None:
    screen.line(f"{found.checkpoint} of job {found.job} is in {found.folder}: {_amount(found)}")


def _imported(screen: Screen, found: TransferView) -> None:
    screen.line(f"{found.folder} is {found.checkpoint} of job {found.job} in {found.store}: {_amount(found)}")
    if found.note:
        screen.line(found.note, "yellow")


def _amount(found: TransferView) -> str:
    rate = f", {size(int(found.size_bytes / found.seconds))}/s" if found.seconds else ""
    return f"{count_of(found.files, 'file')}, {size(found.size_bytes)} in {found.seconds:.2f} s{rate}"
