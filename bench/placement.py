"""How even placement is, how few shards a change moves, and what that costs, beside a plain and a capped consistent-hash ring.

Everything is measured in one process. ``ring_ms`` and ``hash_100k_ms`` are paid once and cached; ``place_ms`` and
``place_100k_ms`` are quotas and assignment from them; ``change_ms`` is one change of membership, ring included. Times are
medians; ``worst`` is the slowest. The least number of moves of each change is computed here anew, without dtr's code.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import mmh3
import numpy as np
from numpy.typing import NDArray

from bench.report import Report, parser
from dtr.placement import Placement, ShardPoints, fill, place
from dtr.ring import Ring

T = TypeVar("T")


def timed(action: Callable[[], T], rounds: int) -> tuple[T, float]:
    """The result, and the median time in milliseconds."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        result = action()
        times.append((time.perf_counter() - begun) * 1e3)
    return result, statistics.median(times)


def peak_mb() -> float:
    """The greatest resident size of this process so far, in MB (ru_maxrss would count the process that started it)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def least_moves(placement: Placement, members: Sequence[str]) -> int:
    """The fewest shards that an even placement on ``members`` must move."""
    counts = placement.counts()
    shards = sum(counts.values())
    low, more = divmod(shards, len(members))
    held = [counts.get(worker, 0) for worker in members]
    return shards - sum(min(count, low) for count in held) - min(more, sum(count > low for count in held))


def next_members(members: list[str], number: int, chance: random.Random) -> list[str]:
    """One random change: a leave, a join, or now and then several of both at once."""
    kind = chance.random()
    leaves, joins = (1, 0) if kind < 0.45 else (0, 1) if kind < 0.9 else (chance.randrange(1, 6), chance.randrange(6))
    leaves = min(leaves, len(members) - 1)
    gone = set(chance.sample(members, leaves))
    return [worker for worker in members if worker not in gone] + [f"joined-{number}-{n}" for n in range(joins)]


@dataclass(slots=True, kw_only=True)
class Changes:
    """What a series of changes did."""

    spread_max: int = 0
    excess: list[int] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)


def run_changes(ring: Ring, shards: ShardPoints, placement: Placement, changes: int, chance: random.Random) -> Changes:
    """Follow random changes of membership; each starts from the placement before."""
    seen = Changes(spread_max=spread(placement.owner, len(placement.workers)))
    members = list(ring.workers)
    for number in range(changes):
        members = next_members(members, number, chance)
        begun = time.perf_counter()
        ring = ring.changed_to(members)
        after = place(ring, shards, previous=placement)
        seen.times_ms.append((time.perf_counter() - begun) * 1e3)
        moved = len(after.moved_from(placement))
        seen.moved.append(moved)
        seen.excess.append(moved - least_moves(placement, members))
        seen.spread_max = max(seen.spread_max, spread(after.owner, len(members)))
        placement = after
    return seen


def spread(owner: NDArray[np.int32], workers: int) -> int:
    """Shards of the fullest worker less those of the emptiest."""
    counts = np.bincount(owner, minlength=workers)
    return int(counts.max() - counts.min())


def peer_of(ring: Ring, shards: ShardPoints, slack: int) -> tuple[int, int, float]:
    """A ring without memory, each worker capped at ``ceil(shards / workers) + slack``: (spread, moves of one leave, ms).

    The cap stays when a worker leaves, unless the others then have no room for all.
    """
    points = shards.points[shards.by_point]
    cap = -(-len(points) // len(ring.workers)) + slack

    def assign(on: Ring) -> NDArray[np.int32]:
        return fill(on, points, np.full(len(on.workers), max(cap, -(-len(points) // len(on.workers)))))

    before, took_ms = timed(lambda: assign(ring), 3)
    leaver = ring.workers[len(ring.workers) // 2]
    smaller = ring.changed_to([worker for worker in ring.workers if worker != leaver])
    names_before = np.array(ring.workers)[before]
    names_after = np.array(smaller.workers)[assign(smaller)]
    return spread(before, len(ring.workers)), int((names_before != names_after).sum()), took_ms


def peers(ring: Ring, shards: ShardPoints) -> dict[str, float]:
    """The plain ring, and rings capped at one above the mean and at the mean."""
    numbers: dict[str, float] = {}
    for name, slack in {"plain": len(shards.points), "capped": 1, "capped_tight": 0}.items():
        numbers[f"{name}_spread"], numbers[f"{name}_moved_by_leave"], numbers[f"{name}_place_ms"] = peer_of(ring, shards, slack)
    return numbers


def limits(ring: Ring, shards: ShardPoints, many: ShardPoints, rounds: int) -> dict[str, float]:
    """What no placement on a ring goes below: the bare hash of ready-made keys, and one look-up of each shard."""
    few_in_order, many_in_order = np.sort(shards.points), np.sort(many.points)
    ready_made = [b"data/%d" % shard for shard in range(len(many.points))]
    return {
        "hash_100k_bare_ms": timed(lambda: [mmh3.mmh3_x64_128_digest(key) for key in ready_made], rounds)[1],
        "lookup_ms": timed(lambda: np.searchsorted(ring.points, few_in_order), rounds)[1],
        "lookup_100k_ms": timed(lambda: np.searchsorted(ring.points, many_in_order), rounds)[1],
    }


def measure(*, workers: int, shards: int, many_shards: int, changes: int, rounds: int, seed: int) -> Report:
    """The whole benchmark."""
    members = [f"worker-{n}" for n in range(workers)]
    ring, ring_ms = timed(lambda: Ring.of(members), rounds)
    few = ShardPoints.of("data", shards)
    many, hash_ms = timed(lambda: ShardPoints.of("data", many_shards), rounds)
    placement, place_ms = timed(lambda: place(ring, few), rounds)
    placement_many, place_many_ms = timed(lambda: place(ring, many), rounds)
    seen = run_changes(ring, few, placement, changes, random.Random(seed))
    figures = {
        "spread_max": max(seen.spread_max, spread(placement_many.owner, workers)),
        "moved_excess_max": max(seen.excess),
        "moved_mean": statistics.fmean(seen.moved),
        "ring_ms": ring_ms,
        "hash_100k_ms": hash_ms,
        "place_ms": place_ms,
        "place_100k_ms": place_many_ms,
        "change_ms": statistics.median(seen.times_ms),
        "change_worst_ms": max(seen.times_ms),
        "peak_mb": peak_mb(),  # before the peers run
    }
    limit, peer = limits(ring, few, many, rounds), peers(ring, few)
    return Report(
        name="placement",
        params={
            "workers": workers,
            "shards": shards,
            "many_shards": many_shards,
            "changes": changes,
            "rounds": rounds,
            "seed": seed,
        },
        figures=figures,
        limit=limit,
        peer=peer,
        ratios={
            "hash_over_bare": hash_ms / limit["hash_100k_bare_ms"],
            "place_over_lookup": place_ms / limit["lookup_ms"],
            "place_100k_over_lookup": place_many_ms / limit["lookup_100k_ms"],
            "place_over_plain": place_ms / peer["plain_place_ms"],
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its report; the exit status is 0."""
    flags = parser("placement", (__doc__ or "").partition("\n")[0])
    flags.add_argument("--workers", type=int, default=1_000)
    flags.add_argument("--shards", type=int, default=10_000)
    flags.add_argument("--many-shards", type=int, default=100_000, help="for hash_100k_ms and place_100k_ms")
    flags.add_argument("--changes", type=int, default=200)
    flags.add_argument("--rounds", type=int, default=7, help="repetitions behind each median")
    given = flags.parse_args(argv)
    measure(
        workers=given.workers,
        shards=given.shards,
        many_shards=given.many_shards,
        changes=given.changes,
        rounds=given.rounds,
        seed=given.seed,
    ).emit(as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
