"""Deterministic mode's order: a bijection, the same everywhere, found at any place at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr.datasets.loading.order import EpochOrder, permuted, share


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_permutation_is_a_bijection(size: int, key: int) -> None:
    """Each thing has one place, each place one thing."""
    assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.sampled_from([0, 1, 5, 16, 64]), st.booleans(), st.data())
def test_any_part_of_an_epoch_is_that_part_of_the_whole(sizes: list[int], window: int, shuffle: bool, data: st.DataObject) -> None:
    """Every sample stands in it once, and looking from the middle finds what looking from the start does."""
    order = EpochOrder.of(np.array(sizes), seed=3, epoch=1, shuffle=shuffle, window=window)
    shards, positions = order.find(0, order.samples)
    whole = list(zip(shards.tolist(), positions.tolist(), strict=True))
    assert sorted(whole) == [(shard, at) for shard, size in enumerate(sizes) for at in range(size)]
    start = data.draw(st.integers(0, order.samples))
    stop = data.draw(st.integers(start, order.samples))
    shards, positions = order.find(start, stop)
    assert list(zip(shards.tolist(), positions.tolist(), strict=True)) == whole[start:stop]
    if not shuffle:
        assert whole == sorted(whole)


def test_the_order_never_changes() -> None:
    """These numbers are promised: a resumed job must find the sequence that it left, whatever version it runs."""
    order = EpochOrder.of(np.array([5, 3, 8]), seed=7, epoch=1, shuffle=True, window=6)
    shards, positions = order.find(0, 16)
    assert shards.tolist() == [0, 2, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert positions.tolist() == [1, 0, 2, 0, 3, 4, 1, 3, 4, 5, 2, 6, 7, 1, 0, 2]


def test_a_window_is_mixed_like_a_random_permutation() -> None:
    """Over 2,000 keys each thing of 1,000 comes to the first place about as often as chance has it, and neighbours part."""
    firsts = np.array([permuted(np.arange(2), 1000, key) for key in range(2000)])
    counts = np.bincount(firsts[:, 0] // 100, minlength=10)
    assert counts.min() > 140 and counts.max() < 260  # 200 +- 4.5 sigma
    assert abs(int(np.median(np.abs(np.diff(firsts, axis=1)))) - 293) < 40  # of two random places of 1,000


@given(st.integers(0, 1000), st.integers(1, 64))
def test_shares_are_even_and_whole(size: int, world_size: int) -> None:
    """They follow each other without a gap, and differ by one sample at most."""
    parts = [share(size, world_size, rank) for rank in range(world_size)]
    assert parts[0][0] == 0 and parts[-1][1] == size
    assert all(one[1] == other[0] for one, other in pairwise(parts))
    widths = [stop - start for start, stop in parts]
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("window", [0, 1 << 14])
def test_the_middle_of_ten_million_samples_is_found_at_once(window: int) -> None:
    """No list of all samples is made: the arrays are as long as there are shards."""
    order = EpochOrder.of(np.full(10_000, 1000), seed=7, epoch=1, shuffle=True, window=window)
    assert len(order.find(5_000_000, 5_000_256)[0]) == 256
    assert order.begins.nbytes + order.shards.nbytes < 1 << 20
