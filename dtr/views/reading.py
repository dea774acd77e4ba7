"""Reading keys whose content somebody else wrote: every surprise is a StateCorrupt that names the key and the field."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from dtr.errors import StateCorrupt
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["Fields", "reading"]


@contextlib.contextmanager
def reading(state: JobState) -> Iterator[None]:
    """Errors of redis-py become dtr's; a key of the wrong type is StateCorrupt, because trying again does not help."""
    with translate(state.url):
        yield


class Fields:
    """The fields of one hash. What is there is checked; what is absent has a default where the schema allows that."""

    __slots__ = ("_fields", "key")

    def __init__(self, key: str, fields: Mapping[str, str]) -> None:
        self.key = key
        self._fields = fields

    def __bool__(self) -> bool:
        return bool(self._fields)

    def items(self) -> list[tuple[str, str]]:
        """All fields, as they are."""
        return list(self._fields.items())

    def text(self, name: str, default: str = "") -> str:
        """The field, or ``default``."""
        return self._fields.get(name, default)

    def number(self, name: str) -> int | None:
        """An integer; None if the field is absent or empty. Raises StateCorrupt if it is something else."""
        return whole(self._fields.get(name, ""), self.key, name)

    def integer(self, name: str, default: int = 0) -> int:
        """An integer, or ``default`` if the field is absent or empty. Raises StateCorrupt if it is something else."""
        found = self.number(name)
        return default if found is None else found

    def decimal(self, name: str) -> float | None:
        """A decimal number, or None. Raises StateCorrupt if it is something else."""
        text = self._fields.get(name, "")
        try:
            return float(text) if text else None
        except ValueError:
            raise StateCorrupt(f"{self.key}: field {name} must be a number, got {text[:40]!r}") from None


def whole(text: str, key: str, name: str) -> int | None:
    """The integer that ``text`` spells, None if it is empty; raises StateCorrupt that names ``key`` and field ``name``."""
    try:
        return int(text) if text else None
    except ValueError:
        raise StateCorrupt(f"{key}: field {name} must be an integer, got {text[:40]!r}") from None
