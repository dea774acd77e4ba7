"""What the commands of ``dtr data`` share: Redis and the store, either of which may be missing, and the step that is asked about."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import rich_click as click

from dtr.cli.options import Target, job_state, server_state
from dtr.errors import CoordinatorUnavailable
from dtr.views.stored import Sources

__all__ = ["data_sources", "store_option", "which_step"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

store_option = click.option("--store", metavar="URL", help="Where the checkpoints are; default: DTR_STORE, dtr.toml, what Redis says.")


def which_step(command: _Command) -> _Command:
    """Give a command the parameters ``step``, ``rank`` and ``run``."""
    for option in (
        click.option("--run", metavar="RUN", help="Of this run, even if the job did not go on from it; default: of the lineage."),
        click.option("--rank", type=click.IntRange(min=0), metavar="N", help="Of this rank alone."),
        click.option("--step", type=click.IntRange(min=0), required=True, metavar="N", help="The step, as agent.step() numbered it."),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def data_sources(where: Target) -> Iterator[Sources]:
    """Redis and, if one is known, the store; without Redis the store alone, with a line on stderr that says so."""
    with contextlib.ExitStack() as stack:
        try:
            state = stack.enter_context(job_state(where))
        except CoordinatorUnavailable:  # then the job is the one of the settings
            state = stack.enter_context(server_state(where))
        found = Sources.open(state, where.settings.store)
        if found.state is None:
            print(f"dtr: {found.note}", file=sys.stderr, flush=True)
        yield found
