"""Layouts by structure: what does not depend on the values of a state is computed once, however often it is saved.

``Structures.lay_out`` takes a state apart in full when it meets a structure for the first time, and keeps what came of it: the outline
(to know the structure again), the arrangement (order, places, encoded header) and the copies to be made. Later saves of the same
structure cost an outline's match, this save's metadata, and the copies. Which arrays share memory is part of the structure: that is
looked up in every save, by their addresses.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.checkpoint.format import tensors, torch_tensors, tree
from dtr.checkpoint.format.copying import Places, copy_dtype
from dtr.checkpoint.format.leaves import SHARED, Leaf, strides_of
from dtr.checkpoint.format.outline import Different, Outline, outline_of
from dtr.checkpoint.format.replication import REPLICATED, UNSEEN, Shares, items_of, take, values_of
from dtr.checkpoint.format.sharing import Group, groups_of, memory_of
from dtr.checkpoint.format.tensors import Arrangement, Tensor
from dtr.checkpoint.format.torch_tensors import OnDevice
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.staging.device import Copy, Devices, Pending

__all__ = ["Laid", "Structures"]

_KEPT: Final = 4  # full states, model alone, ...: a trainer saves few kinds in turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """A state that is placed: ``copy_into`` writes its file. It holds the state's arrays until it is let go."""

    header: bytes
    size_bytes: int
    structure: str  # of what is replicated, the digest and a sample of the values; '' if nothing is
    _plan: _Plan
    _arrays: Sequence[Any]

    @property
    def on_device(self) -> bool:
        """Whether some of it is in the memory of devices."""
        return bool(self._plan.on_device)

    def copy_into(self, buffer: Any, devices: Devices, *, threads: int = 1) -> Pending | None:
        """Write the file into the first ``size_bytes`` of a writable buffer.

        Returns:
            None if all of it is there; else what is still on its way from the memory of devices.
        """
        view = memoryview(buffer).cast("B")
        data: NDArray[np.uint8] = np.frombuffer(view[: self.size_bytes], np.uint8)
        body = data[len(self.header) :]
        pending = None
        if self._plan.on_device:
            # First, so that they travel while this thread copies the rest.
            pending = devices.start(self._plan.device_copies(body, self._arrays))
        try:
            view[: len(self.header)] = self.header
            self._plan.places.fill(body, self._plan.host_arrays(self._arrays), threads=threads)
        except BaseException:
            if pending is not None:
                pending.wait()  # nobody else may have these bytes as long as a device writes to them
            raise
        return pending


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where the bytes of one tensor of the file come from: an array of the match, or a part of it, or the memory of a group."""

    at: int
    kind: str  # that of the leaf, or device
    dtype: np.dtype[Any]  # as what it is copied
    other_dtype: bool = False  # than it has
    read: Callable[[Any], Any] | None = None  # gives the bytes of a torch tensor
    rows: Any = None
    group: Group | None = None  # whose first member the array is

    @property
    def is_whole(self) -> bool:
        """Whether all of the array is copied, and nothing but that."""
        return self.rows is None and self.group is None and not self.other_dtype

    def array(self, arrays: Sequence[Any]) -> Any:
        """What is copied: a numpy array, or the tensor itself if that is on a device."""
        array = arrays[self.at]
        if self.group is not None:
            array = memory_of(array, self.group, 0)
        elif self.kind in {"bytes", "bytearray"}:
            array = np.frombuffer(array, np.uint8)
        elif self.read is not None:
            array = self.read(array)
        elif self.kind == "device":
            array = torch_tensors.array_of(array).source
        if self.rows is not None:
            array = array[self.rows]
        return array.view(self.dtype) if self.other_dtype else array


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Some items of a tensor that all ranks hold alike."""

    source: _Source
    items: NDArray[np.intp]

    def values(self, arrays: Sequence[Any]) -> str:
        return UNSEEN if self.source.kind == "device" else values_of(self.source.array(arrays), self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The copies of one structure."""

    places: Places
    sources: Sequence[_Source]  # of the places
    at: Sequence[int]  # for each place, its array
    torch: Sequence[tuple[int, Callable[[Any], Any]]]  # places of torch tensors, and what gives their bytes
    special: Sequence[int]  # other places whose array is not copied as it is
    on_device: Sequence[tuple[_Source, int, int]]  # and bytes [start, end) behind the header

    def host_arrays(self, arrays: Sequence[Any]) -> list[Any]:
        found = [arrays[at] for at in self.at]
        for n, read in self.torch:
            found[n] = read(found[n])
        for n in self.special:
            found[n] = self.sources[n].array(arrays)
        return found

    def device_copies(self, body: NDArray[np.uint8], arrays: Sequence[Any]) -> list[Copy]:
        return [Copy(target=body[start:end], source=source.array(arrays)) for source, start, end in self.on_device]


@dataclass(slots=True, kw_only=True)
class _Known:
    """One structure."""

    shares: Shares | None
    outline: Outline | None  # None: it has to be taken apart every time
    arrangement: Arrangement
    plan: _Plan
    digest: str
    samples: Sequence[_Sample]
    replicated: str  # of the file's metadata
    able: Sequence[int]  # arrays of the match that may share memory
    shared: tuple[Group, ...]  # and how they do: members count the able ones
    strides: Sequence[tuple[int, ...]]  # of all members, in turn
    text: str  # the tree, encoded; '' if it has to be encoded anew


class _Stand:
    """Stands for an array while a layout is made, and remembers what was cut from it."""

    __slots__ = ("dtype", "name", "nbytes", "rows", "shape")

    def __init__(self, name: str, array: Any, rows: Any = None) -> None:
        self.name, self.rows, self.dtype = name, rows, array.dtype
        self.shape: tuple[int, ...] = array.shape
        self.nbytes: int = array.nbytes

    def __getitem__(self, rows: Any) -> _Stand:
        return _Stand(self.name, np.broadcast_to(np.empty((), self.dtype), self.shape)[rows], rows)


class Structures:
    """The structures that one manager saved last. Any thread may ask."""

    def __init__(self) -> None:
        self._known: list[_Known] = []  # the last used first
        self._mutex = threading.Lock()

    def lay_out(self, state: Any, about: Mapping[str, str], shares: Shares | None = None) -> Laid:
        """Place a state.

        Args:
            state: of this rank.
            about: metadata of the file, for people who look into it.
            shares: what of the state all ranks hold alike, of which this one writes its share; None: it writes all that it has.

        Raises:
            UnsupportedLeaf: a value that a checkpoint cannot keep; names its path.
            InvalidInput: what is to be replicated is not in the state.
        """
        with self._mutex:
            known, arrays = self._find(state, shares)
            metadata = {**about, TREE: known.text}
            if known.replicated:
                metadata[REPLICATED] = known.replicated
            layout = known.arrangement.layout(metadata)
        structure = known.digest + "".join([sample.values(arrays) for sample in known.samples])
        return Laid(header=layout.header, size_bytes=layout.size_bytes, structure=structure, _plan=known.plan, _arrays=arrays)

    def _find(self, state: Any, shares: Shares | None) -> tuple[_Known, list[Any]]:
        for n, known in enumerate(self._known):
            if known.shares == shares and (arrays := _arrays_of(known, state)) is not None:
                self._known.insert(0, self._known.pop(n))
                return known, arrays
        known, arrays = _learn(state, shares)
        if known.outline is not None:
            self._known = [known, *self._known[: _KEPT - 1]]
        return known, arrays


def _arrays_of(known: _Known, state: Any) -> list[Any] | None:
    """The arrays of a state of this structure; None if it is of another."""
    if known.outline is None:
        return None
    try:
        arrays, changed = known.outline.match(state)
    except Different:
        known.text = ""
        return None
    if changed or not known.text:
        known.text = tree.encode(known.outline.tree)
    able = arrays if len(known.able) == len(arrays) else [arrays[n] for n in known.able]
    groups = groups_of(able)
    if groups != known.shared or (groups and _strides(groups, able) != known.strides):
        return None
    return arrays


def _strides(groups: Sequence[Group], able: Sequence[Any]) -> list[tuple[int, ...]]:
    return [strides_of(able[n]) for group in groups for n in group.members]


def _learn(state: Any, shares: Shares | None) -> tuple[_Known, list[Any]]:
    walked = tree.walk(state)
    leaves = walked.leaves
    stands: Mapping[str, Tensor] = {
        name: Tensor(label=tensor.label, array=_Stand(name, tensor.array), alignment=tensor.alignment)  # type: ignore[arg-type]
        for name, tensor in walked.tensors.items()
    }
    held, digest, sampled, replicated = (stands, "", [], "") if shares is None else take(walked.spec, stands, shares, _aliases(walked))
    arrangement = tensors.arrange(held)
    outline = outline_of(state, walked)
    order = range(len(leaves)) if outline is None else outline.order
    position = {number: n for n, number in enumerate(order)}
    arrays: list[Any] = [leaves[number].source for number in order]
    able = [n for n, number in enumerate(order) if leaves[number].can_share]
    shared = groups_of([arrays[n] for n in able])
    origins = _origins(walked, position)
    plan = _plan(held, arrangement, origins)
    samples = [_Sample(source=origins[name], items=items_of(math.prod(stands[name].array.shape))) for name in sampled]
    known = _Known(
        shares=shares, outline=outline, arrangement=arrangement, plan=plan, digest=digest, samples=samples, replicated=replicated,
        able=able, shared=shared, strides=_strides(shared, [arrays[n] for n in able]), text=tree.encode(walked.spec),
    )  # fmt: skip
    return known, arrays


def _aliases(walked: tree.Walked) -> dict[str, list[str]]:
    """The paths of the values that share a tensor, by the name under which that is stored."""
    found = {}
    for group in walked.shared:
        paths = [walked.leaves[n].name for n in group.members]
        found[f"{paths[0]}{SHARED}" if group.owner is None else walked.leaves[group.owner].name] = paths
    return found


def _origins(walked: tree.Walked, position: Mapping[int, int]) -> dict[str, _Source]:
    """Where the bytes of each tensor of the state come from."""
    origins = {leaf.name: _source(leaf, position[n]) for n, leaf in enumerate(walked.leaves)}
    for group in walked.shared:
        if group.owner is None:
            first = origins[walked.leaves[group.members[0]].name]
            origins[f"{walked.leaves[group.members[0]].name}{SHARED}"] = replace(first, group=group, dtype=np.dtype(np.uint8))
    return origins


def _plan(held: Mapping[str, Tensor], arrangement: Arrangement, origins: Mapping[str, _Source]) -> _Plan:
    host: list[tuple[_Source, tuple[int, ...], int]] = []
    on_device: list[tuple[_Source, int, int]] = []
    for entry in arrangement.entries:
        if entry.end == entry.start:
            continue
        stand: Any = held[entry.name].array
        source = origins[stand.name] if stand.rows is None else replace(origins[stand.name], rows=stand.rows)
        if source.kind == "device":
            on_device.append((source, entry.start, entry.end))
            continue
        dtype = copy_dtype(source.dtype)
        if dtype is not source.dtype:
            source = replace(source, dtype=dtype, other_dtype=True)
        host.append((source, stand.shape, entry.start))
    sources = [source for source, _, _ in host]
    return _Plan(
        places=Places.of([shape for _, shape, _ in host], [source.dtype for source in sources], [start for _, _, start in host]),
        sources=sources,
        at=[source.at for source in sources],
        torch=[(n, source.read) for n, source in enumerate(sources) if source.read is not None and source.is_whole],
        special=[n for n, source in enumerate(sources) if not source.is_whole or source.kind in {"bytes", "bytearray"}],
        on_device=on_device,
    )


def _source(leaf: Leaf, at: int) -> _Source:
    array: Any = leaf.tensor.array
    if isinstance(array, OnDevice):
        return _Source(at=at, kind="device", dtype=array.dtype)
    read = torch_tensors.reader_of(leaf.source) if leaf.kind == "torch" else None
    return _Source(at=at, kind=leaf.kind, dtype=array.dtype, read=read)
