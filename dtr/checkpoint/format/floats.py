"""Stored numbers as float64, also of kinds that numpy has no dtype for. Pure.

bfloat16 is the upper half of a float32. The 8-bit kinds are spelled by their sign, exponent and mantissa; see the OCP specification of
8-bit floating point and, for the FNUZ kinds, https://arxiv.org/abs/2206.02915.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_float64"]

# Mantissa bits, bias of the exponent, and what the patterns beyond the finite numbers mean.
_KINDS: Final = {
    "F8_E4M3": (3, 7, "nan only at all ones"),
    "F8_E5M2": (2, 15, "as IEEE 754"),
    "F8_E4M3FNUZ": (3, 8, "nan only at minus zero"),
    "F8_E5M2FNUZ": (2, 16, "nan only at minus zero"),
}


def as_float64(array: NDArray[Any], label: str) -> NDArray[np.float64]:
    """The numbers of ``array``, which holds dtype ``label`` of safetensors as ``tensors.read`` gives it; complex ones stay complex."""
    if label == "BF16":
        bits: NDArray[np.uint32] = array.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).astype(np.float64)
    if label.startswith("F8"):
        return np.take(_table(label), array)
    found: NDArray[np.float64] = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    return found


@cache
def _table(label: str) -> NDArray[np.float64]:
    return np.array([_power(bits) if label == "F8_E8M0" else _small(bits, *_KINDS[label]) for bits in range(256)])


def _power(bits: int) -> float:
    """E8M0 has nothing but an exponent."""
    return math.nan if bits == 255 else math.ldexp(1.0, bits - 127)


def _small(bits: int, mantissa_bits: int, bias: int, special: str) -> float:
    sign = -1.0 if bits & 0x80 else 1.0
    exponent, mantissa = (bits & 0x7F) >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    if special == "nan only at minus zero" and bits == 0x80:
        return math.nan
    if special == "nan only at all ones" and bits & 0x7F == 0x7F:
        return math.nan
    if special == "as IEEE 754" and exponent == (1 << (7 - mantissa_bits)) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
