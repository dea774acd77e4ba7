"""``python -m dtr.stack HOME``: the supervisor of a local stack as a process of its own.

It reads its plan from stdin, leaves its starter (a launcher that waits for its children never meets it), and answers on stdout
with one line of JSON: ``ready``, ``busy`` (another supervisor has the folder) or ``failed`` with the reason. After that it has
no tie to its starter but the folder's locks.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from dtr.errors import DtrError
from dtr.stack.home import Home
from dtr.stack.services import Plan
from dtr.stack.supervisor import Supervisor, sweep

logger = logging.getLogger("dtr.stack")

_LOCK_WITHIN_S = 2.0  # a passer-by who asks whether the lock is held, holds it for a moment


class _Answer:
    """The one line to the starter: the first that is given."""

    def __init__(self) -> None:
        self._descriptor: int | None = os.dup(1)  # not inherited by the services
        os.dup2(2, 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def give(self, state: str, message: str = "", tail: str = "") -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        line = json.dumps({"state": state, "message": message, "tail": tail}) + "\n"
        try:
            os.write(descriptor, line.encode())
        except BrokenPipeError:
            logger.info("the starter has gone before the answer: %s", state)
        os.close(descriptor)


def main(argv: list[str]) -> int:
    """Supervise until the end."""
    plan = Plan.parse(sys.stdin.read())
    if os.fork():
        os._exit(0)
    os.setsid()
    answer = _Answer()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    home = Home(Path(argv[0]))
    lock = home.supervising()
    if not lock.take(within_s=_LOCK_WITHIN_S):
        answer.give("busy")
        return 0
    try:
        sweep(home)
        Supervisor(home, plan).run(lambda: answer.give("ready"))
    except DtrError as exc:
        logger.error("%s", exc)
        answer.give("failed", exc.message, exc.facts.get("tail", ""))
        return exc.exit_code
    except Exception as exc:
        logger.exception("the supervisor ended by an error")
        answer.give("failed", f"{type(exc).__name__}: {exc}")
        return 1
    answer.give("failed", "the stack was ended while it started")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
