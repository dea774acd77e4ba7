"""Barrier rounds as Redis holds them, with the names of those who have not arrived.

Rounds are found by SCAN, limited to the job's prefix: no key lists them, because a barrier must not pay for being looked at.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import orjson

from dtr.errors import StateCorrupt
from dtr.state.job import JobState
from dtr.views.reading import Fields, reading

__all__ = ["RoundView", "RoundsView", "Seat", "describe", "read"]

OPEN: Final = "OPEN"
RELEASED: Final = "RELEASED"
_SCAN_COUNT: Final = 1000  # keys that the server looks at in one call: below a millisecond


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """An expected member of a round; ``rank`` is None if its run is not on record any more."""

    rank: int | None
    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundView:
    """One round. ``state`` is OPEN, RELEASED, BROKEN or TIMEDOUT; ``age_s`` since its first arrival.

    ``missing`` are those who have not arrived, or had not when it ended; ``current`` if its run is open, so that it can still end well.
    """

    name: str
    run: str
    seq: int
    state: str
    arrived: int
    expected: int
    age_s: float | None
    missing: tuple[Seat, ...]
    reason: str
    subset: bool
    current: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsView:
    """The rounds of a job: open ones first, then by age, the youngest first.

    Redis keeps a released round for a minute, and a failed one for an hour.
    """

    job: str
    run: str
    rounds: tuple[RoundView, ...]


def read(state: JobState, *, released: bool = False) -> RoundsView:
    """Every round that Redis still holds; those that were released only if asked for.

    Raises:
        CoordinatorRefused: this user may not SCAN.
        CoordinatorUnavailable, StateCorrupt.
    """
    keys = state.keys
    found = _find(state)
    with reading(state):
        pipeline = state.redis.pipeline()
        pipeline.hget(keys.meta, "run")
        pipeline.time()
        for name, run, seq in found:
            pipeline.hgetall(keys.barrier(name, run, seq).round)
            pipeline.smembers(keys.barrier(name, run, seq).arrived)
        runs = sorted({run for _, run, _ in found})
        for run in runs:
            pipeline.hgetall(keys.run(run))
        current, (seconds, microseconds), *replies = pipeline.execute()
    now_ms = int(seconds) * 1000 + int(microseconds) // 1000
    rosters = {run: _roster(fields) for run, fields in zip(runs, replies[2 * len(found) :], strict=True)}
    rounds = []
    for (name, run, seq), fields, arrived in zip(found, replies[: 2 * len(found) : 2], replies[1 : 2 * len(found) : 2], strict=True):
        if fields:  # it may have expired since it was found
            hashed = Fields(keys.barrier(name, run, seq).round, fields)
            rounds.append(
                describe(hashed, name=name, run=run, seq=seq, arrived=arrived, roster=rosters[run], now_ms=now_ms, current=run == current)
            )
    rounds = [found for found in rounds if released or found.state != RELEASED]
    rounds.sort(key=lambda found: (found.state != OPEN, found.age_s or 0.0, found.name, found.seq))
    return RoundsView(job=state.job, run=current or "", rounds=tuple(rounds))


def _find(state: JobState) -> list[tuple[str, str, int]]:
    prefix = state.keys.prefix
    pattern = re.compile(re.escape(prefix) + r"barrier:([^:]+):([^:]+):(\d+)")
    with reading(state):
        names = set(state.redis.scan_iter(match=f"{prefix}barrier:*", count=_SCAN_COUNT))
    return sorted((match[1], match[2], int(match[3])) for name in names if (match := pattern.fullmatch(name)))


def describe(
    fields: Fields, *, name: str, run: str, seq: int, arrived: Collection[str], roster: Mapping[str, int], now_ms: int, current: bool
) -> RoundView:
    """One round from its hash, the set of those who arrived and its run's roster (worker -> rank)."""
    state = fields.text("state")
    if not state:
        raise StateCorrupt(f"{fields.key} has no field state")
    opened_at = fields.number("opened_at")
    return RoundView(
        name=name,
        run=run,
        seq=seq,
        state=state,
        arrived=fields.integer("arrived"),
        expected=fields.integer("expected"),
        age_s=None if opened_at is None else max(0, now_ms - opened_at) / 1000,
        missing=_expected_but(arrived, fields, roster) if state == OPEN else _recorded(fields.text("missing")),
        reason=fields.text("reason"),
        subset=bool(fields.text("members")),
        current=current,
    )


def _expected_but(arrived: Collection[str], fields: Fields, roster: Mapping[str, int]) -> tuple[Seat, ...]:
    subset = fields.text("members")
    try:
        expected = [str(worker) for worker in orjson.loads(subset)] if subset else list(roster)
    except (orjson.JSONDecodeError, TypeError) as exc:
        raise StateCorrupt(f"{fields.key}: field members must be a JSON array of worker ids, got {subset[:40]!r}") from exc
    seats = (Seat(rank=roster.get(worker), worker=worker) for worker in expected if worker not in arrived)
    return tuple(sorted(seats, key=lambda seat: (seat.rank is None, seat.rank or 0, seat.worker)))


def _recorded(words: str) -> tuple[Seat, ...]:
    """The field ``missing`` of a final round: ``rank:worker`` words."""
    pairs = (word.partition(":")[::2] for word in words.split())
    return tuple(Seat(rank=int(rank) if rank.isdigit() else None, worker=worker) for rank, worker in pairs)


def _roster(fields: Mapping[str, str]) -> dict[str, int]:
    places = ((name.removeprefix("member:"), place.partition(" ")[0]) for name, place in fields.items() if name.startswith("member:"))
    return {worker: int(rank) for worker, rank in places if rank.isdigit()}
