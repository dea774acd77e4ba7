"""What the local stack is made of: the server, the uploader and Flower, each a command line and a way to see that it answers.

A plan says what a supervisor shall run; it travels to it as JSON on a pipe, because the URL may hold a password, which neither
a command line nor a file may show.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from redis import exceptions as rx

from dtr.config import Settings
from dtr.host import host_id
from dtr.stack import server
from dtr.stack.home import Home
from dtr.state import keys
from dtr.state.client import connect

__all__ = ["Plan", "Probe", "Service", "environment", "flower_service", "redis_service", "uploader_service"]

_PROBE_TIMEOUT_S: Final = 2.0
_FRESH_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How to see that a service answers: ``ping`` a Redis, ``http`` GET, or ``uploader``: one is there for a staging folder.

    An uploader's presence in Redis outlives one that was killed, so it counts only if it was renewed within ``fresh_s``.
    """

    kind: str
    target: str
    fresh_s: float = 0.0

    def answers(self, url: str) -> bool:
        """Ask once. ``url`` is the coordinator's."""
        if self.kind == "ping":
            return _pings(self.target)
        if self.kind == "http":
            return _gets(self.target)
        return _uploads(self.target, url, self.fresh_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One process to run: ``address`` is for people; ``ready_within_s`` and ``grace_s`` bound its start and its end."""

    name: str
    argv: tuple[str, ...]
    address: str
    probe: Probe
    ready_within_s: float = 60.0
    grace_s: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a supervisor runs. Stages start one after the other and stop the other way round, the services of a stage together.

    ``notes`` are for whoever asked for the stack.
    """

    url: str
    adopted: bool
    stages: tuple[tuple[Service, ...], ...]
    notes: tuple[str, ...] = ()

    def encode(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        table = json.loads(text)
        return cls(
            url=table["url"],
            adopted=table["adopted"],
            stages=tuple(tuple(_service(service) for service in stage) for stage in table["stages"]),
            notes=tuple(table["notes"]),
        )


def _service(table: dict[str, Any]) -> Service:
    return Service(**{**table, "argv": tuple(table["argv"]), "probe": Probe(**table["probe"])})


def redis_service(home: Home, url: str) -> Service:
    """The server on this machine that ``url`` names; its data stay in ``HOME/redis``.

    Raises:
        Unavailable: no server program was found.
        ConfigError: none that can read the data.
    """
    place = server.address(url)
    if place is None:
        raise ValueError("only a plain URL of this machine can be served")
    binary = server.find(home.data)
    server.remember(binary, home.data)
    return Service(
        name="redis",
        argv=server.command(binary, place[1], home.data),
        address=f"{place[0]}:{place[1]} ({binary})",
        probe=Probe(kind="ping", target=url),
    )


def uploader_service(settings: Settings) -> Service:
    """One Celery worker that uploads what this host stages."""
    return Service(
        name="uploader",
        argv=(sys.executable, "-m", "celery", "-A", "tasks", "worker"),
        address=f"staging in {os.path.abspath(settings.staging)}",
        probe=Probe(kind="uploader", target=os.path.abspath(settings.staging), fresh_s=max(_FRESH_S, 3 * settings.scan_interval_s)),
    )


def flower_service(settings: Settings) -> Service:
    """Flower on 127.0.0.1, on ``flower_port`` or, if that is taken, on a free port."""
    port = _port_or_free(settings.flower_port)
    return Service(
        name="flower",
        argv=(sys.executable, "-m", "celery", "-A", "tasks", "flower", "--address=127.0.0.1", f"--port={port}"),
        address=f"http://127.0.0.1:{port}",
        probe=Probe(kind="http", target=f"127.0.0.1:{port}/healthcheck"),
        grace_s=3.0,  # it holds nothing that could be lost
    )


def environment(settings: Settings, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for the services: every setting as ``DTR_*``, since they run in another folder, where no dtr.toml is."""
    env = dict(os.environ if environ is None else environ)
    env.pop("DTR_CONFIG", None)
    for name, value in settings.as_dict().items():
        if value is not None:
            env[f"DTR_{name.upper()}"] = os.path.abspath(value) if name == "staging" else str(value)
    if settings.store is not None and "://" not in settings.store:
        env["DTR_STORE"] = os.path.abspath(settings.store)
    return env


def _port_or_free(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    return wanted


def _pings(url: str) -> bool:
    client = connect(url, name="dtr-stack", timeout_s=_PROBE_TIMEOUT_S, retries=0)
    try:
        return bool(client.ping())
    except (rx.RedisError, OSError):
        return False
    finally:
        client.close()


def _gets(target: str) -> bool:
    host, _, path = target.partition("/")
    connection = http.client.HTTPConnection(host, timeout=_PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/" + path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _uploads(staging: str, url: str, fresh_s: float) -> bool:
    client = connect(url, name="dtr-stack", timeout_s=_PROBE_TIMEOUT_S, retries=0)
    try:
        seen_at_ms: Any = client.hget(keys.uploader(host_id(staging)), "last_scan_at")
        # Written by this host's clock and compared with it.
        return seen_at_ms is not None and time.time() - int(seen_at_ms) / 1000 < fresh_s
    except (rx.RedisError, OSError, ValueError):  # the last: the field is not a number
        return False
    finally:
        client.close()
