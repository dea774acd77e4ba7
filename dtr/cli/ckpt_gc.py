"""``dtr ckpt gc``, ``rm``, ``pin`` and ``unpin``: which checkpoints stay, and which go."""

from __future__ import annotations

from typing import Any, Final

import rich_click as click

from dtr import names
from dtr.checkpoint.keeping.retention import Policy
from dtr.cli.ckpt_options import open_sources, store_option, usage
from dtr.cli.options import reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.seconds import Seconds
from dtr.cli.table import Cell, Column, cell
from dtr.errors import InvalidInput
from dtr.views import lifecycle as view
from dtr.views import stored
from dtr.views.lifecycle import CollectionView, Fate, PinView, RemovalView
from dtr.views.words import count_of, duration

__all__ = ["gc", "pin", "rm", "unpin"]

_FATES: Final = (
    Column(title="run"),
    Column(title="step", right=True),
    Column(title="is"),
    Column(title="why", least=20),
)
_STYLES: Final = {"kept": "green", "deleted": "red", "damaged": "bold red", "would retire": "yellow", "would delete": "yellow"}
_SHOWN: Final = 20
_LONGEST_S: Final = 3_155_760_000.0


def _best(ctx: click.Context, _: click.Parameter, value: str | None) -> tuple[tuple[str, str, int], ...] | None:
    if value is None:
        return None
    try:
        return names.best_rules(value, "--keep-best")
    except InvalidInput as exc:
        raise click.BadParameter(exc.message, ctx) from exc


@click.command(short_help="Let go of what no rule keeps.")
@click.option("--dry-run", is_flag=True, help="Say what would happen, and why; change nothing.")
@click.option("--orphans", is_flag=True, help="Also delete objects that no manifest names.")
@click.option("--keep-last", type=click.IntRange(1), metavar="N", help="The newest N commits of the lineage.")
@click.option("--keep-every", type=click.IntRange(1), metavar="STEPS", help="The first commit of each so many steps.")
@click.option("--keep-best", callback=_best, metavar="METRIC:min|max:N", help="The best N by a metric; several with commas.")
@click.option("--keep-for", type=Seconds(0.001, _LONGEST_S), metavar="SECONDS", help="Those that are younger.")
@click.option("--grace", type=Seconds(0, _LONGEST_S), metavar="SECONDS", help="How long objects outlive their manifest.")
@store_option
@reading_options
def gc(
    url: str | None, job: str | None, as_json: bool, store: str | None, dry_run: bool, orphans: bool, keep_last: int | None,
    keep_every: int | None, keep_best: tuple[tuple[str, str, int], ...] | None, keep_for: float | None, grace: float | None,
) -> None:  # fmt: skip
    """Apply retention now. A commit stays if any rule keeps it; the newest, pinned ones, and what the newest run continues always stay.

    The rules are those that the newest run was started with; once a --keep option is given, the --keep options alone.
    """
    rules: dict[str, Any] = {}
    if any(rule is not None for rule in (keep_last, keep_every, keep_best, keep_for)):
        rules = {
            "keep_last": keep_last or 0, "keep_every": keep_every or 0, "keep_best": keep_best or (),
            "keep_for_ms": int((keep_for or 0) * 1000),
        }  # fmt: skip
    if grace is not None:
        rules["grace_ms"] = int(grace * 1000)
    with open_sources(target(url, job, store=store)) as sources:
        found = view.gc(sources, rules=rules, dry_run=dry_run, orphans=orphans)
    show(found, json=as_json, human=_human)


@click.command(short_help="Remove commits, after the readers' grace.")
@click.argument("name", nargs=-1, required=True, metavar="RUN/STEP...")
@click.option("--grace", type=Seconds(0, _LONGEST_S), metavar="SECONDS", help="How long the objects stay for readers under way.")
@store_option
@reading_options
def rm(url: str | None, job: str | None, as_json: bool, store: str | None, name: tuple[str, ...], grace: float | None) -> None:
    """Retire commits: nobody starts to read them any more, and their objects go when the readers' grace has passed.

    Refused for the newest commit, for pinned ones, and for what the newest run continues; then nothing is removed.
    """
    with open_sources(target(url, job, store=store)) as sources:
        found = view.remove(sources, _names(sources, name), grace_ms=None if grace is None else int(grace * 1000))
    show(found, json=as_json, human=_removed)


@click.command(short_help="Keep commits whatever the rules say.")
@click.argument("name", nargs=-1, required=True, metavar="RUN/STEP...|latest")
@click.option("--note", default="", metavar="TEXT", help="Why; one line, shown by `gc` and `log`.")
@store_option
@reading_options
def pin(url: str | None, job: str | None, as_json: bool, store: str | None, name: tuple[str, ...], note: str) -> None:
    """Keep commits, whatever the rules of retention say, until they are unpinned."""
    _pin(url, job, store, name, note=note, pinned=True, as_json=as_json)


@click.command(short_help="Let the rules decide about commits again.")
@click.argument("name", nargs=-1, required=True, metavar="RUN/STEP...|latest")
@store_option
@reading_options
def unpin(url: str | None, job: str | None, as_json: bool, store: str | None, name: tuple[str, ...]) -> None:
    """Let the rules of retention decide about commits again; no error if they were not pinned."""
    _pin(url, job, store, name, note="", pinned=False, as_json=as_json)


def _pin(url: str | None, job: str | None, store: str | None, name: tuple[str, ...], *, note: str, pinned: bool, as_json: bool) -> None:
    with open_sources(target(url, job, store=store)) as sources:
        found = view.pin(sources, _names(sources, name), note=note, pinned=pinned)
    show(found, json=as_json, human=_pinned)


def _names(sources: stored.Sources, words: tuple[str, ...]) -> list[tuple[str, int]]:
    """Each word as RUN/STEP or ``latest``; the two words RUN STEP are one name, as everywhere."""
    with usage():
        if len(words) == 2 and "/" not in words[0] and words[1].isdigit():
            return stored.targets(sources, words)
        return list(dict.fromkeys(name for word in words for name in stored.targets(sources, [word])))


# --- for people -------------------------------------------------------------------------------------------------------


def _human(screen: Screen, found: CollectionView) -> None:
    screen.line(f"job {found.job} · {found.store} · {rules_in_words(found.rules)}" + (" · dry run" if found.dry_run else ""), "bold")
    if found.checkpoints:
        screen.line()
        screen.table(_FATES, [_row(one) for one in found.checkpoints])
    if found.chunks:
        screen.line(f"{count_of(found.chunks, 'chunk')} that no checkpoint needs {'would go' if found.dry_run else 'went'}")
    if found.orphans is not None:
        screen.line()
        _orphans(screen, found)


def _orphans(screen: Screen, found: CollectionView) -> None:
    orphans = found.orphans or ()
    for act, words in (("deleted", "deleted"), ("waits", "to go later"), ("would be", "to be deleted")):
        some = [one for one in orphans if one.act == act]
        if some:
            waits = f", the last in {duration(max(one.left_s for one in some))}" if act == "waits" else ""
            screen.line(f"{count_of(len(some), 'orphan')} {words}{waits}:")
        for one in some[:_SHOWN]:
            screen.entry([Cell("  ")], f"{one.key}: {one.why}")
        if len(some) > _SHOWN:
            screen.line(f"  and {len(some) - _SHOWN} more; --json lists all")
    if not orphans:
        screen.line("no orphans")
    if found.aborted:
        words = "would get an abort record" if found.dry_run else "got an abort record"
        screen.line(f"{count_of(len(found.aborted), 'checkpoint')} off the lineage {words}: {', '.join(found.aborted[:_SHOWN])}")
    if found.uploads_discarded:
        screen.line(f"{count_of(found.uploads_discarded, 'interrupted upload')} discarded")


def _removed(screen: Screen, found: RemovalView) -> None:
    screen.table(_FATES, [_row(one) for one in found.checkpoints])


def _pinned(screen: Screen, found: PinView) -> None:
    note = f": {found.note}" if found.note else ""
    for one in found.checkpoints:
        taken = "was not pinned" if one in found.unpinned_before else "is not pinned any more"
        screen.line(f"{one} is pinned{note}" if found.pinned else f"{one} {taken}")


def _row(one: Fate) -> list[Cell]:
    left = f"; its objects go in {duration(one.left_s)}" if one.left_s else ""
    return [cell(one.run), cell(one.step), cell(one.act, _STYLES.get(one.act, "dim")), cell(one.why + left)]


def rules_in_words(rules: Policy) -> str:
    """``keeps the last 5, the first of each 1000 steps``."""
    said = [f"the last {rules.keep_last}"] if rules.keep_last else []
    said += [f"the first of each {rules.keep_every} steps"] if rules.keep_every else []
    said += [f"the {count} {'lowest' if mode == 'min' else 'highest'} by {metric}" for metric, mode, count in rules.keep_best]
    said += [f"those of {duration(rules.keep_for_ms / 1000)}"] if rules.keep_for_ms else []
    return f"keeps {', '.join(said)}" if said else "no rule: keeps all"
