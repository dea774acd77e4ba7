"""A state from the parts that hold it: all of it or what ``only`` selects, into new memory or ``into`` a state that is there already.

Every byte is read once, verified, in parallel, to where it stays: the arrays are writable views of memory that was allocated once, or
the caller's own. What is read is cut into windows at the edges of pieces; a window that lies within one array is read straight into it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.checkpoint.format import tensors, tree
from dtr.checkpoint.format.build import unflatten
from dtr.checkpoint.format.paths import LEFT_OUT, Patterns, mentioned, prune
from dtr.checkpoint.format.replication import REPLICATED
from dtr.checkpoint.format.tensors import Header, Tensor, tensor_at
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.restoring import fill, scattered
from dtr.checkpoint.restoring.contract import Source, Where
from dtr.checkpoint.restoring.scattered import Extent, Located, Whole, check_fits
from dtr.checkpoint.restoring.source import PieceSource
from dtr.errors import IntegrityError
from dtr.store.pieces import Piece, move

__all__ = ["Tee", "check_asked", "new_memory", "read_bytes", "read_state"]

_WINDOW_BYTES: Final = 8 << 20
_ALIGNMENT: Final = 64
_DIRECT_BYTES: Final[dict[Where, int]] = {"slot": 64 << 10, "cache": 64 << 10, "store": 4 << 20}  # what is worth a read of its own
_SMALL_BYTES: Final = 64 << 10  # copied at once; a larger copy lets other threads go on

Tee = Callable[[memoryview, int], None]  # gets the verified bytes of a whole part as they come, in any order, from several threads
Bytes = NDArray[np.uint8]


def read_state(
    sources: Mapping[int, Source], *, rank: int, world_size: int, only: Patterns | None = None, into: Any = None, tee: Tee | None = None
) -> Any:
    """Read the state of ``rank``.

    Args:
        sources: the parts that it needs, by rank: its own, or all of them where the state is replicated in part.
        rank, world_size: of the reader.
        only: read nothing but the values at these paths; a list keeps its length, with None for what was left out.
        into: a state to fill; its dicts, lists and arrays are returned. None: a new state.
        tee: gets the bytes, if all of one part is read.

    Raises:
        IntegrityError: a part is missing or damaged. ``into`` may then be filled in part: the fact ``touched`` says whether.
        StateMismatch: ``into`` is not built like the checkpoint. Nothing was changed.
        InvalidInput: ``only`` selects nothing.
        WorldSizeMismatch: something of it belongs to single ranks of another world size.
        StoreUnavailable: the store stayed away.
    """
    for source in sources.values():
        source.check()
    if len(sources) == 1 and only is None and into is None:
        return _all(sources, rank, world_size, tee)
    whole, spec = _selected(sources, rank, world_size, only, into)
    if into is None:
        return unflatten(spec, scattered.read(sources, _wanted(whole, spec)))
    return _filled(sources, whole, spec, into, partial=only is not None)


def check_asked(sources: Mapping[int, Source], *, rank: int, world_size: int, only: Patterns | None = None, into: Any = None) -> None:
    """Raise what :func:`read_state` would about ``only`` and ``into``; reads the headers alone, and changes nothing."""
    whole, spec = _selected(sources, rank, world_size, only, into)
    if into is not None:
        _matched(whole, spec, into, partial=only is not None)


def _selected(sources: Mapping[int, Source], rank: int, world_size: int, only: Patterns | None, into: Any) -> tuple[Whole, Any]:
    """Where all is, and the tree of what was asked for."""
    whole = _whole(scattered.headers_of(sources), rank)
    spec = whole.spec if only is None else prune(whole.spec, only, None if into is None else LEFT_OUT)
    check_fits(whole, spec, world_size)
    return whole, spec


def _all(sources: Mapping[int, Source], rank: int, world_size: int, tee: Tee | None) -> Any:
    ((held_by, source),) = sources.items()
    memory = read_bytes(source, tee)
    header, found = tensors.read_header(memory, len(memory)), tensors.read(memory)
    whole = _whole({held_by: header}, rank)
    check_fits(whole, whole.spec, world_size)
    return unflatten(whole.spec, found.tensors)


def read_bytes(source: Source, tee: Tee | None = None) -> Bytes:
    """The file of a part in new memory."""
    source.check()
    memory = new_memory(source.state_bytes)
    _read(source, [(0, memory.data)], tee)
    return memory


def new_memory(size_bytes: int) -> Bytes:
    """Memory that begins where any dtype may; its pages are taken when they are filled."""
    memory = np.empty(size_bytes + _ALIGNMENT, np.uint8)
    return memory[-memory.ctypes.data % _ALIGNMENT :][:size_bytes]


def _tree(metadata: Mapping[str, str]) -> Any:
    if TREE not in metadata:
        raise IntegrityError(f"a safetensors file, but no part of a checkpoint: it holds no {TREE}")
    return tree.decode(metadata[TREE])


def _whole(headers: Mapping[int, Header], rank: int) -> Whole:
    """Where the rank's tensors are: in its own part, or in those of all."""
    if any(REPLICATED in header.metadata for header in headers.values()):
        return scattered.locate(headers, rank % len(headers))
    ((held_by, header),) = headers.items()
    located = {
        place.name: Located(
            place=place,
            extents=(Extent(rank=held_by, start=header.data_start + place.start, end=header.data_start + place.end),),
            common=True,
        )
        for place in header.places
    }
    return Whole(spec=_tree(header.metadata), tensors=located, patterns=Patterns.of("*", "only"), world_size=1)


def _wanted(whole: Whole, spec: Any) -> list[Located]:
    return [whole.tensors[name] for name in mentioned(spec, whole.tensors.keys())]


def _matched(whole: Whole, spec: Any, into: Any, *, partial: bool) -> tuple[list[Located], dict[str, Bytes], fill.Filling]:
    wanted = _wanted(whole, spec)
    memory = _beside(wanted)
    return wanted, memory, fill.match(spec, {t.place.name: _tensor(t, memory) for t in wanted}, into, partial=partial)


def _filled(sources: Mapping[int, Source], whole: Whole, spec: Any, into: Any, *, partial: bool) -> Any:
    wanted, memory, filling = _matched(whole, spec, into, partial=partial)
    items: dict[int, list[tuple[int, memoryview]]] = {rank: [] for rank in sources}
    for located in wanted:
        view = filling.memory.get(located.place.name)
        at, view = 0, memory[located.place.name].data if view is None else view
        for extent in located.extents:
            size_bytes = extent.end - extent.start
            items[extent.rank].append((extent.start, view[at : at + size_bytes]))
            at += size_bytes
    try:
        for rank, source in sources.items():
            _read(source, items[rank])
    except IntegrityError as exc:
        exc.facts["touched"] = True
        raise
    return filling.finish()


def _beside(wanted: Iterable[Located]) -> dict[str, Bytes]:
    """Memory for tensors that may have to be read beside where they belong: pages are taken only of those that are."""
    sizes = {t.place.name: t.place.end - t.place.start for t in wanted}
    padded = {name: -(-size // _ALIGNMENT) * _ALIGNMENT for name, size in sizes.items()}
    arena, at, found = new_memory(sum(padded.values())), 0, {}
    for name, size in sizes.items():
        found[name] = arena[at : at + size]
        at += padded[name]
    return found


def _tensor(located: Located, memory: Mapping[str, Bytes]) -> Tensor:
    return tensor_at(located.place, memory[located.place.name], 0)


# --- reading ranges -------------------------------------------------------------------------------------------------


def _read(source: Source, items: list[tuple[int, memoryview]], tee: Tee | None = None) -> None:
    """Fill each of ``items``, (offset, memory), from one source."""
    piece_bytes = source.piece_bytes
    if not piece_bytes or not isinstance(source, PieceSource):  # it cuts and reads ahead by itself
        for start, view in sorted(items, key=lambda item: item[0]):
            source.read_into(view, start)
            if tee is not None:
                tee(view, start)
        return
    window_bytes = piece_bytes * max(1, _WINDOW_BYTES // piece_bytes)
    windows = _windows(items, window_bytes)
    scratches = threading.local()

    def read(window: Piece, over: threading.Event) -> None:
        held = windows[window.number]
        first, last = held[0][0], held[-1][1]
        if len(held) == 1 and first == window.start and last == min(window.end, source.state_bytes):
            source.read_into(held[0][2], first)
            if tee is not None:
                tee(held[0][2], first)
            return
        start = first // piece_bytes * piece_bytes
        end = min(-(-last // piece_bytes) * piece_bytes, source.state_bytes)
        if (scratch := getattr(scratches, "memory", None)) is None:
            scratch = scratches.memory = new_memory(window_bytes)
        views, beside = _laid(held, start, end, scratch, direct_bytes)
        source.read_scattered(views, start)
        for view, found in beside:
            _copy(view, found)

    direct_bytes = _DIRECT_BYTES[source.where]
    order = (Piece(number=n, start=n * window_bytes, end=(n + 1) * window_bytes) for n in sorted(windows))
    move(read, order, threads=source.threads if len(windows) > 1 else 1)


def _laid(
    held: list[tuple[int, int, memoryview]], start: int, end: int, scratch: Bytes, direct_bytes: int
) -> tuple[list[memoryview], list[tuple[memoryview, Bytes]]]:
    """Memory for the bytes [start, end), in order; and what is then copied, from where: small items are read together, in ``scratch``."""
    views: list[memoryview] = []
    beside: list[tuple[memoryview, Bytes]] = []
    at = start
    for low, high, view in held:
        if high - low < direct_bytes:
            beside.append((view, scratch[low - start : high - start]))
            continue
        if low > at:
            views.append(scratch[at - start : low - start].data)
        views.append(view)
        at = high
    if at < end:
        views.append(scratch[at - start : end - start].data)
    return views, beside


def _windows(items: list[tuple[int, memoryview]], window_bytes: int) -> dict[int, list[tuple[int, int, memoryview]]]:
    """What belongs into each window, as (start, end, memory), in order."""
    windows: dict[int, list[tuple[int, int, memoryview]]] = {}
    for start, view in sorted(items, key=lambda item: item[0]):
        at, end = start, start + len(view)
        while at < end:
            number = at // window_bytes
            high = min(end, (number + 1) * window_bytes)
            windows.setdefault(number, []).append((at, high, view[at - start : high - start]))
            at = high
    return windows


def _copy(target: memoryview, found: Bytes) -> None:
    if len(target) < _SMALL_BYTES:
        target[:] = found.data
    else:
        np.copyto(np.frombuffer(target, np.uint8), found)
