"""The numbers that a trainer says of a checkpoint (``metrics={"loss": 1.2}``), for retention and for people. Pure.

They travel with the part: slot record, Redis, manifest. Of several ranks that give the same name, the lowest rank's value is the
checkpoint's. A value that is not finite is kept as None: it is on record that it was given, and it is never the best.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from dtr.errors import InvalidInput, StateCorrupt

__all__ = ["Metrics", "checked", "decode", "encode", "merged", "metric_name"]

Metrics = Mapping[str, float | None]

MOST: Final = 64
_LONGEST_NAME: Final = 64


def metric_name(value: Any) -> str:
    """A metric's name: 1 to 64 printable characters without spaces, ``:`` and ``,`` (which ``keep_best`` separates by)."""
    if type(value) is not str or not 1 <= len(value) <= _LONGEST_NAME or not value.isprintable() or set(value) & set(" :,"):
        shown = repr(value)[:80]
        raise InvalidInput(
            f"metrics must be named by 1 to {_LONGEST_NAME} printable characters without spaces, ':' and ',', got {shown}", field="metrics"
        )
    return value


def checked(given: Any) -> dict[str, float | None]:
    """``metrics`` as a caller gave them: names to plain numbers; None stands for none at all.

    Raises:
        InvalidInput: names the metric.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or len(given) > MOST:
        raise InvalidInput(f"metrics must be a dict of at most {MOST} numbers, got {str(type(given).__name__)[:40]}", field="metrics")
    return {metric_name(name): _number(name, value) for name, value in given.items()}


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (bool, str, bytes)) and hasattr(value, "__float__"):
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = None
        if number is not None:
            return number if math.isfinite(number) else None
    raise InvalidInput(f"metrics[{name!r}] must be a number, got {repr(value)[:60]}", field="metrics")


def encode(metrics: Metrics) -> str:
    """As Redis has them: JSON, empty for none."""
    return json.dumps(dict(metrics), sort_keys=True, ensure_ascii=False, allow_nan=False) if metrics else ""


def decode(text: str, key: str) -> dict[str, float | None]:
    """What ``encode`` wrote; raises StateCorrupt that names ``key`` for anything else."""
    if not text:
        return {}
    try:
        found = json.loads(text)
        if type(found) is dict:
            return checked(found)
    except (ValueError, RecursionError, InvalidInput):
        pass  # told below, with the key
    raise StateCorrupt(f"{key}: metrics must be an object of numbers, got {text[:40]!r}")


def merged(by_rank: Iterable[Metrics]) -> dict[str, float | None]:
    """The checkpoint's metrics from those of its ranks, the lowest rank first."""
    found: dict[str, float | None] = {}
    for metrics in by_rank:
        for name, value in metrics.items():
            found.setdefault(name, value)
    return found
