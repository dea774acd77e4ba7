"""The folder of one local stack: where its data, logs and record are, and who may use it.

Guarantees: at most one supervisor per folder (a lock that the kernel takes back at its death); the record is replaced as a
whole, never half-written; a stack is wanted while ``dtr up`` asked for it to stay or while anyone who borrowed it is alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from dtr.errors import ConfigError
from dtr.stack.processes import ProcessId

__all__ = ["Home", "Lock", "Record", "Running"]

_VERSION: Final = 1
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """One process of the stack as it is on record."""

    name: str
    process: ProcessId
    address: str
    log: str
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """``HOME/stack.json``: what runs, so that anyone can see it and ``dtr down`` can end it."""

    state: str  # starting, ready or stopping
    host: str
    url: str  # masked
    adopted: bool
    supervisor: ProcessId
    services: tuple[Running, ...]

    def encode(self) -> str:
        table = {
            "version": _VERSION,
            "state": self.state,
            "host": self.host,
            "url": self.url,
            "adopted": self.adopted,
            "supervisor": self.supervisor.as_dict(),
            "services": [
                {"name": s.name, "address": s.address, "log": s.log, "restarts": s.restarts, **s.process.as_dict()} for s in self.services
            ],
        }
        return json.dumps(table, indent=2) + "\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises KeyError, TypeError or ValueError if it is no record."""
        table = json.loads(text)
        if table["version"] != _VERSION:
            raise ValueError(f"version {table['version']!r} is unknown")
        return cls(
            state=str(table["state"]),
            host=str(table["host"]),
            url=str(table["url"]),
            adopted=bool(table["adopted"]),
            supervisor=_process(table["supervisor"]),
            services=tuple(
                Running(
                    name=str(s["name"]),
                    process=_process(s),
                    address=str(s["address"]),
                    log=str(s["log"]),
                    restarts=int(s["restarts"]),
                )
                for s in table["services"]
            ),
        )


def _process(table: Mapping[str, Any]) -> ProcessId:
    return ProcessId(pid=int(table["pid"]), started_ticks=int(table["started_ticks"]), boot=str(table["boot"]))


class Lock:
    """A lock on a file, held until ``release`` or the end of the process; programs started meanwhile do not inherit it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, *, shared: bool = False, within_s: float = 0.0) -> bool:
        """Take it, waiting up to ``within_s`` for others; whether it is held now.

        Raises:
            ConfigError: the file system has no locks.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + within_s
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return False
                time.sleep(_POLL_S)
            except OSError as exc:
                os.close(descriptor)
                raise ConfigError(f"{self._path} cannot be locked ({exc}): set DTR_HOME to a folder on a local disk") from exc
            else:
                self._descriptor = descriptor
                return True

    def release(self) -> None:
        """Give it back; nothing if it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class Home:
    """The folder and its files."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.data = self.path / "redis"
        self.store = self.path / "store"
        self._record = self.path / "stack.json"
        self._kept = self.path / "stack.keep"

    def make(self) -> None:
        """Create the folder, for this user only.

        Raises:
            ConfigError: it cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.path / "log").mkdir(exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"{self.path} cannot be used as dtr's home ({exc.strerror}): set DTR_HOME to a folder of yours") from exc

    def log(self, name: str) -> Path:
        return self.path / "log" / f"{name}.log"

    def supervising(self) -> Lock:
        """Held by the supervisor for its whole life."""
        return Lock(self.path / "stack.lock")

    def borrowing(self) -> Lock:
        """Held shared by each borrower; taken for good by a supervisor that stops because nobody wants the stack."""
        return Lock(self.path / "stack.users")

    def supervised(self) -> bool:
        """Whether a supervisor is alive."""
        if not self.path.exists():
            return False
        lock = self.supervising()
        try:
            return not lock.take(shared=True)  # shared: two who ask at once do not take each other for a supervisor
        finally:
            lock.release()

    @property
    def kept(self) -> bool:
        """Whether the stack is to stay although nobody borrows it."""
        return self._kept.exists()

    def keep(self, wanted: bool) -> None:
        if wanted:
            self._kept.touch()
        else:
            self._kept.unlink(missing_ok=True)

    def record(self) -> Record | None:
        """The record on disk; None if there is none.

        Raises:
            ConfigError: the file is not a record.
        """
        try:
            return Record.parse(self._record.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except NotADirectoryError as exc:
            raise ConfigError(f"{self.path} is not a folder") from exc
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ConfigError(f"{self._record} is not a record of `dtr up` ({exc!r}); remove it if no stack runs here") from exc

    def write(self, record: Record) -> None:
        fresh = self._record.with_suffix(".new")
        fresh.write_text(record.encode(), encoding="utf-8")
        fresh.replace(self._record)

    def forget(self) -> None:
        """Remove the record."""
        with contextlib.suppress(FileNotFoundError):
            self._record.unlink()
