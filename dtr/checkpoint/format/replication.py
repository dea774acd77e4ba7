"""What every rank holds alike (``save_async(..., replicated="optimizer/*")``): written once, an even share by each rank, read by any.

    split      the rows that a rank writes of the common tensors: the same answer on every rank, from names and shapes alone
    take       a rank's own tensors and its share of the common ones, as they go into its part

How they are put together again: :mod:`dtr.checkpoint.restoring.scattered`.

A tensor that is cut is cut into rows, along its first dimension of more than one: so a part holds ``optimizer/m[0:512]``, and says under
``dtr_replicated`` in its metadata (JSON) which rows of which tensor that are. Values that are no tensors are in every rank's tree.
What several values of a state share (tied weights) is stored once, and is common if a pattern selects any of them. Where none selects
the name under which it is stored, the part says so under ``also``.
The ranks' structures must be alike: their digest is in every part, and a checkpoint of ranks that differ is refused before it begins. So
must their values. Nobody compares all of them, but a few items of up to 64 tensors, spread over all (the metadata names them under
``sampled``), where all ranks hold them in their machines' memory: what nobody exchanged is found, a single stray number hardly ever.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from dtr.checkpoint.format.paths import Patterns, leaves
from dtr.checkpoint.format.tensors import Tensor
from dtr.errors import InvalidInput

__all__ = [
    "REPLICATED",
    "UNSEEN",
    "Share",
    "Shares",
    "first_difference",
    "items_of",
    "rows_of",
    "sampled_in",
    "split",
    "take",
    "values_of",
]

REPLICATED: Final = "dtr_replicated"
_SNAP: Final = 256  # a cut this part of a share from a tensor's edge is made at the edge
_SHOWN: Final = 8
_SAMPLED_TENSORS: Final = 64  # a microsecond each, in the trainer's way
_SAMPLED_ITEMS: Final = 16
_STRUCTURE_CHARS: Final = 16
UNSEEN: Final = "____"  # the values of a tensor that is in the memory of a device


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """That the tensors which ``patterns`` select are common to ``world_size`` ranks, of which this is ``rank``."""

    patterns: Patterns
    world_size: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a rank writes of a common tensor: rows [start, end) of ``of``."""

    name: str
    start: int
    end: int
    of: int

    @property
    def is_whole(self) -> bool:
        return self.end - self.start == self.of


def split(tensors: Mapping[str, Tensor], world_size: int, rank: int) -> tuple[Share, ...]:
    """The share of ``rank``: all shares together are every row of every tensor, once.

    Even by bytes: laid one after the other in the order of their names, the tensors are cut at equal distances, each cut moved to the
    nearest row, or to the edge of a tensor that is less than 1/256 of a share away. So two shares differ by two rows and 1/64 of a share
    at most, and no more than ``world_size - 1`` cuts are made.
    """
    names = sorted(tensors)
    rows = [rows_of(tensors[name].array.shape, tensors[name].array.nbytes) for name in names]
    sizes = [tensors[name].array.nbytes for name in names]
    ends = list(itertools.accumulate(sizes))
    low, high = (_cut(ends, sizes, rows, world_size, n) for n in (rank, rank + 1))
    found = []
    for n in range(low[0], min(high[0] + 1, len(names))):
        start, end = (low[1] if n == low[0] else 0), (high[1] if n == high[0] else rows[n])
        if start < end:
            found.append(Share(name=names[n], start=start, end=end, of=rows[n]))
    return tuple(found)


def _cut(ends: Sequence[int], sizes: Sequence[int], rows: Sequence[int], world_size: int, number: int) -> tuple[int, int]:
    """Where the share of rank ``number`` begins: a tensor's index and a row of it."""
    if number in {0, world_size} or not ends or not ends[-1]:
        return (0, 0) if number == 0 else (len(ends), 0)
    at, near = ends[-1] * number // world_size, ends[-1] // (world_size * _SNAP)
    n = bisect.bisect_right(ends, at)
    inside, row_bytes = at - (ends[n] - sizes[n]), sizes[n] // rows[n]
    row = (2 * inside + row_bytes) // (2 * row_bytes)
    if inside <= near:
        row = 0
    elif sizes[n] - inside <= near:
        row = rows[n]
    return (n, row) if row < rows[n] else (n + 1, 0)


def rows_of(shape: Sequence[int], size_bytes: int) -> int:
    """How many rows a tensor has, by which it can be cut: 1 if it cannot."""
    return next((size for size in shape if size > 1), 1) if size_bytes else 1


def _sliced(tensor: Tensor, share: Share) -> Tensor:
    if share.is_whole:
        return tensor
    axis = next(n for n, size in enumerate(tensor.array.shape) if size > 1)
    return replace(tensor, array=tensor.array[(slice(None),) * axis + (slice(share.start, share.end),)])


def take(
    spec: Any, tensors: Mapping[str, Tensor], shares: Shares, aliases: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, Tensor], str, list[str], str]:
    """What this rank's part holds, its own tensors first; of what is common, alike on all ranks, the digest of its structure and the names
    of the tensors whose values are compared; the text for its metadata.

    Args:
        spec: the tree of the state.
        tensors: of the state, by the name under which they are stored.
        shares: what of it is common.
        aliases: the paths of all values that a stored tensor holds, where these are several.

    Raises:
        InvalidInput: a pattern selects nothing; it names the pattern.
    """
    patterns = shares.patterns
    also = {name for name, paths in (aliases or {}).items() if not patterns.match(name) and any(map(patterns.match, paths))}
    common = {name: tensor for name, tensor in tensors.items() if name in also or patterns.match(name)}
    _check_patterns(spec, tensors, common, patterns)
    held = {name: tensor for name, tensor in tensors.items() if name not in common}
    rows = {}
    for share in split(common, shares.world_size, shares.rank):
        name = share.name
        if not share.is_whole:
            name = _free_name(f"{share.name}[{share.start}:{share.end}]", tensors)
            rows[name] = {"of": share.name, "rows": [share.start, share.end], "shape": common[share.name].shape}
        held[name] = _sliced(common[share.name], share)
    structure, sampled = _digest(common), _sampled(common) if shares.world_size > 1 else []
    about = {
        "patterns": sorted(patterns.texts), "rank": shares.rank, "world_size": shares.world_size, "structure": structure,
        "sampled": sampled, "rows": rows, **({"also": sorted(also & held.keys())} if also & held.keys() else {}),
    }  # fmt: skip
    return held, structure, sampled, orjson.dumps(about).decode()


def _check_patterns(spec: Any, tensors: Mapping[str, Tensor], common: Mapping[str, Tensor], patterns: Patterns) -> None:
    each = [patterns] if len(patterns.texts) == 1 else [Patterns.of(text, patterns.argument) for text in patterns.texts]
    for one in each:
        if any(one.match(name) for name in common) or any(one.match(path) for path, _ in leaves(spec)):
            continue
        tops = sorted({path.partition("/")[0] for path, _ in leaves(spec)})
        shown = ", ".join(tops[:_SHOWN]) + (", ..." if len(tops) > _SHOWN else "")
        raise InvalidInput(
            f"{patterns.argument} selects nothing: {one} matches no path of the state, which holds {shown or 'a single value'}",
            field=patterns.argument,
        )


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}~{number}"
    return free


def _digest(common: Mapping[str, Tensor]) -> str:
    facts = [[name, tensor.label, tensor.shape] for name, tensor in sorted(common.items())]
    return hashlib.sha256(orjson.dumps(facts)).hexdigest()[:_STRUCTURE_CHARS]


# --- values -----------------------------------------------------------------------------------------------------------


def _sampled(common: Mapping[str, Tensor]) -> list[str]:
    """Without those that have fields: what is between them is nobody's value."""
    names = [name for name, tensor in sorted(common.items()) if tensor.array.nbytes and tensor.array.dtype.names is None]
    return [names[n * len(names) // _SAMPLED_TENSORS] for n in range(_SAMPLED_TENSORS)] if len(names) > _SAMPLED_TENSORS else names


def items_of(size: int) -> NDArray[np.intp]:
    """Which items of a tensor of ``size`` items are compared: the first, the last, and some evenly between."""
    return np.unique(np.linspace(0, size - 1, _SAMPLED_ITEMS).astype(np.intp))


def values_of(array: NDArray[Any], items: NDArray[np.intp]) -> str:
    """Four characters that stand for some items of an array, bit by bit: a NaN is what it is, and no 0.0 is -0.0."""
    return f"{zlib.crc32(array.flat[items].tobytes()) & 0xFFFF:04x}"


def sampled_in(metadata: Mapping[str, str]) -> list[str]:
    """The names of the tensors whose values were compared, from the metadata of a part."""
    return [str(name) for name in orjson.loads(metadata[REPLICATED])["sampled"]] if REPLICATED in metadata else []


def first_difference(one: str, other: str, sampled: Sequence[str]) -> str | None:
    """In which tensor two ranks differ; None if their structures do, empty if ``sampled`` does not say.

    Args:
        one, other: what each said: the digest of the structure, and behind it the values of ``sampled`` in turn.
        sampled: the names of the tensors whose values are compared.
    """
    if one[:_STRUCTURE_CHARS] != other[:_STRUCTURE_CHARS]:
        return None
    at = range(_STRUCTURE_CHARS, _STRUCTURE_CHARS + len(UNSEEN) * len(sampled), len(UNSEEN))
    return next((name for name, n in zip(sampled, at, strict=True) if one[n : n + len(UNSEEN)] != other[n : n + len(UNSEEN)]), "")
