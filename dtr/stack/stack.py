"""The local stack of one machine: Redis, the uploader and Flower, for ``dtr up``, ``dtr down``, ``dtr run`` and ``dtr demo``.

Guarantees: a second ``up`` changes nothing; ``down`` ends all that ``up`` started and nothing else; a Redis that answers
already is adopted and never stopped; a borrowed stack lives as long as any of its borrowers, however they end; the data of the
server survive.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from dtr.config import Settings
from dtr.errors import ConfigError, CoordinatorUnavailable, ServiceFailed, Unavailable
from dtr.stack import processes, server
from dtr.stack.home import Home, Lock, Record
from dtr.stack.services import Plan, Service, environment, flower_service, redis_service, uploader_service
from dtr.stack.supervisor import failed, sweep
from dtr.state.client import check_url, mask

__all__ = ["Down", "Stack", "Up", "make_plan"]

_READY_WITHIN_S: Final = 180.0
_END_WITHIN_S: Final = 90.0
_KILL_S: Final = 10.0
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """What ``up`` found or did: ``started`` is False if the stack was up already; ``notes`` are for people."""

    started: bool
    record: Record
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Down:
    """What ``down`` ended: the names of services; ``adopted`` is the masked URL of a server that was left running, if any."""

    stopped: tuple[str, ...]
    adopted: str | None = None


def make_plan(home: Home, settings: Settings, *, flower: bool = True) -> Plan:
    """What has to run so that ``settings.redis_url`` answers and this host has an uploader.

    Raises:
        CoordinatorUnavailable: nothing answers there and no server may be started there.
        CoordinatorRefused: a Redis answers there and refuses.
        Unavailable, ConfigError: no server program, or none that reads the data.
    """
    url = check_url(settings.redis_url)
    info = server.look(url)
    if info is None and server.address(url) is None:
        raise CoordinatorUnavailable(
            f"nothing answers at {mask(url)}, and a server is started only for redis://127.0.0.1:PORT/DB without password"
        )
    uploader = uploader_service(settings)
    notes = list(server.shortcomings(info or {}))
    second: list[Service] = []
    if info is not None and uploader.probe.answers(url):
        notes.append("an uploader for this host is there already; no other is started")
    else:
        second.append(uploader)
    if flower:
        second.append(shown := flower_service(settings))
        if not shown.address.endswith(f":{settings.flower_port}"):
            notes.append(f"port {settings.flower_port} is taken, so Flower has another one")
    first = () if info is not None else ((redis_service(home, url),),)
    return Plan(url=url, adopted=info is not None, stages=(*first, tuple(second)), notes=tuple(notes))


class Stack:
    """The stack in one folder. Nothing happens before a method is called.

    Args:
        home: the folder; ``dtr.config.default_home()`` is the usual one.
        settings: where the server is to be, staging, Flower's port; passed on to the services.
        flower: whether Flower is part of it.
        planner: makes the plan; for tests, which run stand-ins.
    """

    def __init__(
        self,
        home: Path,
        settings: Settings,
        *,
        flower: bool = True,
        planner: Callable[..., Plan] = make_plan,
    ) -> None:
        self.home = Home(home)
        self._settings = settings
        self._flower = flower
        self._planner = planner

    def up(self) -> Up:
        """Start the stack unless it is up, and have it stay until ``down``. Returns once everything answers.

        Raises:
            ServiceFailed: a service did not start; nothing is left running.
            ConfigError: the folder cannot be used, or another stack of it is up at another URL.
            Unavailable: see :func:`make_plan`.
        """
        with self._borrowing():
            found = self._ensure()
            self.home.keep(wanted=True)
            return found

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[Up]:
        """The stack while the block lasts: started if need be, ended with its last borrower unless somebody said ``up``.

        Raises the same as :meth:`up`.
        """
        with self._borrowing() as lock:
            try:
                yield self._ensure()
            finally:
                lock.release()
                self._await_end_if_unused()

    def down(self) -> Down:
        """End the stack, in the order Flower and uploader, then server; what it left behind if it was killed, too.

        Raises:
            ConfigError: the stack of this folder runs on another host.
            Unavailable: something did not end.
        """
        if not self.home.path.exists():
            return Down(stopped=())
        lock = self.home.supervising()
        record = self._end_supervisor(lock)
        try:
            stopped = [service.name for service in record.services] if record is not None else []
            adopted = record.url if record is not None and record.adopted else None
            return Down(stopped=tuple(dict.fromkeys([*stopped, *sweep(self.home)])), adopted=adopted)
        finally:
            lock.release()

    def status(self) -> Record | None:
        """What runs; None if the stack is not up.

        Raises:
            ConfigError: the record is damaged.
        """
        return self.home.record() if self.home.supervised() else None

    # --- how ---

    @contextlib.contextmanager
    def _borrowing(self) -> Iterator[Lock]:
        self.home.make()
        lock = self.home.borrowing()
        if not lock.take(shared=True, within_s=_END_WITHIN_S):
            raise Unavailable(f"the stack in {self.home.path} has been stopping for {_END_WITHIN_S:g} s; see {self.home.log('stack')}")
        try:
            yield lock
        finally:
            lock.release()

    def _ensure(self) -> Up:
        deadline = time.monotonic() + _READY_WITHIN_S
        while True:
            if self.home.supervised():
                record = self._await_ready(deadline)
                if record is not None:
                    return Up(started=False, record=record, notes=self._missing(record))
            elif (found := self._start()) is not None:
                return found
            if time.monotonic() > deadline:
                raise Unavailable(f"the stack in {self.home.path} did not become ready; see {self.home.log('stack')}")
            time.sleep(_POLL_S)

    def _missing(self, record: Record) -> tuple[str, ...]:
        if self._flower and all(service.name != "flower" for service in record.services):
            return ("Flower is not part of it: `dtr down` and `dtr up` start it with Flower",)
        return ()

    def _await_ready(self, deadline: float) -> Record | None:
        """The record of the stack that another process starts, once it is ready; None if that one ended."""
        while time.monotonic() < deadline:
            record = self.home.record()
            if record is not None:
                self._check_same(record)
                if record.state == "ready":
                    return record
            if not self.home.supervised():
                return None
            time.sleep(_POLL_S)
        return None

    def _check_same(self, record: Record) -> None:
        if record.host != socket.gethostname():
            raise ConfigError(f"the stack in {self.home.path} runs on host {record.host}: set DTR_HOME to a folder of this host")
        if _place(record.url) != _place(mask(self._settings.redis_url)):
            raise ConfigError(
                f"the stack in {self.home.path} is up at {record.url}, not at {mask(self._settings.redis_url)}: "
                "`dtr down` first, or set DTR_HOME to another folder"
            )

    def _start(self) -> Up | None:
        """Start a supervisor and wait for its answer; None if another one was faster."""
        self._sweep()
        plan = self._planner(self.home, self._settings, flower=self._flower)
        with self.home.log("stack").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "dtr.stack", str(self.home.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.home.path,
                env=environment(self._settings),
            )
        with child:
            if child.stdin is None or child.stdout is None:
                raise ValueError("both are pipes")
            with child.stdin as stdin, contextlib.suppress(BrokenPipeError):
                stdin.write(plan.encode().encode())
            line = _read_line(child.stdout.fileno(), _READY_WITHIN_S)
        if not line:
            raise failed("the supervisor ended without an answer", self.home.log("stack"))
        answer = json.loads(line)
        if answer["state"] == "busy":
            return None
        record = self.home.record()
        if answer["state"] != "ready" or record is None:
            raise ServiceFailed(answer["message"] or "the stack ended as soon as it was ready", tail=answer["tail"])
        return Up(started=True, record=record, notes=plan.notes)

    def _sweep(self) -> None:
        lock = self.home.supervising()
        if lock.take():
            try:
                sweep(self.home)
            finally:
                lock.release()

    def _end_supervisor(self, lock: Lock) -> Record | None:
        """Take the lock of supervisors: from one that is alive by asking it to end; its last record, None if there was none alive."""
        asked: Record | None = None
        deadline = time.monotonic() + _END_WITHIN_S
        while not lock.take():  # it may be one that has not written its record yet, or has removed it already
            record = self.home.record()
            if record is not None and record.host != socket.gethostname():
                raise ConfigError(f"the stack in {self.home.path} runs on host {record.host}: run `dtr down` there")
            if record is not None and (asked is None or asked.supervisor != record.supervisor):
                self.home.keep(wanted=False)
                asked = record if processes.send(record.supervisor, signal.SIGTERM) else asked
            elif record is not None:
                asked = record
            if time.monotonic() > deadline:
                if asked is None or not processes.send(asked.supervisor, signal.SIGKILL):
                    raise Unavailable(f"{self.home.path} is locked by a process that does not end; see {self.home.log('stack')}")
                deadline += _KILL_S
            time.sleep(_POLL_S)
        return asked

    def _await_end_if_unused(self) -> None:
        """Wait until the supervisor has ended, unless somebody else wants the stack."""
        deadline = time.monotonic() + _END_WITHIN_S
        while self.home.supervised() and not self.home.kept and time.monotonic() < deadline:
            lock = self.home.borrowing()
            nobody = lock.take()
            lock.release()
            # The supervisor that is stopping holds it exclusively, a borrower does not.
            if not nobody and lock.take(shared=True):
                lock.release()
                return
            time.sleep(_POLL_S)


def _place(url: str) -> tuple[str, str, int, str]:
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    return parts.scheme, host, parts.port or 6379, parts.path.strip("/") or "0"


def _read_line(descriptor: int, within_s: float) -> str:
    """The first line from a pipe; what came of it, if it is closed or too slow."""
    deadline = time.monotonic() + within_s
    found = b""
    while not found.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready or not (chunk := os.read(descriptor, 4096)):
            break
        found += chunk
    return found.decode()
