"""What a trainer may report, in which order, and that a refused report counts nothing."""

from __future__ import annotations

import pytest

from dtr.datasets.consuming.consumption import Consumption
from dtr.datasets.consuming.datastate import Cursor, Dynamic
from dtr.datasets.loading.batch import Batch, SampleRange
from dtr.errors import InvalidInput

CURSOR = Cursor(version=1, digest="d", seed=0, global_batch_size=10, window=0, tail="empty", epoch=0, batch=1)
BATCHES = 3  # of an epoch


def batch(epoch: int, number: int, *ranges: SampleRange) -> Batch:
    return Batch(dataset="n", version=1, run="r", epoch=epoch, number=number, columns={}, ranges=ranges)


def test_batches_of_deterministic_mode_are_reported_one_after_the_other() -> None:
    """From the cursor on, over the end of the epoch."""
    held = Consumption(CURSOR, lambda _: 10, BATCHES)
    for epoch, number in ((0, 1), (0, 2), (1, 0)):
        held.consume(batch(epoch, number))
    state = held.state()
    assert isinstance(state, Cursor) and (state.epoch, state.batch) == (1, 1)


@pytest.mark.parametrize(
    ("reported", "missing"),
    [
        ([(0, 2)], "batch 1 of epoch 0"),
        ([(0, 1), (1, 0)], "batch 2 of epoch 0"),
        ([(0, 1), (0, 2), (1, 1)], "batch 0 of epoch 1"),
    ],
)
def test_a_batch_that_was_left_out_is_named(reported: list[tuple[int, int]], missing: str) -> None:
    """The cursor could not say that it is missing: in the epoch, at its end, and at the next one's start."""
    held = Consumption(CURSOR, lambda _: 10, BATCHES)
    with pytest.raises(InvalidInput, match=f"{missing} .* was not passed to step"):
        held.check([batch(*at) for at in reported])
    for at in reported[:-1]:
        held.consume(batch(*at))
    with pytest.raises(InvalidInput, match=f"{missing} .* was not passed to step"):
        held.check([batch(*reported[-1])])


@pytest.mark.parametrize("start", [CURSOR, Dynamic(version=1, digest="d", seed=0)], ids=["deterministic", "dynamic"])
def test_the_same_batch_twice_is_refused_before_it_counts(start: Cursor | Dynamic) -> None:
    """Also within one list, and an empty one."""
    held = Consumption(start, lambda _: 10, BATCHES)
    before = held.state()
    for one in (batch(0, 1, (0, 0, 5)), batch(0, 1)):
        with pytest.raises(InvalidInput, match="reported before"):
            held.check([one, one])
    assert held.state() == before
