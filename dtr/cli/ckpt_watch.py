"""``dtr ckpt watch``: a checkpoint on its way to the store, rank by rank."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Final

import rich_click as click

from dtr import names
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.saving.progress import PartProgress, SaveProgress
from dtr.cli.ckpt_options import usage
from dtr.cli.options import job_state, reading_options, target
from dtr.cli.screen import Screen, document
from dtr.cli.seconds import Seconds
from dtr.cli.table import LUXURY, Cell, Column, cell
from dtr.errors import InvalidInput
from dtr.state.job import JobState
from dtr.views import events
from dtr.views import watch as view
from dtr.views.events import Interruption
from dtr.views.words import count_of, duration, size, some

__all__ = ["below", "heading", "rows_of", "watch"]

_FAILED: Final = frozenset({"ABORTED", "ABANDONED"})
_COLUMNS: Final = (
    Column(title="rank", right=True),
    Column(title="in the store", spare=3),
    Column(title="%", right=True),
    Column(title="bytes", right=True, spare=2),
    Column(title="MB/s", right=True, spare=1),
    Column(title="left", right=True, spare=1),
    Column(title="is", least=12),
    Column(title="host", least=8, keep="ends", spare=LUXURY),
)
_STYLES: Final = {"done": "green", "uploading": "cyan", "staged": "yellow"}
_LOOK_S: Final = 0.5
_LINE_S: Final = 2.0
_ROOM_ABOUT: Final = 4  # lines of a screen that are not for ranks

_Show = Callable[[SaveProgress], None]


@click.command(short_help="A checkpoint on its way, rank by rank.")
@click.argument("name", nargs=-1, metavar="[RUN STEP | RUN/STEP | STEP]")
@click.option("--follow", "-f", is_flag=True, help="Go on with the next checkpoint, until Ctrl-C (exit 130).")
@click.option("--every", type=Seconds(0.1, 3600), metavar="S", help="Seconds between looks (default 0.5; 2 into a pipe).")
@reading_options
@click.pass_context
def watch(
    ctx: click.Context, url: str | None, job: str | None, as_json: bool, name: tuple[str, ...], follow: bool, every: float | None
) -> None:
    """Show how far a checkpoint is (default: the one under way, else the next), until it is decided: bytes of each rank, MB/s, time left.

    Exit 1 if it was aborted, or abandoned because the job went on from an earlier step. On a terminal bars are drawn in place; into a pipe
    it prints a line when something has changed, and --json one document a line.
    """
    screen = Screen()
    live = screen.terminal and not as_json
    every_s = every or (_LOOK_S if live or as_json else _LINE_S)
    failed = False
    with job_state(target(url, job)) as state:
        with usage():
            chosen = _chosen(state, name)
        for run, step in _to_watch(state, chosen, forever=follow):
            with _shown(screen, state.job, live=live, json=as_json) as show:
                last = _follow(state, run, step, every_s, show)
            failed = last is not None and last.state in _FAILED
            if failed and last is not None:
                print(f"dtr: checkpoint {name_of(run, step)} is {last.state.lower()}: {last.reason}", file=sys.stderr, flush=True)
    if failed:
        ctx.exit(1)


def _chosen(state: JobState, words: Sequence[str]) -> tuple[str, int] | None:
    if not words:
        return None
    pieces = words[0].split("/") if len(words) == 1 else list(words)
    if len(pieces) > 2 or not (pieces[-1].isascii() and pieces[-1].isdigit() and len(pieces[-1]) <= 20):
        raise InvalidInput(f"expected RUN STEP, RUN/STEP or STEP, got {' '.join(words)[:80]!r}", field="checkpoint")
    step = names.step(int(pieces[-1]))
    return view.of_step(state, step) if len(pieces) == 1 else (names.name(pieces[0], "run"), step)


def _to_watch(state: JobState, chosen: tuple[str, int] | None, *, forever: bool) -> Iterator[tuple[str, int]]:
    """The chosen checkpoint, or the one under way, or the next to begin; with ``forever`` all that follow as well."""
    after = events.newest(state)
    first = chosen or view.newest_open(state)
    if first is not None:
        yield first
        if not forever:
            return
    else:
        print(f"dtr: no checkpoint of job {state.job} is under way; waiting for the next", file=sys.stderr, flush=True)
    for news in view.begun(state, after):
        if isinstance(news, Interruption):
            _interrupted(news)
        elif news != first:
            yield news
            if not forever:
                return


def _follow(state: JobState, run: str, step: int, every_s: float, show: _Show) -> SaveProgress | None:
    last = None
    for news in view.follow(state, run, step, every_s=every_s):
        if isinstance(news, Interruption):
            _interrupted(news)
        else:
            show(news)
            last = news
    return last


def _interrupted(news: Interruption) -> None:
    print(f"dtr: {'Redis answers again' if news.back else news.reason}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _shown(screen: Screen, job: str, *, live: bool, json: bool) -> Iterator[_Show]:
    """How each look is shown: in place, as a line, or as a document; the latter two only when more than the time has changed."""
    seen: list[SaveProgress] = []

    def changed(now: SaveProgress) -> bool:
        timeless = replace(now, age_s=None)
        if seen and seen[0] == timeless:
            return False
        seen[:] = [timeless]
        return True

    if live:
        with screen.live() as draw:
            yield lambda now: draw(heading(now, job), _COLUMNS, *_table(now, screen.width or 80))
    elif json:
        yield lambda now: document({"job": job, **asdict(now)}, lines=True) if changed(now) else None
    else:
        yield lambda now: screen.line(line(now)) if changed(now) else None


def _table(now: SaveProgress, width: int) -> tuple[list[list[Cell]], str]:
    room = max(1, shutil.get_terminal_size((80, 24)).lines - _ROOM_ABOUT)
    shown = rows_of(now, room)
    bar_width = 8 if width < 70 else 16 if width < 110 else 24
    return [_row(part, bar_width) for part in shown], below(now, shown)


def rows_of(now: SaveProgress, room: int) -> list[PartProgress]:
    """The parts that a screen has room for, in order of rank: those that are furthest from done, if not all."""
    last = sorted(now.parts, key=lambda part: (part.state == "done", _share(part), part.rank))[:room]
    return sorted(last, key=lambda part: part.rank)


def below(now: SaveProgress, shown: Sequence[PartProgress]) -> str:
    """What is said of the ranks that are not shown."""
    left = [part for part in now.parts if part not in shown]
    counted = Counter(part.state for part in left)
    return f"and {count_of(len(left), 'rank')} more: {', '.join(f'{n} {word}' for word, n in counted.items())}" if left else ""


def heading(now: SaveProgress, job: str) -> str:
    """The line above the bars."""
    return f"job {job} · {line(now)}"


def line(now: SaveProgress) -> str:
    """A look in one line."""
    where, word = name_of(now.run, now.step), now.state.lower()
    if now.state == "COMMITTED":
        rate = f" ({now.total_bytes / 1e6 / now.age_s:.0f} MB/s)" if now.age_s else ""
        took = "" if now.age_s is None else f" in {duration(now.age_s)}{rate}"
        return f"{where} {word}: {count_of(now.expected, 'part')}, {size(now.total_bytes)}{took}"
    facts = [f"{where} {word}", f"{now.done_parts} of {count_of(now.expected, 'part')} in the store"]
    if now.total_bytes:
        facts.append(f"{size(now.done_bytes)} of {size(now.total_bytes)}, {100 * now.done_bytes // now.total_bytes} %")
    if now.mb_per_s is not None:
        facts.append(f"{now.mb_per_s:.0f} MB/s")
    if now.left_s is not None:
        facts.append(f"{duration(now.left_s)} left")
    waits = [f"rank {part.rank} {word_of(part)}" for part in now.parts if part.state in {"absent", "staged"}]
    why = now.reason or some(waits)
    return " · ".join(facts) + (f": {why}" if why else "")


def word_of(part: PartProgress) -> str:
    """What a part is doing, or waiting for."""
    if part.state == "absent":
        return "not staged yet"
    if part.state == "staged":
        return f"waits to be uploaded again: {part.error}" if part.error else "waits for an uploader"
    return part.state


def _row(part: PartProgress, bar_width: int) -> list[Cell]:
    total, share = part.total_bytes, _share(part)
    filled = int(share * bar_width)
    return [
        cell(part.rank),
        cell("█" * filled + "░" * (bar_width - filled), _STYLES.get(part.state, "dim")),
        cell(None if total is None else f"{int(100 * share)}"),
        cell(None if total is None else f"{size(part.done_bytes)} of {size(total)}"),
        cell(None if part.mb_per_s is None else f"{part.mb_per_s:.0f}"),
        cell(duration(part.left_s) if part.left_s else None),
        cell(word_of(part), _STYLES.get(part.state, "")),
        cell(part.host),
    ]


def _share(part: PartProgress) -> float:
    if part.state == "done":
        return 1.0
    return part.done_bytes / part.total_bytes if part.total_bytes else 0.0
