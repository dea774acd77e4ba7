"""Values of a state that lie in the same memory (tied weights, views of one buffer): found by their addresses, stored once.

Values whose memory overlaps form a group. If one of them is contiguous and spans the whole group, its bytes are stored, and the others
are views of them; otherwise the group's memory is stored as a tensor of its own, and all are views of that. A group whose memory is not
smaller than its values together (the even and the odd columns of a matrix) need not share a byte: its values are stored one by one.
``groups`` is pure; ``groups_of`` asks numpy arrays and torch tensors for their addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Extent", "Group", "groups", "groups_of", "memory_of", "span"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The memory of one value: addresses [start, end) of ``device``, its first element at ``address``.

    ``size_bytes`` is what the value takes when stored by itself, which differs for strided and broadcast ones.
    """

    device: str
    address: int
    start: int
    end: int
    size_bytes: int
    contiguous: bool
    alignment: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Values, by index, that share memory. ``owner`` is the one whose bytes are stored; None: those of the whole group are.

    ``offsets`` are in bytes from the beginning of what is stored, in the order of ``members``.
    """

    members: tuple[int, ...]
    offsets: tuple[int, ...]
    owner: int | None
    size_bytes: int


def span(start: int, shape: Sequence[int], strides: Sequence[int], item_bytes: int) -> tuple[int, int]:
    """The first address that an array's elements touch, and the one behind the last; both ``start`` if it has none."""
    if 0 in shape:
        return start, start
    low = high = start
    for size, stride in zip(shape, strides, strict=True):
        reach = (size - 1) * stride
        low, high = (low + reach, high) if reach < 0 else (low, high + reach)
    return low, high + item_bytes


def groups(extents: Sequence[Extent]) -> tuple[Group, ...]:
    """The groups worth sharing, in the order of their first members. The same extents, moved by a constant, give the same groups."""
    found = []
    for device in sorted({extent.device for extent in extents}):
        held = [n for n, extent in enumerate(extents) if extent.device == device and extent.end > extent.start]
        for members in _overlapping(held, extents):
            group = _group(members, extents)
            if group is not None:
                found.append(group)
    return tuple(sorted(found, key=lambda group: group.members[0]))


def _overlapping(held: Sequence[int], extents: Sequence[Extent]) -> list[list[int]]:
    """Sets of at least two values that hang together by overlaps."""
    if len(held) < 2:
        return []
    starts: Any = np.fromiter((extents[n].start for n in held), np.uint64, len(held))
    ends: Any = np.fromiter((extents[n].end for n in held), np.uint64, len(held))
    order = np.argsort(starts, kind="stable")
    reach = np.maximum.accumulate(ends[order])
    touches = starts[order][1:] < reach[:-1]
    if not touches.any():
        return []
    found: list[list[int]] = []
    for position, joined in zip(order.tolist(), [False, *touches.tolist()], strict=True):
        if joined:
            found[-1].append(held[position])
        else:
            found.append([held[position]])
    return [sorted(members) for members in found if len(members) > 1]


def _group(members: Sequence[int], extents: Sequence[Extent]) -> Group | None:
    low, high = min(extents[n].start for n in members), max(extents[n].end for n in members)
    if high - low >= sum(extents[n].size_bytes for n in members):
        return None
    whole = (n for n in members if extents[n].contiguous and extents[n].start == low and extents[n].end == high)
    # Among several, the one of the largest items: its place in the file is aligned for the others as well.
    owner = min(whole, key=lambda n: (-extents[n].alignment, n), default=None)
    if owner is None and extents[members[0]].device != "cpu":
        return None  # the group's memory as such can be read here only
    offsets = tuple(extents[n].address - low for n in members)
    return Group(members=tuple(members), offsets=offsets, owner=owner, size_bytes=high - low)


# --- the addresses of arrays ------------------------------------------------------------------------------------------------


def groups_of(arrays: Sequence[Any]) -> tuple[Group, ...]:
    """The groups of numpy arrays and torch tensors (on any device); cheap where nothing is shared."""
    if _own_their_memory(arrays):
        return ()
    places = [_place(array) for array in arrays]
    if not _touch(places):
        return ()
    return groups([_extent(array, *place) for array, place in zip(arrays, places, strict=True)])


def memory_of(array: Any, group: Group, member: int) -> NDArray[np.uint8]:
    """The whole memory of a group on this machine, as bytes, by the array that is its n-th member; valid as long as the members live."""
    _, address, _, _ = _place(array)
    memory = (ctypes.c_uint8 * group.size_bytes).from_address(address - group.offsets[member])
    return np.ndarray(group.size_bytes, np.uint8, memoryview(memory))


def _own_their_memory(arrays: Sequence[Any]) -> bool:
    """Whether they are different numpy arrays that all own what they hold: then no two can overlap."""
    if len(set(map(id, arrays))) < len(arrays):
        return False
    return all(type(array) is np.ndarray and array.flags.owndata for array in arrays)


def _place(array: Any) -> tuple[str, int, int, int]:
    """Device, address of the first element, first address touched, and the one behind the last."""
    if isinstance(array, np.ndarray):
        address = array.__array_interface__["data"][0]
        if array.flags.c_contiguous:
            return "cpu", address, address, address + array.nbytes
        return "cpu", address, *span(address, array.shape, array.strides, array.itemsize)
    address, item_bytes = array.data_ptr(), array.element_size()
    if array.is_contiguous():
        return str(array.device), address, address, address + array.numel() * item_bytes
    return str(array.device), address, *span(address, array.shape, [stride * item_bytes for stride in array.stride()], item_bytes)


def _touch(places: Sequence[tuple[str, int, int, int]]) -> bool:
    """Whether any two may overlap. A value of one device at the address of another's only costs the closer look."""
    starts: Any = np.fromiter((place[2] for place in places), np.uint64, len(places))
    ends: Any = np.fromiter((place[3] for place in places), np.uint64, len(places))
    held = ends > starts
    starts, ends = starts[held], ends[held]
    order = np.argsort(starts, kind="stable")
    return bool((starts[order][1:] < np.maximum.accumulate(ends[order])[:-1]).any())


def _extent(array: Any, device: str, address: int, start: int, end: int) -> Extent:
    if isinstance(array, np.ndarray):
        size_bytes, contiguous, alignment = array.nbytes, bool(array.flags.c_contiguous), array.dtype.alignment
    else:
        size_bytes, contiguous, alignment = array.numel() * array.element_size(), array.is_contiguous(), array.element_size()
    return Extent(device=device, address=address, start=start, end=end, size_bytes=size_bytes, contiguous=contiguous, alignment=alignment)
