"""``python -m worker_agent run`` is the launcher, as ``dtr run``; ``python -m worker_agent beat`` beats for one trainer."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any

from dtr.errors import DtrError

__all__ = ["main", "run_parser"]

# `dtr run` becomes this program and blocks these while it loads, so that Ctrl-C meets somebody who can clear up.
_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_EXAMPLES = """\
examples:
  dtr run -n 4 -- python train.py                    four trainers on this machine
  dtr run -n 4 --max-restarts 3 -- python train.py   one that fails starts again
  dtr run -n 8 --nnodes 2 --url redis://10.0.0.1 -- python train.py    the same on each of two hosts
"""


def _number(low: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number from {low:g}, got {text}")
        return value

    parse.__name__ = "number"
    return parse


def run_parser() -> argparse.ArgumentParser:
    """The command line of the launcher; ``dtr run`` has the same options."""
    parser = argparse.ArgumentParser(
        prog="dtr run", description="Start trainers and look after them.", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    whole, seconds = _number(0, int), _number(0, float)
    parser.add_argument("-n", "--nproc", type=_number(1, int), default=1, metavar="N", help="trainers on this host (default 1)")
    parser.add_argument("--nnodes", type=_number(1, int), default=1, metavar="M", help="hosts that run this same command (default 1)")
    parser.add_argument("--min", type=_number(1, int), metavar="K", help="elastic: go on with as few as K trainers")
    parser.add_argument("--max-restarts", type=whole, default=0, metavar="K", help="of all trainers of this launcher (default 0)")
    parser.add_argument("--grace", type=seconds, default=30.0, metavar="S", help="from asking to stop to SIGKILL (default 30)")
    parser.add_argument("--stall-timeout", type=seconds, default=300.0, metavar="S", help="0: never (default 300)")
    parser.add_argument("--stall-action", choices=("show", "kill"), default="show", help="with a stalled trainer (default show)")
    parser.add_argument("--url", metavar="URL", help="the coordinator; without one, a local server is started if none is there")
    parser.add_argument("--job", metavar="JOB", help="'name' or 'tenant/name'")
    parser.add_argument("--staging", metavar="DIR", help="folder for staged checkpoints")
    parser.add_argument("--store", metavar="URL", help="where checkpoints go")
    parser.add_argument("--no-uploader", action="store_true", help="start no uploader, even if this host has none")
    parser.add_argument("-q", "--no-prefix", action="store_true", help="do not begin each line of output with [rank]")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD...", help="the program of one trainer")
    return parser


def _run(argv: Sequence[str]) -> int:
    from worker_agent.launcher import Given, Launch, launch

    parser = run_parser()
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("what to run is missing: dtr run -n 4 -- python train.py")
    what = Launch(
        command=tuple(command),
        nproc=args.nproc,
        nnodes=args.nnodes,
        minimum=args.min,
        max_restarts=args.max_restarts,
        grace_s=args.grace,
        stall_timeout_s=args.stall_timeout,
        stall_kills=args.stall_action == "kill",
        prefix=not args.no_prefix,
    )
    given = Given(redis_url=args.url, job=args.job, staging=args.staging, store=args.store, uploader=not args.no_uploader)
    return launch(what, given, os.environ)


def _beat(argv: Sequence[str]) -> int:
    from worker_agent.beater import serve

    return serve(sys.stdin.fileno(), sys.stdout.fileno())


@contextlib.contextmanager
def _log_lines(name: str) -> Iterator[None]:
    """Log lines go to stderr by a thread of their own: one that does not flow (a pager) must not hold up the launcher's loop."""
    root, waiting = logging.getLogger(), SimpleQueue[Any]()
    target, source = logging.StreamHandler(), QueueHandler(waiting)
    target.setFormatter(logging.Formatter(f"{name}: %(message)s"))
    writer = QueueListener(waiting, target)
    logging.raiseExceptions = False  # a closed stderr must not end a launch
    logging.getLogger("worker_agent").setLevel(logging.INFO)
    root.addHandler(source)
    writer.start()
    try:
        yield
    finally:
        root.removeHandler(source)
        writer.stop()


def main(argv: Sequence[str]) -> int:
    """Run one of the two; the exit status. An error of dtr is one line."""
    commands = {"run": ("dtr run", _run), "beat": ("dtr beat", _beat)}
    if not argv or argv[0] not in commands:
        print(f"usage: python -m worker_agent {{{','.join(commands)}}} ...", file=sys.stderr)
        return 2
    name, command = commands[argv[0]]
    try:
        with _log_lines(name):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
            try:
                return command(argv[1:])
            except DtrError as exc:
                logging.getLogger("worker_agent").error("%s", exc.message)
                return exc.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
