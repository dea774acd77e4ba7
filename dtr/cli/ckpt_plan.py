"""``dtr ckpt plan``: what a restore would take, from where, and why not the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import rich_click as click

from dtr import names
from dtr.checkpoint.restoring.candidates import Wish, name_of
from dtr.checkpoint.restoring.plan import Plan, Planned, plan, world_size_of
from dtr.checkpoint.restoring.restore import Reader
from dtr.cli.ckpt_options import open_sources, store_option, usage
from dtr.cli.options import reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.table import Cell, cell
from dtr.errors import ConfigError
from dtr.views.words import count_of, size

__all__ = ["plan_command"]

_NOTHING: Final = 1
_WORD_WIDTH: Final = 12
_WORDS: Final = {"behind": "next in line"}
_STYLES: Final = {"taken": "green", "rejected": "red", "undecided": "yellow"}
_PLACES: Final = {"slot": "memory", "cache": "cache", "store": "store"}


@click.command("plan", short_help="What a restore would take, and from where.")
@click.option("--step", type=click.IntRange(0), metavar="STEP", help="Only a checkpoint of this step, as restore(step=...).")
@click.option("--rank", type=click.IntRange(0), metavar="RANK", help="As this rank alone would read; default: all ranks together.")
@click.option("--world-size", type=click.IntRange(1, 100_000), metavar="N", help="Ranks that restore; default: as many as saved.")
@store_option
@reading_options
@click.pass_context
def plan_command(
    ctx: click.Context, url: str | None, job: str | None, as_json: bool, store: str | None, step: int | None, rank: int | None,
    world_size: int | None,
) -> None:  # fmt: skip
    """Show which checkpoint a restore would take now, where its parts are (memory, cache or store), and why not the others.

    No part is read. Slots and cache are those of this host. Exit 1 if nothing can be restored.
    """
    where = target(url, job, store=store)
    with open_sources(where) as sources, usage():
        if sources.store is None:
            raise ConfigError("store is not known: give --store, or set DTR_STORE", setting="store")
        settings = replace(where.settings, job=sources.job)
        reader = Reader(store=sources.store, url=sources.url, settings=settings, wish=Wish(rank=0, world_size=1, step=step))
        ranks = world_size or world_size_of(reader, sources.state)
        wish = replace(reader.wish, rank=names.rank(rank or 0, ranks), world_size=ranks)
        found = plan(replace(reader, wish=wish), sources.state, every_rank=rank is None)
    show(found, json=as_json, human=_human)
    if not found.choice:
        ctx.exit(_NOTHING)


def _human(screen: Screen, found: Plan) -> None:
    who = count_of(found.world_size, "rank") if found.rank is None else f"rank {found.rank} of {found.world_size}"
    screen.line(f"job {found.job} · {who}", "bold")
    screen.fact("store", found.store)
    taken = next((one for one in found.checkpoints if one.verdict == "taken"), None)
    if taken is not None:
        screen.fact("restores", f"{found.choice} from {_places(taken)}", "green")
    else:
        screen.fact("restores", f"nothing: {found.reason}", "red")
    if found.checkpoints:
        screen.line()
    width = max((len(name_of(one.run, one.step)) for one in found.checkpoints), default=0)
    for one in found.checkpoints:
        word = Cell(_WORDS.get(one.verdict, one.verdict).ljust(_WORD_WIDTH), _STYLES.get(one.verdict, ""))
        screen.entry([cell(name_of(one.run, one.step).ljust(width)), word], _about(one))


def _places(one: Planned) -> str:
    several = sum(one.where.values()) > 1
    return ", ".join(f"{_PLACES[where]} ({count_of(count, 'part')})" if several else _PLACES[where] for where, count in one.where.items())


def _about(one: Planned) -> str:
    """What there is to say of one checkpoint besides its name and verdict."""
    amount = "" if one.size_bytes is None else size(one.size_bytes)
    counted = f"tried {count_of(one.begun, 'time')} since it was last restored" if one.begun and one.verdict != "rejected" else ""
    return "; ".join(text for text in (one.reason or amount, counted) if text)
