"""What a person sees: the story line by line, below it on a terminal what happens now, and in the end the numbers and the verdicts.

Guarantee: where there is no terminal (a file, a pipe, a CI log) there are plain lines only, not cut to any width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from worker_agent.demo.checks import Check

__all__ = ["Now", "Report", "conclude", "open_report"]

_MARGIN: Final = 9
_PLAIN_EVERY_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """What happens at the moment: ``ranks`` are (rank, what it does), ``saved`` and ``durable`` count saves."""

    step: int
    steps: int
    loss: float | None
    step_s: float | None
    ranks: Sequence[tuple[int, str]]
    saved: int
    durable: int


class Report(Protocol):
    """Where the demo says what happens."""

    def say(self, text: str, style: str = "") -> None:
        """A line of the story, with the time since the demo began."""

    def hint(self, text: str, style: str = "") -> None:
        """A line without a time."""

    def show(self, now: Now) -> None:
        """What happens at the moment."""

    def close(self) -> None:
        """End the display; lines may follow."""


def open_report(*, to_stderr: bool) -> Report:
    """The report that suits where it goes."""
    console = Console(stderr=to_stderr, markup=False, highlight=False, emoji=False)
    return LiveReport(console) if console.is_terminal and not console.is_dumb_terminal else PlainReport(console)


class _Lines:
    """Prints lines, broken between words on a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        elapsed = f"{time.monotonic() - self._began:5.1f} s  "
        self._print(Text(elapsed, "dim"), text, style)

    def hint(self, text: str, style: str = "") -> None:
        self._print(Text(" " * _MARGIN if text else ""), text, style)

    def _print(self, margin: Text, text: str, style: str) -> None:
        if not self.console.is_terminal:
            self.console.print(Text.assemble(margin, text), soft_wrap=True)
            return
        wrapped = Text(text, style).wrap(self.console, max(20, self.console.width - _MARGIN))
        for number, line in enumerate(wrapped or [Text()]):
            line.rstrip()
            self.console.print(Text.assemble(margin if number == 0 else " " * _MARGIN, line))


class PlainReport(_Lines):
    """Lines only; a line of progress every few seconds."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._shown_at, self._shown_step = time.monotonic(), -1

    def show(self, now: Now) -> None:
        if now.step > self._shown_step and time.monotonic() - self._shown_at >= _PLAIN_EVERY_S:
            self._shown_at, self._shown_step = time.monotonic(), now.step
            self.say(f"step {_progress(now)}")

    def close(self) -> None:
        """Nothing to end."""


class LiveReport(_Lines):
    """Lines, and below them a display of a few lines that is drawn again and again."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live: Live | None = None

    def show(self, now: Now) -> None:
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        self._live.update(_display(now, self.console.width))

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def _progress(now: Now) -> str:
    loss = "" if now.loss is None else f", loss {now.loss:.2f}"
    speed = "" if now.step_s is None else f", {now.step_s * 1000:.0f} ms a step"
    return f"{now.step + 1} of {now.steps}{loss}{speed}; {now.saved} saved, {now.durable} durable"


def _display(now: Now, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_row(
        " " * (_MARGIN - 1), ProgressBar(total=now.steps, completed=max(0, now.step + 1), width=max(10, min(width, 90) - _MARGIN - 1))
    )
    ranks = "   ".join(f"rank {rank}: {what}" for rank, what in now.ranks)
    lines = [Text(" " * _MARGIN + "step " + _progress(now)), Text(" " * _MARGIN + ranks, "dim")]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Group(Text(), grid, *lines)


def conclude(report: Report, rows: Sequence[tuple[str, str]], checks: Sequence[Check]) -> None:
    """Print the table of figures, then each verdict."""
    report.hint("")
    for label, text in rows:
        report.hint(f"{label:<16}{text}")
    report.hint("")
    for check in checks:
        report.hint(f"{'ok    ' if check.ok else 'FAILED'}  {check.what}: {check.detail}", "" if check.ok else "bold red")
    failed = sum(not check.ok for check in checks)
    report.hint("")
    report.hint(
        f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks hold", "bold red" if failed else "bold green"
    )
