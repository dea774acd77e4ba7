"""The ring: the same everywhere, changed only where a worker came or went, and honest about the points it publishes."""

from __future__ import annotations

import os
import subprocess
import sys

import mmh3
import numpy as np
import pytest

from dtr import ring as ring_module
from dtr.errors import InvalidInput
from dtr.ring import POINT_BITS, VIRTUAL_NODES, Ring, points_of, virtual_nodes

WORKERS = [f"host-{n}" for n in range(40)]


def facts(ring: Ring) -> list[tuple[int, str]]:
    return [(int(point), ring.workers[owner]) for point, owner in zip(ring.points, ring.owners, strict=True)]


def test_a_virtual_node_stands_where_the_documentation_says() -> None:
    """Anyone can compute a point with mmh3 alone, as the module's docstring shows."""
    nodes = virtual_nodes("host-1")
    assert list(nodes) == [f"host-1#{n}" for n in range(VIRTUAL_NODES)]
    assert nodes["host-1#17"] == mmh3.hash64("host-1#17", signed=False)[0] >> 11


def test_a_double_holds_every_point() -> None:
    """Redis keeps scores as doubles; none of the points is rounded."""
    points = points_of(b"%d" % n for n in range(10_000))
    assert points.min() >= 0
    assert points.max() < 2**POINT_BITS
    assert [int(float(p)) for p in points.tolist()] == points.tolist()


def test_the_ring_holds_every_virtual_node_in_order_of_points() -> None:
    """The ring is exactly the sorted union of its workers' virtual nodes."""
    expected = sorted((point, worker) for worker in WORKERS for point in virtual_nodes(worker).values())
    assert facts(Ring.of(WORKERS)) == expected


def test_the_order_in_which_workers_are_named_does_not_matter() -> None:
    """Two processes that list the members differently have one ring."""
    assert facts(Ring.of(reversed(WORKERS))) == facts(Ring.of(WORKERS))


@pytest.mark.parametrize(
    "after",
    [WORKERS[1:], [*WORKERS, "a-newcomer", "z-newcomer"], ["other", *WORKERS[5:30]], ["all", "new"], WORKERS[:1]],
    ids=["leave", "join", "both", "replaced", "one left"],
)
def test_a_changed_ring_equals_one_built_anew(after: list[str]) -> None:
    """Following changes is only quicker, never different."""
    changed, fresh = Ring.of(WORKERS).changed_to(after), Ring.of(after)
    assert facts(changed) == facts(fresh)
    assert changed.workers == fresh.workers
    assert changed.lowest.tolist() == fresh.lowest.tolist()
    assert changed.order().tolist() == fresh.order().tolist()


def test_an_unchanged_membership_keeps_the_ring() -> None:
    """The same members in another order are the same ring, without work."""
    ring = Ring.of(WORKERS)
    assert ring.changed_to(reversed(WORKERS)) is ring


def test_workers_that_share_a_point_stand_in_order_of_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where hashes collide the ids decide, however the ring came about."""
    monkeypatch.setattr(ring_module, "points_of", lambda keys: np.arange(len(list(keys)), dtype=np.int64) % VIRTUAL_NODES)
    fresh = Ring.of(["a", "b", "c"])
    assert [w for _, w in facts(fresh)][:6] == ["a", "b", "c", "a", "b", "c"]
    assert facts(Ring.of(["b", "c"]).changed_to(["a", "b", "c"])) == facts(fresh)


def test_preference_walks_the_ring_from_the_keys_point() -> None:
    """Each worker appears once, in the order of its first virtual node at or after the key."""
    ring = Ring.of(WORKERS)
    point = mmh3.hash64("numbers/7", signed=False)[0] >> 11
    walk = sorted(facts(ring), key=lambda node: (node[0] < point, node[0]))
    assert list(ring.preference("numbers/7")) == list(dict.fromkeys(worker for _, worker in walk))


def test_a_key_keeps_its_first_worker_unless_that_one_leaves() -> None:
    """Consistent hashing: a leave changes the first choice of the leaver's keys only."""
    ring = Ring.of(WORKERS)
    after = ring.changed_to(WORKERS[1:])
    first = {key: next(ring.preference(key)) for key in (f"key-{n}" for n in range(300))}
    assert "host-0" in first.values()
    assert all(next(after.preference(key)) == worker for key, worker in first.items() if worker != "host-0")


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ([], "at least one worker id"),
        (["a", "b", "a"], "'a' more than once"),
        (["a", "B C"], "worker_id must be 1 to 63 characters"),
        (["a", 3], "worker_id must be 1 to 63 characters"),
        (["é"], "worker_id must be 1 to 63 characters"),
    ],
)
def test_wrong_workers_are_refused(workers: list[str], message: str) -> None:
    """A ring needs distinct, well-formed ids; the message names the one that is not."""
    with pytest.raises(InvalidInput, match=message):
        Ring.of(workers)
    with pytest.raises(InvalidInput, match=message):
        Ring.of(WORKERS).changed_to(workers)


def test_another_process_has_the_same_ring() -> None:
    """Nothing depends on the hash seed of the interpreter."""
    code = "from dtr.ring import Ring; r = Ring.of({f'host-{n}' for n in range(40)}); print(r.workers, r.points, r.owners[:99])"

    def output(seed: str) -> bytes:
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=True).stdout

    assert output("1") == output("2")
