"""``dtr data which | replay | skip``: the time machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import rich_click as click

from dtr.cli.data_options import data_sources, store_option, which_step
from dtr.cli.options import reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.table import Cell, Column, cell
from dtr.views import data_history as view
from dtr.views.data_history import BatchView, FileRange, ReplayView, RowsView, SkipView, WhichView
from dtr.views.words import count_of

__all__ = ["replay", "skip", "which"]

_FILES_SHOWN: Final = 12
_ROWS_SHOWN: Final = 5
_LONGEST_VALUE: Final = 60


@click.command(short_help="Which files and samples a step consumed.")
@which_step
@click.option("--all", "everything", is_flag=True, help="Every range, however many.")
@store_option
@reading_options
def which(
    url: str | None, job: str | None, as_json: bool, store: str | None, everything: bool, step: int, rank: int | None, run: str | None
) -> None:
    """Name the files and samples that a step consumed, of each rank or of one.

    FILE:5-9 are four samples of FILE, counted from 0. The newest steps are in Redis, all up to the newest commit in the store.
    """
    with data_sources(target(url, job, store=store)) as sources:
        found = view.which(sources, step, rank=rank, run=run)
    show(found, json=as_json, human=lambda screen, one: _which(screen, one, None if everything else _FILES_SHOWN))


@click.command(short_help="The batch of a step again.")
@which_step
@click.option("--column", "columns", multiple=True, metavar="NAME", help="Only this column; may be given several times.")
@click.option("--rows", "most", type=click.IntRange(min=0), metavar="N", help=f"So many samples; default: {_ROWS_SHOWN}, with --json all.")
@click.option("--out", "file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.npz", help="Write a new file of arrays.")
@store_option
@reading_options
def replay(
    url: str | None, job: str | None, as_json: bool, store: str | None, file: Path | None, most: int | None, columns: tuple[str, ...],
    step: int, rank: int | None, run: str | None,
) -> None:  # fmt: skip
    """Read the batch of a step again, sample by sample in its order, from the files of its data set.

    A file that changed since is refused by name. --out FILE.npz keeps the arrays, as DATASET.RANK.BATCH.COLUMN, for numpy.load.
    """
    rows = most if most is not None else None if as_json else _ROWS_SHOWN
    with data_sources(target(url, job, store=store)) as sources:
        found = view.replay(sources, step, rank=rank, run=run, columns=columns or None, most=rows, file=file)
    show(found, json=as_json, human=_replay)


@click.command(short_help="Leave samples out from now on.")
@click.argument("words", nargs=-1, required=True, metavar="[NAME] FILE:START-STOP")
@click.option("--reason", required=True, metavar="TEXT", help="Why, for those who wonder later.")
@store_option
@reading_options
def skip(url: str | None, job: str | None, as_json: bool, store: str | None, words: tuple[str, ...], reason: str) -> None:
    """Leave samples of a data set out from now on, for good: FILE:5-9 are four samples, counted from 0 in FILE, as `which` names them.

    NAME is the data set's, and may be left out if one data set alone has the file.

    Loaders learn of it within a second or so; what they have read ahead by then goes out. The batch of deterministic mode that has them is
    smaller, and its sequence stays. It is on record in Redis and in the store at once, and in the next checkpoint; `dtr data show` lists
    it. Repeating it changes nothing.
    """
    if len(words) > 2:
        raise click.UsageError(f"expected [NAME] FILE:START-STOP, got {len(words)} words: {' '.join(words)}")
    with data_sources(target(url, job, store=store)) as sources:
        found = view.skip(sources, words[0] if len(words) > 1 else None, words[-1], reason)
    show(found, json=as_json, human=_skip)


# --- for people -----------------------------------------------------------------------------------------------------


def _heading(screen: Screen, found: WhichView | ReplayView) -> None:
    where = "Redis" if found.source == "redis" else "the store"
    left = "" if found.on_lineage else " · the job did not go on from it"
    screen.line(f"job {found.job} · step {found.step} of run {found.run} · from {where}{left}", "bold")


def _title(one: BatchView) -> str:
    empty = "" if one.samples else ", which was empty"
    return f"rank {one.rank} · {one.dataset} · epoch {one.epoch}, batch {one.number} · {count_of(one.samples, 'sample')}{empty}"


def _which(screen: Screen, found: WhichView, most: int | None) -> None:
    _heading(screen, found)
    for one in found.batches:
        screen.line()
        screen.line(_title(one))
        for label, files in (("", one.files), ("padded", one.padded), ("skipped", one.skipped)):
            _files(screen, label, files, most)


def _files(screen: Screen, label: str, files: Sequence[FileRange], most: int | None) -> None:
    for file in files[:most]:
        screen.line(f"{label} {file}".strip(), "yellow" if label == "skipped" else "", indent=2)
    beyond = len(files) - len(files[:most])
    if beyond:
        screen.line(f"and {count_of(beyond, 'more range')}; --all shows them", "dim", indent=2)


def _replay(screen: Screen, found: ReplayView) -> None:
    _heading(screen, found)
    for one in found.batches:
        screen.line()
        screen.line(_title(one.batch))
        _rows(screen, one)
    if found.file:
        screen.line()
        screen.line(f"{found.file} has the arrays")


def _rows(screen: Screen, one: RowsView) -> None:
    columns = [Column(title=f"{name} {one.dtypes[name]}", least=8, spare=number) for number, name in enumerate(one.dtypes)]
    if one.rows:
        screen.table(columns, [[_value(row[name]) for name in one.dtypes] for row in one.rows])
    beyond = one.batch.samples - len(one.rows)
    if beyond > 0:
        screen.line(f"and {count_of(beyond, 'more sample')}; --rows shows more", "dim")


def _value(value: Any) -> Cell:
    text = str(value)
    return cell(text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…")


def _skip(screen: Screen, found: SkipView) -> None:
    what = f"{found.file}:{found.start}-{found.stop} of {found.dataset}, {count_of(found.samples, 'sample')}"
    if found.new:
        screen.line(f"left out from now on: {what}: {found.reason}")
    else:
        screen.line(f"was left out before: {what}", "dim")
    if not found.in_store:
        screen.line(f"until the next checkpoint only Redis has it on record: {found.note}", "yellow")
