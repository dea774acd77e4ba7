"""The order of an epoch: a permutation, fixed for ever by (seed, epoch, count)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dtr.datasets.loading.shuffle import epoch_order
from dtr.errors import InvalidInput

MASK = 2**64 - 1


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_the_order_is_the_documented_one() -> None:
    """A plain Python rendering of the docstring gives the same order."""
    key = mix((mix(7) + 3) & MASK)
    outputs = [mix((key + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i in range(1_000)]
    assert epoch_order(7, 3, 1_000).tolist() == sorted(range(1_000), key=outputs.__getitem__)


def test_the_order_never_changes() -> None:
    """A job that resumes with a later dtr or numpy finds its epoch as it left it."""
    assert epoch_order(0, 0, 10).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]
    assert epoch_order(0, 1, 10).tolist() == [7, 4, 8, 1, 2, 6, 5, 0, 9, 3]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 4_097])
def test_each_index_comes_once(count: int) -> None:
    """An epoch has every shard, exactly once."""
    assert sorted(epoch_order(1, 2, count).tolist()) == list(range(count))


def test_seed_and_epoch_both_matter_and_do_not_mix() -> None:
    """Other numbers give other orders; (seed 1, epoch 0) is not (seed 0, epoch 1)."""
    orders = {tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_every_order_of_three_is_about_equally_likely() -> None:
    """6,000 epochs: each of the 6 orders about 1,000 times (5 standard deviations are 144)."""
    counts = Counter(tuple(epoch_order(11, epoch, 3).tolist()) for epoch in range(6_000))
    assert len(counts) == 6
    assert all(abs(count - 1_000) < 144 for count in counts.values())


def test_no_place_is_preferred() -> None:
    """Over many epochs an index comes as often early as late."""
    mean = np.mean([np.argsort(epoch_order(3, epoch, 20)) for epoch in range(2_000)], axis=0)
    assert np.all(np.abs(mean - 9.5) < 0.7)


@pytest.mark.parametrize(
    ("seed", "epoch", "field"), [(-1, 0, "seed"), (0, -1, "epoch"), (0, 1.5, "epoch"), (True, 0, "seed"), (2**53, 0, "seed")]
)
def test_wrong_numbers_are_refused(seed: int, epoch: int, field: str) -> None:
    """Seed and epoch are integers from 0 to 2**53 - 1, and the message names the one that is not."""
    with pytest.raises(InvalidInput, match=f"{field} must be an integer"):
        epoch_order(seed, epoch, 3)
