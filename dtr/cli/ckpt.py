"""``dtr ckpt``: list, show and verify checkpoints; its other commands are in modules of their own, registered here."""

from __future__ import annotations

import sys
from typing import Final

import rich_click as click

from dtr.checkpoint.restoring.candidates import name_of
from dtr.cli.ckpt_diff import diff
from dtr.cli.ckpt_export import export, import_
from dtr.cli.ckpt_gc import gc, pin, rm, unpin
from dtr.cli.ckpt_log import log
from dtr.cli.ckpt_options import open_sources, store_option, usage
from dtr.cli.ckpt_plan import plan_command
from dtr.cli.ckpt_watch import watch
from dtr.cli.options import reading_options, target
from dtr.cli.screen import Screen, document, show
from dtr.cli.sentences import moment
from dtr.cli.table import LUXURY, Cell, Column, cell
from dtr.views import stored as view
from dtr.views import verification
from dtr.views.checkpoints import CheckpointView, PartView
from dtr.views.stored import CheckpointRow, CheckpointsView, OneView
from dtr.views.verification import Checked
from dtr.views.words import count_of, duration, size, some

__all__ = ["ckpt", "progress", "show_list"]

_DAMAGED: Final = 5
_STYLES: Final = {"COMMITTED": "green", "ABORTED": "red", "ABORTING": "red", "DAMAGED": "bold red", "ABANDONED": "dim", "RETIRED": "dim"}
_KINDS: Final = {
    "all": "replicated, fits any world size",
    "some": "replicated in part, the rest needs world size {0}",
}
_TELLING: Final = {"COMMITTED", "ABANDONED", "RETIRED"}  # their manifests say what the run continues
_ROWS: Final = (
    Column(title="run"),
    Column(title="step", right=True),
    Column(title="is"),
    Column(title=""),
    Column(title="size", right=True, spare=2),
    Column(title="parts", right=True, spare=4),
    Column(title="begun", spare=1),
    Column(title="reason", least=16, spare=3),
    Column(title="in", spare=LUXURY),
)
_PARTS: Final = (
    Column(title="rank", right=True),
    Column(title="is", least=12),
    Column(title="size", right=True, spare=1),
    Column(title="worker", least=8, keep="ends", spare=2),
    Column(title="host", least=10, keep="ends", spare=4),
    Column(title="checksum", spare=3),
    Column(title="object", spare=LUXURY),
)


@click.group(short_help="List, show, verify, compare, keep and remove checkpoints.")
def ckpt() -> None:
    """List, draw, show, verify, compare, export, keep and remove checkpoints.

    The store is the truth and Redis its index: with a store, all that only reads works while Redis is down.
    """


for _command in (log, plan_command, gc, rm, pin, unpin, watch, export, import_, diff):
    ckpt.add_command(_command)


@ckpt.command(short_help="The checkpoints of a job, the newest first.")
@click.option("--all", "everything", is_flag=True, help="Those that retention removed, too.")
@store_option
@reading_options
def ls(url: str | None, job: str | None, as_json: bool, store: str | None, everything: bool) -> None:
    """The checkpoints of a job, the newest first: those under way, committed, abandoned (off the lineage) and aborted, with the reason.

    Each is shown as Redis's index has it; of a commit it is checked that the store has its manifest, not what that says: see `verify`.
    """
    with open_sources(target(url, job, store=store)) as sources:
        found = view.read(sources, retired=everything)
    show(found, json=as_json, human=show_list)


@ckpt.command("show", short_help="One checkpoint and its parts.")
@click.argument("name", nargs=-1, metavar="[RUN STEP | RUN/STEP | STEP | latest]")
@store_option
@reading_options
def show_(url: str | None, job: str | None, as_json: bool, store: str | None, name: tuple[str, ...]) -> None:
    """One checkpoint (default: the latest commit) and its parts: where each is, how large, its checksum, and what it waits for."""
    with open_sources(target(url, job, store=store)) as sources:
        with usage():
            wanted = view.targets(sources, name)
        found = view.read_one(sources, *wanted[0])
    show(found, json=as_json, human=_human_one)


@ckpt.command(short_help="Read every byte and compare it with the manifest.")
@click.argument("name", nargs=-1, metavar="[RUN STEP | RUN/STEP | STEP | latest]")
@click.option("--all", "everything", is_flag=True, help="Every commit of the job.")
@store_option
@reading_options
@click.pass_context
def verify(
    ctx: click.Context, url: str | None, job: str | None, as_json: bool, store: str | None, name: tuple[str, ...], everything: bool
) -> None:
    """Read every object of a checkpoint (default: the latest commit), and check its size and checksum against the manifest.

    Exit 5 if anything is missing or damaged. Of a job that has used several stores, --all reads the commits in one of them, and says how
    many are in which other.
    """
    if everything and name:
        raise click.UsageError("give a checkpoint or --all, not both.", ctx)
    screen, results = Screen(), []
    with open_sources(target(url, job, store=store)) as sources:
        with usage():
            wanted, others = verification.commits(sources) if everything else (view.targets(sources, name), ())
        for result in verification.verify(sources, wanted, listed=everything):
            results.append(result)
            if not as_json:
                _tell(screen, result)
        if as_json:
            ok = all(one.ok for one in results)
            document({"job": sources.job, "store": sources.url, "ok": ok, "checkpoints": results, "elsewhere": others})
        elif others:
            screen.line(view.not_asked(others), "yellow")
    damaged = [name_of(one.run, one.step) for one in results if not one.ok]
    if damaged:
        print(f"dtr: {len(damaged)} of {count_of(len(results), 'checkpoint')} damaged: {some(damaged)}", file=sys.stderr)
        ctx.exit(_DAMAGED)


def show_list(screen: Screen, found: CheckpointsView) -> None:
    """The table of checkpoints."""
    screen.line(f"job {found.job} · {count_of(len(found.checkpoints), 'checkpoint')} · {found.store or 'store unknown'}", "bold")
    if found.elsewhere:
        screen.line(view.not_asked(found.elsewhere), "yellow")
    if found.checkpoints:
        screen.line()
        screen.table(_ROWS, [_row(one, found.store) for one in found.checkpoints])


def _row(one: CheckpointRow, asked: str) -> list[Cell]:
    return [
        cell(one.run),
        cell(one.step),
        cell(one.state.lower(), _STYLES.get(one.state, "yellow")),
        cell("latest" if one.latest else "pinned" if one.pinned else None, "green"),
        cell(None if one.size_bytes is None else size(one.size_bytes)),
        cell(f"{one.done}/{one.expected}"),
        cell(None if one.at_ms is None else moment(one.at_ms)),
        cell(one.reason),
        cell(one.store if one.store != asked else None),
    ]


def _human_one(screen: Screen, found: OneView) -> None:
    one = found.checkpoint
    latest = ", the latest commit" if one.latest else ""
    screen.fact("checkpoint", f"{name_of(one.run, one.step)} of job {found.job}{latest}")
    screen.fact("is", one.state.lower() + (f": {one.reason}" if one.reason else ""), _STYLES.get(one.state, "yellow"))
    kind = _KINDS.get(one.replicated, "sharded, world size {0}").format(one.world_size)
    amount = "" if one.size_bytes is None else f", {size(one.size_bytes)}"
    screen.fact("holds", f"{one.done} of {count_of(one.expected, 'part')}{amount}; {kind}")
    if one.at_ms is not None:
        screen.fact("begun", moment(one.at_ms))
    if found.parent or (one.in_store and one.state in _TELLING):
        screen.fact("continues", found.parent or "nothing")
    if one.metrics:
        screen.fact(
            "metrics", ", ".join(f"{name} {'not finite' if value is None else f'{value:.6g}'}" for name, value in one.metrics.items())
        )
    if one.pinned:
        screen.fact("pinned", "yes" if one.pinned == "-" else one.pinned, "green")
    screen.fact("store", (found.store or "unknown") + (", as Redis says; it was not asked" if found.store and one.in_store is None else ""))
    if found.parts:
        screen.line()
        screen.table(_PARTS, [_part(part) for part in found.parts])


def _part(part: PartView) -> list[Cell]:
    return [
        cell(part.rank),
        cell(part_word(part), "green" if part.state == "done" else "yellow"),
        cell(None if part.size_bytes is None else size(part.size_bytes)),
        cell(part.worker),
        cell(part.host),
        cell(part.checksum),
        cell(part.object),
    ]


def _tell(screen: Screen, result: Checked) -> None:
    rate = f", {size(int(result.size_bytes / result.seconds))}/s" if result.seconds else ""
    text = f"{count_of(result.parts, 'part')}, {size(result.size_bytes)} in {result.seconds:.2f} s{rate}" if result.ok else result.error
    word = cell("ok     ", "green") if result.ok else cell("damaged", "bold red")
    screen.entry([cell(name_of(result.run, result.step)), word], text)


def progress(one: CheckpointView) -> str:
    """How far an open checkpoint is, and what it waits for."""
    age = "" if one.age_s is None else f" for {duration(one.age_s)}"
    waits = [f"rank {part.rank} {part_word(part)}" for part in one.parts or () if part.state != "done"]
    why = f": {one.reason}" if one.reason else f": {some(waits)}" if waits else ""
    return f"{one.run}/{one.step} {one.state.lower()}{age}, {one.done} of {count_of(one.expected, 'part')} in the store{why}"


def part_word(part: PartView) -> str:
    """What a part is waiting for."""
    if part.state == "done":
        return "done"
    if part.state == "absent":
        return "not staged yet"
    if not part.uploader:
        return f"waits to be uploaded again: {part.error}" if part.error else "waits for an uploader"
    return f"uploading, {100 * part.progress_bytes // part.size_bytes} %" if part.size_bytes else "uploading"
