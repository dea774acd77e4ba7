"""A part's bytes: a safetensors file (https://github.com/huggingface/safetensors), laid out before a single byte is copied.

    8 bytes     length of the header, little-endian
    header      JSON: name -> dtype, shape, data_offsets; ``__metadata__``: name -> text; spaces up to a multiple of 256 at least
    data        the tensors, without gaps, those of the largest alignment first: so each is aligned as its dtype needs

``arrange`` depends on the structure only and may be kept from save to save; ``Arrangement.layout`` adds this save's metadata;
``Layout.copy_into`` is the only thing that touches the arrays' bytes, once, straight into the caller's memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from dtr.checkpoint.format.copying import Places, copy_dtype
from dtr.errors import IntegrityError, InvalidInput

__all__ = [
    "Arrangement",
    "Entry",
    "Header",
    "Layout",
    "Part",
    "Place",
    "Tensor",
    "arrange",
    "dtype_of",
    "header_end",
    "read",
    "read_header",
    "tensor_at",
]

_STEP_BYTES: Final = 256  # of the header; a multiple of the largest alignment, 64
_HEADER_BYTES: Final = 100_000_000  # what the safetensors package reads at most
_METADATA: Final = "__metadata__"

# What numpy has no dtype for (bfloat16, float8) is held as unsigned integers of that size.
_HELD_AS: Final = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8", "BF16": "<u2",
    "F8_E4M3": "|u1", "F8_E5M2": "|u1", "F8_E4M3FNUZ": "|u1", "F8_E5M2FNUZ": "|u1", "F8_E8M0": "|u1",
}  # fmt: skip
_LABELS: Final = {held: label for label, held in reversed(_HELD_AS.items()) if not label.startswith(("F8", "BF"))}
_DTYPES: Final = {label: np.dtype(held) for label, held in _HELD_AS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An array and its dtype in the file. ``U8`` also stands for any dtype that safetensors lacks: then as its bytes (see ``of``).

    ``alignment`` is what its place needs beyond that of its dtype: bytes that others see as something larger.
    """

    label: str
    array: NDArray[Any]
    alignment: int = 1

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
        header_bytes = _rounded(8 + text_bytes) - 8
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

        Contiguous arrays are copied by memcpy, others by numpy's strided copy, in both cases bit by bit. The arrays must be those that
        were arranged: same names, same sizes (InvalidInput otherwise, before anything is written).
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
        data = np.frombuffer(view[: self.size_bytes], np.uint8)
        held = [(entry, leaves[entry.name].array) for entry in self.entries if entry.end > entry.start]
        dtypes = [copy_dtype(array.dtype) for _, array in held]
        places = Places.of([array.shape for _, array in held], dtypes, [len(self.header) + entry.start for entry, _ in held])
        arrays = [array if array.dtype is dtype else array.view(dtype) for (_, array), dtype in zip(held, dtypes, strict=True)]
        places.fill(data, arrays, threads=threads)


def _rounded(size_bytes: int) -> int:
    """Up to the next of few lengths: so that a number with one digit more seldom changes the size of the file, and with it of the slot."""
    step = max(_STEP_BYTES, 1 << (size_bytes // 64).bit_length())
    return -(-size_bytes // step) * step


def arrange(leaves: Mapping[str, Tensor]) -> Arrangement:
    """Give each tensor its place. Looks at names, dtypes and shapes only, never at the bytes."""
    if _METADATA in leaves:
        raise InvalidInput(f"{_METADATA!r} cannot be a tensor's name", field="leaves")
    entries, described, at = [], {}, 0
    for name, tensor in sorted(leaves.items(), key=lambda item: -_alignment(item[1])):  # stable: else in the state's order
        end = at + tensor.array.nbytes
        entries.append(Entry(name=name, start=at, end=end))
        described[name] = {"dtype": tensor.label, "shape": tensor.shape, "data_offsets": (at, end)}
        at = end
    return Arrangement(entries=tuple(entries), described=orjson.dumps(described)[1:-1], data_bytes=at)


def _alignment(tensor: Tensor) -> int:
    """What its place is ordered by; what follows must stay aligned, too, so bytes of an odd length come with those of their kind."""
    size_bytes = tensor.array.nbytes
    wanted = min(tensor.alignment, size_bytes & -size_bytes)
    return max(tensor.array.dtype.alignment, wanted)


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that was read: its tensors are views of the buffer, writable if that is."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read(buffer: Any) -> Part:
    """Parse a whole file in memory. IntegrityError for anything but a well-formed safetensors file of exactly this length."""
    view = memoryview(buffer).cast("B")
    header = read_header(view, len(view))
    data = view[header.data_start :]
    return Part(metadata=header.metadata, tensors={place.name: tensor_at(place, data, place.start) for place in header.places})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor is, bytes [start, end) from the data's beginning, and what it is."""

    name: str
    start: int
    end: int
    label: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of itself; ``places`` are in the data's order and fill it without a gap from ``data_start`` on."""

    metadata: dict[str, str]
    places: tuple[Place, ...]
    data_start: int


def header_end(head: Any) -> int:
    """How many of a file's first bytes its header takes, by its first 8; IntegrityError for more than any file's may take."""
    header_bytes = struct.unpack_from("<Q", head)[0] if len(head) >= 8 else 0
    if not 2 <= header_bytes <= _HEADER_BYTES:
        raise _damaged(f"a header of {header_bytes} bytes")
    return 8 + int(header_bytes)


def read_header(head: Any, size_bytes: int) -> Header:
    """Parse the header at the beginning of ``head``; IntegrityError unless it describes a well-formed file of ``size_bytes``."""
    view = memoryview(head).cast("B")
    header, data_start = _header(view)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged("its metadata is not text")
    data_bytes = size_bytes - data_start
    places = sorted((_place(name, described) for name, described in header.items()), key=lambda place: (place.start, place.end))
    at = 0
    for place in places:
        if place.start != at:
            raise _damaged(f"the data of {place.name!r} begins at {place.start}, not at {at}")
        at = place.end
        if at > data_bytes:
            raise _damaged(f"the data of {place.name!r} ends at {at}, after the file's {data_bytes}")
    if at != data_bytes:
        raise _damaged(f"{data_bytes - at} bytes follow its last tensor")
    return Header(metadata=metadata, places=tuple(places), data_start=data_start)


def _header(view: memoryview) -> tuple[dict[str, Any], int]:
    end = header_end(view)
    if end > len(view):
        raise _damaged(f"{len(view)} bytes with a header of {end - 8}")
    try:
        header = orjson.loads(view[8:end])
    except orjson.JSONDecodeError as exc:
        raise _damaged(f"its header is not JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise _damaged("its header is not an object")
    return header, end


def _place(name: str, described: Any) -> Place:
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
    return Place(name=name, start=start, end=end, label=label, shape=tuple(shape))


def dtype_of(label: str) -> np.dtype[Any]:
    """As what numpy holds a dtype of the file; what it has none for (bfloat16, float8), as unsigned integers of that size."""
    return _DTYPES[label]


def tensor_at(place: Place, buffer: Any, offset: int) -> Tensor:
    """The tensor of ``place`` as a view of memory that holds (or will hold) its bytes at ``offset``."""
    try:
        array: NDArray[Any] = np.ndarray(place.shape, _DTYPES[place.label], buffer, offset)
    except (ValueError, OverflowError) as exc:  # dimensions of 2**62 beside one of 0
        raise _damaged(f"a shape of {place.shape} is more than numpy can hold") from exc
    return Tensor(label=place.label, array=array)


def _damaged(why: str) -> IntegrityError:
    return IntegrityError(f"not a valid part (safetensors file): {why}")
