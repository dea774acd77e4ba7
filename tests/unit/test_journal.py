"""What a step consumed, as rows: written and parsed, kept until a commit has them, and never taken on trust."""

from __future__ import annotations

import gzip
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr.datasets.consuming.datastate import Cursor, Dynamic
from dtr.datasets.loading.batch import Batch
from dtr.datasets.timemachine.journal import Account, Journal, Origin, Row, decode, encode, merged_accounts, parse_account
from dtr.errors import InvalidInput, StateCorrupt

DYNAMIC = Origin(version=1, digest="d", mode="dynamic")
ORDERED = Origin(version=2, digest="e", mode="deterministic", seed=7, global_batch_size=10, window=64, tail="pad", world_size=3)

spans = st.tuples(st.integers(0, 99), st.integers(0, 50), st.integers(1, 9)).map(lambda s: (s[0], s[1], s[1] + s[2]))
some = st.lists(spans, max_size=4).map(tuple)
rows = st.builds(
    Row, step=st.integers(0, 10**6), epoch=st.integers(0, 9), number=st.integers(0, 999), ranges=some, padded=some, skipped=some
)


@given(st.lists(rows, max_size=5), st.sampled_from([DYNAMIC, ORDERED]))
def test_what_is_written_is_read(held: list[Row], origin: Origin) -> None:
    """Any rows, in Redis and in the store, keep the order of their samples."""
    account = Account(origin=origin, rows=tuple(held))
    assert parse_account(orjson.loads(orjson.dumps(account.to_json()))) == account
    content = encode(job="j", run="0001-aaaa", step=9, accounts={3: {"numbers": account}, 0: {}})
    assert decode(content, "k") == {3: {"numbers": account}}
    assert encode(job="j", run="0001-aaaa", step=9, accounts={0: {}, 3: {"numbers": account}}) == content


def test_a_row_of_deterministic_mode_leaves_out_what_its_order_tells() -> None:
    """Ranges and padding follow from the order; what was skipped does not."""
    batch = Batch(
        dataset="n", version=1, run="r", epoch=1, number=2, columns={}, ranges=((0, 1, 2),), padded=((0, 3, 4),), skipped=((0, 2, 3),)
    )
    assert Row.of(5, batch, by_order=True) == Row(step=5, epoch=1, number=2, skipped=((0, 2, 3),))
    assert Row.of(5, batch, by_order=False) == Row(
        step=5, epoch=1, number=2, ranges=((0, 1, 2),), padded=((0, 3, 4),), skipped=((0, 2, 3),)
    )
    assert Row(step=5, epoch=1, number=2).to_json() == [5, 1, 2]


@pytest.mark.parametrize("tail", ["empty", "pad"])
def test_the_ranks_rows_of_an_epoch_count_its_samples_once(tail: str) -> None:
    """In deterministic mode, from the order alone: the last batch is short, or filled up with samples that were there before."""
    origin = Origin(version=1, digest="x", mode="deterministic", global_batch_size=24, window=1, tail=tail, world_size=5)
    rows = [Row(step=n, epoch=0, number=n) for n in range(5)]
    assert sum(origin.samples_of(row, rank, 100) for row in rows for rank in range(5)) == 100
    assert [origin.samples_of(rows[4], rank, 100) for rank in range(5)] == ([4, 0, 0, 0, 0] if tail == "pad" else [0, 1, 1, 1, 1])


def test_the_origin_is_that_of_the_data_state() -> None:
    """In dynamic mode a version is all that matters; in deterministic mode, the sequence and the world that shares it."""
    cursor = Cursor(version=2, digest="e", seed=7, global_batch_size=10, window=64, tail="pad", epoch=1, batch=4)
    assert Origin.of(cursor, 3) == ORDERED
    assert Origin.of(Dynamic(version=1, digest="d", seed=9), 3) == DYNAMIC
    assert [ORDERED.samples_of(Row(step=0, epoch=0, number=0, skipped=((1, 0, 1),)), rank, 99) for rank in range(3)] == [2, 2, 3]


def test_a_commit_lets_go_of_its_steps_alone() -> None:
    """Rows through the committed step are forgotten, later ones stay; nothing left is nothing to tell."""
    journal = Journal()
    for step in range(5):
        journal.add("n", DYNAMIC, Row(step=step, epoch=0, number=step))
    journal.forget(2)
    told = journal.to_json("n")
    assert told is not None and [row.step for row in parse_account(told).rows] == [3, 4]
    journal.forget(9)
    assert journal.to_json("n") is None
    assert journal.to_json("other") is None


def test_the_same_rows_told_twice_are_one() -> None:
    """Two shares overlap when a commit was slow to be known."""
    early = Account(origin=DYNAMIC, rows=tuple(Row(step=n, epoch=0, number=n) for n in (1, 2)))
    late = Account(origin=DYNAMIC, rows=tuple(Row(step=n, epoch=0, number=n) for n in (2, 3)))
    (found,) = merged_accounts([early, late])
    assert [row.step for row in found.rows] == [1, 2, 3]
    assert len(merged_accounts([early, Account(origin=ORDERED, rows=early.rows)])) == 2


@pytest.mark.parametrize(
    "row", [None, [], [1, 2], [1, 2, "3"], [-1, 0, 0], [1, 0, 0, 7], [1, 0, 0, "x:0-1"], [1, 0, 0, "1:5-2"], [1, 0, 0, "", "", "", ""]]
)
def test_a_row_that_is_none_is_refused(row: Any) -> None:
    """It is what another process wrote."""
    with pytest.raises(InvalidInput):
        Row.parse(row)
    with pytest.raises(StateCorrupt, match="journal"):
        parse_account({**DYNAMIC.to_json(), "rows": [row]})


@pytest.mark.parametrize("change", [{"mode": "other"}, {"world_size": 0}, {"global_batch_size": 0}, {"digest": 5}, {"seed": "x"}])
def test_an_origin_that_is_none_is_refused(change: dict[str, Any]) -> None:
    """As a row."""
    with pytest.raises(StateCorrupt):
        parse_account({**ORDERED.to_json(), "rows": [], **change})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", gzip.compress(b"no json", mtime=0), gzip.compress(b"[]", mtime=0), gzip.compress(b'{"version":2}', mtime=0),
        gzip.compress(b'{"version":1,"ranks":[]}', mtime=0), gzip.compress(b'{"version":1,"ranks":{"x":{}}}', mtime=0),
    ],
)  # fmt: skip
def test_a_damaged_object_is_named(content: bytes) -> None:
    """The error has its key."""
    with pytest.raises(StateCorrupt, match="journal/r/1"):
        decode(content, "journal/r/1")
