"""A part's bytes: a safetensors file (https://github.com/huggingface/safetensors), laid out before a single byte is copied.

    8 bytes     length of the header, little-endian
    header      JSON: name -> dtype, shape, data_offsets; ``__metadata__``: name -> text; spaces up to a multiple of 64
    data        the tensors, without gaps, those of the largest alignment first: so each is aligned as its dtype needs

``arrange`` depends on the structure only and may be kept from save to save; ``Arrangement.layout`` adds this save's metadata;
``Layout.copy_into`` is the only thing that touches the arrays' bytes, once, straight into the caller's memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from dtr.errors import IntegrityError, InvalidInput

__all__ = ["Arrangement", "Entry", "Layout", "Part", "Tensor", "arrange", "read"]

_ALIGNMENT: Final = 64
_HEADER_BYTES: Final = 100_000_000  # what the safetensors package reads at most
_PIECE_BYTES: Final = 32 << 20
_METADATA: Final = "__metadata__"

# What numpy has no dtype for (bfloat16, float8) is held as unsigned integers of that size.
_HELD_AS: Final = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8", "BF16": "<u2",
    "F8_E4M3": "|u1", "F8_E5M2": "|u1", "F8_E4M3FNUZ": "|u1", "F8_E5M2FNUZ": "|u1", "F8_E8M0": "|u1",
}  # fmt: skip
_LABELS: Final = {held: label for label, held in reversed(_HELD_AS.items()) if not label.startswith(("F8", "BF"))}
_DTYPES: Final = {label: np.dtype(held) for label, held in _HELD_AS.items()}
_OF_SIZE: Final[dict[int, np.dtype[Any]]] = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An array and its dtype in the file. ``U8`` also stands for any dtype that safetensors lacks: then as its bytes (see ``of``)."""

    label: str
    array: NDArray[Any]

    @classmethod
    def of(cls, array: NDArray[Any]) -> Tensor:
        """The array under its own dtype where the format has it, else as bytes with one more dimension, the item's size."""
        return cls(label=_LABELS.get(array.dtype.str, "U8"), array=array)

    @property
    def is_raw(self) -> bool:
        """Whether the dtype has to be recorded elsewhere."""
        return self.label == "U8" and self.array.dtype != np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return (*self.array.shape, self.array.dtype.itemsize) if self.is_raw else self.array.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a tensor is: bytes [start, end) from the data's beginning."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """The order and places of tensors of given names, dtypes and shapes; the same for every save of the same structure."""

    entries: tuple[Entry, ...]
    described: bytes  # the entries as JSON members, without the braces
    data_bytes: int

    def layout(self, metadata: Mapping[str, str]) -> Layout:
        """The complete layout with this save's metadata; InvalidInput if the header becomes larger than readers accept."""
        members = orjson.dumps({_METADATA: dict(metadata)})[1:-1]
        if self.described:
            members += b"," + self.described
        text_bytes = len(members) + 2
        header_bytes = -(-(8 + text_bytes) // _ALIGNMENT) * _ALIGNMENT - 8
        if header_bytes > _HEADER_BYTES:
            raise InvalidInput(
                f"the state's structure (names, shapes, numbers outside arrays) takes {header_bytes} bytes, a file's header holds"
                f" {_HEADER_BYTES}: put long lists of numbers into arrays",
                field="state",
            )
        header = struct.pack("<Q", header_bytes) + b"{" + members + b"}" + b" " * (header_bytes - text_bytes)
        return Layout(header=header, entries=self.entries, size_bytes=len(header) + self.data_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A file whose every byte is placed. ``size_bytes`` is the file's exact size."""

    header: bytes
    entries: tuple[Entry, ...]
    size_bytes: int

    def copy_into(self, buffer: Any, leaves: Mapping[str, Tensor], *, threads: int = 1) -> None:
        """Write the whole file into the first ``size_bytes`` of a writable buffer.

        Contiguous arrays are copied by memcpy, others by numpy's strided copy, in both cases bit by bit and without the GIL. The
        arrays must be those that were arranged: same names, same sizes (InvalidInput otherwise, before anything is written).
        """
        view = memoryview(buffer).cast("B")
        if view.readonly or len(view) < self.size_bytes:
            raise InvalidInput(f"buffer must be writable and hold {self.size_bytes} bytes, got {len(view)}", field="buffer")
        if len(leaves) != len(self.entries):
            raise InvalidInput(f"leaves must be the {len(self.entries)} that were arranged, got {len(leaves)}", field="leaves")
        for entry in self.entries:
            tensor = leaves.get(entry.name)
            if tensor is None or tensor.array.nbytes != entry.end - entry.start:
                raise InvalidInput(f"leaves must be those that were arranged; {entry.name!r} is absent or has another size")
        view[: len(self.header)] = self.header
        data = np.frombuffer(view[: self.size_bytes], np.uint8)[len(self.header) :]
        if threads == 1 or len(data) <= _PIECE_BYTES:
            for entry in self.entries:
                _copy(data[entry.start : entry.end], leaves[entry.name].array)
            return
        batches = _batches(_pieces(data, self.entries, leaves), max(_PIECE_BYTES, len(data) // (8 * threads)))
        with ThreadPoolExecutor(threads, thread_name_prefix="dtr-copy") as pool:
            for _ in pool.map(_copy_all, batches):
                pass


_Piece = tuple[NDArray[np.uint8], NDArray[Any]]


def _pieces(data: NDArray[np.uint8], entries: tuple[Entry, ...], leaves: Mapping[str, Tensor]) -> Iterator[_Piece]:
    """The copies to be made, large contiguous ones cut so that threads share them."""
    for entry in entries:
        array, target = leaves[entry.name].array, data[entry.start : entry.end]
        if not array.flags.c_contiguous or array.nbytes <= _PIECE_BYTES:
            yield target, array
            continue
        source = array.reshape(-1).view(np.uint8)
        for start in range(0, array.nbytes, _PIECE_BYTES):
            yield target[start : start + _PIECE_BYTES], source[start : start + _PIECE_BYTES]


def _batches(pieces: Iterable[_Piece], size_bytes: int) -> Iterator[list[_Piece]]:
    """Pieces in turn, some for each hand-over to a thread: a hand-over costs as much as copying a hundred kilobytes."""
    batch: list[_Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece[0])
        if held >= size_bytes:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _copy_all(batch: list[_Piece]) -> None:
    for target, array in batch:
        _copy(target, array)


def _copy(target: NDArray[np.uint8], array: NDArray[Any]) -> None:
    if not len(target):
        return
    if array.flags.c_contiguous:
        np.copyto(target, array.reshape(-1).view(np.uint8))
        return
    # As unsigned integers (or opaque bytes) of the item's size: no NaN is touched, no byte order changed, no padding skipped.
    size = array.dtype.itemsize
    dtype = _OF_SIZE.get(size, np.dtype(f"V{size}"))
    np.copyto(target.view(dtype).reshape(array.shape), array.view(dtype))


def arrange(leaves: Mapping[str, Tensor]) -> Arrangement:
    """Give each tensor its place. Looks at names, dtypes and shapes only, never at the bytes."""
    if _METADATA in leaves:
        raise InvalidInput(f"{_METADATA!r} cannot be a tensor's name", field="leaves")
    entries, described, at = [], {}, 0
    for name, tensor in sorted(leaves.items(), key=lambda item: -item[1].array.dtype.alignment):  # stable: else in the state's order
        end = at + tensor.array.nbytes
        entries.append(Entry(name=name, start=at, end=end))
        described[name] = {"dtype": tensor.label, "shape": tensor.shape, "data_offsets": (at, end)}
        at = end
    return Arrangement(entries=tuple(entries), described=orjson.dumps(described)[1:-1], data_bytes=at)


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that was read: its tensors are views of the buffer, writable if that is."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read(buffer: Any) -> Part:
    """Parse a whole file in memory. IntegrityError for anything but a well-formed safetensors file of exactly this length."""
    view = memoryview(buffer).cast("B")
    header, data_start = _header(view)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged("its metadata is not text")
    data = view[data_start:]
    placed = sorted((_place(name, described) for name, described in header.items()), key=lambda place: place[1:3])
    tensors, at = {}, 0
    for name, start, end, label, shape in placed:
        if start != at:
            raise _damaged(f"the data of {name!r} begins at {start}, not at {at}")
        at = end
        if end > len(data):
            raise _damaged(f"the data of {name!r} ends at {end}, after the file's {len(data)}")
        tensors[name] = Tensor(label=label, array=_view(data, start, label, shape))
    if at != len(data):
        raise _damaged(f"{len(data) - at} bytes follow its last tensor")
    return Part(metadata=metadata, tensors=tensors)


def _header(view: memoryview) -> tuple[dict[str, Any], int]:
    header_bytes = struct.unpack_from("<Q", view)[0] if len(view) >= 8 else 0
    if not 2 <= header_bytes <= min(_HEADER_BYTES, len(view) - 8):
        raise _damaged(f"{len(view)} bytes with a header of {header_bytes}")
    try:
        header = orjson.loads(view[8 : 8 + header_bytes])
    except orjson.JSONDecodeError as exc:
        raise _damaged(f"its header is not JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise _damaged("its header is not an object")
    return header, 8 + header_bytes


def _place(name: str, described: Any) -> tuple[str, int, int, str, tuple[int, ...]]:
    match described:
        case {"dtype": str(label), "shape": [*shape], "data_offsets": [int(start), int(end)], **rest} if not rest:
            pass
        case _:
            raise _damaged(f"the entry of {name!r} has not dtype, shape and data_offsets")
    if label not in _DTYPES:
        raise _damaged(f"{name!r} has the unknown dtype {label[:40]!r}")
    if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 64:
        raise _damaged(f"{name!r} has no valid shape")
    if not 0 <= start <= end or end - start != math.prod(shape) * _DTYPES[label].itemsize:
        raise _damaged(f"{name!r} of shape {shape} as {label} does not fill the bytes {start} to {end}")
    return name, start, end, label, tuple(shape)


def _view(data: memoryview, start: int, label: str, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return np.ndarray(shape, _DTYPES[label], data, start)
    except (ValueError, OverflowError) as exc:  # dimensions of 2**62 beside one of 0
        raise _damaged(f"a shape of {shape} is more than numpy can hold") from exc


def _damaged(why: str) -> IntegrityError:
    return IntegrityError(f"not a valid part (safetensors file): {why}")
