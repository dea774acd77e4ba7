"""Samples per second of one worker: what counts as its time, and what does not."""

from __future__ import annotations

import pytest

from dtr.datasets.registering.speed import WINDOW, Speed


def consumed(speed: Speed, batches: int, *, every_s: float, start_s: float = 0.0, samples: int = 10, epoch: int = 0) -> float:
    """So many batches, the first now; returns when the next would come."""
    for n in range(batches):
        speed.consumed(epoch, samples, start_s + n * every_s)
    return start_s + batches * every_s


def test_samples_over_the_time_between_batches() -> None:
    """Ten samples every tenth of a second are a hundred a second."""
    speed = Speed()
    consumed(speed, 20, every_s=0.1)
    assert speed.samples_per_s == pytest.approx(100)


@pytest.mark.parametrize(("batches", "every_s"), [(0, 1.0), (8, 1.0), (40, 0.01)])
def test_too_little_is_no_speed(batches: int, every_s: float) -> None:
    """Less than nine batches, or half a second, tell nothing."""
    speed = Speed()
    consumed(speed, batches, every_s=every_s)
    assert speed.samples_per_s is None


def test_the_wait_for_the_end_of_an_epoch_is_not_counted() -> None:
    """Given an hour between two epochs, then the speed is that within them."""
    speed = Speed()
    after_s = consumed(speed, 10, every_s=0.1)
    consumed(speed, 10, every_s=0.1, start_s=after_s + 3600, epoch=1)
    assert speed.samples_per_s == pytest.approx(100)


def test_batches_without_samples_are_not_counted() -> None:
    """A rank that has nothing left gets empty batches in step with the others: it is not slow for that."""
    speed = Speed()
    after_s = consumed(speed, 10, every_s=0.1)
    after_s = consumed(speed, 100, every_s=1.0, start_s=after_s, samples=0)
    consumed(speed, 10, every_s=0.1, start_s=after_s)
    assert speed.samples_per_s == pytest.approx(100)


def test_waiting_within_an_epoch_is_counted() -> None:
    """Its shards take a worker as long as it takes, whatever the reason."""
    speed = Speed()
    after_s = consumed(speed, 11, every_s=0.1)
    speed.consumed(0, 10, after_s + 9.9 - 0.1)
    assert speed.samples_per_s == pytest.approx(110 / 10.8, rel=0.01)


def test_only_the_newest_batches_count() -> None:
    """Given a worker that became slow, when a window's worth of batches is through, then its speed is the new one."""
    speed = Speed()
    after_s = consumed(speed, 3 * WINDOW, every_s=0.01)
    consumed(speed, WINDOW, every_s=0.1, start_s=after_s + 0.09)
    assert speed.samples_per_s == pytest.approx(100, rel=0.01)
