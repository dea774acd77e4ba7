"""``dtr status``: is the job well, and if not, why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import rich_click as click

from dtr.cli.barriers import missing
from dtr.cli.ckpt import progress
from dtr.cli.events import show_events
from dtr.cli.options import reading_options, server_state, target
from dtr.cli.screen import Screen, show
from dtr.cli.table import Column, cell
from dtr.cli.workers import show_departed, show_members
from dtr.views import status as view
from dtr.views.failures import FailedSave
from dtr.views.jobs import JobSummary
from dtr.views.server import ServerView
from dtr.views.status import JobView, PageView
from dtr.views.uploaders import UploaderView
from dtr.views.words import count_of, duration, size, some

__all__ = ["status"]

_VERDICTS: Final = {
    "running": "bold green",
    "finished": "bold green",
    "over": "bold",
    "forming": "bold yellow",
    "recovering": "bold yellow",
}
_JOBS: Final = (
    Column(title="job", least=12, keep="ends"),
    Column(title="alive", right=True),
    Column(title="overdue", right=True, spare=2),
    Column(title="run", spare=1),
    Column(title="latest", spare=3),
    Column(title="opened", right=True, spare=2),
    Column(title="what is wrong", least=16, spare=1),
)
_MOST_MEMBERS: Final = 16
_MOST_DEPARTED: Final = 5
_MOST_WARNINGS: Final = 10
_MOST_ROUNDS: Final = 8
_MOST_HOSTS: Final = 6
_MOST_FAILED: Final = 3


@click.command(short_help="Is the job well, and if not, why.")
@click.option("--events", "event_count", type=click.IntRange(0, 1000), default=6, show_default=True, help="How many of the newest events.")
@reading_options
def status(url: str | None, job: str | None, as_json: bool, event_count: int) -> None:
    """One page about a job: the server, the verdict, members, who ended the last run and why, barriers, checkpoints, uploaders, events.

    Without --job (or DTR_JOB, or dtr.toml) it shows the only job that is alive, or lists the jobs of the server.
    """
    where = target(url, job)
    with server_state(where) as state:
        found = view.read_page(state, asked=where.job_chosen, event_count=event_count)
    show(found, json=as_json, human=_human)


def _human(screen: Screen, page: PageView) -> None:
    _server(screen, page.server)
    if page.job is None:
        _jobs(screen, page.jobs)
        return
    screen.fact("job", f"{page.job.job} ({page.chosen})")
    others = [_other(one) for one in page.jobs if one.job != page.job.job]
    if others:
        screen.fact("other jobs", some(others))
    screen.line()
    _verdict(screen, page.job)
    if page.job.phase:
        _members(screen, page.job)
        _facts(screen, page.job)


def _server(screen: Screen, seen: ServerView) -> None:
    limit = f" of {size(seen.maxmemory_bytes)}" if seen.maxmemory_bytes else ""
    facts = [
        seen.url,
        f"{seen.engine.capitalize()} {seen.version or ''}".strip(),
        None if seen.uptime_s is None else f"up {duration(seen.uptime_s)}",
        f"ping {seen.ping_ms:.1f} ms",
        None if seen.used_memory_bytes is None else f"{size(seen.used_memory_bytes)}{limit}",
    ]
    screen.fact("redis", " · ".join(fact for fact in facts if fact))
    for warning in seen.warnings:
        screen.fact("", f"! {warning}", "yellow")


def _jobs(screen: Screen, listed: Sequence[JobSummary]) -> None:
    screen.line()
    screen.table(
        _JOBS,
        [
            [
                cell(one.job),
                cell("damaged", "bold red") if one.damage else cell(one.alive, "green" if one.alive else "dim"),
                cell(one.overdue or None, "red"),
                cell(one.run),
                cell(one.latest),
                cell(f"{duration(one.opened_ago_s)} ago"),
                cell(one.damage),
            ]
            for one in listed
        ],
    )
    screen.line()
    screen.line("No job was chosen, and it is not clear which is meant: `dtr status --job JOB` shows one.")


def _other(one: JobSummary) -> str:
    return f"{one.job} (damaged: {one.damage})" if one.damage else f"{one.job} ({one.alive} alive)"


def _verdict(screen: Screen, found: JobView) -> None:
    screen.fact(found.verdict.upper(), found.sentence, label_style=_VERDICTS.get(found.verdict, "bold red"))
    for warning in found.warnings[:_MOST_WARNINGS]:
        screen.fact("", f"! {warning}", "yellow")
    if len(found.warnings) > _MOST_WARNINGS:
        screen.fact("", f"! and {len(found.warnings) - _MOST_WARNINGS} more", "yellow")
    if found.ended is not None:
        ago = "" if found.ended.ago_s is None else f" {duration(found.ended.ago_s)} ago"
        seat = "" if found.ended.rank is None else f"rank {found.ended.rank} "
        screen.fact("last end", f"run {found.ended.run} ended{ago}: {seat}({found.ended.worker}) departed: {found.ended.reason}")


def _members(screen: Screen, found: JobView) -> None:
    if found.workers:
        shown = found.workers
        if len(shown) > _MOST_MEMBERS:
            shown = tuple(worker for worker in shown if worker.condition != "alive")[:_MOST_MEMBERS]
            counted = Counter(worker.condition for worker in found.workers)
            screen.line()
            screen.fact("members", ", ".join(f"{number} {word}" for word, number in counted.items()) + "; `dtr workers` lists them all")
        if shown:
            screen.line()
            show_members(screen, shown)
    gone = tuple(departed for departed in found.departed if not departed.returned)
    if gone:
        screen.line()
        screen.line(f"departed ({len(gone)})", "bold")
        show_departed(screen, gone[:_MOST_DEPARTED])
    screen.line()


def _facts(screen: Screen, found: JobView) -> None:
    formed = "" if found.formed_ago_s is None else f", formed {duration(found.formed_ago_s)} ago"
    ranks = "" if found.world_size is None else f", {count_of(found.world_size, 'rank')}"
    last = f"{found.last_run}{ranks}{formed}" if found.last_run else "none yet"
    screen.fact("run" if found.run else "last run", f"{last} · generation {found.generation}")
    _barriers(screen, found)
    _checkpoints(screen, found)
    if found.uploaders:
        _uploaders(screen, found.uploaders)
    if found.counters:
        screen.fact("counters", " · ".join(f"{name} {value}" for name, value in found.counters.items()))
    if found.events:
        screen.line()
        screen.line("events", "bold")
        show_events(screen, found.events)


def _uploaders(screen: Screen, found: Sequence[UploaderView]) -> None:
    if len(found) > _MOST_HOSTS:
        screen.fact("uploaders", f"on {sum(one.present for one in found)} of {len(found)} hosts")
    else:
        screen.fact("uploaders", "; ".join(_uploader(one) for one in found))


def _uploader(one: UploaderView) -> str:
    if not one.present:
        return f"{one.host} MISSING"
    doing = [f"{one.fields[name]} {word}" for name, word in (("uploads", "under way"), ("staged", "staged")) if name in one.fields]
    return f"{one.host} present" + (f" ({some(doing)})" if doing else "")


def _barriers(screen: Screen, found: JobView) -> None:
    if found.barriers is None:
        screen.fact("barriers", "unknown: this user may not SCAN")
        return
    for number, one in enumerate(found.barriers[:_MOST_ROUNDS]):
        waits = "" if one.age_s is None else f", waiting {duration(one.age_s)}"
        ended = "" if one.current else f" (run {one.run} has ended)"
        text = f"{one.name} round {one.seq}: {one.arrived} of {one.expected} there{waits} for {missing(one)}{ended}"
        screen.fact("" if number else "barriers", text, "yellow" if one.current else "dim")
    if len(found.barriers) > _MOST_ROUNDS:
        screen.fact("", f"and {len(found.barriers) - _MOST_ROUNDS} more: `dtr barriers`")


def _checkpoints(screen: Screen, found: JobView) -> None:
    latest = found.latest
    if latest is None:
        screen.fact("latest", "no commit yet")
    else:
        facts = [
            f"{latest.run}/{latest.step}",
            None if latest.decided_ago_s is None else f"committed {duration(latest.decided_ago_s)} ago",
            f"{count_of(found.unsaved_steps, 'step')} behind" if found.unsaved_steps else None,
            None if latest.size_bytes is None else size(latest.size_bytes),
            latest.store,
        ]
        screen.fact("latest", " · ".join(fact for fact in facts if fact))
    for number, one in enumerate(found.open_checkpoints):
        screen.fact("" if number else "open", progress(one), "yellow" if one.state == "ABORTING" else "")
    failed = [one for one in found.failed_saves if one.since_latest]
    for number, lost in enumerate(failed[:_MOST_FAILED]):
        screen.fact("" if number else "failed", _failed(lost), "red")
    if len(failed) > _MOST_FAILED:
        screen.fact("", f"and {len(failed) - _MOST_FAILED} more: `dtr events`", "red")


def _failed(one: FailedSave) -> str:
    who = "" if one.rank is None else f" of rank {one.rank} ({one.worker})"
    return f"{one.run}/{one.step}{who} {one.state.lower()} {duration(one.ago_s)} ago: {one.reason}"
