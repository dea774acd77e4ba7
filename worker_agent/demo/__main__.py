"""``python -m worker_agent.demo``: the demo's own process, which ``dtr demo`` becomes.

Exit status: 0, 1 if a check or the demo itself failed, 2 to 5 as of every command of dtr, 130 after Ctrl-C, by which time
everything that was started has ended and every folder is gone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import worker_agent
from dtr.cli.failures import describe
from dtr.config import Settings
from dtr.errors import DtrError
from dtr.store import open_store
from worker_agent.demo.checks import Check
from worker_agent.demo.director import Outcome, direct
from worker_agent.demo.figures import Figures
from worker_agent.demo.gradients import file_bytes
from worker_agent.demo.interrupts import Interrupts
from worker_agent.demo.model import Shape
from worker_agent.demo.options import Options
from worker_agent.demo.report import Report, conclude, open_report
from worker_agent.demo.workplace import Workplace, clean_environment, free_port, installed_packages

__all__ = ["main"]

JOB: Final = "demo"
_DEFAULT: Final = Options()


def parser() -> argparse.ArgumentParser:
    """The command line; ``dtr demo`` has the same options, save those for tests."""
    made = argparse.ArgumentParser(prog="dtr demo", description=__doc__)
    made.add_argument("--workers", type=int, default=_DEFAULT.workers)
    made.add_argument("--steps", type=int, default=_DEFAULT.steps)
    made.add_argument("--store", metavar="URL")
    made.add_argument("--no-kill", dest="kill", action="store_false")
    made.add_argument("--keep", action="store_true")
    made.add_argument("--json", action="store_true")
    made.add_argument("--hidden", type=int, default=_DEFAULT.hidden, help=argparse.SUPPRESS)
    made.add_argument("--corpus-bytes", type=int, default=_DEFAULT.corpus_bytes, help=argparse.SUPPRESS)
    made.add_argument("--rejoin-after", dest="rejoin_after_s", type=float, default=_DEFAULT.rejoin_after_s, help=argparse.SUPPRESS)
    return made


def settings_of(place: Workplace, options: Options, *, port: int, stamp: str) -> Settings:
    """The settings of everything that the demo starts; the user's own are not looked at.

    Raises:
        ConfigError, InvalidInput: the store's URL is wrong.
    """
    return Settings.load(
        environ={},
        config_file=os.devnull,
        redis_url=f"redis://127.0.0.1:{port}/0",
        job=JOB,
        store=options.store_in(str(place.store), stamp),
        staging=str(place.staging),
        settle_s=1.0,  # all start together here; forming again shall not wait for long
        barrier_timeout_s=120.0,
        form_timeout_s=120.0,
        keep_last=0,  # so that every save can be looked at in the end
        data_weights="even",  # what is to be seen here is that a death moves the dead one's shards, and no others
    )


def needs(options: Options) -> tuple[int, int]:
    """Bytes in memory and on disk that the demo needs, generously."""
    width = Shape(hidden=options.hidden).parameters + 1
    state_bytes = 3 * 4 * width
    saves = options.steps // options.save_every + 2
    return file_bytes(options.workers, width) + 2 * 2 * state_bytes, 2 * options.corpus_bytes + saves * state_bytes + (64 << 20)


def run(options: Options, interrupts: Interrupts, report: Report) -> int:
    """Do the demo in folders of its own, say how it ended, and clear up; returns the exit status."""
    memory_bytes, disk_bytes = needs(options)
    place = Workplace.create(memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    logging.basicConfig(filename=place.own_log, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    keep, begun, interrupted = options.keep, False, False
    try:
        with interrupts.allowed():
            settings = settings_of(place, options, port=free_port(), stamp=time.strftime(f"{JOB}-%Y%m%d-%H%M%S-{os.getpid()}"))
            base = clean_environment(os.environ, import_from=Path(worker_agent.__file__).parents[1], installed=installed_packages())
            os.environ.clear()
            os.environ.update(place.environment(base, settings))
            open_store(str(settings.store)).probe()  # what is wrong with it is best said before anything runs
            begun = True
            outcome = direct(options, place, settings, report)
        tell(outcome, options, report)
        keep = keep or not outcome.ok
        return 0 if outcome.ok else 1
    except KeyboardInterrupt:
        interrupted = True
        return interrupts.status
    except DtrError as exc:
        keep = keep or begun  # for whoever wants to know why
        report.close()
        return fail(exc, as_json=options.json)
    finally:
        report.close()
        place.clear(keep=keep)
        if interrupted:
            report.say("interrupted: all that the demo started has ended" + ("" if keep else ", its folders are gone"))
        if keep:
            report.hint(
                f"kept: {place.folder} (logs, notes and samples of the trainers, the server's data"
                + (")" if options.store else ", checkpoints)")
            )


def tell(outcome: Outcome, options: Options, report: Report) -> None:
    """Say how it went."""
    conclude(report, outcome.figures.rows(), outcome.checks)
    if options.store is not None:
        report.hint(f"the checkpoints stay in {outcome.store}")
    if options.json:
        print(to_json(outcome.figures, outcome.checks))


def to_json(figures: Figures, checks: Sequence[Check]) -> str:
    """The outcome for programs."""
    verdicts = [{"what": check.what, "ok": check.ok, "detail": check.detail} for check in checks]
    return json.dumps({"name": "demo", "ok": all(check.ok for check in checks), "figures": figures.as_dict(), "checks": verdicts})


def fail(exc: DtrError, *, as_json: bool) -> int:
    """Say what went wrong, to programs as every command of dtr does, and return the exit status.

    People get the message with its lines: the end of a log is easier to read so.
    """
    status, kind, message = describe(exc)
    if as_json:
        print(json.dumps({"error": message, "code": kind, "exit_code": status}), flush=True)
    print(f"dtr demo: {exc.message}", file=sys.stderr)
    return status


def main(argv: Sequence[str]) -> int:
    """Run the demo and return the exit status."""
    interrupts = Interrupts()
    interrupts.install()
    args = parser().parse_args(argv)
    try:
        options = Options(**vars(args))
        report = open_report(to_stderr=options.json)
        killed = "one will be killed" if options.kill else "nobody will be killed"
        learners = f"{options.workers} trainers learn" if options.workers > 1 else "one trainer learns"
        report.hint(f"dtr demo: {learners} to write Python, {killed}", "bold")
        return run(options, interrupts, report)
    except DtrError as exc:
        return fail(exc, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
