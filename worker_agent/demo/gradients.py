"""Data-parallel for real: every rank's gradient lies in one shared memory file, and each rank averages its share of them.

Ranks may have batches of different sizes, near the end of an epoch even none: each row has a weight, the number of its samples.

Between two barriers each rank writes one slice of the mean row, so the work is divided as in a reduce-scatter. Two barriers a
step are enough: a rank overwrites its own row only after the second one, when nobody reads rows any more, and the mean row only
after the next step's first one, when everybody has used the mean.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["GRADIENTS", "MEAN", "SharedGradients", "file_bytes", "slice_of"]

Floats = NDArray[np.float32]

GRADIENTS: Final = "gradients"  # every rank has written its row
MEAN: Final = "mean"  # every rank has averaged its slice
_FLOAT_BYTES: Final = 4
_PREFIX: Final = "gradients-"


def file_bytes(world_size: int, width: int) -> int:
    """The size of the file: a row for each rank, and one for the mean, each with its weight."""
    return (world_size + 1) * (width + 1) * _FLOAT_BYTES


def slice_of(rank: int, world_size: int, width: int) -> slice:
    """The columns that ``rank`` averages; the ranks' slices cover all columns once and differ by at most one in length."""
    return slice(rank * width // world_size, (rank + 1) * width // world_size)


class SharedGradients:
    """One rank's view of the rows of one run.

    Args:
        folder: in memory if possible, the same for all ranks.
        run: names the file, so that nothing of an ended run is ever read.
        rank: of this process.
        world_size: how many rows there are.
        width: numbers in a row, its weight excepted.

    Raises:
        OSError: there is no room for the file.
    """

    def __init__(self, folder: Path, *, run: str, rank: int, world_size: int, width: int) -> None:
        self.path = folder / f"{_PREFIX}{run}"
        self._columns = slice_of(rank, world_size, width)
        self._rank = rank
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, file_bytes(world_size, width))  # a hole in a full tmpfs would be a SIGBUS
            shared = mmap.mmap(descriptor, file_bytes(world_size, width))
        finally:
            os.close(descriptor)
        # The array keeps the mapping alive; both go when the last view of them does.
        self._rows: Floats = np.frombuffer(shared, dtype=np.float32).reshape(world_size + 1, width + 1)

    @property
    def own(self) -> Floats:
        """This rank's row: write the gradient here."""
        row: Floats = self._rows[self._rank, :-1]
        return row

    @property
    def mean(self) -> Floats:
        """The mean of all rows, valid from `average` until this rank meets the others again."""
        row: Floats = self._rows[-1, :-1]
        return row

    def average(self, meet: Callable[[str], None], *, weight: int) -> tuple[Floats, int]:
        """Average the rows together with the other ranks; returns the mean, the same bits for each of them, and the sum of all weights.

        Args:
            meet: a barrier of all ranks, called with `GRADIENTS` and then `MEAN`; what it raises is passed on.
            weight: of this rank's row; with 0 it counts nothing, whatever is in it.
        """
        self._rows[self._rank, -1] = weight
        meet(GRADIENTS)
        weights = self._rows[:-1, -1]
        total = int(weights.sum())
        np.matmul(weights / np.float32(max(total, 1)), self._rows[:-1, self._columns], out=self._rows[-1, self._columns])
        meet(MEAN)
        return self.mean, total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove the file; those who have it mapped keep their memory until they let go of it."""
        with contextlib.suppress(FileNotFoundError):  # another rank was first
            self.path.unlink()
