"""What a message may say. It comes from a queue that others can write to, so it is parsed like any other input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from dtr import names
from dtr.errors import InvalidInput

__all__ = ["Collect", "Settle", "UploadPart"]

_HIGHEST_RANK = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """Let go of what no rule of retention keeps."""

    job: str

    @classmethod
    def parse(cls, args: Sequence[Any], given: Mapping[str, Any]) -> Self:
        """The message; raises InvalidInput that names the field."""
        known = [field.name for field in fields(cls)]
        if args:
            raise InvalidInput(f"a message names its fields ({', '.join(known)}), got {len(args)} without a name")
        if wrong := [name for name in given if name not in known]:
            raise InvalidInput(f"a message has the fields {', '.join(known)}, got {', '.join(map(_short, wrong[:5]))} as well")
        if missing := [name for name in known if name not in given]:
            raise InvalidInput(f"a message has the fields {', '.join(known)}, and lacks {', '.join(missing)}")
        checked: dict[str, Any] = {name: _CHECKS[name](given[name]) for name in known}
        return cls(**checked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle(Collect):
    """Decide one checkpoint."""

    run: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadPart(Settle):
    """Upload one rank's part of a checkpoint."""

    rank: int


def _integer(value: Any, field: str, highest: int) -> int:
    if type(value) is not int or not 0 <= value <= highest:
        raise InvalidInput(f"{field} must be an integer from 0 to {highest}, got {_short(value)}", field=field)
    return value


def _short(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "job": names.job_name,
    "run": lambda value: names.name(value, "run"),
    "step": lambda value: _integer(value, "step", names.MAX_STEP),
    "rank": lambda value: _integer(value, "rank", _HIGHEST_RANK),
}
