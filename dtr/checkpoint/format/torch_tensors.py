"""torch tensors as arrays, bit by bit, if the process uses torch; it is never imported for a state that has none."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.checkpoint.format.tensors import Tensor
from dtr.errors import InvalidInput, UnsupportedLeaf

__all__ = [
    "DTYPES",
    "RAW",
    "OnDevice",
    "array_of",
    "as_tensor",
    "build",
    "dtype_name",
    "facts_of",
    "is_parameter",
    "is_tensor",
    "item_bytes",
    "label_of",
    "memory_of",
    "reader_of",
    "view",
]

# torch's names of the dtypes that safetensors has. Those that numpy lacks are seen as integers of their size.
_LABELS: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32", "uint64": "U64",
    "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_NAMES: Final = {label: name for name, label in _LABELS.items()}
_AS_INTEGERS: Final = {
    "bfloat16": "int16",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
    "complex32": "int32",
}
RAW: Final = {"complex128": np.dtype("<c16"), "complex32": np.dtype("V4")}  # those that it lacks, as numpy sees them, if it does
DTYPES: Final = frozenset(_LABELS) | frozenset(RAW)


class OnDevice:
    """A tensor in the memory of a device, as far as a layout needs it: what numpy would say of it, and slices of it. Nothing is copied."""

    __slots__ = ("dtype", "nbytes", "shape", "source")

    def __init__(self, source: Any, dtype: np.dtype[Any]) -> None:
        self.source, self.dtype = source, dtype
        self.shape: tuple[int, ...] = tuple(source.shape)
        self.nbytes: int = source.numel() * source.element_size()

    def __getitem__(self, rows: Any) -> OnDevice:
        return OnDevice(self.source[rows], self.dtype)


def is_tensor(value: Any) -> bool:
    """Whether it is a torch tensor or Parameter, and not of some subclass that holds more than its bytes."""
    torch = sys.modules.get("torch")
    return torch is not None and type(value) in {torch.Tensor, torch.nn.Parameter}


def is_parameter(value: Any) -> bool:
    return type(value) is not sys.modules["torch"].Tensor


def is_here(value: Any) -> bool:
    """Whether its bytes are in this machine's memory, where numpy can see them."""
    return bool(value.device.type == "cpu")


def dtype_name(value: Any) -> str:
    """``bfloat16``."""
    return str(value.dtype).removeprefix("torch.")


def label_of(name: str) -> str:
    """The dtype of this name as the file's format has it; '' if it has none."""
    return _LABELS.get(name, "")


def item_bytes(name: str) -> int:
    """The size of an item of the dtype of this name."""
    return _held_dtype(name).itemsize


def facts_of(value: Any) -> tuple[Any, ...]:
    """All that a layout depends on; two tensors of the same facts can take each other's place in it."""
    return (
        value.dtype, value.shape, value.device, value.layout, value.requires_grad, value.is_nested, value.is_conj(), value.is_neg()
    )  # fmt: skip


def as_tensor(value: Any) -> tuple[Tensor, str | None]:
    """The tensor's bytes as an array, shared where it is in this machine's memory, and its dtype where the label does not say it.

    Raises InvalidInput that says what the tensor is (``is sparse``) if it has no plain bytes.
    """
    torch = sys.modules["torch"]
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise InvalidInput("is sparse, quantized or nested; give its parts as plain tensors")
    if value.device.type == "meta":
        raise InvalidInput("is on the meta device and has no data")
    name = dtype_name(value)
    if name not in DTYPES:
        raise InvalidInput(f"is of dtype {name}; give a view of uint8")
    label = _LABELS.get(name, "U8")
    return Tensor(label=label, array=array_of(value)), name if name in RAW else None


def array_of(value: Any) -> Any:
    """The bytes of a tensor that ``as_tensor`` accepts: a numpy array over its memory, or what stands for one on a device."""
    torch = sys.modules["torch"]
    plain = value.detach() if value.requires_grad else value
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    if not is_here(plain):
        return OnDevice(plain, _held_dtype(dtype_name(plain)))
    if (integers := _AS_INTEGERS.get(dtype_name(plain))) is not None:
        plain = plain.view(getattr(torch, integers))
    return plain.numpy()


def reader_of(value: Any) -> Callable[[Any], Any]:
    """``array_of`` for tensors of the same facts (``facts_of``), without asking each for them again."""
    if not is_here(value) or value.is_conj() or value.is_neg():
        return array_of
    read: Callable[[Any], Any] = operator.methodcaller("numpy")
    if (integers := _AS_INTEGERS.get(dtype_name(value))) is not None:
        dtype = getattr(sys.modules["torch"], integers)
        read = lambda tensor: tensor.view(dtype).numpy()
    return (lambda tensor: read(tensor.detach())) if value.requires_grad else read


def _held_dtype(name: str) -> np.dtype[Any]:
    """The dtype that numpy would say the items have, as they lie in memory."""
    return np.dtype(_AS_INTEGERS.get(name, RAW.get(name, name)))


def memory_of(array: NDArray[Any]) -> Any:
    """The bytes of an array from a file as a torch tensor of uint8, in whose storage tensors can be made; copied only if read-only."""
    torch = _torch()
    if not (array.flags.writeable and array.flags.aligned):
        array = array.copy()
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def build(memory: Any, tensor: Tensor, dtype: str | None = None, *, requires_grad: bool | None = None) -> Any:
    """The tensor that is the whole of ``memory``; a Parameter if ``requires_grad`` is given.

    Args:
        memory: of the array of ``tensor``.
        tensor: as it was in the file; ``dtype`` names that of torch where the label does not.
        requires_grad: of the Parameter.
    """
    name, shape = dtype or _NAMES[tensor.label], tensor.array.shape
    return view(memory, name, shape, _dense(shape, tensor.array.itemsize), 0, requires_grad=requires_grad)


def _dense(shape: Sequence[int], item_bytes: int) -> list[int]:
    strides, reach = [], item_bytes
    for size in reversed(shape):
        strides.append(reach)
        reach *= max(size, 1)
    return strides[::-1]


def view(memory: Any, name: str, shape: Sequence[int], strides: Sequence[int], offset: int, *, requires_grad: bool | None = None) -> Any:
    """A tensor of dtype ``name`` in the memory of another, ``strides`` and ``offset`` in bytes; it shares the storage.

    Raises ValueError if they are no whole number of items.
    """
    torch = _torch()
    dtype = getattr(torch, name)
    size = dtype.itemsize
    if offset % size or any(stride % size or stride < 0 for stride in strides):
        raise ValueError(f"strides {strides} and offset {offset} are no whole number of {name}")
    built = torch.empty(0, dtype=dtype).set_(
        memory.untyped_storage(), offset // size, tuple(shape), tuple(stride // size for stride in strides)
    )
    return built if requires_grad is None else torch.nn.Parameter(built, requires_grad=requires_grad)


def _torch() -> Any:
    try:
        import torch
    except ImportError as exc:
        raise UnsupportedLeaf("this checkpoint holds torch tensors, and torch is not installed here: pip install torch") from exc
    return torch
