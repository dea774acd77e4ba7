"""Arrays copied to their places in a buffer, bit by bit, as fast as memory goes.

Large arrays are cut into pieces that threads take in turn, the caller's among them; numpy releases the GIL for each. Small ones are
copied by the caller alone, by loops that do not pass through Python's byte code: a hand-over to a thread costs as much as copying a
hundred kilobytes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from operator import setitem
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.failpoints import failpoint

__all__ = ["LARGE_BYTES", "Places", "copy_dtype"]

LARGE_BYTES: Final = 64 << 10  # from here on a copy takes longer than handing it to a thread
_PIECE_BYTES: Final = 8 << 20
_WORTH_THREADS_BYTES: Final = 4 << 20
# numpy copies these by their size alone; others field by field, which skips padding.
_PLAIN_KINDS: Final = frozenset("biufcmM")
_OF_SIZE: Final[dict[int, np.dtype[Any]]] = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}

_Copy = tuple[NDArray[Any], NDArray[Any]]


def copy_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype as which arrays of ``dtype`` are copied: no NaN is touched, no byte order changed, no padding skipped."""
    return dtype if dtype.kind in _PLAIN_KINDS else _OF_SIZE.get(dtype.itemsize, np.dtype(f"V{dtype.itemsize}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where arrays go, and as what: the i-th array to ``starts[i]``, as one of ``shapes[i]`` and ``dtypes[i]`` (see ``copy_dtype``).

    It depends on the structure of a state alone, and can be kept. No place may be empty.
    """

    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[np.dtype[Any]]
    starts: Sequence[int]
    large: Sequence[int]
    small: Sequence[int]

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]], starts: Sequence[int]) -> Places:
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        large = [n for n, size in enumerate(sizes) if size >= LARGE_BYTES]
        small = [n for n, size in enumerate(sizes) if size < LARGE_BYTES]
        return cls(shapes=shapes, dtypes=dtypes, starts=starts, large=large, small=small)

    def fill(self, data: NDArray[np.uint8], arrays: Sequence[NDArray[Any]], *, threads: int) -> None:
        """Copy the arrays, whose shapes and dtypes are those of the places, into ``data``."""
        pieces: list[_Copy] = []
        for n in self.large:
            pieces += _pieces(np.ndarray(self.shapes[n], self.dtypes[n], data, self.starts[n]), arrays[n])
        _share(pieces, threads)
        failpoint("stage.half_copied")
        if not self.large:
            _copy_small(data, self.shapes, self.dtypes, self.starts, arrays)
        elif self.small:
            _copy_small(data, *([values[n] for n in self.small] for values in (self.shapes, self.dtypes, self.starts, arrays)))


def _copy_small(data: NDArray[np.uint8], shapes: Any, dtypes: Any, starts: Any, arrays: Any) -> None:
    targets: Any = map(np.ndarray, shapes, dtypes, repeat(data), starts)
    put: Callable[[Any, Any, Any], None] = setitem
    deque(map(put, targets, repeat(...), arrays), maxlen=0)


def _pieces(target: NDArray[Any], array: NDArray[Any]) -> list[_Copy]:
    """A large copy, cut so that threads share it: anywhere if the array is contiguous, else between rows."""
    if target.nbytes <= _PIECE_BYTES:
        return [(target, array)]
    if array.flags.c_contiguous:
        target, array = target.reshape(-1), array.reshape(-1)
    count = -(-target.nbytes // _PIECE_BYTES)
    rows = -(-len(target) // count)
    return [(target[start : start + rows], array[start : start + rows]) for start in range(0, len(target), rows)]


def _share(pieces: Sequence[_Copy], threads: int) -> None:
    """Copy all pieces, by this thread and up to ``threads - 1`` more; returns, or raises, when none of them copies any more."""
    batches, total_bytes = _batches(pieces)

    def work() -> None:
        while True:
            try:
                batch = batches.popleft()
            except IndexError:
                return
            for target, array in batch:
                target[...] = array

    if threads == 1 or len(batches) < 2 or total_bytes < _WORTH_THREADS_BYTES:
        work()
        return
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="dtr-copy") as pool:
        others = [found for _ in range(min(threads, len(batches)) - 1) if (found := _started(pool, work)) is not None]
        work()
        for other in others:
            other.result()


def _started(pool: ThreadPoolExecutor, work: Callable[[], None]) -> Future[None] | None:
    try:
        return pool.submit(work)
    except RuntimeError:  # no thread can be had: slower is better than not at all
        return None


def _batches(pieces: Sequence[_Copy]) -> tuple[deque[list[_Copy]], int]:
    """Pieces that are taken at once, each batch large enough to be worth it; and how many bytes they are together."""
    batches: deque[list[_Copy]] = deque()
    batch: list[_Copy] = []
    held = total_bytes = 0
    for piece in pieces:
        batch.append(piece)
        held += piece[0].nbytes
        if held >= _PIECE_BYTES:
            batches.append(batch)
            total_bytes += held
            batch, held = [], 0
    if batch:
        batches.append(batch)
    return batches, total_bytes + held
