"""numpy dtypes as JSON, in the words of numpy's .npy format: ``"<c16"`` or ``[["x", "<f4"], ["y", "<i2", [3]]]``."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.errors import ManifestInvalid

__all__ = ["NATIVE", "describe", "parse", "scalar_bytes", "why_unsupported"]

NATIVE: Final = frozenset(
    {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64", "C64"}
)  # labels of dtypes that numpy has
_KINDS: Final = "biufcmMSUV"
_NAMED: Final = re.compile(rf"[<>|=][{_KINDS}]\d{{1,10}}(\[[^\]]{{1,20}}\])?", re.ASCII)
_MAX_FIELDS_DEEP: Final = 8


def why_unsupported(dtype: np.dtype[Any]) -> str | None:
    """Why a checkpoint cannot keep arrays of this dtype bit by bit; None if it can."""
    if dtype.hasobject or dtype.kind == "O":
        return "Python objects have no bytes of their own; give a dtype of numbers, or a list"
    if dtype.kind not in _KINDS or _is_foreign(dtype):
        return "it belongs to another package; give a view of unsigned integers of the same size"
    if dtype.kind == "V" and (_depth(dtype) > _MAX_FIELDS_DEEP or not _comes_back(dtype)):
        return "its fields overlap, are out of order, nested too deep or records; give a copy with plain fields"
    return None


def _is_foreign(dtype: np.dtype[Any]) -> bool:
    """Whether it, or a field, was registered by another package (ml_dtypes): its name would come back as opaque bytes."""
    base = dtype.base
    return base.isbuiltin == 2 or any(_is_foreign(field[0]) for field in (base.fields or {}).values())


def _depth(dtype: np.dtype[Any]) -> int:
    return 1 + max((_depth(field[0]) for field in (dtype.base.fields or {}).values()), default=0)


def _comes_back(dtype: np.dtype[Any]) -> bool:
    try:
        back = parse(_as_lists(describe(dtype)))
    except (ValueError, ManifestInvalid):
        return False
    return back == dtype and back.type is dtype.type


def describe(dtype: np.dtype[Any]) -> Any:
    """JSON-able: text, or a list of fields."""
    return np.lib.format.dtype_to_descr(np.lib.format.drop_metadata(dtype))


def scalar_bytes(value: NDArray[Any]) -> bytes:
    """The bytes of a 0-d array. The six unused ones of an 80-bit long double, which hold whatever was there, are zeroed."""
    content = bytearray(value.tobytes())
    if value.dtype.kind in "fc" and value.dtype.itemsize // (1 + (value.dtype.kind == "c")) == 16 and np.finfo(value.dtype).nmant == 63:
        for start in range(10, len(content), 16):
            content[start : start + 6] = bytes(6)
    return bytes(content)


def parse(described: Any) -> np.dtype[Any]:
    """The dtype of a description from a file; ManifestInvalid for anything that ``describe`` does not write."""
    try:
        dtype = np.lib.format.descr_to_dtype(_descr(described, _MAX_FIELDS_DEEP))
    except (TypeError, ValueError, OverflowError, SyntaxError) as exc:
        raise ManifestInvalid(f"unknown dtype {str(described)[:80]!r}") from exc
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise ManifestInvalid(f"unknown dtype {str(described)[:80]!r}")
    return dtype


def _descr(described: Any, levels: int) -> Any:
    """The same with tuples where numpy wants them, each field checked."""
    if isinstance(described, str) and _NAMED.fullmatch(described):
        return described
    if not isinstance(described, list) or not levels:
        raise ValueError("not a dtype")
    return [_field(field, levels) for field in described]


def _field(field: Any, levels: int) -> tuple[Any, ...]:
    match field:
        case [name, dtype]:
            return _name(name), _descr(dtype, levels - 1)
        case [name, dtype, [*shape]] if all(type(size) is int and 0 <= size < 2**31 for size in shape):
            return _name(name), _descr(dtype, levels - 1), tuple(shape)
    raise ValueError("not a field")


def _name(name: Any) -> Any:
    match name:
        case str():
            return name
        case [str(title), str(plain)]:
            return title, plain
    raise ValueError("not a name")


def _as_lists(described: Any) -> Any:
    """What JSON would make of it."""
    return [_as_lists(part) for part in described] if isinstance(described, list | tuple) else described
