"""Which values of two checkpoints differ, and by how much; in bounded memory, every byte verified on the way.

Tensors are compared bit by bit first: what has the same bits is the same, NaN included. Where bits differ, the numbers are compared as
float64 (integers exactly): the largest absolute difference, the largest relative one (``|a - b| / max(|a|, |b|)``), and how many elements
differ. A NaN or infinity against anything else has no difference to measure, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dtr.checkpoint.format.build import unflatten
from dtr.checkpoint.format.floats import as_float64
from dtr.checkpoint.format.forms import Form, form_of, gathered, read_form
from dtr.checkpoint.format.paths import leaves
from dtr.checkpoint.restoring.opened import Opened, RankState
from dtr.errors import ManifestInvalid

__all__ = ["Measured", "TensorDiff", "ValueDiff", "diff", "measure"]

SLICE_BYTES: Final = 16 << 20  # of each side in memory at a time
BLOCK_ITEMS: Final = 1 << 20  # compared at a time: as float64 and with what is computed of them, some 50 MB
_SHOWN: Final = 120

What = Literal["same", "differs", "only in a", "only in b", "another kind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How far two tensors are apart. ``odd``: elements that differ and of which one is NaN or infinite."""

    elements: int = 0
    changed: int = 0
    odd: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0

    def plus(self, other: Measured) -> Measured:
        """Of both together."""
        return Measured(
            elements=self.elements + other.elements, changed=self.changed + other.changed, odd=self.odd + other.odd,
            max_abs=max(self.max_abs, other.max_abs), max_rel=max(self.max_rel, other.max_rel),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDiff:
    """One tensor. ``rank`` is None for one that all ranks hold alike; ``a`` and ``b`` say dtype and shape where they differ."""

    path: str
    rank: int | None
    what: What
    a: str = ""
    b: str = ""
    measured: Measured = field(default_factory=Measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueDiff:
    """A value that is no tensor: ``a`` and ``b`` are its two forms, '' where there is none; ``rank`` as in :class:`TensorDiff`."""

    path: str
    rank: int | None
    a: str
    b: str


def diff(a: Opened, b: Opened) -> Iterator[TensorDiff | ValueDiff]:
    """Every tensor of both, and every other value that differs, rank by rank, in the order of their paths.

    Ranks that only one of them has are reported by their tensors, as being only there.

    Raises:
        IntegrityError: one of them is damaged.
        StoreUnavailable.
    """
    others = {state.rank: state for state in b.states()}
    seen: set[str] = set()  # tensors that are common to all ranks are compared once
    for mine in a.states():
        yield from _of_rank(a, b, mine, others.pop(mine.rank, RankState(rank=mine.rank, spec=None, tensors={})), seen)
    for rank, other in sorted(others.items()):
        yield from _of_rank(a, b, RankState(rank=rank, spec=None, tensors={}), other, seen)


def _of_rank(a: Opened, b: Opened, mine: RankState, other: RankState, seen: set[str]) -> Iterator[TensorDiff | ValueDiff]:
    alone = None if a.replicated == b.replicated == "all" else mine.rank
    one, two = (dict(leaves(state.spec)) if state.spec is not None else {} for state in (mine, other))
    for path in sorted(one.keys() | two.keys()):
        forms = form_of(one.get(path), mine), form_of(two.get(path), other)
        if forms == (None, None):
            if one.get(path, _ABSENT) != two.get(path, _ABSENT):
                yield ValueDiff(path=path, rank=alone, a=_shown(one, path), b=_shown(two, path))
            continue
        common = all(form.located.common for form in forms if form is not None)
        if common and path in seen:
            continue
        if common:
            seen.add(path)
        yield _tensor(a, b, path, None if common else alone, forms[0], forms[1], (_shown(one, path), _shown(two, path)))


_ABSENT: Final = object()


def _tensor(a: Opened, b: Opened, path: str, rank: int | None, one: Form | None, two: Form | None, shown: tuple[str, str]) -> TensorDiff:
    if one is None or two is None:
        missing = shown[0] if one is None else shown[1]
        said_a, said_b = (one.described if one else missing), (two.described if two else missing)
        what: What = "another kind" if missing else "only in a" if two is None else "only in b"
        return TensorDiff(path=path, rank=rank, what=what, a=said_a, b=said_b)
    if one.described != two.described:
        return TensorDiff(path=path, rank=rank, what="another kind", a=one.described, b=two.described)
    if not (gathered(one) or gathered(two)) and one.strided != two.strided:
        view = "a view of other memory: "  # too large to be gathered, so not comparable with what is dense
        said_a, said_b = (f"{view if form.strided else ''}{form.described}" for form in (one, two))
        return TensorDiff(path=path, rank=rank, what="another kind", a=said_a, b=said_b)
    total = Measured()
    for mine, other in _slices(a, b, one, two):
        total = total.plus(measure(mine, other, one.dtype, one.item_bytes, label=one.label))
    return TensorDiff(path=path, rank=rank, what="differs" if total.changed else "same", a=one.described, b=two.described, measured=total)


def _slices(a: Opened, b: Opened, one: Form, two: Form) -> Iterator[tuple[Any, Any]]:
    """The bytes of both, slice by slice; at once where one is to be gathered."""
    size_bytes, step = one.end - one.start, max(1, SLICE_BYTES // one.item_bytes) * one.item_bytes
    if gathered(one) or gathered(two):
        yield read_form(a, one, 0, size_bytes), read_form(b, two, 0, two.end - two.start)
        return
    for start in range(0, size_bytes, step):
        end = min(start + step, size_bytes)
        yield read_form(a, one, start, end), read_form(b, two, start, end)


def measure(a: Any, b: Any, dtype: np.dtype[Any] | None, item_bytes: int, *, label: str = "") -> Measured:
    """How far two buffers of as many items are apart.

    Args:
        a, b: the bytes.
        dtype: what the items are; None: opaque, so that they are counted and not measured.
        item_bytes: of each.
        label: dtype in the file, where numpy has none (bfloat16, float8).
    """
    one, two = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    elements = len(one) // item_bytes
    if np.array_equal(one, two):
        return Measured(elements=elements)
    found = Measured(elements=elements)
    for start in range(0, len(one), BLOCK_ITEMS * item_bytes):
        left, right = (side[start : start + BLOCK_ITEMS * item_bytes] for side in (one, two))
        where = _where(left, right, item_bytes)
        apart = Measured(changed=int(np.count_nonzero(where)))
        if apart.changed and dtype is not None:
            left, right = left.view(dtype), right.view(dtype)
            apart = _apart(left, right, label) if where.all() else _apart(left[where], right[where], label)
        found = found.plus(apart)
    return found


def _where(left: NDArray[np.uint8], right: NDArray[np.uint8], item_bytes: int) -> NDArray[np.bool_]:
    """Which items differ in any bit."""
    if item_bytes in {1, 2, 4, 8}:
        bits = np.dtype(f"u{item_bytes}")
        return np.asarray(left.view(bits) != right.view(bits))
    return np.asarray((left != right).reshape(-1, item_bytes).any(axis=1))


def _apart(a: NDArray[Any], b: NDArray[Any], label: str) -> Measured:
    """Of elements whose bits differ."""
    if a.dtype.kind in "iu" and not label.startswith(("BF", "F8")):
        high, low = np.maximum(a, b), np.minimum(a, b)
        gap = (high.astype(np.uint64) - low.astype(np.uint64)).astype(np.float64)  # modulo 2**64, and so exact with signs as well
        size = np.maximum(np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64)))
        return Measured(changed=len(a), max_abs=float(gap.max()), max_rel=float((gap / np.maximum(size, 1)).max()))
    x, y = as_float64(a, label), as_float64(b, label)
    finite = np.isfinite(x) & np.isfinite(y)
    odd = len(a) - int(np.count_nonzero(finite))
    if odd:
        x, y = x[finite], y[finite]
    if not len(x):
        return Measured(changed=len(a), odd=odd)
    with np.errstate(over="ignore"):  # of numbers at both ends of float64
        gap = np.abs(x - y)
    size = np.maximum(np.abs(x), np.abs(y))
    size[size == 0] = 1.0  # both are zero, of different sign: no difference
    return Measured(changed=len(a), odd=odd, max_abs=float(gap.max()), max_rel=float(np.divide(gap, size, out=gap).max()))


def _shown(nodes: Mapping[str, Any], path: str) -> str:
    """A value as a person reads it; '' if there is none."""
    if path not in nodes:
        return ""
    node = nodes[path]
    try:
        text = repr(unflatten(node, {}))
    except ManifestInvalid:  # a tensor
        text = f"a tensor, {next(iter(node))}" if type(node) is dict and node else repr(node)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
