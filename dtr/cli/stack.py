"""``dtr up`` and ``dtr down``: the local stack on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import rich_click as click

from dtr.config import Settings, default_home
from dtr.errors import ServiceFailed, Unavailable
from dtr.stack import Stack, Up
from dtr.stack.follow import Follower
from dtr.views.words import count_of

__all__ = ["down", "up"]

_FOLLOW_S: Final = 0.25
_HOME = click.option(
    "--home", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="Data and logs; default: DTR_HOME, ~/.dtr."
)


@click.command(short_help="Run Redis, an uploader and Flower on this machine.")
@click.option("--detach", "-d", is_flag=True, help="Return once everything answers; `dtr down` ends it.")
@click.option("--url", metavar="URL", help="Where the server is to be; default: DTR_REDIS_URL, dtr.toml, redis://127.0.0.1:6379/0.")
@click.option("--flower/--no-flower", default=True, help="With Flower (default) or without.")
@_HOME
@click.pass_context
def up(ctx: click.Context, detach: bool, url: str | None, flower: bool, home: Path | None) -> None:
    """Run the local stack: Redis, one uploader and Flower.

    Without --detach it stays in front and shows the logs; Ctrl-C ends everything. A Redis that answers at the URL already is used and never
    stopped. The server's data are kept from one `up` to the next.
    """
    stack = Stack(home or default_home(), Settings.load(redis_url=url), flower=flower)
    try:
        _up(ctx, stack, detach=detach)
    except ServiceFailed as exc:
        click.echo(exc.facts.get("tail", ""), err=True)
        raise


def _up(ctx: click.Context, stack: Stack, *, detach: bool) -> None:
    if detach:
        found = stack.up()
        _show(stack, found)
        click.echo("`dtr down` ends it; the server's data stay.")
        return
    try:
        with stack.borrowed() as found:
            _show(stack, found)
            if found.started:
                click.echo("Ctrl-C ends it; the server's data stay.")
                _follow(stack, found)
            elif not stack.home.kept:
                click.echo("It ends with the command that started it; `dtr up --detach` has it stay.")
    except KeyboardInterrupt:
        click.echo("\nending the stack", err=True)
        stack.down()
        ctx.exit(130)


@click.command(short_help="End what `dtr up` started.")
@_HOME
def down(home: Path | None) -> None:
    """End the local stack that `dtr up` started. The server's data stay; a Redis that was there before is left running."""
    ended = Stack(home or default_home(), Settings()).down()
    if not ended.stopped:
        click.echo("nothing is up")
        return
    click.echo(f"ended {', '.join(ended.stopped)}")
    if ended.adopted is not None:
        click.echo(f"left running: the Redis at {ended.adopted}, which dtr did not start")


def _show(stack: Stack, found: Up) -> None:
    click.echo(f"{'up' if found.started else 'already up'}, data and logs in {stack.home.path}")
    if found.record.adopted:
        click.echo(f"  {'redis':<9} {found.record.url}, which was there already and is never stopped")
    for service in found.record.services:
        again = f", restarted {count_of(service.restarts, 'time')}" if service.restarts else ""
        click.echo(f"  {service.name:<9} {service.address}{again}")
    for note in found.notes:
        click.echo(f"  note: {note}")


def _follow(stack: Stack, found: Up) -> None:
    """Show the logs until the stack ends."""
    names = ["stack", *(service.name for service in found.record.services)]
    follower = Follower((name, stack.home.log(name)) for name in names)
    running = True
    while running:
        running = stack.status() is not None
        for name, line in follower.lines():
            click.echo(f"{name:<9}| {line}")
        if running:
            time.sleep(_FOLLOW_S)
    if stack.home.record() is not None:
        raise Unavailable(f"the stack ended without being asked to; see {stack.home.log('stack')}")
    click.echo("the stack was ended from elsewhere")
