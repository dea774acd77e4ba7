"""What the ledger's fields say of each shard: pure."""

from __future__ import annotations

import pytest

from dtr.errors import StateCorrupt
from dtr.views.data_progress import ShardView, tally
from dtr.views.reading import Fields
from tests.unit.test_skips import dataset


def told(**facts: object) -> dict[int, ShardView]:
    """Shards of 10, 10, 5 and 7 samples."""
    given = {"taken": "0000", "done": "0000", "quarantined": set(), "partial": {}, "skipped": {}, "fields": {}, **facts}
    flags = {key: [mark == "1" for mark in str(given.pop(key))] for key in ("taken", "done")}
    shards = tally(dataset(), Fields("ledger:n:0:r", given.pop("fields")), **flags, **given)  # type: ignore[arg-type]
    return {shard.shard: shard for shard in shards}


def states(found: dict[int, ShardView]) -> list[tuple[str, int, int]]:
    return [(shard.state, shard.consumed, shard.skipped) for shard in found.values()]


def test_done_before_the_run_and_in_it() -> None:
    """Taken and leased by nobody is done before; a bit of its own says in this run; the rest is free."""
    assert states(told(taken="1100", done="0100")) == [("done", 10, 0), ("done", 10, 0), ("free", 0, 0), ("free", 0, 0)]


def test_what_is_leased_counts_what_went_out_once() -> None:
    """Sums, newest batches and what was consumed before the run may tell the same samples."""
    fields = {"lease/0": "w 1 1", "part/0": "0-4", "out/0/3": "0:4-6 1:0-1", "lease/1": "v 1 2"}
    found = told(taken="1100", fields=fields, partial={1: ((0, 3),), 3: ((0, 2),)})
    assert states(found) == [("leased", 6, 0), ("leased", 3, 0), ("free", 0, 0), ("free", 2, 0)]
    assert [shard.worker for shard in found.values()] == ["w", "v", "", ""]


def test_what_is_skipped_is_not_waited_for() -> None:
    """A lease of which nothing is left is done, also if all of the shard is skipped; what was consumed before is not skipped."""
    fields = {"lease/0": "w 1 1", "out/0/0": "0:0-8", "lease/2": "w 1 2"}
    found = told(taken="1010", fields=fields, skipped={0: ((7, 10),), 2: ((0, 5),), 3: ((0, 7),)})
    assert states(found) == [("done", 8, 2), ("free", 0, 0), ("done", 0, 5), ("free", 0, 7)]


def test_what_cannot_be_read_is_in_quarantine() -> None:
    """Whether it was found so in this run, or before; what was consumed of it before counts."""
    assert states(told(taken="1000", quarantined={0, 2}, partial={0: ((0, 4),)}))[:3] == [
        ("quarantined", 4, 0), ("free", 0, 0), ("quarantined", 0, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("fields", [{"part/x": "0-4"}, {"part/1": "4-0"}, {"out/0/1": "x:0-4"}, {"out/0/1": "1:0"}])
def test_a_damaged_ledger_is_named(fields: dict[str, str]) -> None:
    """Rather than counted wrongly."""
    with pytest.raises(StateCorrupt, match="ledger"):
        told(fields=fields)
