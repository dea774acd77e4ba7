"""The structure of a state, kept: whether the next state has the same one is found out without taking it apart again.

An outline knows of each container its keys and the types of its values, and of each array its dtype and shape. ``Outline.match`` goes
through a state by whole containers at once; it gives the arrays in a fixed order, and refreshes the tree where values are no arrays.
It is strict: a state that would be laid out, or refused, in any other way does not match.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from dtr.checkpoint.format import dtypes, torch_tensors
from dtr.checkpoint.format.tree import Walked, scalar_nodes
from dtr.errors import UnsupportedLeaf

__all__ = ["Different", "Outline", "outline_of"]

_DICTS: Final = (dict, OrderedDict)


class Different(Exception):
    """The state has another structure."""


@dataclass(slots=True, kw_only=True)
class _Container:
    """One container. Positions count its values; ``scalars`` holds where in the tree the node of each is."""

    kind: type
    keys: list[Any] | None
    key_types: list[type] | None
    types: list[type]
    arrays: list[int] = field(default_factory=list)
    dtypes: list[np.dtype[Any]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    described: list[tuple[int, Any]] = field(default_factory=list)  # of arrays whose dtype is more than a number's
    tensors: list[tuple[int, tuple[Any, ...]]] = field(default_factory=list)
    texts: list[tuple[int, int]] = field(default_factory=list)  # bytes and bytearrays, with their lengths
    scalars: list[tuple[int, Any, Any]] = field(default_factory=list)
    below: list[tuple[int, _Container]] = field(default_factory=list)

    def match(self, value: Any, found: list[Any], node_of: Callable[[Any], Any]) -> bool:
        """Append the arrays; True if a value that is no array has another node than before."""
        kind: Any = type(value)
        if kind is not self.kind or len(value) != len(self.types):
            raise Different
        values: Any = value
        if self.keys is not None:
            if list(value) != self.keys or list(map(type, value)) != self.key_types:
                raise Different
            values = list(value.values())
        if list(map(type, values)) != self.types:
            raise Different
        self._match_arrays(values, found)
        for at, facts in self.tensors:
            if torch_tensors.facts_of(values[at]) != facts:
                raise Different
            found.append(values[at])
        for at, length in self.texts:
            if len(values[at]) != length:
                raise Different
            found.append(values[at])
        changed = self._refresh(values, node_of) if self.scalars else False
        for at, below in self.below:
            changed = below.match(values[at], found, node_of) or changed
        return changed

    def _match_arrays(self, values: Sequence[Any], found: list[Any]) -> None:
        if not self.arrays:
            return
        arrays = values if len(self.arrays) == len(values) else [values[at] for at in self.arrays]
        if [array.dtype for array in arrays] != self.dtypes or [array.shape for array in arrays] != self.shapes:
            raise Different
        for at, described in self.described:  # equality of structured dtypes overlooks what the tree records
            if dtypes.describe(values[at].dtype) != described:
                raise Different
        found.extend(arrays)

    def _refresh(self, values: Sequence[Any], node_of: Callable[[Any], Any]) -> bool:
        changed = False
        for at, holder, key in self.scalars:
            node = node_of(values[at])
            if node != holder[key] or node == 0:  # 0.0 equals -0.0
                holder[key], changed = node, True
        return changed


@dataclass(slots=True, kw_only=True)
class Outline:
    """The outline of one structure.

    Args:
        order: which array of the walk the i-th array of a match is.
        spec: a list that holds the tree, which each match keeps up to date.
    """

    order: list[int]
    spec: Any
    _root: _Container

    def match(self, state: Any) -> tuple[list[Any], bool]:
        """The arrays of ``state`` (numpy arrays, torch tensors, bytes), and whether the tree changed.

        Raises:
            Different: it has not this structure; what was encoded of the tree before is out of date, since it may be half refreshed.
        """
        found: list[Any] = []
        try:
            changed = self._root.match([state], found, scalar_nodes())
        except (UnsupportedLeaf, RecursionError) as exc:  # a walk says where
            raise Different from exc
        return found, changed

    @property
    def tree(self) -> Any:
        """The tree of the last state that matched."""
        return self.spec[0]


def outline_of(state: Any, walked: Walked) -> Outline | None:
    """The outline of a state that was just walked; None if it has keys whose equality says too little (floats, tuples)."""
    spec = [walked.spec]
    made = _Maker()
    root = made.container([state], spec)
    return None if root is None else Outline(order=made.order(root), spec=spec, _root=root)


class _Maker:
    """Numbers the arrays as the walk did."""

    def __init__(self) -> None:
        self._count = 0
        self._numbers: dict[tuple[int, int], int] = {}

    def container(self, value: Any, node: Any) -> _Container | None:
        pairs = type(value) in _DICTS
        keys = list(value) if pairs else None
        if keys is not None and not all(type(key) in {str, int} for key in keys):
            return None
        values = list(value.values()) if pairs else value
        made = _Container(
            kind=type(value), keys=keys, key_types=None if keys is None else list(map(type, keys)), types=list(map(type, values))
        )
        for at, (item, (holder, key)) in enumerate(zip(values, _holders(node, keys), strict=True)):
            if not self._add(made, at, item, holder, key):
                return None
        return made

    def _add(self, made: _Container, at: int, item: Any, holder: Any, key: Any) -> bool:
        if isinstance(item, np.ndarray):
            made.arrays.append(at)
            made.dtypes.append(item.dtype)
            made.shapes.append(item.shape)
            if item.dtype.kind == "V":
                made.described.append((at, dtypes.describe(item.dtype)))
        elif torch_tensors.is_tensor(item):
            made.tensors.append((at, torch_tensors.facts_of(item)))
        elif isinstance(item, bytes | bytearray) and not isinstance(item, np.bytes_):
            made.texts.append((at, len(item)))
        elif isinstance(item, dict | list | tuple):
            below = self.container(item, holder[key])
            if below is None:
                return False
            made.below.append((at, below))
            return True
        else:
            made.scalars.append((at, holder, key))
            return True
        self._numbers[id(made), at] = self._count
        self._count += 1
        return True

    def order(self, made: _Container) -> list[int]:
        """The numbers of the arrays in the order in which ``match`` gives them."""
        here = [*made.arrays, *(at for at, _ in made.tensors), *(at for at, _ in made.texts)]
        return [*(self._numbers[id(made), at] for at in here), *(number for _, below in made.below for number in self.order(below))]


def _holders(node: Any, keys: list[Any] | None) -> list[tuple[Any, Any]]:
    """For each value of a container: the list or dict in the tree that holds its node, and under what."""
    if type(node) is list:
        return [(node, at) for at in range(len(node))]
    ((_, inner),) = node.items()
    if keys is None:
        return [(inner, at) for at in range(len(inner))]
    if type(inner) is dict:
        return [(inner, key) for key in keys]
    return [(pair, 1) for pair in inner]
