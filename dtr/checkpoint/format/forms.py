"""The tensors of a part as its tree means them: which bytes of the file each is, and as what they count.

A value may be a tensor of the file, the same bytes as a dtype that the format lacks, or a view of memory that it shares with others
(``dtr.checkpoint.format.tree`` has the nodes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtr.checkpoint.format import dtypes, torch_tensors
from dtr.checkpoint.format.sharing import span
from dtr.checkpoint.format.tensors import Tensor, dtype_of
from dtr.checkpoint.restoring.opened import Opened, RankState
from dtr.checkpoint.restoring.scattered import Located
from dtr.errors import InvalidInput, ManifestInvalid

__all__ = ["Form", "Strided", "form_of", "read_form"]

KINDS = frozenset({"array", "torch", "parameter", "bytes", "bytearray"})  # nodes that stand for a tensor
GATHER_BYTES = 64 << 20  # a view of gaps is put together in memory up to this; a larger one is taken with what lies in its gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class Strided:
    """A view that is not dense: counted from the first byte that it touches."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A tensor: bytes [start, end) of ``located``. ``dtype`` None: opaque items of so many bytes.

    ``label`` names the dtype in the file's words where numpy has none for it; ``described`` is dtype and shape, for people.
    """

    located: Located
    start: int
    end: int
    described: str
    label: str
    dtype: np.dtype[Any] | None
    item_bytes: int
    strided: Strided | None = None


def form_of(node: Any, state: RankState) -> Form | None:
    """What a node of the tree names; None if it is a plain value. Raises ManifestInvalid for a node that no tree has."""
    if type(node) is not dict or len(node) != 1 or next(iter(node)) not in KINDS:
        return None
    ((kind, inner),) = node.items()
    try:
        if kind == "parameter":
            return _form("torch", inner[0]["torch"], state)
        return _form(kind, inner, state)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, InvalidInput) as exc:
        raise ManifestInvalid(f"the tree of rank {state.rank} names no tensor of its file: {str(node)[:80]}") from exc


def _form(kind: str, inner: Any, state: RankState) -> Form:
    located = state.tensors[inner if type(inner) is str else inner["at"]]
    size_bytes = located.place.end - located.place.start
    label, shape, dtype, text = located.place.label, located.place.shape, None, ""
    if type(inner) is dict:
        label, dtype, text = _described(kind, inner["dtype"])
        shape = tuple(int(size) for size in inner["shape"])
    held = dtype if dtype is not None else dtype_of(label)
    word = f"{kind} " if kind in {"bytes", "bytearray"} else ""
    start, end, strided = 0, size_bytes, None
    if type(inner) is dict and "strides" in inner:
        strides, offset = tuple(int(stride) for stride in inner["strides"]), int(inner["offset"])
        start, end = span(offset, shape, strides, held.itemsize)
        if end - start != math.prod(shape) * held.itemsize or list(strides) != _dense(shape, held.itemsize):
            strided = Strided(shape=shape, strides=strides, offset=offset - start)
    if not 0 <= start <= end <= size_bytes:
        raise ValueError("a view outside of its tensor")
    return Form(
        located=located, start=start, end=end, described=f"{word}{text or label} {list(shape)}", label=label, dtype=_measurable(held),
        item_bytes=max(1, held.itemsize), strided=strided,
    )  # fmt: skip


def _described(kind: str, dtype: Any) -> tuple[str, np.dtype[Any] | None, str]:
    """Label, numpy's dtype and text of a dtype that stands in the tree."""
    if kind == "torch":
        label = torch_tensors.label_of(dtype)
        return (label, None, "") if label else ("", torch_tensors.RAW[dtype], str(dtype))
    found = dtypes.parse(dtype)
    label = Tensor.of(np.empty(0, found)).label
    return (label, found, "") if dtype_of(label) == found else ("", found, str(dtype))


def _measurable(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """As what its items can be measured; times as integers, records not at all."""
    if dtype.kind in "mM":
        return np.dtype(f"{dtype.byteorder}i8")
    return dtype if dtype.kind in "biufc" and dtype.subdtype is None else None


def _dense(shape: tuple[int, ...], item_bytes: int) -> list[int]:
    strides, reach = [], item_bytes
    for size in reversed(shape):
        strides.append(reach)
        reach *= size
    return strides[::-1]


def read_form(opened: Opened, form: Form, start: int, end: int) -> bytearray | bytes:
    """Bytes [start, end) of what a form means, counted from its first; all of it at once if it is to be gathered."""
    found, strided = opened.read(form.located, form.start + start, form.start + end), form.strided
    if strided is None or not gathered(form):
        return found
    items = np.ndarray(strided.shape, np.dtype(f"V{form.item_bytes}"), found, strided.offset, strided.strides)
    return items.tobytes()


def gathered(form: Form) -> bool:
    """Whether it is put together from a view with gaps, which is done in one piece."""
    if form.strided is None:
        return False
    return max(form.end - form.start, math.prod(form.strided.shape) * form.item_bytes) <= GATHER_BYTES
