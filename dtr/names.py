"""Checks of what comes from outside: names, steps, ranks, sizes. Each raises InvalidInput that names the field."""

from __future__ import annotations

import math
import re
from typing import Any, Final

from dtr.errors import InvalidInput

_BEST: Final = re.compile(r"([^\s:,]{1,64}):(min|max):([1-9][0-9]{0,5})")
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62})?", re.ASCII)
MAX_STEP: Final = 2**53 - 1  # an integer that a double, and so Redis, holds exactly

__all__ = ["MAX_STEP", "best_rules", "host", "job_name", "name", "positive", "rank", "seconds", "step"]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def name(value: Any, field: str) -> str:
    """A name of one word: 1 to 63 of ``A-Z a-z 0-9 . _ -``, the first a letter or digit."""
    if not isinstance(value, str) or not _NAME.fullmatch(value) or ".." in value:
        raise InvalidInput(
            f"{field} must be 1 to 63 characters of A-Z a-z 0-9 . _ - and begin with a letter or digit, got {_shown(value)}",
            field=field,
        )
    return value


def job_name(value: Any) -> str:
    """A job: ``name`` or ``tenant/name``."""
    words = value.split("/") if isinstance(value, str) else [value]
    if len(words) > 2:
        raise InvalidInput(f"job must be 'name' or 'tenant/name', got {_shown(value)}", field="job")
    for word in words:
        name(word, "job")
    return str(value)


def _integer(value: Any, field: str, low: int, high: int, what: str) -> int:
    if hasattr(value, "__index__") and not isinstance(value, bool):
        number = value.__index__()
        if isinstance(number, int) and low <= number <= high:
            return number
    raise InvalidInput(f"{field} must be {what}, got {_shown(value)}", field=field)


def step(value: Any, field: str = "step") -> int:
    """A training step: an integer from 0 to 2**53 - 1."""
    return _integer(value, field, 0, MAX_STEP, "an integer from 0 to 2**53 - 1")


def positive(value: Any, field: str, high: int = MAX_STEP) -> int:
    """An integer from 1."""
    return _integer(value, field, 1, high, f"an integer from 1 to {high}")


def rank(value: Any, world_size: int, field: str = "rank") -> int:
    """A rank: an integer from 0 to world_size - 1."""
    return _integer(value, field, 0, world_size - 1, f"an integer from 0 to world_size - 1 = {world_size - 1}")


def seconds(value: Any, field: str) -> float:
    """A time to wait: a finite number from 0."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    raise InvalidInput(f"{field} must be a finite number of seconds from 0, got {_shown(value)}", field=field)


def host(value: Any, field: str) -> str:
    """A host name or an IP address, for people: 1 to 255 printable characters without white space."""
    if isinstance(value, str) and 0 < len(value) <= 255 and value.isascii() and value.isprintable() and " " not in value:
        return value
    raise InvalidInput(f"{field} must be a host name or an IP address, got {_shown(value)}", field=field)


def best_rules(value: Any, field: str = "keep_best") -> tuple[tuple[str, str, int], ...]:
    """``METRIC:min|max:COUNT``, several separated by commas, as (metric, min or max, count); '' and None: none.

    A bare ``METRIC:min`` would leave open how many, so it is refused.
    """
    if value is None or value == "":
        return ()
    found = [_BEST.fullmatch(word.strip()) for word in value.split(",")] if isinstance(value, str) else [None]
    if any(word is None for word in found):
        raise InvalidInput(
            f"{field} must be METRIC:min:COUNT or METRIC:max:COUNT, several separated by commas, such as loss:min:3, got {_shown(value)}",
            field=field,
        )
    return tuple((word[1], word[2], int(word[3])) for word in found if word is not None)
