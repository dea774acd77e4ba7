"""A state as a typed tree in JSON, and its arrays beside it: nothing is pickled, everything comes back as what it was.

A node of the tree is

    null, true, 3, 2.5, "text", [...]     None, bool, int, float, str, list: as in JSON
    {"dict": {...}}                       a dict whose keys are all text; {"items": [[key, value], ...]} with other keys
    {"ordered": [[key, value], ...]}      a collections.OrderedDict
    {"tuple": [...]}
    {"int": "0x..."}                      an int of more than 64 bits
    {"float": "nan"}                      also "inf", "-inf"; the bits of any other NaN as 16 hex digits
    {"str": "eda080"}                     text with lone surrogates, in hex (UTF-8, surrogates passed)
    {"bytes": NAME}, {"bytearray": NAME}  the tensor of that name in the file
    {"array": NAME}                       a numpy array; {"array": {"at": NAME, "dtype": ..., "shape": ...}} for a dtype that
                                          safetensors lacks, described as in numpy's own .npy files
    {"scalar": {"dtype": ..., "hex": ...}}, {"numpy_str": "text"}, {"numpy_bytes": "hex"}   a numpy scalar
    {"torch": NAME}, {"torch": {"at": NAME, "dtype": ..., "shape": ...}}   a torch tensor
    {"parameter": [NODE, requires_grad]}  a torch Parameter
    {"array": VIEW}, {"torch": VIEW}      a value that lies in the memory of another one, and will again: VIEW is {"at": NAME,
                                          "dtype": ..., "shape": ..., "strides": [bytes, ...], "offset": bytes}. One that is the whole
                                          of another is just another node with that tensor's NAME.

A tensor's name is its path, ``model/layers/0/weight``, for people who look into the file; nothing is parsed back from it. What lies in
the same memory is stored once (``dtr.checkpoint.format.sharing``), under the path of the value that spans it, or of the first one and
``~shared``.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson

from dtr.checkpoint.format import dtypes, torch_tensors
from dtr.checkpoint.format.build import MAX_DEPTH, unflatten
from dtr.checkpoint.format.leaves import Leaf, tensors_of
from dtr.checkpoint.format.sharing import Group
from dtr.checkpoint.format.tensors import Tensor
from dtr.errors import InvalidInput, ManifestInvalid, UnsupportedLeaf

__all__ = ["MAX_DEPTH", "TREE", "Walked", "decode", "encode", "flatten", "scalar_nodes", "unflatten", "walk"]

TREE: Final = "dtr_tree"  # the name of the tree in the metadata of a part's file
_MAX_VALUES: Final = 10_000_000
_NAN: Final = "7ff8000000000000"
_KEEPS: Final = (
    "a checkpoint keeps None, bool, int, float, str, bytes, bytearray, numpy arrays and scalars, torch tensors,"
    " and dicts, lists and tuples of them"
)
_INSTEAD: Final = {
    dict: "give dict(x)",
    tuple: "give tuple(x), or a dict of its fields",
    list: "give list(x)",
    str: "give str(x)",
    int: "give int(x)",
    float: "give float(x)",
    np.ndarray: "give numpy.array(x), or the data and the mask apart",
}


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take a state apart: the tree (JSON-able) and the tensors it names. Arrays are not copied.

    Raises UnsupportedLeaf, naming the path like ``state["model"][3]``, for what a checkpoint cannot keep, for a container that holds
    itself, and for more than 64 levels or ten million values.
    """
    walked = walk(state)
    return walked.spec, walked.tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked:
    """A state taken apart. ``leaves`` are its arrays in the order of the walk, ``shared`` the groups of them that share memory."""

    spec: Any
    leaves: tuple[Leaf, ...]
    tensors: dict[str, Tensor]
    shared: tuple[Group, ...]


def walk(state: Any) -> Walked:
    """Take a state apart, with all that is found on the way; as ``flatten`` does."""
    flattener = _Flattener()
    try:
        spec = flattener.value(state)
    except RecursionError as exc:  # the caller's own stack is nearly full
        raise UnsupportedLeaf(f"{flattener.where()} is nested too deep", path=flattener.where()) from exc
    tensors, shared = tensors_of(flattener.leaves)
    return Walked(spec=spec, leaves=tuple(flattener.leaves), tensors=tensors, shared=shared)


def scalar_nodes() -> Callable[[Any], Any]:
    """What gives the node of a value that is no container and no array; it raises UnsupportedLeaf for one that cannot be kept."""
    return _Flattener().value


def encode(spec: Any) -> str:
    """The tree as JSON text."""
    return orjson.dumps(spec).decode()


def decode(text: str) -> Any:
    """JSON text as a tree that ``unflatten`` then checks; ManifestInvalid if it is not JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise ManifestInvalid(f"the tree of the part is not JSON: {exc}") from exc


class _Flattener:
    """One walk through a state; ``_path`` is where it is."""

    def __init__(self) -> None:
        self.leaves: list[Leaf] = []
        self._names: set[str] = {"__metadata__"}
        self._path: list[tuple[str, Any]] = []  # (what is said of it, what names it in the file)
        self._open: set[int] = set()
        self._values = 0
        self._dtypes: dict[np.dtype[Any], str | None] = {}  # why not
        self._described: dict[np.dtype[Any], Any] = {}
        self._by_type: dict[type, Callable[[Any], Any]] = {
            type(None): lambda value: value,
            bool: lambda value: value,
            int: _int,
            float: _float,
            str: _str,
            bytes: lambda value: self._leaf("bytes", Tensor.of(np.frombuffer(value, np.uint8)), None, None, value),
            bytearray: lambda value: self._leaf("bytearray", Tensor.of(np.frombuffer(value, np.uint8)), None, None, value),
            dict: self._dict,
            OrderedDict: lambda value: {"ordered": self._items(value)},
            list: self._list,
            tuple: lambda value: {"tuple": self._list(value)},
            np.ndarray: self._array,
            np.str_: lambda value: {"numpy_str": _str(str.__str__(value))},  # str(value) would drop NULs at the end
            np.bytes_: lambda value: {"numpy_bytes": bytes.__getitem__(value, slice(None)).hex()},
        }

    def value(self, value: Any) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise self._unsupported(f"is one of more than {_MAX_VALUES} values: put numbers into arrays")
        if (handle := self._by_type.get(type(value))) is not None:
            return handle(value)
        if isinstance(value, np.generic):
            return self._scalar(value)
        if torch_tensors.is_tensor(value):
            return self._torch(value)
        raise self._refused(value)

    # --- containers ---

    def _dict(self, value: dict[Any, Any]) -> Any:
        if all(type(key) is str and _is_unicode(key) for key in value):
            return {"dict": dict(self._items(value))}
        return {"items": self._items(value)}

    def _items(self, value: dict[Any, Any]) -> list[Any]:
        with _Entered(self, value):
            return [[self._key(key), self._below(f"[{_shown(key)}]", key, item)] for key, item in value.items()]

    def _list(self, value: Iterable[Any]) -> list[Any]:
        with _Entered(self, value):
            return [self._below(f"[{index}]", index, item) for index, item in enumerate(value)]

    def _below(self, said: str, name: Any, value: Any) -> Any:
        self._path.append((said, name))
        node = self.value(value)
        self._path.pop()
        return node

    def _key(self, key: Any, levels: int = 3) -> Any:
        if type(key) is tuple and levels:
            return {"tuple": [self._key(part, levels - 1) for part in key]}
        if type(key) in {str, int, float, bool, type(None)}:
            return self._by_type[type(key)](key)
        raise self._unsupported(
            f"has the key {_shown(key)} of type {type(key).__name__}; keys are str, int, float, bool, None and tuples of them"
        )

    def enter(self, container: Any) -> None:
        if id(container) in self._open:
            raise self._unsupported("holds itself")
        if len(self._path) >= MAX_DEPTH:
            raise self._unsupported(f"is nested deeper than {MAX_DEPTH} levels")
        self._open.add(id(container))

    def leave(self, container: Any) -> None:
        self._open.discard(id(container))

    # --- arrays ---

    def _array(self, value: Any) -> Any:
        if (why := self._why_unsupported(value.dtype)) is not None:
            raise self._unsupported(f"is an array of dtype {value.dtype}: {why}")
        tensor, described = Tensor.of(value), self._described[value.dtype]
        return self._leaf("array", tensor, described if tensor.is_raw else None, described, value)

    def _why_unsupported(self, dtype: np.dtype[Any]) -> str | None:
        if dtype not in self._dtypes:
            self._dtypes[dtype] = why = dtypes.why_unsupported(dtype)
            self._described[dtype] = dtypes.describe(dtype) if why is None else None
        return self._dtypes[dtype]

    def _torch(self, value: Any) -> Any:
        try:
            tensor, dtype = torch_tensors.as_tensor(value)
        except InvalidInput as exc:
            raise self._unsupported(f"is a torch tensor that {exc.message}") from exc
        node = self._leaf("torch", tensor, dtype, torch_tensors.dtype_name(value), value)
        return {"parameter": [node, value.requires_grad]} if torch_tensors.is_parameter(value) else node

    def _leaf(self, kind: str, tensor: Tensor, dtype: Any, described: Any, source: Any) -> Any:
        path = "/".join([_file_name(name) for _, name in self._path]) or "state"
        name, number = path, 1
        while name in self._names:  # as {1: a, "1": b}
            number += 1
            name = f"{path}~{number}"
        self._names.add(name)
        node: dict[str, Any] = {}
        self.leaves.append(Leaf(node=node, kind=kind, name=name, tensor=tensor, dtype=dtype, described=described, source=source))
        return node

    def _scalar(self, value: Any) -> Any:
        array = np.asarray(value)
        if (why := dtypes.why_unsupported(array.dtype)) is not None or type(array[()]) is not type(value):
            raise self._unsupported(f"is a numpy scalar of type {type(value).__name__}: {why or 'not one of numpy itself'}")
        return {"scalar": {"dtype": dtypes.describe(array.dtype), "hex": dtypes.scalar_bytes(array).hex()}}

    # --- refusals ---

    def where(self) -> str:
        steps = [said for said, _ in self._path]
        if len(steps) > 12:
            steps = [*steps[:6], "...", *steps[-3:]]
        return "state" + "".join(steps)

    def _unsupported(self, what: str) -> UnsupportedLeaf:
        where = self.where()
        return UnsupportedLeaf(f"{where} {what}", path=where)

    def _refused(self, value: Any) -> UnsupportedLeaf:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        for base, instead in _INSTEAD.items():
            if isinstance(value, base):
                return self._unsupported(f"is a {kind}, which would not come back as one: {instead}")
        return self._unsupported(f"is a {kind}: {_KEEPS}")


class _Entered:
    """While it is open, the container must not be met again: it would hold itself."""

    __slots__ = ("_container", "_flattener")

    def __init__(self, flattener: _Flattener, container: Any) -> None:
        self._flattener, self._container = flattener, container

    def __enter__(self) -> None:
        self._flattener.enter(self._container)

    def __exit__(self, *error: object) -> None:
        self._flattener.leave(self._container)


def _int(value: int) -> Any:
    return value if -(2**63) <= value < 2**63 else {"int": hex(value)}


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    if math.isinf(value):
        return {"float": "inf" if value > 0 else "-inf"}
    bits = struct.pack(">d", value).hex()
    return {"float": "nan" if bits == _NAN else bits}


def _str(value: str) -> Any:
    return value if _is_unicode(value) else {"str": value.encode("utf-8", "surrogatepass").hex()}


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(key: Any) -> str:
    """As in Python, with double quotes where that is all it takes; short."""
    if type(key) is str and key.isprintable() and not set(key) & {'"', "'", "\\"}:
        text = f'"{key}"'
    else:
        text = repr(key) if type(key) in {str, bytes, int, float, bool, type(None), tuple} else f"<{type(key).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _file_name(key: Any) -> str:
    if type(key) is str and key.isalnum() and key.isascii():
        return key
    text = key if type(key) is str else repr(key)
    return text.replace("~", "~0").replace("/", "~1").encode("utf-8", "backslashreplace").decode()
