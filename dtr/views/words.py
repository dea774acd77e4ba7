"""Numbers and lists as a person takes them in at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["count_of", "duration", "size", "some"]

_TIMES: Final = ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600))
_SIZES: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def duration(seconds: float) -> str:
    """A time: ``0.4 s``, ``45 s``, ``12 min``, ``5 h``, ``3 d``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for limit, unit, length in _TIMES:
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def size(size_bytes: int) -> str:
    """A number of bytes with three digits: ``512 B``, ``1.50 MiB``, ``12.0 GiB``."""
    amount, unit = float(size_bytes), 0
    while amount >= 999.5 and unit < len(_SIZES) - 1:
        amount, unit = amount / 1024, unit + 1
    if unit == 0:
        return f"{size_bytes} B"
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{amount:.{digits}f} {_SIZES[unit]}"


def some(items: Sequence[str], most: int = 4) -> str:
    """The items, or the first few and how many there are beyond."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def count_of(number: int, one: str, many: str | None = None) -> str:
    """``1 member``, ``4 members``."""
    return f"{number} {one if number == 1 else many or one + 's'}"
