"""``dtr run``: the launcher. It parses, and becomes ``python -m worker_agent run``; what that does is not known here."""

from __future__ import annotations

import os
import signal
import sys
from typing import Final, NoReturn

import rich_click as click

from dtr.cli.seconds import Seconds

__all__ = ["run"]

# Not -m alone: that would put the working folder first on the path, where a trainer's queue.py or types.py would hide Python's own.
_LAUNCHER: Final = ("-P", "-m", "worker_agent", "run")


@click.command(
    context_settings={"allow_interspersed_args": False},
    short_help="Start trainers and look after them.",
    epilog="Status: 0 if all trainers end with 0; else that of the first that failed for good (128 + N for signal N); 130 after Ctrl-C.",
)
@click.option("--nproc", "-n", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Trainers on this host.")
@click.option("--nnodes", type=click.IntRange(1), default=1, show_default=True, metavar="M", help="Hosts that run this same command.")
@click.option("--min", type=click.IntRange(1), metavar="K", help="Elastic: the job goes on with as few as K trainers.")
@click.option("--max-restarts", type=click.IntRange(0), default=0, show_default=True, metavar="K", help="Of all trainers of this launcher.")
@click.option("--grace", type=Seconds(0), default=30.0, show_default=True, metavar="S", help="Seconds between SIGTERM and SIGKILL.")
@click.option("--stall-timeout", type=Seconds(0), default=300.0, show_default=True, metavar="S", help="Seconds without progress; 0: never.")
@click.option("--stall-action", type=click.Choice(["show", "kill"]), default="show", show_default=True, help="With a stalled trainer.")
@click.option("--url", metavar="URL", help="The coordinator; default: DTR_REDIS_URL, dtr.toml, or a server that is started here.")
@click.option("--job", metavar="JOB", help="'name' or 'tenant/name'; default: DTR_JOB, dtr.toml.")
@click.option("--staging", metavar="DIR", help="Folder for staged checkpoints; default: DTR_STAGING, dtr.toml, in /dev/shm.")
@click.option("--store", metavar="URL", help="Where checkpoints go, a folder or a URL; default: DTR_STORE, dtr.toml.")
@click.option("--no-uploader", is_flag=True, help="Start no uploader, even if this host has none.")
@click.option("--no-prefix", "-q", is_flag=True, help="Do not begin each line of output with [rank].")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
def run(command: tuple[str, ...], **options: object) -> None:
    """Start N trainers, beat for them, start again those that fail, and end with their status.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK and what an Agent needs. Without a coordinator one is started on this machine for the time of
    the run, and an uploader, if this host has none.

        dtr run -n 4 --max-restarts 3 -- python train.py
    """
    become([*arguments(options), "--", *command])


def arguments(options: dict[str, object]) -> list[str]:
    """The options as the launcher's command line."""
    found: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            found.append(flag)
        elif value is not None and value is not False:
            found.append(f"{flag}={value}")
    return found


def become(argv: list[str]) -> NoReturn:
    """Replace this process, so that signals and the exit status are the launcher's own."""
    sys.stdout.flush()
    # A signal that comes while the new program loads waits until it is ready to clear up.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    os.execv(sys.executable, [sys.executable, *_LAUNCHER, *argv])  # noqa: S606 - no shell is wanted
