"""Which samples a rank trains on: those of its shards, in another order each epoch, a batch for each step.

Guarantee: the batch of a step depends on (shards, epoch order, step) alone, so a step that is done again after a restore on the same
shards sees the same samples. What an epoch leaves over after its last whole batch is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.shuffle import epoch_order
from dtr.datasets.spec import Shard

__all__ = ["Feed", "read_samples"]

Bytes = NDArray[np.uint8]


def read_samples(shards: Sequence[Shard]) -> Bytes:
    """All samples of these shards, one a row."""
    return np.concatenate([shard.read()["tokens"] for shard in sorted(shards, key=lambda shard: shard.index)])


class Feed:
    """The batches of one rank.

    Args:
        samples: those of its shards.
        batch: samples in a batch; all of them if there are fewer.
        seed: of the order of each epoch.
    """

    def __init__(self, samples: Bytes, *, batch: int, seed: int) -> None:
        self._samples, self._seed = samples, seed
        self._batch = min(batch, len(samples))
        self._order: tuple[int, NDArray[np.int64]] = (0, epoch_order(seed, 0, len(samples)))

    def of_step(self, step: int) -> Bytes:
        """The samples of this step."""
        epoch, number = divmod(step, len(self._samples) // self._batch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self._seed, epoch, len(self._samples)))
        begin = number * self._batch
        return self._samples[self._order[1][begin : begin + self._batch]]
