"""What a person sees: the story line by line, below it on a terminal what happens now, and in the end the numbers and the verdicts.

Guarantee: where there is no terminal (a file, a pipe, a CI log) there are plain lines only, not cut to any width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from worker_agent.demo.checks import Check

__all__ = ["LiveReport", "Now", "PlainReport", "Report", "conclude", "open_report"]

_TIME_WIDTH: Final = 9
_LABEL_WIDTH: Final = 16
_VERDICT_WIDTH: Final = 8
_PLAIN_EVERY_S: Final = 5.0
_LONGEST_BAR: Final = 80
_NARROWEST: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """What happens at the moment: ``doing`` is what each trainer does, by its number; ``saved`` and ``durable`` count saves,
    the last of which stopped training for ``stall_s``; ``consumed`` of the ``samples`` of ``epoch`` were trained on.
    """

    step: int
    steps: int
    loss: float | None
    step_s: float | None
    doing: Mapping[str, str]
    saved: int
    durable: int
    stall_s: float | None
    epoch: int
    consumed: int
    samples: int


class Report(Protocol):
    """Where the demo says what happens."""

    def say(self, text: str, style: str = "") -> None:
        """A line of the story, with the time since the demo began."""

    def hint(self, text: str = "", style: str = "") -> None:
        """A line without a time."""

    def fact(self, label: str, text: str) -> None:
        """A line with a label in its left margin."""

    def verdict(self, word: str, text: str, style: str = "") -> None:
        """A line with a word in its left margin."""

    def show(self, now: Now) -> None:
        """What happens at the moment."""

    def close(self) -> None:
        """End the display; lines may follow."""


def open_report(*, to_stderr: bool) -> Report:
    """The report that suits where it goes."""
    console = Console(stderr=to_stderr, markup=False, highlight=False, emoji=False)
    return LiveReport(console) if console.is_terminal and not console.is_dumb_terminal else PlainReport(console)


class _Lines:
    """Prints lines; on a terminal broken between words, the rest below the beginning of the text."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        self._print(Text(f"{time.monotonic() - self._began:5.1f} s".ljust(_TIME_WIDTH), "dim"), Text(text, style))

    def hint(self, text: str = "", style: str = "") -> None:
        self._print(Text(), Text(text, style))

    def fact(self, label: str, text: str) -> None:
        self._print(Text(label.ljust(_LABEL_WIDTH), "bold"), Text(text))

    def verdict(self, word: str, text: str, style: str = "") -> None:
        self._print(Text(word.ljust(_VERDICT_WIDTH), style or "green"), Text(text, style))

    def _print(self, margin: Text, text: Text) -> None:
        if not self.console.is_terminal:
            self.console.print(Text.assemble(margin, text), soft_wrap=True)
            return
        indent = len(margin)
        for number, line in enumerate(text.wrap(self.console, max(_NARROWEST, self.console.width) - indent) or [Text()]):
            line.rstrip()
            self.console.print(Text.assemble(margin if number == 0 else " " * indent, line))


class PlainReport(_Lines):
    """Lines only; a line of progress every few seconds."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._shown_at, self._shown_step = time.monotonic(), -1

    def show(self, now: Now) -> None:
        if now.step > self._shown_step and time.monotonic() - self._shown_at >= _PLAIN_EVERY_S:
            self._shown_at, self._shown_step = time.monotonic(), now.step
            self.say(f"{_progress(now)}; {_data(now)}")

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
        self._live.update(_display(now, self.console))

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def _progress(now: Now) -> str:
    loss = "" if now.loss is None else f", loss {now.loss:.2f}"
    speed = "" if now.step_s is None else f", {now.step_s * 1000:.0f} ms each"
    return f"step {now.step + 1} of {now.steps}{speed}{loss}"


def _data(now: Now) -> str:
    return f"epoch {now.epoch}, {100 * now.consumed // now.samples} % of {now.samples:,} samples"


def _saves(now: Now) -> str:
    stall = "" if now.stall_s is None else f", stall {now.stall_s * 1000:.0f} ms"
    return f"{now.saved} saved, {now.durable} durable{stall}"


def _trainers(now: Now) -> str:
    together: dict[str, list[str]] = {}
    for number, what in now.doing.items():
        together.setdefault(what, []).append(number)
    return "trainers " + "; ".join(f"{', '.join(numbers)} {what}" for what, numbers in together.items())


def _display(now: Now, console: Console) -> RenderableType:
    width = console.width
    length = min(width, _LONGEST_BAR)
    done = length * (now.step + 1) // now.steps
    full, empty = "#-" if console.options.ascii_only else "\N{BOX DRAWINGS HEAVY HORIZONTAL}\N{BOX DRAWINGS LIGHT HORIZONTAL}"
    lines = [Text(f"{_progress(now)}; {_saves(now)}"), Text(_data(now)), Text(_trainers(now), "dim")]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Group(Text(), Text.assemble((full * done, "green"), (empty * (length - done), "dim")), *lines)


def conclude(report: Report, rows: Sequence[tuple[str, str]], checks: Sequence[Check]) -> None:
    """Print the table of figures, then each verdict."""
    report.hint()
    for label, text in rows:
        report.fact(label, text)
    report.hint()
    for check in checks:
        report.verdict("ok" if check.ok else "FAILED", f"{check.what}: {check.detail}", "" if check.ok else "bold red")
    failed = sum(not check.ok for check in checks)
    report.hint()
    report.hint(
        f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks hold", "bold red" if failed else "bold green"
    )
