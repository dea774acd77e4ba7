"""What the commands of ``dtr ckpt`` share: ``--store``, Redis and the store with either missing, and errors of usage."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import rich_click as click

from dtr.cli.options import Target, job_state, server_state
from dtr.errors import CoordinatorUnavailable, InvalidInput
from dtr.views.stored import Sources

__all__ = ["open_sources", "store_option", "usage"]

store_option = click.option("--store", metavar="URL", help="Where the checkpoints are; default: DTR_STORE, dtr.toml, what Redis says.")


@contextlib.contextmanager
def open_sources(where: Target) -> Iterator[Sources]:
    """Redis and the store; what is done without either of them is said on stderr: of Redis before, of the store after it was done."""
    with contextlib.ExitStack() as stack:
        try:
            state = stack.enter_context(job_state(where))
        except CoordinatorUnavailable:  # then the job is the one of the settings
            state = stack.enter_context(server_state(where))
        found = Sources.open(state, where.settings.store)
        if found.state is None:
            print(f"dtr: {found.note}", file=sys.stderr, flush=True)
        yield found
        if found.state is not None and found.note:  # what cannot be done without a store is an error that says so itself
            print(f"dtr: {found.note}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """What is no name of a checkpoint is wrong usage."""
    try:
        yield
    except InvalidInput as exc:
        raise click.UsageError(f"{exc.message}.") from exc
