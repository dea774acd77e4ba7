"""Deterministic mode: the sequence of global batches, whatever the number of ranks, and its end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dtr.config import Settings
from dtr.errors import DataConflict, InvalidInput, ShardUnreadable
from tests.loading import damage, loading, registered

numbers = pytest.fixture(registered)


def global_batches(job: Any, steps: int | None, **options: Any) -> list[list[int]]:
    """The global batches, put together from the ranks' shares."""
    for rank in job.ranks:
        rank.seen.clear()
    job.train(steps, mode="deterministic", global_batch_size=24, **options)
    return [[i for rank in job.ranks for i in rank.seen[n][1]] for n in range(len(job.ranks[0].seen))]


@pytest.mark.parametrize("window", [64, 0])
def test_the_sequence_of_global_batches_does_not_depend_on_the_ranks(settings: Settings, numbers: Path, window: int) -> None:
    """Given 4 -> 3 -> 8 -> 1 ranks, when each goes on from the state before, then the global batches are those of 4 throughout."""
    with loading(settings, 4, names="all") as job:
        expected = global_batches(job, None, epochs=2, window=window)
    assert Counter(i for batch in expected[:17] for i in batch) == Counter(range(400))
    assert expected[:17] != expected[17:]
    found, cut = [], {}
    for ranks, steps in ((4, 7), (3, 9), (8, 5), (1, None)):
        with loading(settings, ranks, names=f"r{ranks}-") as job:
            found += global_batches(job.restored(cut), steps, epochs=2, window=window)
            cut = job.merged()
    assert found == expected


@pytest.mark.parametrize(("tail", "sizes"), [("empty", [24] * 16 + [16]), ("drop", [24] * 16), ("pad", [24] * 17)])
def test_the_tail_of_a_deterministic_epoch(settings: Settings, numbers: Path, tail: str, sizes: list[int]) -> None:
    """Given samples that are no multiple of the global batch, then the last one is short, dropped or padded, as was asked."""
    with loading(settings, 2) as job:
        assert [len(batch) for batch in global_batches(job, None, tail=tail)] == sizes


def test_a_state_of_another_sequence_is_refused(settings: Settings, numbers: Path) -> None:
    """Given a restored cursor, when the loader asks for another global batch size, then it is refused by name."""
    with loading(settings, 2, names="a") as job:
        global_batches(job, 3)
        cut = job.merged()
    with loading(settings, 2, names="b") as job, pytest.raises(DataConflict, match="global_batch_size 24, the loader 30"):
        job.restored(cut).train(mode="deterministic", global_batch_size=30)


def test_a_damaged_shard_stops_deterministic_mode(settings: Settings, numbers: Path) -> None:
    """Given a damaged shard, in deterministic mode, then no other sequence is given in its place, and the error says what to do."""
    damage(numbers / "part-2.jsonl")
    with loading(settings, 1) as job, pytest.raises(ShardUnreadable, match=r"part-2\.jsonl") as caught:
        global_batches(job, None)
    assert "dtr data skip numbers part-2.jsonl:0-25 --reason TEXT" in str(caught.value)


def test_a_batch_that_is_not_reported_is_asked_for(settings: Settings, numbers: Path) -> None:
    """Given a batch that was left out, as after a bad loss, when a later one is reported, then it is named; in order, nothing is lost."""
    with loading(settings, 1, names="a") as job:
        (rank,) = job.ranks
        loader = rank.loader(mode="deterministic", global_batch_size=40)
        rank.consume(next(loader))
        left_out, following = next(loader), next(loader)
        before = job.merged()
        for batches in (following, [following, left_out]):
            with pytest.raises(InvalidInput, match="batch 1 of epoch 0 .* was not passed to step.*left out of the optimizer step too"):
                rank.plane.consumed(batches, 1)
        assert job.merged() == before
        rank.plane.consumed([left_out, following], 1)
        assert job.merged()["numbers"]["batch"] == 3
