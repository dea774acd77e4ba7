"""Which worker holds which shard: even, and moving no more than a change requires.

Guarantee, for any history of changes: every shard has one worker; with equal weights two workers differ by at most one
shard, with weights each worker is within one shard of its exact share; and no placement as even as this one would move fewer
shards. So a leave moves the leaver's shards only, and a join moves exactly ``floor(shards / workers after the join)`` (equal
weights).

The result is a pure function of (workers, shards, weights, previous placement), the same in every process. Weights come from
:mod:`dtr.weights`, out of one reading that is made once in a run (:mod:`dtr.datasets.registering.speed`). In steps:

1. *Quotas.* Each worker's exact share, rounded down. The shards left over go one each to workers that hold more than their
   rounded share already (so they keep it), then to those that were there before, then by remainder, then in ring order.
2. *Release.* What departed workers held is free. A worker above its quota frees the shards nearest before a virtual node of
   one that has room: those which the ring would hand over.
3. *Fill*, in rounds: every free shard asks the first worker at or after its point that has room; each worker takes what it
   has room for, in the order of the shards' points; the others ask on.

Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2018) caps the ring instead; a cap leaves 3 to 11
shards a worker where this leaves 10 to 10, and a tight cap moves hundreds of shards for one leaver (`bench/placement.py` shows
both).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtr import names
from dtr.errors import InvalidInput, StateCorrupt
from dtr.ring import Ring, points_of

__all__ = ["MAX_SHARDS", "Placement", "ShardPoints", "fill", "format_ranges", "parse_ranges", "place"]

MAX_SHARDS = 1_000_000
_WEIGHT_UNITS = 1 << 20  # the heaviest worker's weight in integer units: shares are then exact, without rounding of floats
_MAX_WEIGHT = 1e12
_RANGES = re.compile(r"\d{1,7}(-\d{1,7})?(,\d{1,7}(-\d{1,7})?)*", re.ASCII)

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardPoints:
    """The points on the ring of a data set's shards ``NAME/0``, ``NAME/1``, ...; hashed once, used for every placement.

    ``points[i]`` belongs to shard i; ``by_point`` lists the shards in the order of their points.
    """

    points: Int64s
    by_point: Int32s

    @classmethod
    def of(cls, name: str, shards: int) -> ShardPoints:
        """The points of ``shards`` shards of the data set ``name``."""
        names.positive(shards, "shards", MAX_SHARDS)
        prefix = name.encode().replace(b"%", b"%%") + b"/%d"
        points = points_of([prefix % shard for shard in range(shards)])
        return cls(points=points, by_point=np.argsort(points, kind="stable").astype(np.int32))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """The worker of every shard: shard i belongs to ``workers[owner[i]]``. Workers are sorted by id."""

    workers: tuple[str, ...]
    owner: Int32s

    def counts(self) -> dict[str, int]:
        """Worker -> number of its shards; a worker without any has 0."""
        return dict(zip(self.workers, np.bincount(self.owner, minlength=len(self.workers)).tolist(), strict=True))

    def shards_of(self, worker_id: str) -> list[int]:
        """The shards of one worker in ascending order. Raises InvalidInput if the worker has no place here."""
        if worker_id not in self.workers:
            raise InvalidInput(f"worker_id {worker_id!r} is not in this placement of {len(self.workers)} workers", field="worker_id")
        found: list[int] = np.flatnonzero(self.owner == self.workers.index(worker_id)).tolist()
        return found

    def moved_from(self, previous: Placement) -> list[int]:
        """The shards whose worker differs from that in ``previous``, in ascending order."""
        before = _reindexed(previous, self.workers)
        moved: list[int] = np.flatnonzero(before != self.owner).tolist()
        return moved

    def to_fields(self) -> dict[str, str]:
        """As it stands in Redis: worker -> its shards as ranges, ``0-3,17,40-41``, or nothing for none."""
        by_worker = np.argsort(self.owner, kind="stable")
        ends = np.cumsum(np.bincount(self.owner, minlength=len(self.workers)))[:-1]
        return {worker: format_ranges(held) for worker, held in zip(self.workers, np.split(by_worker, ends), strict=True)}

    @classmethod
    def from_fields(cls, fields: Mapping[str, str], shards: int) -> Placement:
        """What `to_fields` wrote, for so many shards. Raises StateCorrupt unless each shard is placed exactly once."""
        workers = tuple(sorted(fields))
        owner = np.full(shards, -1, dtype=np.int32)
        placed = 0
        for index, worker in enumerate(workers):
            held = parse_ranges(fields[worker])
            if held.size and held[-1] >= shards:
                raise StateCorrupt(f"placement: worker {worker!r} holds shard {held[-1]}, but there are {shards} shards")
            owner[held] = index
            placed += held.size
        missing = np.flatnonzero(owner < 0)
        if missing.size or placed != shards:
            what = f"shard {missing[0]} has no worker" if missing.size else "a shard has two workers"
            raise StateCorrupt(f"placement: {what} ({placed} placed, {shards} expected)")
        owner.flags.writeable = False
        return cls(workers=workers, owner=owner)


def place(ring: Ring, shards: ShardPoints, *, previous: Placement | None = None, weights: Mapping[str, float] | None = None) -> Placement:
    """Place the shards on the ring's workers, starting from ``previous`` where there was one of as many shards.

    ``weights`` gives a worker's share relative to the others' (a positive number; 1 where none is given; read to one part in a
    million of the greatest). Raises InvalidInput for weights that are not such numbers and for a ``previous`` of other shards.
    """
    count = len(shards.points)
    if previous is None:
        owner = np.full(count, -1, dtype=np.int32)
        newcomer = np.zeros(len(ring.workers), dtype=np.bool_)
    else:
        if len(previous.owner) != count:
            raise InvalidInput(f"previous must place the same shards: it has {len(previous.owner)}, expected {count}", field="previous")
        owner = _reindexed(previous, ring.workers)
        known = frozenset(previous.workers)
        newcomer = np.array([worker not in known for worker in ring.workers])
    held = np.bincount(owner[owner >= 0], minlength=len(ring.workers))
    quota = _quotas(count, held, newcomer, ring.order(), _units(ring.workers, weights))
    _release(owner, ring, shards.points, surplus=np.maximum(held - quota, 0), room=quota > held)
    free = shards.by_point[owner[shards.by_point] < 0]
    owner[free] = fill(ring, shards.points[free], np.maximum(quota - held, 0))
    owner.flags.writeable = False
    return Placement(workers=ring.workers, owner=owner)


def fill(ring: Ring, points: Int64s, room: Int64s) -> Int32s:
    """The worker (as an index) of each point, as the rounds of step 3 settle it.

    ``points`` are sorted; ``room[w]`` is how many worker w takes, together at least as many as there are points.
    """
    if room.sum() < len(points):
        raise InvalidInput(f"room must suffice for all shards: {room.sum()} for {len(points)}", field="room")
    room = room.copy()
    nodes, owners = ring.points, ring.owners
    chosen = np.full(len(points), -1, dtype=np.int32)
    waiting = np.arange(len(points))
    while waiting.size:
        open_nodes = np.flatnonzero(room[owners] > 0)  # indexing by numbers: by a mask it takes four times as long
        nodes, owners = nodes[open_nodes], owners[open_nodes]
        asked = owners[np.searchsorted(nodes, points[waiting]) % len(nodes)]
        taken = _rank_within(asked, len(room)) < room[asked]
        chosen[waiting[taken]] = asked[taken]
        room -= np.bincount(asked[taken], minlength=len(room))
        waiting = waiting[~taken]
    return chosen


def _rank_within(groups: Int32s, count: int) -> Int64s:
    """For each element, how many earlier elements are of its group; groups are 0..count-1."""
    narrow = groups.astype(np.uint16) if count <= 1 << 16 else groups  # numpy sorts 16 bits by radix: ten times faster
    by_group = np.argsort(narrow, kind="stable")
    sizes = np.bincount(groups, minlength=count)
    starts = np.cumsum(sizes) - sizes
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[by_group] = np.arange(len(groups)) - np.repeat(starts, sizes)
    return ranks


def _reindexed(placement: Placement, workers: tuple[str, ...]) -> Int32s:
    """The owners of a placement as indices into other ``workers``, -1 where the owner is not among them. A new array."""
    index_of = {worker: index for index, worker in enumerate(workers)}
    moved = np.array([index_of.get(worker, -1) for worker in placement.workers], dtype=np.int32)
    reindexed: Int32s = moved[placement.owner]
    return reindexed


def _units(workers: tuple[str, ...], weights: Mapping[str, float] | None) -> Int64s:
    """The weights as integers."""
    if not weights:
        return np.ones(len(workers), dtype=np.int64)
    for worker, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= _MAX_WEIGHT:
            raise InvalidInput(
                f"weights: the weight of {worker!r} must be a number above 0 and up to {_MAX_WEIGHT:g}, got {weight!r}",
                field="weights",
            )
    given = np.array([float(weights.get(worker, 1.0)) for worker in workers])
    units: Int64s = np.rint(given / given.max() * _WEIGHT_UNITS).astype(np.int64)
    return units


def _quotas(count: int, held: Int64s, newcomer: NDArray[np.bool_], ring_order: Int32s, units: Int64s) -> Int64s:
    total = int(units.sum())
    quota: Int64s = count * units // total
    remainder = count * units % total
    left_over = count - int(quota.sum())
    ring_rank = np.empty(len(units), dtype=np.int64)
    ring_rank[ring_order] = np.arange(len(units))
    by_claim = np.lexsort((ring_rank, -remainder, newcomer, held <= quota, remainder == 0))
    quota[by_claim[:left_over]] += 1
    return quota


def _release(owner: Int32s, ring: Ring, points: Int64s, *, surplus: Int64s, room: NDArray[np.bool_]) -> None:
    """Set to -1 the owner of as many shards of each worker as its surplus says, nearest first before a node with room."""
    if not surplus.any():
        return
    movable = np.flatnonzero((owner >= 0) & (surplus > 0)[owner])  # owner -1 reads the last worker's surplus, and is masked
    nodes = ring.points[room[ring.owners]]
    position = np.searchsorted(nodes, points[movable])
    wrap = np.where(position == len(nodes), 1 << 53, 0)
    distance = nodes[position % len(nodes)] + wrap - points[movable]
    nearest_first = movable[np.argsort(distance, kind="stable")]
    holder = owner[nearest_first]
    owner[nearest_first[_rank_within(holder, len(surplus)) < surplus[holder]]] = -1


def format_ranges(shards: NDArray[np.signedinteger]) -> str:
    """Ascending shard numbers as text: ``0-3,17,40-41``."""
    if not len(shards):
        return ""
    breaks = np.flatnonzero(np.diff(shards) != 1) + 1
    firsts = shards[np.concatenate([[0], breaks])].tolist()
    lasts = shards[np.concatenate([breaks, [len(shards)]]) - 1].tolist()
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def parse_ranges(text: str) -> Int64s:
    """What `format_ranges` wrote. Raises StateCorrupt for anything else: shards must ascend and be below `MAX_SHARDS`."""
    if not text:
        return np.empty(0, dtype=np.int64)
    if not _RANGES.fullmatch(text):
        raise StateCorrupt(f"placement: expected shard ranges such as 0-3,17, got {text[:80]!r}")
    parts = [part.partition("-") for part in text.split(",")]
    firsts = np.array([int(first) for first, _, _ in parts])
    lasts = np.array([int(last or first) for first, _, last in parts])
    if lasts[-1] >= MAX_SHARDS or np.any(lasts < firsts) or np.any(firsts[1:] <= lasts[:-1]):
        raise StateCorrupt(f"placement: shard ranges must ascend and end below {MAX_SHARDS}, got {text[:80]!r}")
    lengths = lasts - firsts + 1
    starts = np.cumsum(lengths) - lengths
    shards: Int64s = np.repeat(firsts - starts, lengths) + np.arange(lengths.sum())
    return shards
