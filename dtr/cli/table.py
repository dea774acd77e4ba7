"""Tables that fit the screen: what is most important stays longest, and where no table fits, each row becomes a few lines. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich.cells import cell_len, set_cell_size

__all__ = ["GAP", "LUXURY", "Cell", "Column", "cell", "cut", "fit"]

GAP: Final = 2
LUXURY: Final = 9  # the ``spare`` of a column that goes before any other is cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """How a column behaves where the screen is narrow.

    Args:
        title: its heading.
        right: numbers are aligned on the right.
        least: it may be cut down to this many characters; None: never cut.
        keep: which side of a text survives the cut; ``ends`` suits names that differ at both ends.
        spare: 0 always stays; the highest goes first, and one of LUXURY before any text is cut.
    """

    title: str
    right: bool = False
    least: int | None = None
    keep: Literal["start", "ends"] = "start"
    spare: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    """A text without control characters, and its style."""

    text: str
    style: str = ""


def cell(value: object, style: str = "") -> Cell:
    """The cell that shows ``value``; nothing for None. What cannot be printed (a terminal's control codes) shows as ``?``."""
    text = "" if value is None else str(value)
    return Cell(text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text), style)


def fit(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int | None) -> list[int] | None:
    """How wide each column is, 0 for one that is left out; None if not even the columns that always stay have room.

    Columns without any content are left out as well, if they are spare.
    """
    natural = [max([cell_len(column.title), *(cell_len(row[i].text) for row in rows)]) for i, column in enumerate(columns)]
    shown = [i for i, column in enumerate(columns) if not column.spare or any(row[i].text for row in rows)]
    while True:
        spare = max(shown, key=lambda i: columns[i].spare)
        found = _shrunk({i: natural[i] for i in shown}, columns, width, may_cut=columns[spare].spare < LUXURY)
        if found is not None:
            return [found.get(i, 0) for i in range(len(columns))]
        if not columns[spare].spare:
            return None
        shown.remove(spare)


def _shrunk(widths: dict[int, int], columns: Sequence[Column], width: int | None, *, may_cut: bool) -> dict[int, int] | None:
    """The widths, if they may be cut the widest cut first, so that they fit; None if they cannot."""
    room = sum(widths.values()) if width is None else width - GAP * (len(widths) - 1)
    excess = sum(widths.values()) - room
    while excess > 0:
        soft = {i: size - least for i, size in widths.items() if (least := columns[i].least) is not None and size > least}
        if not soft or not may_cut:
            return None
        widest = max(soft, key=lambda i: (columns[i].keep == "start", widths[i]))  # names stay whole for longest
        widths[widest] -= 1
        excess -= 1
    return widths


def cut(text: str, width: int, column: Column) -> str:
    """The text in exactly ``width`` characters: padded, or cut with an ellipsis."""
    if cell_len(text) <= width:
        padding = " " * (width - cell_len(text))
        return padding + text if column.right else text + padding
    if column.keep == "start" or width < 5:
        return set_cell_size(text, width - 1) + "…"
    tail = (width - 1) // 2
    return set_cell_size(text, width - 1 - tail) + "…" + set_cell_size(text[-tail:], tail)
