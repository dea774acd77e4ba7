"""``dtr ckpt log``: the history of a job as a tree, like ``git log --graph``."""

from __future__ import annotations

from typing import Final

import rich_click as click
from rich.cells import cell_len, set_cell_size

from dtr.cli.ckpt_options import open_sources, store_option
from dtr.cli.options import reading_options, target
from dtr.cli.screen import Screen, show
from dtr.cli.sentences import moment
from dtr.cli.table import GAP, Cell, cell
from dtr.views import lineage as view
from dtr.views.lineage import LineageView, Node, RunView
from dtr.views.stored import CheckpointRow, not_asked
from dtr.views.words import count_of, size

__all__ = ["drawn", "log"]

_MARKS: Final = {"COMMITTED": "*", "ABANDONED": "~", "ABORTED": "x", "ABORTING": "x", "RETIRED": ".", "DAMAGED": "!", view.GONE: "?"}
_STYLES: Final = {"COMMITTED": "green", "ABORTED": "red", "ABORTING": "red", "DAMAGED": "bold red"}
_DIM: Final = {"ABANDONED", "RETIRED", view.GONE}  # their marks say it all
_UNDER_WAY: Final = "+"
_NARROW: Final = 24


@click.command(short_help="Draw runs, branches and checkpoints.")
@click.option("--all", "everything", is_flag=True, help="Every record, however old, and retired checkpoints one by one.")
@store_option
@reading_options
def log(url: str | None, job: str | None, as_json: bool, store: str | None, everything: bool) -> None:
    """Draw the history of a job: its runs (o), what each continues, and their checkpoints, the newest on top.

    The lineage, which a restore goes by, is the straight line on the left. What was left behind branches off to the right, above the
    checkpoint from which the job went on: * committed, ~ abandoned, x aborted, . retired, + under way, ! damaged.
    """
    with open_sources(target(url, job, store=store)) as sources:
        found = view.read(sources, most=None if everything else 500)
    show(found, json=as_json, human=lambda screen, one: _human(screen, one, fold=not everything))


def _human(screen: Screen, found: LineageView, *, fold: bool) -> None:
    latest = f"latest {found.latest}" if found.latest else "no commit yet"
    screen.line(f"job {found.job} · {count_of(len(found.runs), 'run')} · {latest} · {found.store or 'store unknown'}", "bold")
    if found.elsewhere:
        screen.line(not_asked(found.elsewhere), "yellow")
    for rows in view.paths(found, fold=fold):
        screen.line()
        for margin, text in drawn(rows, screen.width):
            screen.entry(margin, text)
    if found.older:
        screen.line(f"and {count_of(found.older, 'older record')} in the store; --all reads them", "dim")


def drawn(rows: list[Node], width: int | None) -> list[tuple[list[Cell], str]]:
    """The rows as cells of the margin and a text that fits beside them."""
    words = [_words(row) for row in rows]
    name_width = max((cell_len(one[1].text) for one in words if one is not None), default=0)
    found = []
    for row, said in zip(rows, words, strict=True):
        lines = "| " * row.depth
        if said is None:
            found.append(([Cell(f"{'| ' * (row.depth - 1)}|/")], ""))
            continue
        mark, name, state, text = said
        graph = Cell(f"{lines}{mark}".ljust(2 * (max(one.depth for one in rows) + 1) - 1))
        margin = [graph, Cell(name.text.ljust(name_width), name.style), Cell(state.text.ljust(9), state.style)]
        room = None if width is None else width - sum(cell_len(one.text) + GAP for one in margin)
        if room is not None and _NARROW <= room < cell_len(text):
            text = set_cell_size(text, room - 1) + "…"
        found.append((margin, text))
    return found


def _words(row: Node) -> tuple[str, Cell, Cell, str] | None:
    """Mark, name, state and text of a row; None for the end of a branch."""
    if row.run is not None:
        return "o", cell(row.run.run, "bold"), cell("run", "" if row.run.on_lineage else "dim"), _run(row.run)
    if row.checkpoint is None:
        return None
    one = row.checkpoint
    style = "dim" if one.state in _DIM else _STYLES.get(one.state, "yellow")
    name = cell(f"{one.run}/{one.step}", style if one.state != "COMMITTED" else "")
    return _MARKS.get(one.state, _UNDER_WAY), name, cell(one.state.lower(), style), _checkpoint(one, row.folded)


def _run(run: RunView) -> str:
    began = [] if run.began_at_ms is None else [moment(run.began_at_ms)]
    if not run.known:
        return "its record is gone, so what it continues is not known"
    words = [f"continues {run.parent}" if run.parent else "a fresh start", *([] if run.checkpoints else ["saved nothing"])]
    return ", ".join([*words, count_of(run.world_size, "rank"), *began])


def _checkpoint(one: CheckpointRow, folded: int) -> str:
    words = []
    if folded:
        words.append(f"and {folded} before it")
    if one.latest:
        words.append("latest")
    if one.pinned:
        words.append("pinned" if one.pinned == "-" else f"pinned: {one.pinned}")
    if one.size_bytes is not None and one.state in {"COMMITTED", "ABANDONED"}:
        words.append(size(one.size_bytes))
    if one.at_ms is not None and one.state != view.GONE:
        words.append(moment(one.at_ms))
    words += [f"{name} {'?' if value is None else f'{value:.4g}'}" for name, value in one.metrics.items()]
    if _under_way(one):
        words.append(f"{one.done} of {count_of(one.expected, 'part')}")
    if one.reason and one.state not in _DIM:
        words.append(one.reason)
    return ", ".join(words)


def _under_way(one: CheckpointRow) -> bool:
    return one.state not in _MARKS
