"""Deterministic mode's order: which sample stands at which place of an epoch, without a list of all samples. Pure.

Guarantee: the place of every sample is a function of (seed, epoch, sizes of the shards, window) alone, the same on every machine and in
every world size, and any place is found in constant time and memory, so that resuming in the middle of an epoch costs nothing.

The shards stand in the epoch's order (`dtr.datasets.loading.shuffle`); their samples, one after the other, are cut into windows of
``window`` samples, and within each window the samples are permuted. ``window=0`` is one window over the whole epoch: a global shuffle.

A window is permuted by a Feistel network of six rounds over the next power of four, walked on until it lands inside (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002); the round function is SplitMix64's finalizer. That is a bijection for any key, and for
windows of a thousand and more its places are statistically those of a random permutation; for windows of a few samples it cannot reach
all orders, and for one of two samples it may well be the same in many epochs. Quality of the whole: samples of one shard meet samples of
about ``window / shard_size`` other shards, which change from epoch to epoch if the shards are shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.loading.shuffle import epoch_order

__all__ = ["EpochOrder", "permuted", "share"]

Int64s = NDArray[np.int64]
_ROUNDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """The order of one epoch.

    Args:
        shards: in the order of this epoch.
        begins: how many samples stand before each of them, and, last, how many there are.
        window: samples that are permuted among each other; 0: all of them; 1: none.
        key: of the permutations, a function of seed and epoch.
    """

    shards: Int64s
    begins: Int64s
    window: int
    key: int

    @classmethod
    def of(cls, sizes: Int64s, *, seed: int, epoch: int, shuffle: bool, window: int) -> EpochOrder:
        """The order of ``epoch`` for shards of these sizes, by number."""
        shards = epoch_order(seed, epoch, len(sizes)) if shuffle else np.arange(len(sizes))
        begins = np.concatenate([[0], np.cumsum(sizes[shards])])
        return cls(shards=shards, begins=begins, window=window if shuffle else 1, key=_mix_int(_mix_int(seed) ^ (epoch + 1)))

    @property
    def samples(self) -> int:
        """How many the epoch has."""
        return int(self.begins[-1])

    def find(self, start: int, stop: int) -> tuple[Int64s, Int64s]:
        """The samples at places ``start`` to ``stop``: their shards, and their positions within these."""
        places = np.arange(start, stop, dtype=np.int64)
        total = self.samples
        window = self.window or total
        if window > 1:
            begin = places // window * window
            found = np.empty_like(places)
            for first in np.unique(begin).tolist():
                inside = begin == first
                size = min(window, total - first)
                found[inside] = first + permuted(places[inside] - first, size, _mix_int(self.key ^ _mix_int(first)))
            places = found
        at = np.searchsorted(self.begins, places, side="right") - 1
        return self.shards[at], places - self.begins[at]


def share(size: int, world_size: int, rank: int) -> tuple[int, int]:
    """The part of a global batch of ``size`` samples that is one rank's: contiguous, and at most one sample larger than another's."""
    return size * rank // world_size, size * (rank + 1) // world_size


def permuted(places: Int64s, size: int, key: int) -> Int64s:
    """Where a permutation of ``size`` things, one for each key, puts these places; a bijection of 0 to size - 1."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    found = _feistel(places.astype(np.uint64), half, key)
    outside = np.flatnonzero(found >= np.uint64(size))
    while len(outside):
        found[outside] = _feistel(found[outside], half, key)
        outside = outside[found[outside] >= np.uint64(size)]
    return found.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, key: int) -> NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for turn in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ np.uint64(_mix_int(key + turn + 1))) & mask)
    return (left << shift) | right


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    """SplitMix64's finalizer, a bijection on 64-bit integers."""
    z &= (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return z ^ (z >> 31)
