"""What every command that reads shares: ``--url``, ``--job``, ``--json``, and the way from there to a job's state."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import rich_click as click

from dtr.cli.failures import Invocation
from dtr.config import Settings
from dtr.state.client import connect
from dtr.state.job import JobState
from dtr.views import jobs
from dtr.views.words import count_of, some

__all__ = ["Target", "job_state", "reading_options", "server_state", "target"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    found = ctx.find_object(Invocation)
    if found is not None and value:
        found.as_json = True
    return value


def reading_options(command: _Command) -> _Command:
    """Give a command the parameters ``url``, ``job`` and ``as_json``."""
    for option in (
        click.option("--json", "as_json", is_flag=True, is_eager=True, callback=_remember, help="One JSON document on stdout."),
        click.option("--job", metavar="JOB", help="The job; default: DTR_JOB, dtr.toml, the only one alive."),
        click.option("--url", metavar="URL", help="The coordinator; default: DTR_REDIS_URL, dtr.toml, redis://127.0.0.1:6379/0."),
    ):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The settings of this call; ``job_chosen`` if anyone said which job."""

    settings: Settings
    job_chosen: bool


def target(url: str | None, job: str | None, **given: Any) -> Target:
    """Load the settings; raises ConfigError or InvalidInput that names what is wrong."""
    given = {"redis_url": url, "job": job, **given}
    settings = Settings.load(**given)
    return Target(settings=settings, job_chosen=Settings.origins(**given)["job"].kind != "default")


@contextlib.contextmanager
def server_state(where: Target, job: str | None = None) -> Iterator[JobState]:
    """The server, seen from ``job`` (default: the one in the settings)."""
    url = where.settings.redis_url
    # One retry: a person who waits for an answer would rather know now.
    state = JobState(url, job or where.settings.job, client=connect(url, name=f"dtr-cli-{os.getpid()}", retries=1))
    try:
        yield state
    finally:
        state.close()


@contextlib.contextmanager
def job_state(where: Target) -> Iterator[JobState]:
    """The job that was chosen, or else the only one alive; what is printed names it.

    Raises:
        UsageError: none was chosen, and several jobs are there, or only a damaged one.
    """
    job = where.settings.job
    if not where.job_chosen:
        with server_state(where) as state:
            listed = jobs.read(state)
        found, _ = jobs.pick(listed, job, asked=False)
        if found is None:
            known = some([f"{one.job} (damaged)" if one.damage else one.job for one in listed], 8)
            raise click.UsageError(f"this server has {count_of(len(listed), 'job')}: {known}; choose one with --job.")
        job = found
    with server_state(where, job) as state:
        yield state
