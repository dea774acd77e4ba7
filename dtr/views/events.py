"""The events of a job: what happened to members, runs, barriers and checkpoints, oldest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from dtr.clock import SYSTEM, Clock
from dtr.errors import CoordinatorRefused, CoordinatorUnavailable, StateCorrupt
from dtr.state.exchange import Exchange
from dtr.state.job import JobState
from dtr.views.reading import reading

__all__ = ["Event", "EventsView", "Interruption", "describe", "follow", "newest", "read"]

_BLOCK_MS: Final = 1000
_RETRY_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One entry of the stream: ``id`` is Redis's, ``at_ms`` the server's time in milliseconds since the epoch."""

    id: str
    at_ms: int
    event: str
    fields: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsView:
    """The newest events of a job, the oldest of them first."""

    job: str
    now_ms: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """While following: Redis went away (``back`` False, with the reason) or answers again (``back`` True)."""

    back: bool
    reason: str = ""


def read(state: JobState, *, count: int) -> EventsView:
    """The ``count`` newest events.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    with reading(state):
        entries = state.redis.xrevrange(state.keys.events, count=count) if count else []
    found = tuple(describe(state.keys.events, entry_id, fields) for entry_id, fields in reversed(entries))
    return EventsView(job=state.job, now_ms=state.server_now_ms(), events=found)


def newest(state: JobState) -> str:
    """The id of the newest event, ``0-0`` if there is none.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    with reading(state):
        entries = state.redis.xrevrange(state.keys.events, count=1)
    return str(entries[0][0]) if entries else "0-0"


def describe(key: str, entry_id: str, fields: Mapping[str, str]) -> Event:
    """One entry of the stream ``key``."""
    kind = fields.get("event")
    if not kind:
        raise StateCorrupt(f"{key}: entry {entry_id} has no field event")
    rest = {name: value for name, value in fields.items() if name != "event"}
    return Event(id=entry_id, at_ms=int(entry_id.partition("-")[0]), event=kind, fields=rest)


def follow(state: JobState, after: str, *, clock: Clock = SYSTEM) -> Iterator[Event | Interruption]:
    """Every event after the id ``after``, each once, for ever; waits for the next in XREAD BLOCK.

    Survives outages of Redis: tells when one begins and when it is over, and reads on. Where Redis came back without the stream, or
    with one that ends before what was read, it reads that from its beginning.

    Raises:
        CoordinatorRefused: Redis answers and does not let this user read.
        StateCorrupt: the stream is not what dtr writes.
    """
    exchange = Exchange(state.url, "dtr-events")
    key, away = state.keys.events, False
    try:
        while True:
            try:
                if away:
                    after = _where_to_go_on(state, after)
                    yield Interruption(back=True)
                    away = False
                with reading(state):
                    entries = exchange.wait({key: after}, _BLOCK_MS)
            except CoordinatorRefused:
                raise
            except CoordinatorUnavailable as exc:
                if not away:
                    yield Interruption(back=False, reason=exc.message)
                away = True
                clock.sleep(_RETRY_S)
                continue
            for _, after, fields in entries:
                yield describe(key, after, fields)
    finally:
        exchange.close()


def _where_to_go_on(state: JobState, after: str) -> str:
    return "0-0" if _order(newest(state)) < _order(after) else after


def _order(entry_id: str) -> tuple[int, int]:
    at, _, sequence = entry_id.partition("-")
    return int(at), int(sequence or 0)
