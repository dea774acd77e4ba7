"""The ring of virtual nodes as agents compute it: how much of it each member holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dtr.ring import POINT_BITS, VIRTUAL_NODES, Ring, virtual_nodes
from dtr.state.job import JobState
from dtr.views.reading import reading

__all__ = ["Point", "RingView", "ShareView", "describe", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareView:
    """One worker's part of the ring; ``share`` is the fraction of all keys that prefer it, about 1 / workers."""

    worker: str
    virtual_nodes: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One virtual node: keys from the point before it up to ``point`` prefer ``worker``."""

    point: int
    worker: str
    node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RingView:
    """The ring of the members of a job, by name.

    ``stored`` is how many virtual nodes the sorted set ``ring`` in Redis holds for people, and ``expected`` how many it should; agents
    do not read it. ``points`` is None unless they were asked for.
    """

    job: str
    workers: tuple[ShareView, ...]
    stored: int
    expected: int
    points: tuple[Point, ...] | None


def read(state: JobState, *, points: bool = False) -> RingView:
    """The ring of the present members, with its points if asked for; empty if there are none.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    with reading(state):
        pipeline = state.redis.pipeline()
        pipeline.zrange(state.keys.members, 0, -1)
        pipeline.zcard(state.keys.ring)
        workers, stored = pipeline.execute()
    return describe(workers, job=state.job, stored=stored, points=points)


def describe(workers: list[str], *, job: str, stored: int, points: bool) -> RingView:
    """The ring of these workers."""
    expected = VIRTUAL_NODES * len(workers)
    if not workers:
        return RingView(job=job, workers=(), stored=stored, expected=expected, points=() if points else None)
    ring = Ring.of(workers)
    # The arc that ends at a point belongs to the worker there; the first one's begins behind the last point.
    arcs = np.diff(ring.points, prepend=ring.points[-1] - (1 << POINT_BITS))
    held = np.bincount(ring.owners, weights=arcs.astype(np.float64), minlength=len(ring.workers)) / float(1 << POINT_BITS)
    nodes = np.bincount(ring.owners, minlength=len(ring.workers))
    shares = tuple(
        ShareView(worker=worker, virtual_nodes=int(nodes[index]), share=round(float(held[index]), 6))
        for index, worker in enumerate(ring.workers)
    )
    return RingView(job=job, workers=shares, stored=stored, expected=expected, points=_points(ring) if points else None)


def _points(ring: Ring) -> tuple[Point, ...]:
    """In order; a worker's virtual nodes are numbered by what their point was made of."""
    numbers = {(worker, point): int(node.rpartition("#")[2]) for worker in ring.workers for node, point in virtual_nodes(worker).items()}
    return tuple(
        Point(point=int(point), worker=ring.workers[owner], node=numbers[ring.workers[owner], int(point)])
        for point, owner in zip(ring.points, ring.owners, strict=True)
    )
