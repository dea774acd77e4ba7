"""The group ``dtr``. A command's module is loaded when that command runs, so that help and completion of names are fast."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import rich_click as click
from rich_click import rich_click

from dtr.cli.failures import Invocation, report

__all__ = ["COMMANDS", "Entry", "cli", "run"]

_NARROW: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a command is defined, and its line in the help of the group."""

    module: str
    attribute: str
    panel: str
    about: str
    below: tuple[str, ...] = ()  # the commands of a group

    def load(self) -> click.Command:
        """The command itself."""
        command: click.Command = getattr(importlib.import_module(self.module), self.attribute)
        return command


def _entry(name: str, panel: str, about: str, module: str | None = None, below: tuple[str, ...] = ()) -> tuple[str, Entry]:
    attribute = name.replace("-", "_")
    return name, Entry(module=f"dtr.cli.{module or attribute}", attribute=attribute, panel=panel, about=about, below=below)


_CKPT: Final = ("ls", "show", "verify", "log", "plan", "watch", "gc", "rm", "pin", "unpin", "export", "import", "diff")
_DATA: Final = ("ls", "show", "progress", "which", "replay", "skip", "release")
COMMANDS: Final[dict[str, Entry]] = dict(
    [
        _entry("status", "Look", "Is the job well, and if not, why."),
        _entry("workers", "Look", "Who is there, and who has gone and why."),
        _entry("barriers", "Look", "Barrier rounds, and who is missing."),
        _entry("ring", "Look", "How the ring is shared among the workers."),
        _entry("ckpt", "Look", "List, show, verify, compare, keep and remove checkpoints.", below=_CKPT),
        _entry("data", "Look", "List data sets, and ask what a step consumed.", below=_DATA),
        _entry("events", "Look", "What happened, and what happens now."),
        _entry("config", "Look", "The settings and where they come from.", below=("show",)),
        _entry("run", "Run", "Start trainers and look after them."),
        _entry("demo", "Run", "See it all at work: training, a kill, recovery."),
        _entry("up", "Run", "Run Redis, an uploader and Flower on this machine.", "stack"),
        _entry("down", "Run", "End what `dtr up` started.", "stack"),
        _entry("rebuild", "Run", "Fill an emptied Redis from the store."),
        _entry("redis-cli", "Run", "Talk to the coordinator as redis-cli does."),
    ]
)


class LazyGroup(click.RichGroup):
    """Lists :data:`COMMANDS` from their entries alone, and loads the one that is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A stand-in that has the command's name and its line of help."""
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else click.RichCommand(name=cmd_name, short_help=entry.about, panel=entry.panel)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else COMMANDS[name].load(), rest


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        try:
            version = metadata.version("dtr")
        except metadata.PackageNotFoundError:
            version = "from a checkout that is not installed"
        click.echo(f"dtr {version}, Python {sys.version.split()[0]}")
        ctx.exit()


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings come from options, DTR_* variables and dtr.toml, in this order; `dtr config show` lists them all.",
)
@click.option("--url", metavar="URL", help="The coordinator; default: DTR_REDIS_URL, dtr.toml, redis://127.0.0.1:6379/0.")
@click.option("--job", metavar="JOB", help="The job, NAME or TENANT/NAME; default: DTR_JOB, dtr.toml, the only one alive.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit.")
@click.pass_context
def cli(ctx: click.Context, url: str | None, job: str | None) -> None:
    """A runtime for distributed training: see and run its jobs.

    --url and --job may stand before or after the command.
    """
    given: dict[str, Any] = {name: value for name, value in (("url", url), ("job", job)) if value is not None}
    # Defaults of every command below; those of a group's commands lie one level deeper.
    ctx.default_map = {name: {**given, **dict.fromkeys(entry.below, given)} for name, entry in COMMANDS.items()}


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command of ``argv`` (default: this process's arguments) and return the exit code; errors are reported."""
    _open_streams()
    if shutil.get_terminal_size((80, 24)).columns < _NARROW:
        rich_click.THEME = "default-nu"  # without boxes: their frames and columns leave no room for words
        rich_click.OPTIONS_TABLE_COLUMN_TYPES = ["opt_all", "help"]
        rich_click.OPTIONS_TABLE_HELP_SECTIONS = ["help"]
    args = list(sys.argv[1:] if argv is None else argv)
    invocation = Invocation()
    try:
        code = cli.main(args, prog_name="dtr", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
    except SystemExit as exc:  # click's own, when a pipe was closed or a group had no command
        return exc.code if isinstance(exc.code, int) else 1
    except BaseException as exc:
        return report(exc, args, invocation)
    return code if isinstance(code, int) else 0


def _open_streams() -> None:
    """Streams that take everything: one that the caller closed (``>&-``) swallows it, and one for ASCII shows ``?`` for other letters."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
