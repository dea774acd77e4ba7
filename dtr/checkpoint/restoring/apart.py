"""Whether the arrays that a restore fills get in each other's way: told by their addresses, before a byte is read.

What two targets share is written twice. That is right where the saved arrays share the very same bytes (tied weights, views of one
buffer), and wrong anywhere else: the later one would win, and nobody would know. Extents that overlap need not share a byte (the even and
the odd columns of a matrix), so those are looked at element by element, within a bound.

Targets are sorted by address, and each is compared with those that reach behind its beginning: few, unless thousands interleave.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.checkpoint.format.leaves import strides_of
from dtr.checkpoint.format.sharing import span
from dtr.errors import StateMismatch

__all__ = ["Target", "check_apart"]

_MAX_WORK: Final = 100_000  # of numpy's search for a common element, which takes a few steps for any array that people make


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An array or tensor of the given state, and the saved one that belongs there, over memory of its own."""

    path: str
    given: Any
    saved: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where elements lie; the strides, in bytes, of a dimension of one are 0. ``plain``: what lies there is what is seen."""

    device: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    plain: bool

    @classmethod
    def of(cls, array: Any) -> _Place:
        shape = tuple(array.shape)
        strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides_of(array), strict=True))
        if isinstance(array, np.ndarray):
            address = array.__array_interface__["data"][0]
            return cls(device="cpu", address=address, shape=shape, strides=strides, item_bytes=array.itemsize, plain=True)
        plain = not (array.is_conj() or array.is_neg())
        return cls(
            device=str(array.device), address=array.data_ptr(), shape=shape, strides=strides, item_bytes=array.element_size(), plain=plain
        )

    def folds(self) -> bool:
        """Whether its own elements may share memory: some dimension steps by less than what lies within a step."""
        reach = self.item_bytes
        for stride, size in sorted((abs(stride), size) for stride, size in zip(self.strides, self.shape, strict=True) if size > 1):
            if stride < reach:
                return True
            reach += (size - 1) * stride
        return False

    def as_array(self) -> NDArray[Any]:
        """An array of such elements, for questions about addresses alone: nothing of it may be read."""
        return np.asarray(_Interface(self))


class _Interface:
    def __init__(self, place: _Place) -> None:
        self.__array_interface__ = {
            "version": 3, "typestr": f"|V{place.item_bytes}", "data": (place.address, True), "shape": place.shape,
            "strides": place.strides,
        }  # fmt: skip


class _Seen:
    """A target with its place; that of the saved one is asked for where it matters."""

    __slots__ = ("_saved", "end", "given", "start", "target")

    def __init__(self, target: Target) -> None:
        self.target, self.given = target, _Place.of(target.given)
        self.start, self.end = span(self.given.address, self.given.shape, self.given.strides, self.given.item_bytes)
        self._saved: _Place | None = None

    @property
    def saved(self) -> _Place:
        if self._saved is None:
            self._saved = _Place.of(self.target.saved)
        return self._saved


def check_apart(targets: Iterable[Target]) -> None:
    """Return if every target can hold what belongs there, whatever is written into the others.

    Raises:
        StateMismatch: two share memory, and what was saved for them is not shared in the same way; names both paths. Or the elements of
            one share memory with each other.
    """
    seen = [found for found in map(_Seen, targets) if found.end > found.start and found.given.item_bytes]
    reaching: list[_Seen] = []
    for this in sorted(seen, key=lambda found: (found.given.device, found.start)):
        if this.given.folds():
            raise _mismatch(this, "has elements that share memory with each other: give an array of its own")
        reaching = [other for other in reaching if other.given.device == this.given.device and other.end > this.start]
        for other in reaching:
            if not _shared_alike(other, this) and _share(other.given, this.given):
                first, last = sorted((other, this), key=lambda found: found.target.path)
                raise _mismatch(first, f"shares memory with {last.target.path}, and what was saved does not: give each its own")
        if not any(other.given == this.given for other in reaching):  # where they lie alike, so do those that were saved
            reaching.append(this)


def _shared_alike(a: _Seen, b: _Seen) -> bool:
    """Whether each byte that the targets share is the same saved byte for both."""
    if a.given == b.given:
        return a.saved == b.saved
    same_layout = all(one.given.plain and one.given.strides == one.saved.strides for one in (a, b))
    return same_layout and a.given.address - b.given.address == a.saved.address - b.saved.address


def _share(a: _Place, b: _Place) -> bool:
    try:
        return np.shares_memory(a.as_array(), b.as_array(), max_work=_MAX_WORK)  # type: ignore[arg-type]  # numpy types it 0 or -1
    except np.exceptions.TooHardError:
        return True  # nobody can tell: better refused than wrong


def _mismatch(found: _Seen, what: str) -> StateMismatch:
    path = found.target.path
    return StateMismatch(f"{path} {what}; nothing was restored into it", path=path)
