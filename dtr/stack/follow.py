"""New lines of several log files, in the order in which they are found; a file that was moved away is followed by its successor."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["Follower"]


class Follower:
    """Follows files by name from their present end; one that appears later is read from its beginning.

    Args:
        files: name shown with each line, and path.
    """

    def __init__(self, files: Iterable[tuple[str, Path]]) -> None:
        self._files = dict(files)
        self._read_to = {name: (_identity(path), _size(path)) for name, path in self._files.items()}
        self._rest = dict.fromkeys(self._files, b"")

    def lines(self) -> Iterator[tuple[str, str]]:
        """Name and text of each line that was completed since the last call."""
        for name, path in self._files.items():
            *complete, self._rest[name] = (self._rest[name] + self._fresh(name, path)).split(b"\n")
            for line in complete:
                yield name, line.decode(errors="replace")

    def _fresh(self, name: str, path: Path) -> bytes:
        identity, offset = self._read_to[name]
        now, size = _identity(path), _size(path)
        if now != identity or size < offset:
            offset = 0
        if size == offset:
            return b""
        with path.open("rb") as file:
            file.seek(offset)
            found = file.read(size - offset)
        self._read_to[name] = (now, offset + len(found))
        return found


def _identity(path: Path) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
