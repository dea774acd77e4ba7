"""``dtr ckpt diff``: what differs between two checkpoints."""

from __future__ import annotations

import contextlib
import re
from typing import Final

import rich_click as click

from dtr.checkpoint.keeping.diff import TensorDiff
from dtr.cli.ckpt_options import open_sources, store_option, usage
from dtr.cli.options import reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.table import Cell, Column, cell
from dtr.views import difference as view
from dtr.views.difference import DiffView
from dtr.views.stored import Sources
from dtr.views.words import count_of, size

__all__ = ["diff"]

_TENSORS: Final = (
    Column(title="tensor", least=16, keep="ends"),
    Column(title="rank", right=True, spare=1),
    Column(title="changed", right=True),
    Column(title="max abs", right=True),
    Column(title="max rel", right=True),
    Column(title="of", right=True, spare=2),
    Column(title="", spare=3),
)
_SHOWN: Final = 200
_NAME: Final = re.compile(r"latest|(?:[^/]+/)?\d+")


@click.command(short_help="Which tensors of two checkpoints differ, and by how much.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--exit-code", is_flag=True, help="Exit 1 if anything differs.")
@store_option
@reading_options
@click.pass_context
def diff(ctx: click.Context, url: str | None, job: str | None, as_json: bool, store: str | None, a: str, b: str, exit_code: bool) -> None:
    """Compare two checkpoints tensor by tensor, and every other value. A and B are RUN/STEP, latest, or folders that `export` wrote.

    Bits are compared first; where they differ, the numbers are: the largest absolute and relative difference, and how many elements.
    """
    for word in (a, b):
        if not view.is_folder(word) and _NAME.fullmatch(word) is None:
            raise click.UsageError(f"expected RUN/STEP, STEP, latest or a folder that `export` wrote; there is no folder {word!r}.", ctx)
    with contextlib.ExitStack() as stack:
        opened: list[Sources] = []

        def sources() -> Sources:
            if not opened:
                opened.append(stack.enter_context(open_sources(target(url, job, store=store))))
            return opened[0]

        with usage():
            found = view.read(a, b, sources)
    show(found, json=as_json, human=_human)
    if exit_code and not found.identical:
        ctx.exit(1)


def _human(screen: Screen, found: DiffView) -> None:
    screen.line(
        " · ".join(f"{word} {side.name} ({count_of(side.world_size, 'rank')})" for word, side in (("a", found.a), ("b", found.b))), "bold"
    )
    rate = f" at {size(int(found.compared_bytes / found.seconds))}/s" if found.seconds else ""
    screen.line(f"{count_of(found.same, 'tensor')} the same, {len(found.tensors)} not; {size(found.compared_bytes)} compared{rate}")
    measured = [one for one in found.tensors if one.what == "differs"]
    if measured:
        screen.line()
        screen.table(_TENSORS, [_row(one) for one in sorted(measured, key=lambda one: -one.measured.max_rel)[:_SHOWN]])
    if len(measured) > _SHOWN:
        screen.line(f"and {len(measured) - _SHOWN} more; --json lists all")
    others = [one for one in found.tensors if one.what != "differs"]
    if others:
        screen.line()
    for one in others[:_SHOWN]:
        text = {"only in a": one.a, "only in b": one.b}.get(one.what, f"{one.a} in a, {one.b} in b")
        screen.entry([cell(_place(one.path, one.rank)), Cell(one.what, "yellow")], text)
    if found.values:
        screen.line()
    for value in found.values[:_SHOWN]:
        screen.entry([cell(_place(value.path, value.rank))], f"{value.a or 'absent'} in a, {value.b or 'absent'} in b")


def _place(path: str, rank: int | None) -> str:
    return path if rank is None else f"{path} of rank {rank}"


def _row(one: TensorDiff) -> list[Cell]:
    found = one.measured
    odd = f"{count_of(found.odd, 'element')} NaN or infinite" if found.odd else ""
    return [
        cell(one.path), cell(one.rank), cell(f"{100 * found.changed / max(1, found.elements):.3g} %"), cell(f"{found.max_abs:.3g}"),
        cell(f"{found.max_rel:.3g}"), cell(found.elements), cell(odd, "red"),
    ]  # fmt: skip
