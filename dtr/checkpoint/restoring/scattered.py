"""A state that lies in the parts of several ranks, put together again: each byte read once, into memory that was allocated once.

    locate     where every tensor of a rank's state is, over all parts of its checkpoint
    fits       what of it a run of another size can have: the common tensors, and the other values that the patterns select
    read       the tensors that are wanted; neighbours in a part together, the parts side by side

See :mod:`dtr.checkpoint.format.replication` for how it was spread, and :mod:`dtr.checkpoint.restoring.fetch` for who reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import orjson

from dtr.checkpoint.format import tree
from dtr.checkpoint.format.paths import Patterns, leaves, mentioned
from dtr.checkpoint.format.replication import REPLICATED, rows_of
from dtr.checkpoint.format.tensors import Header, Place, Tensor, header_end, read_header, tensor_at
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.restoring.contract import Source
from dtr.errors import IntegrityError, WorldSizeMismatch

__all__ = ["Extent", "Located", "Whole", "check_fits", "fits", "header_of", "headers_of", "locate", "read"]

_ALIGNMENT: Final = 64
_READERS: Final = 4
_SHOWN: Final = 8
_KEPT_BYTES: Final = 128 << 20  # of first pieces, while a state is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Bytes [start, end) of the part of ``rank``, counted from the file's beginning."""

    rank: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A tensor and its bytes, in order; ``common``: every rank holds it alike."""

    place: Place
    extents: tuple[Extent, ...]
    common: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The state of one rank as the parts hold it: its tree, and where each tensor is that the tree may name."""

    spec: Any
    tensors: Mapping[str, Located]
    patterns: Patterns
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """Rows [start, end) of the tensor ``of``, which has this shape."""

    of: str
    start: int
    end: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    """``dtr_replicated``, checked. ``also``: common tensors of this part by other names than the patterns select."""

    patterns: tuple[str, ...]
    world_size: int
    structure: str
    rows: Mapping[str, _Row]
    also: frozenset[str] = frozenset()


def header_of(source: Source, *, keep: bool = False) -> Header:
    """The header of a part; IntegrityError if it is damaged. ``keep``: what was read for it is not read again, see ``Source.head``."""
    head = source.head(keep=keep)
    end = header_end(head)
    if end > source.state_bytes:
        raise IntegrityError(f"{source.name} has {source.state_bytes} bytes and a header of {end}")
    if end > len(head):
        head = bytearray(end)
        source.read_into(head)
    return read_header(head, source.state_bytes)


def locate(headers: Mapping[int, Header], rank: int) -> Whole:
    """Where the state of ``rank`` is, by the headers of all parts of its checkpoint.

    Raises:
        IntegrityError: the parts do not belong together, or rows of a common tensor are missing.
    """
    abouts = {r: _about(header, r, len(headers)) for r, header in headers.items()}
    mine = abouts[rank]
    for r, about in abouts.items():
        if (about.patterns, about.structure) != (mine.patterns, mine.structure):
            raise IntegrityError(
                f"ranks {rank} and {r} of this checkpoint disagree about what is replicated: {mine.patterns}, {about.patterns}"
            )
    patterns = Patterns.of(list(mine.patterns), "replicated")
    own: dict[str, Located] = {}
    pieces: dict[str, list[tuple[int, int, Place, Extent]]] = {}
    for r, header in sorted(headers.items()):
        for place in header.places:
            extent = Extent(rank=r, start=header.data_start + place.start, end=header.data_start + place.end)
            if (row := abouts[r].rows.get(place.name)) is not None:
                pieces.setdefault(row.of, []).append((row.start, row.end, _whole_of(place, row), extent))
            elif place.name in abouts[r].also or patterns.match(place.name):
                pieces.setdefault(place.name, []).append((0, rows_of(place.shape, place.end - place.start), place, extent))
            elif r == rank:
                own[place.name] = Located(place=place, extents=(extent,), common=False)
    common = {name: _joined(name, held) for name, held in pieces.items()}
    spec = tree.decode(_metadata(headers[rank], TREE))
    return Whole(spec=spec, tensors={**own, **common}, patterns=patterns, world_size=len(headers))


def _about(header: Header, rank: int, parts: int) -> _About:
    try:
        told = orjson.loads(_metadata(header, REPLICATED))
        match told:
            case {"patterns": [*patterns], "rank": int(said), "world_size": int(size), "structure": str(structure), "rows": dict(rows)}:
                if not patterns or not all(type(text) is str and text.strip("/") for text in patterns):
                    raise ValueError("its patterns are none")
                if said == rank and size == parts:
                    checked = {name: _row(row) for name, row in rows.items()}
                    also = frozenset(map(str, told.get("also", ())))
                    return _About(patterns=tuple(patterns), world_size=size, structure=structure, rows=checked, also=also)
    except (orjson.JSONDecodeError, ValueError, TypeError) as exc:
        raise IntegrityError(f"the part of rank {rank} does not say which rows it holds: {exc}") from exc
    raise IntegrityError(f"the part of rank {rank} belongs to another checkpoint than the {parts} parts beside it")


def _row(row: Any) -> _Row:
    match row:
        case {"of": str(name), "rows": [int(start), int(end)], "shape": [*shape]} if 0 <= start < end:
            if all(type(size) is int and size >= 0 for size in shape):
                return _Row(of=name, start=start, end=end, shape=tuple(shape))
    raise ValueError(f"{str(row)[:60]} names no rows of a tensor")


def _whole_of(place: Place, row: _Row) -> Place:
    """The tensor of which ``place`` holds rows."""
    axis = next((n for n, size in enumerate(row.shape) if size > 1), 0)
    if place.shape != (*row.shape[:axis], row.end - row.start, *row.shape[axis + 1 :]):
        raise IntegrityError(f"{place.name} of shape {place.shape} is not rows {row.start} to {row.end} of {row.shape}")
    return replace(place, name=row.of, shape=row.shape)


def _metadata(header: Header, name: str) -> str:
    if name not in header.metadata:
        raise IntegrityError(f"a safetensors file, but no part of such a checkpoint: it holds no {name}")
    return header.metadata[name]


def _joined(name: str, held: list[tuple[int, int, Place, Extent]]) -> Located:
    """A common tensor from the rows that the parts hold of it."""
    held.sort(key=lambda piece: piece[:2])
    place, at, size_bytes = held[0][2], 0, 0
    for start, end, other, extent in held:
        if start != at or (other.label, other.shape) != (place.label, place.shape):
            raise IntegrityError(f"rows {at} to {start} of the replicated tensor {name} are in no part, or in several")
        at, size_bytes = end, size_bytes + extent.end - extent.start
    if at != rows_of(place.shape, size_bytes):
        raise IntegrityError(f"the rows from {at} on of the replicated tensor {name} are in no part")
    return Located(place=replace(place, start=0, end=size_bytes), extents=tuple(piece[3] for piece in held), common=True)


def fits(whole: Whole, spec: Any) -> tuple[list[str], list[str]]:
    """The paths of a tree that a run of any size can have, and those that only one of the same size can."""
    names = whole.tensors.keys()
    fit: list[str] = []
    unfit: list[str] = []
    for path, node in leaves(spec):
        found = mentioned(node, names)
        common = all(whole.tensors[name].common for name in found) if found else whole.patterns.match(path)
        (fit if common else unfit).append(path)
    return fit, unfit


def read(sources: Mapping[int, Source], wanted: Iterable[Located]) -> dict[str, Tensor]:
    """The tensors, views of one buffer; neighbours in a part are read together, the parts side by side."""
    found = sorted(wanted, key=lambda t: (t.extents[0].rank, t.extents[0].start))
    offsets, size_bytes = _offsets(found)
    buffer = _aligned(size_bytes)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="dtr-parts") as pool:
        for _ in pool.map(lambda run: sources[run[0]].read_into(buffer[run[2] : run[2] + run[3]].data, run[1]), _runs(found, offsets)):
            pass
    return {t.place.name: tensor_at(t.place, buffer, offset) for t, offset in zip(found, offsets, strict=True)}


def _offsets(found: Sequence[Located]) -> tuple[list[int], int]:
    """Where each tensor goes in the buffer, and the buffer's size: neighbours in a part are neighbours there."""
    at, offsets, after = 0, [], (-1, -1)
    for located in found:
        first, last = located.extents[0], located.extents[-1]
        if (first.rank, first.start) != after:
            at = -(-at // _ALIGNMENT) * _ALIGNMENT + first.start % _ALIGNMENT  # the phase of the file, in which it is aligned
        offsets.append(at)
        at, after = at + located.place.end - located.place.start, (last.rank, last.end)
    return offsets, at


def _aligned(size_bytes: int) -> Any:
    memory = np.empty(size_bytes + _ALIGNMENT, np.uint8)
    return memory[-memory.ctypes.data % _ALIGNMENT :][:size_bytes]


def _runs(found: Sequence[Located], offsets: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """What to read: rank, offset in its part, offset in the buffer, bytes; neighbours joined."""
    runs: list[tuple[int, int, int, int]] = []
    for located, offset in zip(found, offsets, strict=True):
        at = offset
        for extent in located.extents:
            size = extent.end - extent.start
            if runs and (runs[-1][0], runs[-1][1] + runs[-1][3], runs[-1][2] + runs[-1][3]) == (extent.rank, extent.start, at):
                runs[-1] = (*runs[-1][:3], runs[-1][3] + size)
            elif size:
                runs.append((extent.rank, extent.start, at, size))
            at += size
    return runs


def headers_of(sources: Mapping[int, Source]) -> dict[int, Header]:
    """The headers of all parts, a few read at a time; of few parts what was read for them is kept."""
    keep = sum(min(source.piece_bytes or 0, source.state_bytes) for source in sources.values()) <= _KEPT_BYTES
    with ThreadPoolExecutor(_READERS, thread_name_prefix="dtr-parts") as pool:
        return dict(zip(sources, pool.map(partial(header_of, keep=keep), sources.values()), strict=True))


def check_fits(whole: Whole, spec: Any, world_size: int) -> None:
    """Raise WorldSizeMismatch unless ``world_size`` ranks can have what ``spec`` asks for."""
    if world_size == whole.world_size:
        return
    fit, unfit = fits(whole, spec)
    if not unfit:
        return
    shown = ", ".join(unfit[:_SHOWN]) + (f" and {len(unfit) - _SHOWN} more" if len(unfit) > _SHOWN else "")
    rest = f", or only what all ranks hold alike: only={list(whole.patterns.texts)!r}" if fit else ""
    raise WorldSizeMismatch(
        f"was saved by {whole.world_size} ranks, and here are {world_size}: {shown} belong to single ranks; restore it with "
        f"world_size={whole.world_size}{rest}",
        saved=whole.world_size, given=world_size, fits=fit, unfit=unfit,
    )  # fmt: skip
