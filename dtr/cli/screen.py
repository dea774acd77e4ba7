"""Where results go: JSON for programs, or lines and tables for people, on any width, with or without colour."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import orjson
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from dtr.cli.table import GAP, Cell, Column, cell, cut, fit

__all__ = ["Screen", "document", "show"]

_LABEL_WIDTH: Final = 11
_ROOM_BESIDE: Final = 24

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
        body = Text(cell(text).text, style)
        if self.width is None:
            self._print(left + body, 0)
        elif self.width - left.cell_len < _ROOM_BESIDE:
            left.rstrip()
            if left:
                self._print(left, 0)
            self._print(body, 1)
        else:
            for number, part in enumerate(body.wrap(self._console, self.width - left.cell_len)):
                part.rstrip()
                self._print((left if number == 0 else Text(" " * left.cell_len)) + part, 0)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
        """A table, or where it does not fit, one paragraph a row."""
        widths = fit(columns, rows, self.width)
        if widths is None:
            self._records(columns, rows)
            return
        kept = [i for i, width in enumerate(widths) if width]
        self._row([Cell(columns[i].title, "bold") for i in kept], [columns[i] for i in kept], [widths[i] for i in kept])
        for row in rows:
            self._row([row[i] for i in kept], [columns[i] for i in kept], [widths[i] for i in kept])

    def _row(self, cells: Sequence[Cell], columns: Sequence[Column], widths: Sequence[int]) -> None:
        parts = [(cut(one.text, width, column), one.style) for one, column, width in zip(cells, columns, widths, strict=True)]
        line = Text(" " * GAP).join(Text(text, style) for text, style in parts)
        line.rstrip()
        self._print(line, 0)

    def _records(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
        for row in rows:
            shown = [(column.title, one) for column, one in zip(columns, row, strict=True) if one.text]
            for number, (title, one) in enumerate(shown):
                self._print(Text.assemble((f"{title} ", "bold" if number == 0 else "dim"), (one.text, one.style)), 0 if number == 0 else 1)

    def _print(self, text: Text, indent: int) -> None:
        shown = Padding(text, (0, 0, 0, indent), expand=False) if indent else text
        self._console.print(shown, soft_wrap=self.width is None)
