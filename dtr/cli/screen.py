"""Where results go: JSON for programs, or lines and tables for people, on any width, with or without colour."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import orjson
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from dtr.cli.table import GAP, Cell, Column, cell, cut, fit

__all__ = ["Screen", "document", "show"]

_LABEL_WIDTH: Final = 11
_ROOM_BESIDE: Final = 24
_NARROW: Final = 60  # below this, a word that has no room beside the margin goes below it
_LONGEST_LINE: Final = 1_000_000
_SEPARATORS: Final = "/:,;=-_."

T = TypeVar("T")


def document(value: Any, *, lines: bool = False) -> None:
    """Print a view as JSON: one indented document, or with ``lines`` one line; never NaN, never half a document."""
    options = orjson.OPT_APPEND_NEWLINE | (0 if lines else orjson.OPT_INDENT_2)
    rest = memoryview(orjson.dumps(value, option=options))
    sys.stdout.flush()
    while rest:  # unbuffered (PYTHONUNBUFFERED), a pipe that is closed midway takes a part and raises only at the next write
        rest = rest[sys.stdout.buffer.write(rest) :]
    sys.stdout.buffer.flush()


def show(value: T, *, json: bool, human: Callable[[Screen, T], None]) -> None:
    """Print a view, the way that was asked for."""
    if json:
        document(value)
    else:
        human(Screen(), value)


class Screen:
    """Standard output for a person. A pipe or a file has no width: nothing is cut or wrapped there, unless COLUMNS says otherwise."""

    def __init__(self, console: Console | None = None, width: int | None = None) -> None:
        self.width = width or shutil.get_terminal_size((0, 0)).columns or None
        # Data are no markup, and a name with a number in it is no number.
        self._console = console or Console(width=self.width or 10_000, markup=False, highlight=False, emoji=False)

    @property
    def terminal(self) -> bool:
        """Whether a person looks at it now."""
        return self._console.is_terminal

    def line(self, text: str = "", style: str = "", *, indent: int = 0) -> None:
        """A line, wrapped between words; ``indent`` stands before every line."""
        self._print(Text(cell(text).text, style), indent)

    def fact(self, label: str, text: str, style: str = "", *, label_style: str = "bold") -> None:
        """A text with its label in the left margin."""
        self.entry([Cell(label.ljust(_LABEL_WIDTH), label_style)], text, style)

    def entry(self, margin: Sequence[Cell], text: str, style: str = "") -> None:
        """A text beside its margin, wrapped there; below the margin on a narrow screen."""
        left = Text(" " * GAP).join(Text(one.text, one.style) for one in margin) + Text(" " * GAP)
        body = cell(text).text
        if self.width is None:
            self._print(left + Text(body, style), 0)
        elif max(_ROOM_BESIDE, _longest_word(body, min(self.width, _NARROW))) > self.width - left.cell_len:
            left.rstrip()
            if left:
                self._print(left, 0)
            self._print(Text(body, style), 1)
        else:
            for number, part in enumerate(self._broken(Text(body, style), self.width - left.cell_len)):
                self._print((left if number == 0 else Text(" " * left.cell_len)) + part, 0)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
        """A table, or where it does not fit, one paragraph a row."""
        for line, indent in self._lines(columns, rows):
            self._print(line, indent)

    @contextlib.contextmanager
    def live(self) -> Iterator[Callable[[str, Sequence[Column], Sequence[Sequence[Cell]], str], None]]:
        """A heading, a table and a line below that are replaced in place by every call of what this gives; the last ones stay."""
        # Redrawn by whoever calls, not by a thread: what is shown changes at a look, and at no other time.
        with Live(console=self._console, auto_refresh=False) as live:

            def draw(heading: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], below: str) -> None:
                shown: list[RenderableType] = [Text(cell(heading).text, "bold")]
                shown += [part for line, indent in self._lines(columns, rows) for part in self._wrapped(line, indent)]
                if below:
                    shown.append(Text(cell(below).text, "dim"))
                live.update(Group(*shown), refresh=True)

            yield draw

    def _lines(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> list[tuple[Text, int]]:
        """The lines of a table, each with its indent."""
        widths = fit(columns, rows, self.width)
        if widths is None:
            return [line for row in rows for line in _record(columns, row)]
        kept = [i for i, width in enumerate(widths) if width]
        header = [Cell(columns[i].title, "bold") for i in kept]
        shown = [header, *([row[i] for i in kept] for row in rows)]
        return [(_row(cells, [columns[i] for i in kept], [widths[i] for i in kept]), 0) for cells in shown]

    def _print(self, text: Text, indent: int) -> None:
        for line in self._wrapped(text, indent):
            self._console.print(line, soft_wrap=True)

    def _wrapped(self, text: Text, indent: int) -> list[Text]:
        """The lines of a text, between words where they have room, else behind a character that separates parts of a name."""
        margin = Text(" " * indent)
        if self.width is None:
            return [margin + text]
        return [margin + line for line in self._broken(text, self.width - indent)]

    def _broken(self, text: Text, room: int) -> list[Text]:
        room = max(1, room)
        if _longest_word(text.plain, _LONGEST_LINE) > room:
            text = Text(_parted(text.plain, room), text.style, spans=text.spans)
        lines = text.wrap(self._console, room)
        for line in lines:
            line.rstrip()
        return list(lines)


def _longest_word(text: str, limit: int) -> int:
    """The cells of the longest word that a line of ``limit`` can hold."""
    return max((size for word in text.split() if (size := cell_len(word)) <= limit), default=0)


def _parted(text: str, room: int) -> str:
    """The text with a line's end in each word that is longer than a line: behind ``/`` or the like, if there is one in its last half."""
    shown = []
    for word in text.split(" "):
        rest = word
        while cell_len(rest) > room:
            cut_at = max((rest.rfind(mark, room // 2, room) for mark in _SEPARATORS), default=-1) + 1 or room
            shown.append(rest[:cut_at] + "\n")
            rest = rest[cut_at:]
        shown.append(rest + " ")
    return "".join(shown).rstrip(" ")


def _row(cells: Sequence[Cell], columns: Sequence[Column], widths: Sequence[int]) -> Text:
    parts = [(cut(one.text, width, column), one.style) for one, column, width in zip(cells, columns, widths, strict=True)]
    line = Text(" " * GAP).join(Text(text, style) for text, style in parts)
    line.rstrip()
    return line


def _record(columns: Sequence[Column], row: Sequence[Cell]) -> list[tuple[Text, int]]:
    shown = [(column.title, one) for column, one in zip(columns, row, strict=True) if one.text]
    return [
        (Text.assemble((f"{title} ", "bold" if number == 0 else "dim"), (one.text, one.style)), 0 if number == 0 else 1)
        for number, (title, one) in enumerate(shown)
    ]
