"""What trainers write down for the director: one line of JSON for each thing that happened, with the time on this machine's clock.

Guarantee: a line is written in one call, so a trainer that is killed leaves whole lines, and at most one torn one that is not read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

__all__ = ["Committed", "Event", "Finished", "Formed", "Halted", "Note", "Notebook", "Notes", "Restored", "Saved", "Started", "Stepped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A trainer process is there, in the launcher's seat ``local_rank``; ``restarts`` counts its predecessors."""

    local_rank: int
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Formed:
    """The trainer is in a run and knows its shards, by number."""

    run: str
    rank: int
    world_size: int
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """An optimizer step is done; ``loss`` is the mean over all ranks' ``samples`` of ``epoch``, in nats a byte."""

    run: str
    step: int
    loss: float
    epoch: int
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """``save_async`` returned after ``stall_s``; ``digest`` is that of the state it was given, of ``size_bytes``."""

    run: str
    rank: int
    step: int
    digest: str
    stall_s: float
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A save is durable; ``seconds`` since ``save_async`` was called."""

    run: str
    step: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Halted:
    """A call raised ``error`` (BarrierBroken or RosterChanged): the run ended.

    ``barrier`` and ``missing`` are what a broken barrier named; ``culprit`` is who departed, empty if a newcomer waits.
    """

    run: str
    rank: int
    step: int
    error: str
    barrier: str
    missing: tuple[str, ...]
    culprit: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """The collective restore of ``run`` gave ``step`` of ``from_run`` with ``digest``; step -1: there was nothing to restore."""

    run: str
    rank: int
    from_run: str
    step: int
    digest: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The trainer has done its last step, and every save is durable."""

    step: int


Event: TypeAlias = Started | Formed | Stepped | Saved | Committed | Halted | Restored | Finished

_KINDS: Final[dict[str, Callable[..., Event]]] = {
    kind.__name__.lower(): kind for kind in (Started, Formed, Stepped, Saved, Committed, Halted, Restored, Finished)
}
_LISTS: Final = frozenset({"shards", "missing"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """An event, who wrote it, and when: ``at`` is CLOCK_MONOTONIC in seconds, which all processes of a machine share."""

    at: float
    worker: str
    pid: int
    event: Event

    def to_line(self) -> str:
        """One line of JSON, without its end."""
        head = {"at": self.at, "worker": self.worker, "pid": self.pid, "kind": type(self.event).__name__.lower()}
        return json.dumps({**head, **dataclasses.asdict(self.event)}, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> Note:
        """What `to_line` wrote; raises KeyError, TypeError or ValueError for anything else."""
        fields = json.loads(line)
        at, worker, pid, kind = (fields.pop(name) for name in ("at", "worker", "pid", "kind"))
        event = _KINDS[kind](**{name: tuple(value) if name in _LISTS else value for name, value in fields.items()})
        return cls(at=at, worker=worker, pid=pid, event=event)


class Notebook:
    """The trainer's side: one file for each process.

    Args:
        folder: where the notes go.
        worker: who writes.
    """

    def __init__(self, folder: Path, worker: str) -> None:
        self._worker = worker
        path = folder / f"{worker}-{os.getpid()}.jsonl"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, event: Event, *, at: float | None = None) -> None:
        """Note an event; ``at`` if it was not now."""
        note = Note(at=time.monotonic() if at is None else at, worker=self._worker, pid=os.getpid(), event=event)
        os.write(self._descriptor, (note.to_line() + "\n").encode())

    def close(self) -> None:
        os.close(self._descriptor)


class Notes:
    """The director's side: reads what was added since the last look.

    Args:
        folder: of the notes; files may appear at any time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read_to: dict[str, int] = {}

    def fresh(self) -> list[Note]:
        """The notes since the last call, all files together in the order of time."""
        return sorted(self._read(), key=lambda note: note.at)

    def _read(self) -> Iterator[Note]:
        for path in sorted(self._folder.glob("*.jsonl")):
            begin = self._read_to.get(path.name, 0)
            if path.stat().st_size <= begin:
                continue
            with path.open("rb") as file:
                file.seek(begin)
                whole, end, _ = file.read().rpartition(b"\n")
            self._read_to[path.name] = begin + len(whole) + len(end)
            yield from map(Note.from_line, whole.decode().splitlines())
