"""The ring of virtual nodes: for any key, the order in which a job's workers are preferred.

Guarantee: a ring is a pure function of its worker ids, equal in every process and on every machine, and a worker that comes or
goes changes the preference only of keys that prefer it. Each worker stands on the ring ``VIRTUAL_NODES`` times; a point is the
upper 53 bits of MurmurHash3 (x64, 128 bit, seed 0, first word) of ``WORKER#N``, so a double, and thus a Redis sorted set,
holds it exactly::

    mmh3.hash64("host-1#17", signed=False)[0] >> 11

A key belongs to the first virtual node at or after its point; after the last one comes the first. The ring alone spreads
unevenly (2 to 23 shards a worker at 1,000 workers and 10,000 shards): `dtr.placement` makes it even. Source of the idea:
Karger et al., "Consistent Hashing and Random Trees", 1997.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mmh3
import numpy as np
from numpy.typing import NDArray

from dtr import names
from dtr.errors import InvalidInput

__all__ = ["POINT_BITS", "VIRTUAL_NODES", "Ring", "points_of", "virtual_nodes"]

VIRTUAL_NODES = 150
POINT_BITS = 53  # what a double holds exactly
_SUFFIXES = tuple(b"#%d" % node for node in range(VIRTUAL_NODES))

Points = NDArray[np.int64]
Owners = NDArray[np.int32]


def points_of(keys: Iterable[bytes]) -> Points:
    """The point of each key, in the order given: an integer from 0 to 2**53 - 1."""
    digests = b"".join(map(mmh3.mmh3_x64_128_digest, keys))
    first_words = np.frombuffer(digests, dtype="<u8")[::2]
    return (first_words >> np.uint64(64 - POINT_BITS)).astype(np.int64)


def virtual_nodes(worker_id: str) -> dict[str, int]:
    """What a worker adds to the ring: virtual node (``host-1#17``) -> point."""
    encoded = worker_id.encode()
    points = points_of(encoded + suffix for suffix in _SUFFIXES)
    return {f"{worker_id}#{node}": int(point) for node, point in enumerate(points)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ring:
    """The virtual nodes of some workers in the order of their points; made by `of`, it follows changes by `changed_to`.

    ``owners[i]`` is the index in ``workers`` of the worker that stands at ``points[i]``; ``lowest[w]`` is the lowest point of
    worker w. Workers are sorted by id, and where two virtual nodes share a point the lower id stands first, so nothing depends
    on history.
    """

    workers: tuple[str, ...]
    points: Points
    owners: Owners
    lowest: Points

    @classmethod
    def of(cls, workers: Iterable[str]) -> Ring:
        """The ring of these workers, at least one, each named once."""
        ordered = _sorted_ids(workers)
        nodes = _nodes_of(ordered)
        owners = np.repeat(np.arange(len(ordered), dtype=np.int32), VIRTUAL_NODES)
        points = nodes.reshape(-1)
        return _in_order(ordered, points, owners, nodes.min(axis=1), by_point=np.argsort(points))

    def changed_to(self, workers: Iterable[str]) -> Ring:
        """The ring of these workers, equal to ``Ring.of(workers)``; only newcomers are hashed."""
        ordered = _sorted_ids(workers)
        if ordered == self.workers:
            return self
        index_of = {worker: index for index, worker in enumerate(ordered)}
        moved = np.array([index_of.get(worker, -1) for worker in self.workers], dtype=np.int32)
        known = frozenset(self.workers)
        newcomers = [worker for worker in ordered if worker not in known]
        new_index = np.array([index_of[worker] for worker in newcomers], dtype=np.int32)
        nodes = _nodes_of(newcomers)

        owners = moved[self.owners]
        stays = owners >= 0
        lowest = np.empty(len(ordered), dtype=np.int64)
        lowest[moved[moved >= 0]] = self.lowest[moved >= 0]
        lowest[new_index] = nodes.min(axis=1)
        points = np.concatenate([self.points[stays], nodes.reshape(-1)])
        owners = np.concatenate([owners[stays], np.repeat(new_index, VIRTUAL_NODES)])
        by_point = np.argsort(points, kind="stable")  # merges what is sorted already, so a change costs little
        return _in_order(ordered, points, owners, lowest, by_point=by_point)

    def preference(self, key: str) -> Iterator[str]:
        """Every worker once, the most preferred for this key first."""
        start = int(np.searchsorted(self.points, points_of([key.encode()])[0]))
        around = np.concatenate([self.owners[start:], self.owners[:start]])
        _, first_seen = np.unique(around, return_index=True)
        for position in np.sort(first_seen):
            yield self.workers[around[position]]

    def order(self) -> Owners:
        """The workers (as indices) in the order in which they first appear on the ring."""
        return np.argsort(self.lowest, kind="stable").astype(np.int32)


def _sorted_ids(workers: Iterable[str]) -> tuple[str, ...]:
    given = [names.name(worker, "worker_id") for worker in workers]
    ordered = tuple(sorted(set(given)))
    if not ordered:
        raise InvalidInput("workers must hold at least one worker id, got none", field="workers")
    if len(ordered) != len(given):
        twice = next(worker for worker in ordered if given.count(worker) > 1)
        raise InvalidInput(f"workers must name each worker once, got {twice!r} more than once", field="workers")
    return ordered


def _nodes_of(workers: Sequence[str]) -> NDArray[np.int64]:
    """One row of points for each worker."""
    keys = [encoded + suffix for encoded in map(str.encode, workers) for suffix in _SUFFIXES]
    return points_of(keys).reshape(len(workers), VIRTUAL_NODES)


def _in_order(workers: tuple[str, ...], points: Points, owners: Owners, lowest: Points, *, by_point: NDArray[np.intp]) -> Ring:
    """The ring whose nodes are in the order ``by_point``, and by worker where points are equal."""
    points, owners = points[by_point], owners[by_point]
    if np.any(points[1:] == points[:-1]):  # about once in a million rings of 1,000 workers
        by_point_and_id = np.lexsort((owners, points))
        points, owners = points[by_point_and_id], owners[by_point_and_id]
    return Ring(workers=workers, points=points, owners=owners, lowest=lowest)
