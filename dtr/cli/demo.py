"""``dtr demo``: becomes ``python -m worker_agent.demo``, since dtr does not import what stands above it."""

from __future__ import annotations

import os
import signal
import sys

import rich_click as click

__all__ = ["demo"]


@click.command(short_help="See it all at work: training, a kill, recovery.")
@click.option("--workers", type=click.IntRange(1, 16), metavar="N", help="Trainers; default 4.")
@click.option("--steps", type=click.IntRange(1, 100_000), metavar="N", help="Optimizer steps; default 400.")
@click.option(
    "--store",
    metavar="URL",
    help="Where checkpoints go, and stay: file:///FOLDER, s3://, gs:// or az://; default: the demo's own folder.",
)
@click.option("--no-kill", is_flag=True, help="Do not kill a trainer midway.")
@click.option("--keep", is_flag=True, help="Keep the demo's folder: logs, checkpoints, the server's data.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout in the end, and the story on stderr.")
def demo(workers: int | None, steps: int | None, store: str | None, no_kill: bool, keep: bool, as_json: bool) -> None:
    """Train a small language model on Python's standard library with 4 trainers, kill one of them midway, and see the job recover.

    Starts a server, an uploader, Flower and the trainers in a temporary home, and ends them all; nothing of yours is touched. It takes
    about a minute, ends with a table of figures and with checks, one of which proves from the trainers' own logs that every sample was
    consumed exactly once, and exits with 1 if a check fails.
    """
    chosen = [f"--{name}={value}" for name, value in (("workers", workers), ("steps", steps), ("store", store)) if value is not None]
    flags = [name for name, given in (("--no-kill", no_kill), ("--keep", keep), ("--json", as_json)) if given]
    sys.stdout.flush()
    # One process: signals, the exit status and the terminal need no one in between. A signal that comes while the new program loads
    # waits until it is ready to clear up.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    os.execv(sys.executable, [sys.executable, "-m", "worker_agent.demo", *chosen, *flags])  # noqa: S606 - no shell is wanted
