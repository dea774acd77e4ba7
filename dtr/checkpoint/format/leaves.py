"""The arrays of a state as a walk met them, and what becomes of them: a tensor of their own in the file, or a view of another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dtr.checkpoint.format.sharing import Group, groups_of, memory_of
from dtr.checkpoint.format.tensors import Tensor

__all__ = ["SHARED", "Leaf", "strides_of", "tensors_of"]

SHARED: Final = "~shared"  # a ``~`` in a key stands as ``~0``: no path ends like this


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One array of a state.

    Args:
        node: of the tree, with ``kind`` as its only key; becomes final when it is known who shares memory with whom.
        kind: ``array``, ``torch``, ``bytes`` or ``bytearray``.
        name: its path in the file.
        tensor: its bytes.
        dtype: as the tree describes it where the file's label does not say it; else None.
        described: the dtype as a view of other memory needs it.
        source: what the state holds: the numpy array or the torch tensor.
    """

    node: dict[str, Any]
    kind: str
    name: str
    tensor: Tensor
    dtype: Any
    described: Any
    source: Any

    @property
    def can_share(self) -> bool:
        """Whether it is what lies in its memory: not bytes, which nobody can change, nor a torch view that only looks conjugate."""
        return self.kind == "array" or (self.kind == "torch" and not (self.source.is_conj() or self.source.is_neg()))


def tensors_of(leaves: Sequence[Leaf]) -> tuple[dict[str, Tensor], tuple[Group, ...]]:
    """The tensors of the file, by name, and the groups of leaves that share memory; completes the leaves' nodes.

    The members of a group are indices of ``leaves``.
    """
    for leaf in leaves:
        leaf.node[leaf.kind] = _plain(leaf, leaf.name)
    able = [n for n, leaf in enumerate(leaves) if leaf.can_share]
    found = groups_of([leaves[n].source for n in able])
    shared = tuple(
        Group(
            members=tuple(able[n] for n in group.members), offsets=group.offsets, size_bytes=group.size_bytes,
            owner=None if group.owner is None else able[group.owner],
        )
        for group in found
    )  # fmt: skip
    own = {leaf.name: leaf.tensor for leaf in leaves}
    for group in shared:
        _share(leaves, group, own)
    return own, shared


def _plain(leaf: Leaf, name: str) -> Any:
    return name if leaf.dtype is None else {"at": name, "dtype": leaf.dtype, "shape": list(leaf.tensor.array.shape)}


def _share(leaves: Sequence[Leaf], group: Group, own: dict[str, Tensor]) -> None:
    """Leave the group's members one tensor, and make their nodes views of it."""
    for n in group.members:
        if n != group.owner:
            del own[leaves[n].name]
    if group.owner is None:
        first = leaves[group.members[0]]
        name = f"{first.name}{SHARED}"
        alignment = max(leaves[n].tensor.array.dtype.alignment for n in group.members)
        own[name] = Tensor(label="U8", array=memory_of(first.source, group, 0), alignment=alignment)
    else:
        name = leaves[group.owner].name
    for n, offset in zip(group.members, group.offsets, strict=True):
        leaf = leaves[n]
        leaf.node[leaf.kind] = _plain(leaf, name) if _is_whole(leaves, n, group, offset) else _view(leaf, name, offset)


def _is_whole(leaves: Sequence[Leaf], n: int, group: Group, offset: int) -> bool:
    """Whether the leaf is what is stored, of the same dtype and shape, so that the tensor's name says all of it."""
    if group.owner is None or offset:
        return False
    leaf, owner = leaves[n], leaves[group.owner]
    alike = (leaf.tensor.label, leaf.dtype, leaf.tensor.array.shape) == (owner.tensor.label, owner.dtype, owner.tensor.array.shape)
    return alike and strides_of(leaf.source) == strides_of(owner.source)


def _view(leaf: Leaf, name: str, offset: int) -> Any:
    array = leaf.tensor.array
    return {
        "at": name, "dtype": leaf.described, "shape": list(array.shape), "strides": list(strides_of(leaf.source)), "offset": offset,
    }  # fmt: skip


def strides_of(source: Any) -> tuple[int, ...]:
    """The strides of an array or tensor in bytes."""
    if isinstance(source, np.ndarray):
        return source.strides
    item_bytes = source.element_size()
    return tuple(stride * item_bytes for stride in source.stride())
