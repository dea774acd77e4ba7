"""Restore into a state that is there already: its arrays are filled in place, its other values replaced.

    match     walk the saved tree and the given state side by side; whatever does not fit is refused before a byte is read
    read      each array's bytes straight into its own memory, where that is contiguous; else beside it, and copied
    finish    put the other values into the dicts and lists that hold them

A dict must have the saved keys, a list or tuple the saved length, an array the saved shape and dtype, and what shares memory (or is one
dict or list under two names) must have been saved so: a model that differs is told by the path of the first difference, and stays as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.checkpoint.format import torch_tensors
from dtr.checkpoint.format.build import unflatten
from dtr.checkpoint.format.paths import LEFT_OUT, mentioned
from dtr.checkpoint.format.tensors import Tensor
from dtr.checkpoint.restoring.apart import Target, check_apart
from dtr.errors import StateMismatch

__all__ = ["Filling", "match"]

_ARRAYS: Final = {"array", "torch", "parameter"}
_PAIRS: Final = {"items", "ordered"}
_CONTAINERS: Final = {"dict": dict, "items": dict, "ordered": OrderedDict, "tuple": tuple}

Value = Callable[[], Any]  # what belongs at a place of the state, once the bytes are there


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """A state that fits. ``memory`` says where a tensor's bytes shall be read to; ``finish`` completes the state and returns it."""

    memory: Mapping[str, memoryview]
    finish: Value


def match(spec: Any, tensors: Mapping[str, Tensor], state: Any, *, partial: bool = False) -> Filling:
    """Where everything goes.

    Args:
        spec: the saved tree; LEFT_OUT stands for an item of a list that is not wanted.
        tensors: every tensor that it may name, over memory of its own whose bytes are not there yet.
        state: to be filled.
        partial: the state may have more than the tree.

    Raises:
        StateMismatch: it does not fit; nothing was changed.
    """
    walk = _Match(tensors, partial)
    finish = walk.value(spec, state, "state")
    return Filling(memory=walk.settle(), finish=finish)


class _Match:
    def __init__(self, tensors: Mapping[str, Tensor], partial: bool) -> None:
        self._tensors, self._partial = tensors, partial
        self._at = {tensor.array.ctypes.data: name for name, tensor in tensors.items() if tensor.array.nbytes}
        self._memory: dict[str, NDArray[np.uint8]] = {}
        self._targets: list[Target] = []
        self._containers: dict[int, tuple[str, Any]] = {}  # those that are filled in place, by id: path, and what was saved for it
        self._beside: set[str] = set()  # tensors that some value is built from, so that they need memory of their own

    def settle(self) -> dict[str, memoryview]:
        """The memory of the tensors that are read straight to where they belong; StateMismatch if targets are in each other's way."""
        check_apart(self._targets)
        for name in self._beside:
            self._memory.pop(name, None)
        return {name: memory.data for name, memory in self._memory.items()}

    def value(self, node: Any, given: Any, path: str) -> Value:
        if node is LEFT_OUT:
            return lambda: given
        self._check_once(node, given, path)
        if type(node) is list:
            return self._list(node, given, path)
        if type(node) is dict and len(node) == 1:
            ((kind, inner),) = node.items()
            if kind in _ARRAYS:
                return self._array(node, given, path)
            if kind == "tuple":
                return self._tuple(inner, given, path)
            if kind == "dict":
                return self._dict(list(inner.items()), given, path, dict)
            if kind in _PAIRS:
                return self._dict([(unflatten(key, {}), item) for key, item in inner], given, path, _CONTAINERS[kind])
        if isinstance(given, dict | list | tuple | np.ndarray) or torch_tensors.is_tensor(given):
            raise _mismatch(path, f"is a {_kind(given)}, and a single value was saved")
        self._beside.update(mentioned(node, self._tensors.keys()))
        return lambda: unflatten(node, self._tensors)

    # --- containers -------------------------------------------------------------------------------------------------

    def _check_once(self, node: Any, given: Any, path: str) -> None:
        """A dict or list that the state names twice can hold only what was saved alike."""
        if isinstance(given, dict | list):
            first, saved = self._containers.setdefault(id(given), (path, node))
            if saved is not node and repr(saved) != repr(node):  # 1 and 1.0 are not alike
                raise _mismatch(path, f"is the same {_kind(given)} as {first}, and what was saved is not: give each its own")

    def _dict(self, saved: list[tuple[Any, Any]], given: Any, path: str, kind: type) -> Value:
        if not isinstance(given, dict):
            raise _mismatch(path, f"is a {_kind(given)}, and a {kind.__name__} was saved")
        if absent := [key for key, _ in saved if key not in given]:
            raise _mismatch(path, f"lacks {_some(absent)}, which was saved")
        known = dict(saved)
        if not self._partial and (extra := [key for key in given if key not in known]):
            raise _mismatch(path, f"has {_some(extra)}, which was not saved")
        values = [(key, self.value(item, given[key], f"{path}[{key!r}]")) for key, item in saved]
        return lambda: _put_all(given, values)

    def _list(self, saved: list[Any], given: Any, path: str) -> Value:
        self._check_length(saved, given, path, list)
        values = [(index, self.value(item, given[index], f"{path}[{index}]")) for index, item in enumerate(saved)]
        return lambda: _put_all(given, values)

    def _tuple(self, saved: list[Any], given: Any, path: str) -> Value:
        self._check_length(saved, given, path, tuple)
        values = [self.value(item, given[index], f"{path}[{index}]") for index, item in enumerate(saved)]

        def finish() -> Any:
            found = tuple(value() for value in values)
            return given if all(new is old for new, old in zip(found, given, strict=True)) else found

        return finish

    def _check_length(self, saved: list[Any], given: Any, path: str, kind: type) -> None:
        if not isinstance(given, kind):
            raise _mismatch(path, f"is a {_kind(given)}, and a {kind.__name__} was saved")
        if len(given) != len(saved):  # type: ignore[arg-type]
            raise _mismatch(path, f"has {len(given)} items, and {len(saved)} were saved")  # type: ignore[arg-type]

    # --- arrays -----------------------------------------------------------------------------------------------------

    def _array(self, node: Any, given: Any, path: str) -> Value:
        saved = unflatten(node, self._tensors)  # the array as it will be, over memory that is still empty
        name = (self._numpy if isinstance(saved, np.ndarray) else self._torch)(saved, given, path)
        self._targets.append(Target(path=path, given=given, saved=saved))
        if not name:
            self._beside.update(mentioned(node, self._tensors.keys()))
        return lambda: given if name in self._memory else _copied(given, saved)

    def _numpy(self, saved: Any, given: Any, path: str) -> str:
        if not isinstance(given, np.ndarray):
            raise _mismatch(path, f"is a {_kind(given)}, and an array was saved")
        _check_same(path, (given.shape, given.dtype), (saved.shape, saved.dtype))
        if not given.flags.writeable:
            raise _mismatch(path, "is read-only: give an array that can be written, or leave into= out")
        return self._direct(saved, given)

    def _torch(self, saved: Any, given: Any, path: str) -> str:
        if not torch_tensors.is_tensor(given):
            raise _mismatch(path, f"is a {_kind(given)}, and a torch tensor was saved")
        _check_same(path, (tuple(given.shape), given.dtype), (tuple(saved.shape), saved.dtype))
        if given.device.type == "meta" or given.layout != saved.layout:
            raise _mismatch(path, f"is a tensor without plain memory ({given.device}, {given.layout}), which nothing can be read into")
        if given.device.type != "cpu" or given.is_conj() or given.is_neg():
            return ""
        return self._direct(torch_tensors.as_tensor(saved)[0].array, torch_tensors.as_tensor(given)[0].array)

    def _direct(self, saved: NDArray[Any], given: NDArray[Any]) -> str:
        """The tensor whose bytes are read straight into ``given``: if it is the whole of one, and both are contiguous; else ''."""
        name = self._at.get(saved.ctypes.data, "")
        whole = bool(name) and self._tensors[name].array.nbytes == saved.nbytes == given.nbytes
        if not whole or not (saved.flags.c_contiguous and given.flags.c_contiguous):
            return ""
        memory = given.reshape(-1).view(np.uint8)
        if name in self._memory and self._memory[name].ctypes.data != memory.ctypes.data:
            return ""  # one tensor, saved once and named twice; here it is two arrays
        self._memory[name] = memory
        return name


def _put_all(container: Any, values: list[tuple[Any, Value]]) -> Any:
    for key, value in values:
        new = value()
        if new is not container[key]:
            container[key] = new
    return container


def _copied(given: Any, saved: Any) -> Any:
    """Bit by bit: numpy's as opaque bytes of the item's size."""
    if not isinstance(given, np.ndarray):
        given.detach().copy_(saved.detach())
    elif given.dtype.itemsize:
        opaque = np.dtype(f"V{given.dtype.itemsize}")
        given.view(opaque)[...] = saved.view(opaque)
    return given


def _check_same(path: str, given: tuple[Any, Any], saved: tuple[Any, Any]) -> None:
    for what, ours, theirs in zip(("shape", "dtype"), given, saved, strict=True):
        if ours != theirs:
            raise _mismatch(path, f"has {what} {ours}, and {theirs} was saved")


def _kind(value: Any) -> str:
    return type(value).__name__


def _some(keys: list[Any]) -> str:
    shown = ", ".join(repr(key)[:60] for key in keys[:4])
    return shown + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _mismatch(path: str, what: str) -> StateMismatch:
    return StateMismatch(f"{path} {what}; nothing was restored into it", path=path)
