"""Columns as torch tensors; torch is imported when the first is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

__all__ = ["as_tensors"]


def as_tensors(columns: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Columns of numbers and booleans as tensors of the same memory; other columns (objects, text, dates) stay arrays.

    Copied is only what torch cannot share: read-only memory, another byte order, negative strides.
    """
    return {name: _tensor(values) for name, values in columns.items()}


def _tensor(values: NDArray[Any]) -> Any:
    import torch

    too_wide = {"f": 8, "c": 16}.get(values.dtype.kind, 8)
    if values.dtype.kind not in "biufc" or values.dtype.itemsize > too_wide:
        return values
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if not values.flags.writeable or any(stride < 0 for stride in values.strides):
        values = values.copy()
    return torch.from_numpy(values)
