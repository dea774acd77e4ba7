"""Random histories of joins, leaves and weights against an oracle that shares no code with dtr.placement."""

from __future__ import annotations

import bisect
from collections import Counter
from fractions import Fraction
from functools import cache

import mmh3
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dtr.placement import Placement, ShardPoints, place
from dtr.ring import Ring
from dtr.weights import settled

NAMES = st.sampled_from([f"w{n}" for n in range(12)])


@cache
def point(key: str) -> int:
    return mmh3.hash64(key, signed=False)[0] >> 11


def walk(members: set[str], quota: dict[str, int], orphans: list[str]) -> dict[str, str]:
    """Step 3 of the rules, one shard and one node at a time."""
    nodes = sorted((point(f"{worker}#{n}"), worker) for worker in members for n in range(150))
    given: dict[str, str] = {}
    waiting = sorted(orphans, key=point)
    while waiting:
        open_now = {worker for worker in members if quota[worker] > 0}
        refused = []
        for shard in waiting:
            start = bisect.bisect_left(nodes, (point(shard), ""))
            asked = next(worker for _, worker in nodes[start:] + nodes[:start] if worker in open_now)
            if quota[asked] > 0:
                quota[asked] -= 1
                given[shard] = asked
            else:
                refused.append(shard)
        waiting = refused
    return given


def distance(shard: str, workers: set[str]) -> int:
    """How far before the next virtual node of one of these workers a shard stands."""
    nodes = sorted(point(f"{worker}#{n}") for worker in workers for n in range(150))
    start = point(shard)
    return (next((node for node in nodes if node >= start), nodes[0]) - start) % 2**53


def check_released(before: dict[str, str], after: dict[str, str], members: set[str]) -> None:
    """Step 2 of the rules: what a worker gave up stood nearer before a node of a worker with room than anything it kept."""
    held, holds = Counter(before.values()), Counter(after.values())
    with_room = {worker for worker in members if holds[worker] > held[worker]}
    for worker in members if with_room else ():
        given = [distance(shard, with_room) for shard in before if before[shard] == worker != after[shard]]
        kept = [distance(shard, with_room) for shard in before if before[shard] == worker == after[shard]]
        assert not given or not kept or max(given) <= min(kept)


def fewest_moves(shards: int, before: Counter[str], members: set[str], weights: dict[str, Fraction]) -> int:
    """The theoretical minimum over all placements in which each worker is within one shard of its share."""
    total = sum(weights[w] for w in members)
    share = {w: shards * weights[w] / total for w in members}
    floors = {w: int(share[w]) for w in members}
    spare = shards - sum(floors.values())
    keep = sum(min(before[w], floors[w]) for w in members)
    more = sum(before[w] > floors[w] and share[w] > floors[w] for w in members)
    return shards - keep - min(spare, more)


class Job(RuleBasedStateMachine):
    """Members come, go and change speed; after each change the shards are placed anew from the last placement."""

    shards = 0
    weighted = False

    @initialize(shards=st.integers(1, 60), first=st.sets(NAMES, min_size=1), weighted=st.booleans())
    def begin(self, shards: int, first: set[str], *, weighted: bool) -> None:
        """The first placement is the oracle's walk with the oracle's quotas."""
        self.shards, self.members, self.weighted = shards, set(first), weighted
        self.weights: dict[str, float] = {}
        self.points = ShardPoints.of("data", shards)
        self.ring = Ring.of(first)
        self.placement = place(self.ring, self.points)
        held = Counter(self.placement.counts())
        given = walk(self.members, dict(held), [f"data/{n}" for n in range(shards)])
        assert self.owners(self.placement) == given

    def owners(self, placement: Placement) -> dict[str, str]:
        return {f"data/{n}": placement.workers[owner] for n, owner in enumerate(placement.owner)}

    def exact(self) -> dict[str, Fraction]:
        """The weights of the members as placement promises to read them: to one part in 2**20 of the greatest."""
        given = {w: self.weights.get(w, 1) for w in self.members}
        return {w: Fraction(round(weight / max(given.values()) * 2**20)) for w, weight in given.items()}

    def change(self) -> None:
        """Place anew; check moves against the minimum and each orphan against the walk."""
        before = self.owners(self.placement)
        held = Counter(before.values())
        self.ring = self.ring.changed_to(self.members)
        self.placement = place(self.ring, self.points, previous=self.placement, weights=self.weights)
        after = self.owners(self.placement)
        moved = [shard for shard in before if before[shard] != after[shard]]
        assert len(moved) == fewest_moves(self.shards, held, self.members, self.exact())
        check_released(before, after, self.members)
        gained = Counter(after[shard] for shard in moved)
        assert {shard: after[shard] for shard in moved} == walk(self.members, {w: gained[w] for w in self.members}, moved)

    @rule(worker=NAMES)
    def join(self, worker: str) -> None:
        self.members.add(worker)
        self.change()

    @rule(worker=NAMES)
    @precondition(lambda self: len(self.members) > 1)
    def leave(self, worker: str) -> None:
        self.members.discard(worker)
        self.change()

    @rule(members=st.sets(NAMES, min_size=1))
    def replace_many(self, members: set[str]) -> None:
        self.members = set(members)
        self.change()

    @precondition(lambda self: self.weighted)
    @rule(worker=NAMES, weight=st.sampled_from([1, 2, 4, 8, 16]))
    def reweigh(self, worker: str, weight: int) -> None:
        """Powers of two, so that weights relative to the greatest are exact."""
        self.weights[worker] = weight
        self.change()

    @precondition(lambda self: self.weighted)
    @rule(speeds=st.dictionaries(NAMES, st.floats(0.1, 1e4)))
    def measure(self, speeds: dict[str, float]) -> None:
        """Weights of any size, as speeds make them."""
        self.weights = settled(self.weights, speeds, self.members)
        self.change()

    @invariant()
    def shares_are_exact(self) -> None:
        """Every shard once, each worker within one of its share; without weights no two differ by more than one."""
        if not self.shards:
            return
        counts = self.placement.counts()
        assert set(counts) == self.members
        assert sum(counts.values()) == self.shards
        if not self.weights:
            assert max(counts.values()) - min(counts.values()) <= 1
        exact = self.exact()
        for worker, count in counts.items():
            assert abs(count - exact[worker] * self.shards / sum(exact.values())) < 1


Job.TestCase.settings = settings(max_examples=100, stateful_step_count=12, deadline=None)
TestJob = Job.TestCase
