"""A real training process for tests: loops over barrier and step, forms again when it must, and tells what happened.

    python -m tests.trainer URL JOB STAGING WORKER RANK LOW HIGH [STEPS]

Prints one JSON object a line: started, formed, step, changed, broken, stale, done.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.waiting import eventually

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    from dtr.errors import BarrierBroken, RosterChanged, StaleIncarnation
    from worker_agent import Agent

    url, job, staging, worker, rank, low, high, *rest = argv
    steps = int(rest[0]) if rest else 1_000_000
    agent = Agent(
        worker, url, (int(low), int(high)), None if rank == "-" else int(rank), job=job, staging=staging,
        ttl_s=1.5, beat_interval_s=0.2, settle_s=0.5, form_timeout_s=120, barrier_timeout_s=120,
    )  # fmt: skip
    say("started", worker=worker)
    try:
        with agent:
            while agent.current_step + 1 < steps:
                try:
                    say("formed", run=agent.run, rank=agent.rank, world_size=agent.world_size)
                    while agent.current_step + 1 < steps:
                        agent.barrier("step")
                        say("step", run=agent.run, step=agent.step())
                        time.sleep(0.01)
                except BarrierBroken as broken:
                    say("broken", missing=[m.worker for m in broken.missing], reason=broken.reason, run=broken.run)
                    agent.form()
                except RosterChanged as change:
                    say("changed", reason=change.message)
                    agent.form()
    except StaleIncarnation as stale:
        say("stale", reason=stale.message)
        return 3
    say("done")
    return 0


def say(event: str, **facts: Any) -> None:
    """One line for the test; the time is CLOCK_MONOTONIC, the same for all processes of this host."""
    print(json.dumps({"event": event, "at": time.monotonic(), **facts}), flush=True)


class Trainer:
    """A running trainer process, seen from a test."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.said: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.trainer", *arguments],
            cwd=ROOT, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._readers = [
            threading.Thread(target=self._read_events, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_events(self) -> None:
        for line in self.process.stdout or ():
            self.said.append(json.loads(line))

    def _read_errors(self) -> None:
        for line in self.process.stderr or ():
            self.errors.append(line)

    def wait_for(self, event: str, check: Callable[[dict[str, Any]], bool] = lambda _: True, timeout_s: float = 60.0) -> dict[str, Any]:
        """The first thing that it said of this kind and that passes ``check``."""
        return eventually(
            lambda: next((s for s in list(self.said) if s["event"] == event and check(s)), None),
            timeout_s=timeout_s,
            what=f"{event!r} from {self.process.args}, which said {self.said[-3:]} {self.errors[-5:]}",
        )

    def progress(self, timeout_s: float = 60.0) -> None:
        """Wait until it has made some steps from now on."""
        seen = len(self.steps)
        eventually(lambda: len(self.steps) > seen + 3, timeout_s=timeout_s, what=f"steps of {self.process.args}: {self.errors[-5:]}")

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [s for s in list(self.said) if s["event"] == "step"]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Kill it if it still runs; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        code = self.process.wait(timeout=30)
        for reader in self._readers:
            reader.join(timeout=10)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
