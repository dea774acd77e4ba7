"""A state put together again from its tree and its tensors; the inverse of ``tree.flatten``, and as strict as a parser must be.

The tree may come from a damaged or hostile file, so every node is checked: whatever is wrong is a ManifestInvalid that says where.
"""

from __future__ import annotations

import math
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.checkpoint.format import dtypes, torch_tensors
from dtr.checkpoint.format.sharing import span
from dtr.checkpoint.format.tensors import Tensor
from dtr.errors import ManifestInvalid

__all__ = ["MAX_DEPTH", "unflatten"]

MAX_DEPTH: Final = 64
_MAX_SIDE: Final = 1 << 48  # of a view of stride 0, which is larger than its bytes
_FLOATS: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_INTEGER: Final = re.compile(r"-?0x[0-9a-f]+", re.ASCII)


def unflatten(spec: Any, leaves: Mapping[str, Tensor]) -> Any:
    """The state of a tree and the tensors that were read beside it.

    Arrays are views of the file's buffer, not copies, and writable if that is; bytes and scalars are values of their own. Raises
    ManifestInvalid for a malformed tree, or one that does not fit the tensors.
    """
    return _Builder(leaves).value(spec, MAX_DEPTH)


class _Builder:
    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        self._leaves = leaves
        self._memories: dict[str, Any] = {}  # what torch tensors share, by the name of the tensor in the file

    def value(self, node: Any, levels: int) -> Any:
        if node is None or type(node) in {bool, int, float, str}:
            return node
        if type(node) is list:
            return self.list_of(node, levels)
        if type(node) is dict and len(node) == 1:
            ((name, inner),) = node.items()
            if (build := _NODES.get(name)) is not None:
                return build(self, inner, levels)
        raise _invalid(node, "a node")

    # --- containers ---

    def list_of(self, node: Any, levels: int) -> list[Any]:
        if type(node) is not list or not levels:
            raise _invalid(node, f"a list within {MAX_DEPTH} levels")
        return [self.value(item, levels - 1) for item in node]

    def dict_of(self, node: Any, levels: int) -> dict[str, Any]:
        if type(node) is not dict or not levels:
            raise _invalid(node, f"an object within {MAX_DEPTH} levels")
        return {key: self.value(item, levels - 1) for key, item in node.items()}

    def items(self, node: Any, levels: int) -> list[tuple[Any, Any]]:
        if type(node) is not list or not levels or not all(type(pair) is list and len(pair) == 2 for pair in node):
            raise _invalid(node, f"a list of pairs within {MAX_DEPTH} levels")
        items = [(self._key(key), self.value(item, levels - 1)) for key, item in node]
        if len(dict(items)) != len(items):
            raise _invalid(node, "keys that differ")
        return items

    def _key(self, node: Any) -> Any:
        key = self.value(node, 4)
        try:
            hash(key)
        except TypeError as exc:
            raise _invalid(node, "a key") from exc
        return key

    # --- arrays ---

    def _leaf(self, name: Any) -> Tensor:
        found = self._leaves.get(name) if type(name) is str else None
        if found is None:
            raise _invalid(name, "the name of a tensor in the file")
        return found

    def bytes_of(self, name: Any) -> NDArray[np.uint8]:
        tensor = self._leaf(name)
        if tensor.label != "U8" or tensor.array.ndim != 1:
            raise _invalid(name, "a tensor of bytes")
        return tensor.array

    def _described(self, node: Any) -> tuple[Tensor, Any, tuple[int, ...]]:
        match node:
            case {"at": str(name), "dtype": dtype, "shape": [*shape]} if len(node) == 3 and _is_shape(shape):
                return self._leaf(name), dtype, tuple(shape)
        raise _invalid(node, "a tensor's name, dtype and shape")

    def _view(self, node: Any) -> tuple[Tensor, Any, tuple[int, ...], tuple[int, ...], int]:
        match node:
            case {"at": str(name), "dtype": dtype, "shape": [*shape], "strides": [*strides], "offset": int(offset)} if len(node) == 5:
                if _is_shape(shape) and len(strides) == len(shape) and all(type(n) is int for n in (offset, *strides)):
                    return self._leaf(name), dtype, tuple(shape), tuple(strides), offset
        raise _invalid(node, "a tensor's name, and dtype, shape, strides and offset of a view of it")

    def array(self, node: Any) -> NDArray[Any]:
        if type(node) is str:
            tensor = self._leaf(node)
            if tensor.label not in dtypes.NATIVE:
                raise _invalid(node, f"a numpy array, not {tensor.label}")
            return tensor.array
        if type(node) is dict and "strides" in node:
            tensor, described, shape, strides, offset = self._view(node)
            dtype = dtypes.parse(described)
            _check_inside(tensor, dtype.itemsize, shape, strides, offset)
            return np.ndarray(shape, dtype, tensor.array.reshape(-1).view(np.uint8).data, offset, strides)
        tensor, described, shape = self._described(node)
        return _reinterpreted(tensor, dtypes.parse(described), shape)

    def torch(self, node: Any, *, requires_grad: bool | None = None) -> Any:
        if type(node) is str:
            tensor = self._leaf(node)
            return torch_tensors.build(self._memory(node), tensor, requires_grad=requires_grad)
        if type(node) is dict and "strides" in node:
            tensor, name, shape, strides, offset = self._view(node)
            if type(name) is not str or name not in torch_tensors.DTYPES:
                raise _invalid(node, "a torch dtype")
            _check_inside(tensor, torch_tensors.item_bytes(name), shape, strides, offset)
            try:
                return torch_tensors.view(self._memory(node["at"]), name, shape, strides, offset, requires_grad=requires_grad)
            except ValueError as exc:
                raise _invalid(node, f"a view of whole items: {exc}") from exc
        tensor, name, shape = self._described(node)
        if (dtype := torch_tensors.RAW.get(name) if type(name) is str else None) is None:
            raise _invalid(node, "a torch dtype")
        whole = Tensor(label="", array=_reinterpreted(tensor, dtype, shape))
        return torch_tensors.build(self._memory(node["at"]), whole, name, requires_grad=requires_grad)

    def _memory(self, name: str) -> Any:
        """The memory of a tensor in the file, the same for all torch tensors that lie in it."""
        if name not in self._memories:
            self._memories[name] = torch_tensors.memory_of(self._leaf(name).array)
        return self._memories[name]

    def parameter(self, node: Any) -> Any:
        match node:
            case [{"torch": inner, **rest}, bool(requires_grad)] if not rest:
                return self.torch(inner, requires_grad=requires_grad)
        raise _invalid(node, "a torch tensor and whether it requires a gradient")

    def numpy_str(self, node: Any) -> Any:
        text = self.value(node, 0)
        if type(text) is not str:
            raise _invalid(node, "text")
        return np.str_(text)


# What each kind of node stands for. One table for all builders: one that a builder held, and that held the builder, would keep every
# restored byte until the garbage collector runs.
_NODES: Final[Mapping[str, Callable[[_Builder, Any, int], Any]]] = {
    "dict": lambda builder, node, levels: builder.dict_of(node, levels),
    "items": lambda builder, node, levels: dict(builder.items(node, levels)),
    "ordered": lambda builder, node, levels: OrderedDict(builder.items(node, levels)),
    "tuple": lambda builder, node, levels: tuple(builder.list_of(node, levels)),
    "int": lambda builder, node, levels: _int(node),
    "float": lambda builder, node, levels: _float(node),
    "str": lambda builder, node, levels: _text(node),
    "bytes": lambda builder, node, levels: builder.bytes_of(node).tobytes(),
    "bytearray": lambda builder, node, levels: bytearray(builder.bytes_of(node)),
    "array": lambda builder, node, levels: builder.array(node),
    "scalar": lambda builder, node, levels: _scalar(node),
    "numpy_str": lambda builder, node, levels: builder.numpy_str(node),
    "numpy_bytes": lambda builder, node, levels: np.bytes_(_hex(node)),
    "torch": lambda builder, node, levels: builder.torch(node),
    "parameter": lambda builder, node, levels: builder.parameter(node),
}


def _is_shape(shape: list[Any]) -> bool:
    return len(shape) <= 64 and all(type(size) is int and size >= 0 for size in shape)


def _check_inside(tensor: Tensor, item_bytes: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
    """A view must not leave the tensor that it is a view of."""
    low, high = span(offset, shape, strides, item_bytes)
    if min(low, offset) < 0 or max(high, offset) > tensor.array.nbytes or max([1, *shape]) > _MAX_SIDE:
        raise _invalid(strides, f"a view inside of {tensor.array.nbytes} bytes")


def _reinterpreted(tensor: Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The bytes of a tensor as another dtype, in place."""
    if tensor.label != "U8" or tensor.array.nbytes != math.prod(shape) * dtype.itemsize:
        raise _invalid(shape, f"a shape that {tensor.array.nbytes} bytes fill as {dtype}")
    try:
        return np.ndarray(shape, dtype, tensor.array.reshape(-1).data if tensor.array.nbytes else bytearray())
    except (ValueError, OverflowError, MemoryError) as exc:
        raise _invalid(shape, "a shape that numpy can hold") from exc


def _int(node: Any) -> int:
    if type(node) is not str or not _INTEGER.fullmatch(node):
        raise _invalid(node, "an integer in hex")
    return int(node, 16)


def _float(node: Any) -> float:
    if type(node) is str and node in _FLOATS:
        return _FLOATS[node]
    bits = _hex(node)
    if len(bits) != 8 or not math.isnan(value := struct.unpack(">d", bits)[0]):
        raise _invalid(node, "the bits of a NaN")
    return float(value)


def _text(node: Any) -> str:
    try:
        return _hex(node).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as exc:
        raise _invalid(node, "text in hex") from exc


def _scalar(node: Any) -> Any:
    match node:
        case {"dtype": described, "hex": text} if len(node) == 2:
            dtype, content = dtypes.parse(described), bytearray(_hex(text))
            if len(content) == dtype.itemsize and content:
                return np.frombuffer(content, dtype)[0]
    raise _invalid(node, "a scalar's dtype and bytes")


def _hex(node: Any) -> bytes:
    try:
        return bytes.fromhex(node)
    except (TypeError, ValueError) as exc:
        raise _invalid(node, "bytes in hex") from exc


def _invalid(node: Any, expected: str) -> ManifestInvalid:
    shown = repr(node) if not isinstance(node, dict | list) else f"{type(node).__name__} of {len(node)}"
    return ManifestInvalid(f"the tree of the part is malformed: expected {expected}, got {shown[:80]}")
