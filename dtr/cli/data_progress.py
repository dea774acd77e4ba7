"""``dtr data show | progress``: one data set, and how far the run has come."""

from __future__ import annotations

from typing import Final

import rich_click as click

from dtr.cli.data_options import data_sources, store_option
from dtr.cli.options import reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.sentences import moment
from dtr.cli.table import LUXURY, Column, cell
from dtr.views import data_progress as progress_view
from dtr.views import data_show as show_view
from dtr.views.data_progress import EpochView, ProgressView, ShardView
from dtr.views.data_show import CommittedView, NoteView, ShowView
from dtr.views.words import count_of, duration, size, some

__all__ = ["progress", "show_one"]

_STYLES: Final = {"done": "green", "quarantined": "red", "free": "dim", "leased": ""}
_WORKERS: Final = (
    Column(title="rank", right=True),
    Column(title="worker", least=8, keep="ends"),
    Column(title="step", right=True),
    Column(title="samples", right=True),
    Column(title="samples/s", right=True, spare=1),
    Column(title="leases", right=True, spare=2),
    Column(title="", spare=3),
    Column(title="host", least=8, keep="ends", spare=LUXURY),
)
_SHARDS: Final = (
    Column(title="shard", right=True),
    Column(title="is"),
    Column(title="consumed", right=True),
    Column(title="of", right=True),
    Column(title="skipped", right=True, spare=1),
    Column(title="samples", least=12, keep="ends"),
    Column(title="worker", least=8, keep="ends", spare=2),
)


@click.command("show", short_help="One data set, and what of it is left out.")
@click.argument("name")
@store_option
@reading_options
def show_one(url: str | None, job: str | None, as_json: bool, store: str | None, name: str) -> None:
    """A data set: its files, shards that cannot be read and why, samples that were skipped and why, and the newest commit's position."""
    with data_sources(target(url, job, store=store)) as sources:
        found = show_view.read(sources, name)
    show(found, json=as_json, human=_show)


@click.command(short_help="How far the epoch is, and when it ends.")
@click.argument("name", required=False)
@click.option("--shards", is_flag=True, help="Also each shard that is not done.")
@click.option("--all", "everything", is_flag=True, help="With --shards: those that are done as well.")
@store_option
@reading_options
def progress(url: str | None, job: str | None, as_json: bool, store: str | None, name: str | None, shards: bool, everything: bool) -> None:
    """How far the run has come in the epoch of each data set, or of NAME: by worker, with speeds and the time left, and by shard."""
    with data_sources(target(url, job, store=store)) as sources:
        found = progress_view.read(sources, name)
    show(found, json=as_json, human=lambda screen, one: _progress(screen, one, shards=shards or everything, everything=everything))


# --- for people -----------------------------------------------------------------------------------------------------


def _show(screen: Screen, found: ShowView) -> None:
    screen.line(f"job {found.job} · data set {found.name} · version {found.version}", "bold")
    if not found.registered:
        screen.line("Redis does not know it: this is what the store tells; registering it again makes it known", "yellow")
    screen.line()
    screen.fact("samples", f"{found.total_samples:,} in {count_of(found.shards, 'shard')} of {found.shard_size:,}")
    screen.fact("files", f"{count_of(found.files, 'file')} of {found.format}, {size(found.size_bytes)}, in {found.path}")
    screen.fact("order", f"shuffled by seed {found.seed}" if found.shuffle else "as the files are")
    screen.fact("registered", f"{moment(found.registered_at_ms)}, digest {found.digest[:12]}")
    _committed(screen, found.committed, found.version)
    for one in found.quarantined:
        what = f"shard {one.shard}, {one.file}:{one.start}-{one.stop}, {count_of(one.samples, 'sample')}: {one.error}"
        screen.fact("quarantine", what, "red", label_style="bold red")
    for skipped in found.skipped:
        what = f"{skipped.file}:{skipped.start}-{skipped.stop}, {count_of(skipped.samples, 'sample')}: {skipped.reason}"
        stale = "" if skipped.applies else " (the file has changed since: nothing of it is left out)"
        screen.fact("skipped", f"{what}, since {moment(skipped.at_ms)}{stale}", "yellow" if skipped.applies else "dim")


def _committed(screen: Screen, found: CommittedView | None, version: int) -> None:
    if found is None:
        return
    where = f"{found.run}/{found.step}: epoch {found.epoch}, {found.consumed:,} samples consumed, {found.mode} mode"
    screen.fact("committed", where if found.version == version else f"{where}, of version {found.version}")
    for note in found.notes:
        screen.fact("", _note(note), "dim")


def _note(note: NoteView) -> str:
    return f"epoch {note.epoch}: {count_of(note.samples, 'sample')} {note.kind}: {some([str(file) for file in note.files])}"


def _progress(screen: Screen, found: ProgressView, *, shards: bool, everything: bool) -> None:
    state = "" if found.running else ", which has ended"
    screen.line(f"job {found.job} · " + (f"run {found.run}{state}" if found.run else "no run yet"), "bold")
    if found.run and not found.datasets:
        screen.line("it has not begun to load any data set")
    for one in found.datasets:
        screen.line()
        _epoch(screen, one)
        if shards:
            _shards(screen, [shard for shard in one.shards if everything or shard.state != "done"])


def _epoch(screen: Screen, one: EpochView) -> None:
    percent = 100 * (one.consumed + one.left_out) // one.samples if one.samples else 100
    words = [f"{one.dataset} · epoch {one.epoch}", f"{one.consumed:,} of {one.samples:,} samples, {percent} %"]
    if one.left_out:
        words.append(f"{one.left_out:,} left out")
    if one.samples_per_s:
        words.append(f"{one.samples_per_s:,.0f}/s")
    if one.eta_s is not None:
        words.append("over" if not one.eta_s else f"{duration(one.eta_s)} left")
    screen.line(" · ".join(words))
    if one.shards:
        counts = {state: sum(shard.state == state for shard in one.shards) for state in ("done", "leased", "free", "quarantined")}
        screen.line(f"{count_of(len(one.shards), 'shard')}: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
    screen.line()
    screen.table(
        _WORKERS,
        [
            [
                cell(worker.rank), cell(worker.worker), cell(worker.step), cell(f"{worker.samples:,}"),
                cell("" if worker.samples_per_s is None else f"{worker.samples_per_s:,.0f}"),
                cell(worker.leased if one.mode == "dynamic" else ""), cell("dry" if worker.dry else ""), cell(worker.host),
            ]
            for worker in one.workers
        ],
    )  # fmt: skip


def _shards(screen: Screen, shards: list[ShardView]) -> None:
    if not shards:
        return
    screen.line()
    screen.table(
        _SHARDS,
        [
            [
                cell(one.shard), cell(one.state, _STYLES[one.state]), cell(one.consumed), cell(one.stop - one.start),
                cell(one.skipped or ""), cell(f"{one.file}:{one.start}-{one.stop}"), cell(one.worker),
            ]
            for one in shards
        ],
    )  # fmt: skip
