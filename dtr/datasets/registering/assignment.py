"""Which shards of a data set belong to which rank of a run. Owns ``placement:NAME`` and ``placement:NAME:GENERATION``.

Guarantees: all ranks of a run read one placement; it is computed once per run, by one member, from the placement installed before and the
measured speeds of that moment, so that only the shards of whoever departed move, what a newcomer gets, and what a worker of another speed
than before has too much of; weights are installed with the shards they led to; a process outside the run cannot install one.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dtr import weights
from dtr.datasets.registering.spec import DatasetSpec
from dtr.datasets.registering.speed import speeds
from dtr.errors import StateCorrupt
from dtr.placement import Placement, ShardPoints, parse_ranges, place
from dtr.ring import Ring
from dtr.session import Session
from dtr.state.client import translate

__all__ = ["Assignment"]

log = logging.getLogger(__name__)

SETTLE_S = 0.2  # a change seldom comes alone
LEASE_S = 5.0  # then another member may compute it
POLL_S = 0.05
_MAX_ATTEMPTS = 10


@dataclass(slots=True, kw_only=True)
class Assignment:
    """Keeps what placing again can reuse: the last ring, and the points of the last data set's shards."""

    _ring: Ring | None = field(default=None, init=False)
    _points: tuple[str, int, ShardPoints] | None = field(default=None, init=False)

    def alone(self, spec: DatasetSpec, rank: int, world_size: int) -> list[int]:
        """The shards of one rank where there is no run: the placement of ``rank-0``, ``rank-1``, ... from nothing."""
        ring = self._ring_of(f"rank-{n}" for n in range(world_size))
        return place(ring, self._points_of(spec)).shards_of(f"rank-{rank}")

    def in_run(self, session: Session, spec: DatasetSpec, worker_id: str) -> list[int]:
        """The shards of one worker of the session's run.

        Waits until the run's placement is installed, by this member or another; ends early only when the run does.

        Raises:
            RosterChanged, StaleIncarnation, StateLost: the run ended, or this member is not in it.
            StateCorrupt: the placement in Redis is not readable.
            CoordinatorUnavailable: Redis cannot be reached.
        """
        members = _digest(session.run.roster)
        for _ in range(_MAX_ATTEMPTS):
            answer = self._installed_or_claimed(session, spec, worker_id, members)
            if answer[0] == "installed":
                shards: list[int] = parse_ranges(answer[1]).tolist()
                return shards
            _, parent, version, grandparent = answer
            self._compute(session, spec, members, parent=parent, parent_version=version, grandparent=grandparent)
        raise StateCorrupt(f"the placement of data set {spec.name!r} in Redis has no readable entry for worker {worker_id!r}")

    def _installed_or_claimed(self, session: Session, spec: DatasetSpec, worker_id: str, members: str) -> Any:
        """The claim's answer once it is not ``wait``: another member computes and needs a moment."""
        state, run, who = session.state, session.run, session.identity
        keys = [
            state.keys.meta,
            state.keys.roster,
            state.keys.placement(spec.name),
            state.keys.placement(spec.name, run.generation),
        ]
        args = [
            who.state_id, run.id, who.worker_id, run.rank, who.incarnation,
            run.generation, spec.version, members, worker_id, int(LEASE_S * 1000),
        ]  # fmt: skip
        while True:
            answer = session.guarded(lambda: state.call("placement_claim", keys, args))
            if answer[0] != "wait":
                return answer
            until_settled_s = SETTLE_S - int(answer[1]) / 1000
            session.clock.sleep(max(until_settled_s, 0) + POLL_S * random.uniform(0.5, 1.5))

    def _compute(self, session: Session, spec: DatasetSpec, members: str, *, parent: str, parent_version: str, grandparent: str) -> None:
        state, run, who = session.state, session.run, session.identity
        previous, before = None, dict[str, float]()
        if parent and parent_version == str(spec.version):
            previous, before = _read(session, spec, int(parent))
            session.clock.sleep(SETTLE_S)
        by_speed = session.settings.data_weights == "speed"
        settled = weights.settled(before, speeds(session, spec.name, run.roster), run.roster) if by_speed else {}
        placement = place(self._ring_of(run.roster), self._points_of(spec), previous=previous, weights=settled)
        moved = len(placement.moved_from(previous)) if previous is not None else spec.shards
        fields = [text for pair in (placement.to_fields() | weights.to_fields(settled)).items() for text in pair]
        keys = [
            state.keys.meta,
            state.keys.roster,
            state.keys.placement(spec.name),
            state.keys.placement(spec.name, run.generation),
            state.keys.placement(spec.name, int(grandparent or run.generation)),
            state.keys.events,
        ]
        args = [
            who.state_id, run.id, who.worker_id, run.rank, who.incarnation, spec.name,
            parent, grandparent, run.generation, spec.version, members, moved, *fields,
        ]  # fmt: skip
        verdict = session.guarded(lambda: state.call("placement_install", keys, args))
        log.info(
            "data set %s: placement of generation %d %s, %d of %d shards moved", spec.name, run.generation, verdict, moved, spec.shards
        )

    def _ring_of(self, workers: Iterable[str]) -> Ring:
        self._ring = Ring.of(workers) if self._ring is None else self._ring.changed_to(workers)
        return self._ring

    def _points_of(self, spec: DatasetSpec) -> ShardPoints:
        known = self._points
        if known is None or known[:2] != (spec.name, spec.shards):
            known = self._points = (spec.name, spec.shards, ShardPoints.of(spec.name, spec.shards))
        return known[2]


def _read(session: Session, spec: DatasetSpec, generation: int) -> tuple[Placement | None, dict[str, float]]:
    """An installed placement and the weights in force; neither if it is damaged: then shards are placed anew, and that is logged."""
    with translate(session.state.url):
        fields: Any = session.state.redis.hgetall(session.state.keys.placement(spec.name, generation))
    try:
        shards = {worker: held for worker, held in fields.items() if not weights.is_field(worker)}
        return Placement.from_fields(shards, spec.shards), weights.from_fields(fields)
    except StateCorrupt as exc:
        log.warning("data set %s: generation %d cannot be the start of the next placement: %s", spec.name, generation, exc)
        return None, {}


def _digest(workers: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(workers)).encode()).hexdigest()[:16]
