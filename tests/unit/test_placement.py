"""Placement: even, minimal, written readably, and refusing what is damaged."""

from __future__ import annotations

import numpy as np
import pytest

from dtr.errors import InvalidInput, StateCorrupt
from dtr.placement import MAX_SHARDS, Placement, ShardPoints, fill, format_ranges, parse_ranges, place
from dtr.ring import Ring, points_of


def workers(count: int) -> list[str]:
    return [f"worker-{n}" for n in range(count)]


def spread(placement: Placement) -> int:
    counts = placement.counts().values()
    return max(counts) - min(counts)


def test_a_shards_point_is_the_hash_of_its_name() -> None:
    """Shard 7 of `numbers` stands at the point of `numbers/7`, whatever the data set is called."""
    assert ShardPoints.of("numbers", 8).points[7] == points_of([b"numbers/7"])[0]
    assert ShardPoints.of("a%d%%b", 8).points[7] == points_of([b"a%d%%b/7"])[0]


@pytest.mark.parametrize(("nodes", "shards"), [(1, 1), (4, 10), (7, 3), (16, 16), (30, 1_000)])
def test_every_shard_has_one_worker_and_nobody_two_more_than_another(nodes: int, shards: int) -> None:
    """The first placement is even, also with fewer shards than workers."""
    placement = place(Ring.of(workers(nodes)), ShardPoints.of("d", shards))
    assert sum(placement.counts().values()) == shards
    assert spread(placement) <= 1
    assert sorted(s for w in placement.workers for s in placement.shards_of(w)) == list(range(shards))


def test_most_shards_go_to_the_worker_that_the_ring_prefers() -> None:
    """Evenness bends the ring's order, it does not replace it."""
    ring, shards = Ring.of(workers(10)), ShardPoints.of("d", 1_000)
    placement = place(ring, shards)
    first = [next(ring.preference(f"d/{shard}")) for shard in range(1_000)]
    kept = sum(placement.workers[owner] == wish for owner, wish in zip(placement.owner, first, strict=True))
    assert kept > 800


def test_a_leave_moves_exactly_the_leavers_shards() -> None:
    """Nobody else's shard changes hands when a worker goes."""
    ring, shards = Ring.of(workers(7)), ShardPoints.of("d", 100)
    before = place(ring, shards)
    after = place(ring.changed_to(workers(7)[1:]), shards, previous=before)
    assert after.moved_from(before) == before.shards_of("worker-0")
    assert spread(after) <= 1


def test_a_join_moves_exactly_the_newcomers_share() -> None:
    """A newcomer gets floor(shards / workers), and no shard moves between the others."""
    ring, shards = Ring.of(workers(7)), ShardPoints.of("d", 100)
    before = place(ring, shards)
    after = place(ring.changed_to([*workers(7), "newcomer"]), shards, previous=before)
    assert after.moved_from(before) == after.shards_of("newcomer")
    assert len(after.shards_of("newcomer")) == 100 // 8


def test_no_change_moves_nothing() -> None:
    """Placing again from the last placement gives that placement."""
    ring, shards = Ring.of(workers(7)), ShardPoints.of("d", 100)
    before = place(ring, shards)
    assert place(ring, shards, previous=before).moved_from(before) == []


def test_nearly_half_of_the_workers_die_at_once() -> None:
    """However many leave, only what they held moves."""
    ring, shards = Ring.of(workers(50)), ShardPoints.of("d", 1_003)
    before = place(ring, shards)
    after = place(ring.changed_to(workers(50)[20:]), shards, previous=before)
    assert after.moved_from(before) == sorted(s for w in workers(20) for s in before.shards_of(w))
    assert spread(after) <= 1


def test_an_uneven_placement_is_made_even_with_the_fewest_moves() -> None:
    """A placement that someone else wrote is a fine start: only what is above quota moves."""
    uneven = Placement(workers=("a", "b"), owner=np.zeros(10, dtype=np.int32))
    after = place(Ring.of(["a", "b"]), ShardPoints.of("d", 10), previous=uneven)
    assert after.counts() == {"a": 5, "b": 5}
    assert len(after.moved_from(uneven)) == 5


def test_weights_scale_the_quotas() -> None:
    """A worker of weight 3 gets three times the shards of one with weight 1, each within one of the exact share."""
    placement = place(Ring.of(["slow", "fast", "plain"]), ShardPoints.of("d", 503), weights={"slow": 1, "fast": 3})
    for worker, share in {"slow": 503 / 5, "fast": 503 * 3 / 5, "plain": 503 / 5}.items():
        assert abs(placement.counts()[worker] - share) < 1


def test_equal_weights_are_no_weights() -> None:
    """Only the ratio of weights counts, exactly."""
    ring, shards = Ring.of(workers(9)), ShardPoints.of("d", 1_000)
    weighted = place(ring, shards, weights=dict.fromkeys(workers(9), 0.1))
    assert weighted.owner.tolist() == place(ring, shards).owner.tolist()


def test_a_new_weight_moves_only_the_difference_of_quotas() -> None:
    """Making one worker slower hands on its surplus and moves nothing else."""
    ring, shards = Ring.of(workers(4)), ShardPoints.of("d", 400)
    before = place(ring, shards)
    after = place(ring, shards, previous=before, weights={"worker-2": 0.5})
    assert after.counts()["worker-2"] == 58  # its share is 57.1, and it keeps what the rounding allows
    assert len(after.moved_from(before)) == 42


def test_a_rounded_up_share_goes_to_the_greater_remainder() -> None:
    """Given shares of 2.8 and 1.2, whatever the names, then they become 3 and 1."""
    for heavy, light in (("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")):
        assert place(Ring.of([heavy, light]), ShardPoints.of("d", 4), weights={heavy: 7, light: 3}).counts() == {heavy: 3, light: 1}


def test_a_rounded_up_share_goes_to_who_was_there_before() -> None:
    """Given 11 shards on three workers, one of them new, then the new one has 3 wherever the ring puts it."""
    for newcomer in (f"n{n}" for n in range(20)):
        before = Placement(workers=("a", "b"), owner=np.zeros(11, dtype=np.int32))
        after = place(Ring.of(["a", "b", newcomer]), ShardPoints.of("d", 11), previous=before)
        assert after.counts() == {"a": 4, "b": 4, newcomer: 3}


def test_an_exact_share_is_not_rounded_up() -> None:
    """Given shares of 1.5, 1.5 and 3, then the third keeps 3 of the 6 that it held, although keeping 4 would move less."""
    before = Placement(workers=("a", "b", "c"), owner=np.full(6, 2, dtype=np.int32))
    after = place(Ring.of(["a", "b", "c"]), ShardPoints.of("d", 6), previous=before, weights={"c": 2})
    assert after.counts()["c"] == 3


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "2", 10**400], ids=str)
def test_wrong_weights_are_refused(weight: float) -> None:
    """A weight is a positive number; the message names the worker."""
    with pytest.raises(InvalidInput, match="weight of 'a' must be a number above 0"):
        place(Ring.of(["a"]), ShardPoints.of("d", 1), weights={"a": weight})


@pytest.mark.parametrize("shards", [0, -1, MAX_SHARDS + 1, 10**8, 1.5, True])
def test_wrong_numbers_of_shards_are_refused(shards: int) -> None:
    """From 1 to the limit, which the message names."""
    with pytest.raises(InvalidInput, match=f"shards must be an integer from 1 to {MAX_SHARDS}"):
        ShardPoints.of("d", shards)


def test_a_previous_placement_of_other_shards_is_refused() -> None:
    """Moves between different sets of shards have no meaning."""
    previous = place(Ring.of(["a"]), ShardPoints.of("d", 5))
    with pytest.raises(InvalidInput, match="it has 5, expected 6"):
        place(Ring.of(["a"]), ShardPoints.of("d", 6), previous=previous)


def test_filling_needs_room_for_all() -> None:
    """Too little room is an error, not an endless search."""
    with pytest.raises(InvalidInput, match="1 for 2"):
        fill(Ring.of(["a"]), np.array([1, 2]), np.array([1]))


def test_a_stranger_has_no_shards() -> None:
    """Asking for a worker that is not placed is an error that says so."""
    with pytest.raises(InvalidInput, match="'b' is not in this placement"):
        place(Ring.of(["a"]), ShardPoints.of("d", 5)).shards_of("b")


def test_a_placement_cannot_be_changed_afterwards() -> None:
    """It is a value that may be shared."""
    with pytest.raises(ValueError, match="read-only"):
        place(Ring.of(["a"]), ShardPoints.of("d", 5)).owner[0] = 1


@pytest.mark.parametrize(
    ("shards", "text"),
    [([], ""), ([5], "5"), ([0, 1, 2, 3, 17, 40, 41], "0-3,17,40-41"), ([0, 2, 4], "0,2,4"), ([8, 9], "8-9")],
)
def test_ranges_are_readable_and_come_back(shards: list[int], text: str) -> None:
    """What stands in Redis is what a person would write."""
    assert format_ranges(np.array(shards, dtype=np.int64)) == text
    assert parse_ranges(text).tolist() == shards


@pytest.mark.parametrize(
    "text",
    ["x", "1,", ",1", "1-", "-1", "3-1", "1,1", "5,4", "1-3,3", "1 2", "1.5", "9999999", "0-9999999", "10000000000", "١"],
)
def test_damaged_ranges_are_refused(text: str) -> None:
    """Anything but ascending ranges below the limit is corrupt state."""
    with pytest.raises(StateCorrupt, match="shard ranges"):
        parse_ranges(text)


def test_a_placement_comes_back_from_its_fields() -> None:
    """Written to Redis and read again it is the same, also for workers without shards."""
    before = place(Ring.of(workers(30)), ShardPoints.of("d", 25))
    fields = before.to_fields()
    after = Placement.from_fields(dict(reversed(fields.items())), 25)
    assert after.workers == before.workers
    assert after.owner.tolist() == before.owner.tolist()
    assert "" in fields.values()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "shard 0 has no worker"),
        ({"a": "0-1", "b": "3"}, "shard 2 has no worker"),
        ({"a": "0-3", "b": "3"}, "a shard has two workers"),
        ({"a": "0-3", "b": "4"}, "worker 'b' holds shard 4, but there are 4"),
    ],
)
def test_a_placement_that_is_not_one_is_refused(fields: dict[str, str], message: str) -> None:
    """Each shard exactly once, or the state is corrupt."""
    with pytest.raises(StateCorrupt, match=message):
        Placement.from_fields(fields, 4)
