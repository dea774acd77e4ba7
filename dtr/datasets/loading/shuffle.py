"""The order of an epoch: a permutation that depends on (seed, epoch, count) alone.

Guarantee: the same three numbers give the same order on every machine and with every version of numpy, since only 64-bit
arithmetic and a stable sort are used. Index i is sorted by the i-th output of SplitMix64 (Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", 2014) started at a key made of seed and epoch, so every order is equally likely; equal outputs,
which 64 bits practically exclude, keep the order of their indices. Written out, with ``mix`` SplitMix64's finalizer::

    key = mix(mix(seed) + epoch)                       modulo 2**64
    output(i) = mix(key + (i + 1) * 0x9E3779B97F4A7C15)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtr import names

__all__ = ["epoch_order"]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The indices 0 to count - 1 in the order in which this epoch takes them.

    Raises InvalidInput if seed or epoch is not an integer from 0 to 2**53 - 1.
    """
    names.step(seed, "seed")
    names.step(epoch, "epoch")
    key = _mix((_mix(seed) + epoch) & _MASK)
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")


def _mix(z: int) -> int:
    """SplitMix64's finalizer, a bijection on 64-bit integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
