"""Runs the services of one local stack, restarts what ends by itself, ends them all when asked to or when nobody wants them.

Guarantees: ready is said only when every service answered; a service that cannot start ends the whole stack, with the end of
its log; services end in the reverse order of their start, so that an uploader still has its server; the supervisor's own death,
by whatever signal, takes the services with it (``tether.py``), and what survives that is ended by the next ``up`` or ``down``.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dtr.clock import SYSTEM, Clock
from dtr.errors import ServiceFailed, Unavailable
from dtr.stack import processes
from dtr.stack.home import Home, Lock, Record, Running
from dtr.stack.processes import ProcessId
from dtr.stack.services import Plan, Service
from dtr.state.client import mask

__all__ = ["Supervisor", "failed", "restart_delay_s", "sweep"]

logger = logging.getLogger(__name__)

TICK_S: Final = 0.25
_STABLE_S: Final = 60.0
_SWEEP_GRACE_S: Final = 20.0
_TAIL_BYTES: Final = 2_000


class _Unwanted(Exception):
    """The stack was asked to end while it was starting."""


def sweep(home: Home) -> list[str]:
    """End what a killed supervisor left behind; the caller holds the lock of supervisors. Returns the names of what ran."""
    record = home.record()
    if record is None:
        return []
    running = [service for service in record.services if processes.alive(service.process)]
    for service in reversed(running):
        processes.stop([service.process], grace_s=_SWEEP_GRACE_S)
    home.forget()
    home.keep(wanted=False)
    return [service.name for service in running]


def failed(what: str, log: Path) -> ServiceFailed:
    """The error that says ``what``, with the end of that log."""
    end = _tail(log)
    last = end.splitlines()[-1].strip() if end else "it is empty"
    return ServiceFailed(f"{what}; the last line of {log}: {last}", tail=end)


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace").strip()


def restart_delay_s(failures: int) -> float:
    """Seconds before a service is started again after it ended ``failures`` times in a row: 0.5, 1, 2, ... up to 30."""
    return float(min(30.0, 0.5 * 2.0 ** min(failures - 1, 10)))


@dataclass(slots=True, kw_only=True)
class _Kept:
    """A service with the process that is it now."""

    service: Service
    child: subprocess.Popen[bytes] | None = None
    process: ProcessId | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    failures: int = 0
    restarts: int = 0


class Supervisor:
    """One per home, in the main thread of its process. ``run`` returns when the stack has ended."""

    def __init__(self, home: Home, plan: Plan, *, clock: Clock = SYSTEM) -> None:
        self._home = home
        self._plan = plan
        self._clock = clock
        self._stages = [[_Kept(service=service) for service in stage] for stage in plan.stages]
        self._stop_requests = 0
        self._woken = threading.Event()
        self._last_user: Lock | None = None
        self._state = "starting"
        self._own = processes.identify(os.getpid())

    def run(self, ready: Callable[[], None]) -> None:
        """Start everything, call ``ready``, watch until the end (SIGTERM, SIGINT, or nobody wants it), end everything.

        Raises:
            ServiceFailed: a service did not start.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            for stage in self._stages:
                self._start_stage(stage)
            self._state = "ready"
            self._write()
            ready()
            while not self._unwanted():
                self._tend()
                self._woken.wait(TICK_S)
        except _Unwanted:
            pass  # asked to end while starting: ends below like any other
        finally:
            self._end()

    def _on_signal(self, number: int, frame: object) -> None:
        self._stop_requests += 1
        self._woken.set()

    def _unwanted(self) -> bool:
        if self._stop_requests:
            return True
        if self._home.kept:
            return False
        lock = self._home.borrowing()
        if not lock.take():
            return False
        self._last_user = lock  # kept to the end, so that nobody borrows what is being stopped
        return True

    # --- starting ---

    def _start_stage(self, stage: list[_Kept]) -> None:
        for kept in stage:
            self._start(kept)
        waiting = list(stage)
        while waiting:
            if self._unwanted():
                raise _Unwanted
            for kept in waiting:
                self._check_starting(kept)
            waiting = [kept for kept in waiting if not kept.service.probe.answers(self._plan.url) or self._ended(kept)]
            if waiting:
                self._woken.wait(0.05)

    def _check_starting(self, kept: _Kept) -> None:
        late = self._clock.monotonic() - kept.started_at > kept.service.ready_within_s
        if self._ended(kept):
            what = f"ended with status {kept.child.returncode if kept.child else '?'}"
        elif late:
            what = f"did not answer within {kept.service.ready_within_s:g} s"
        else:
            return
        raise failed(f"{kept.service.name} {what}", self._home.log(kept.service.name))

    def _start(self, kept: _Kept) -> None:
        log = self._home.log(kept.service.name)
        kept.child = processes.start(kept.service.argv, log=log, cwd=self._home.path)
        kept.process = processes.identify(kept.child.pid)
        kept.started_at = self._clock.monotonic()
        self._write()

    # --- watching ---

    def _tend(self) -> None:
        now = self._clock.monotonic()
        for kept in (kept for stage in self._stages for kept in stage):
            if kept.child is None:
                if now >= kept.start_at:
                    kept.restarts += 1
                    self._start(kept)
            elif self._ended(kept):
                self._plan_restart(kept, now)

    def _plan_restart(self, kept: _Kept, now: float) -> None:
        status = kept.child.returncode if kept.child else None
        kept.failures = 1 if now - kept.started_at > _STABLE_S else kept.failures + 1
        delay_s = restart_delay_s(kept.failures)
        kept.start_at = now + delay_s
        kept.child = None
        if kept.process is not None:
            processes.stop([kept.process], grace_s=0)  # what is left of its session
        logger.warning("%s ended by itself with status %s; it starts again in %g s", kept.service.name, status, delay_s)

    @staticmethod
    def _ended(kept: _Kept) -> bool:
        return kept.child is not None and kept.child.poll() is not None

    # --- ending ---

    def _end(self) -> None:
        self._state = "stopping"
        self._write()
        for stage in reversed(self._stages):
            running = [kept for kept in stage if kept.process is not None]
            self._stop(running)
            for kept in running:
                if kept.child is not None:
                    kept.child.wait()
        self._home.keep(wanted=False)
        self._home.forget()

    def _stop(self, running: list[_Kept]) -> None:
        found = {kept.process: kept.service for kept in running if kept.process is not None}
        graces_s = {process: service.grace_s for process, service in found.items()}
        before = self._stop_requests
        # A second Ctrl-C or SIGTERM is meant seriously.
        for process in processes.stop_each(graces_s, hurried=lambda: self._stop_requests > max(before, 1)):
            logger.info("%s did not end within %g s of SIGTERM and was killed", found[process].name, graces_s[process])

    def _write(self) -> None:
        if self._own is None:
            raise Unavailable("this process cannot see itself in /proc, which the local stack needs")
        services = tuple(
            Running(
                name=kept.service.name,
                process=kept.process,
                address=kept.service.address,
                log=str(self._home.log(kept.service.name)),
                restarts=kept.restarts,
            )
            for stage in self._stages
            for kept in stage
            if kept.process is not None
        )
        self._home.write(
            Record(
                state=self._state,
                host=socket.gethostname(),
                url=mask(self._plan.url),
                adopted=self._plan.adopted,
                supervisor=self._own,
                services=services,
            )
        )
