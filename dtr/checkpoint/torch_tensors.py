"""torch tensors as arrays, bit by bit, if the process uses torch; it is never imported for a state that has none."""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np

from dtr.checkpoint.tensors import Tensor
from dtr.errors import InvalidInput, UnsupportedLeaf

__all__ = ["RAW", "as_tensor", "build", "is_parameter", "is_tensor"]

# torch's names of the dtypes that safetensors has. Those that numpy lacks are seen as integers of their size.
_LABELS: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32", "uint64": "U64",
    "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_NAMES: Final = {label: name for name, label in _LABELS.items()}
_AS_INTEGERS: Final = {
    "BF16": "int16",
    "F8_E4M3": "uint8",
    "F8_E5M2": "uint8",
    "F8_E4M3FNUZ": "uint8",
    "F8_E5M2FNUZ": "uint8",
    "F8_E8M0": "uint8",
}
RAW: Final = {"complex128": np.dtype("<c16")}


def is_tensor(value: Any) -> bool:
    """Whether it is a torch tensor or Parameter, and not of some subclass that holds more than its bytes."""
    torch = sys.modules.get("torch")
    return torch is not None and type(value) in {torch.Tensor, torch.nn.Parameter}


def is_parameter(value: Any) -> bool:
    return type(value) is not sys.modules["torch"].Tensor


def as_tensor(value: Any) -> tuple[Tensor, str | None]:
    """The tensor's bytes as an array, shared where it is in this machine's memory, and its dtype where the label does not say it.

    Raises InvalidInput that says what the tensor is (``is sparse``) if it has no plain bytes.
    """
    torch = sys.modules["torch"]
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise InvalidInput("is sparse, quantized or nested; give its parts as plain tensors")
    if value.device.type == "meta":
        raise InvalidInput("is on the meta device and has no data")
    name = str(value.dtype).removeprefix("torch.")
    if name not in _LABELS and name not in RAW:
        raise InvalidInput(f"is of dtype {name}; give a view of uint8")
    plain = value.detach().cpu().resolve_conj().resolve_neg()
    if name in RAW:
        return Tensor.of(plain.numpy()), name
    label = _LABELS[name]
    if label in _AS_INTEGERS:
        plain = plain.view(getattr(torch, _AS_INTEGERS[label]))
    return Tensor(label=label, array=plain.numpy()), None


def build(tensor: Tensor, *, requires_grad: bool | None = None) -> Any:
    """The torch tensor over an array from a file (copied only if that is read-only); a Parameter if ``requires_grad`` is given."""
    try:
        import torch
    except ImportError as exc:
        raise UnsupportedLeaf("this checkpoint holds torch tensors, and torch is not installed here: pip install torch") from exc
    array = tensor.array
    if not (array.flags.writeable and array.flags.aligned):
        array = array.copy()
    if (integers := _AS_INTEGERS.get(tensor.label)) is not None:
        built = torch.from_numpy(array.view(integers)).view(getattr(torch, _NAMES[tensor.label]))
    else:
        built = torch.from_numpy(array)
    return built if requires_grad is None else torch.nn.Parameter(built, requires_grad=requires_grad)
