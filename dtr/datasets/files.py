"""The files of a data set as they lie on disk: found, looked at and measured."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dtr.datasets.formats import Format
from dtr.datasets.spec import FileFacts
from dtr.errors import DatasetMismatch, InvalidInput
from dtr.placement import MAX_SHARDS

__all__ = ["Found", "find_files", "measure_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The files of a data set, sorted by name, before anyone looked inside. ``stamps`` holds (size in bytes, mtime in ns) of each."""

    path: str
    folder: str
    files: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]


def find_files(path: Any, format: Format) -> Found:
    """The files of this format at ``path``: that file, or all below that folder but hidden ones (``.name`` and ``_name``).

    Raises:
        InvalidInput: there is nothing at the path, nothing in it, or no file of this format.
        DatasetMismatch: a file cannot be looked at; the message names it.
    """
    absolute = _absolute(path)
    if os.path.isdir(absolute):
        folder, files = absolute, sorted(_below(absolute, format))
    elif os.path.isfile(absolute):
        folder, name = os.path.split(absolute)
        files = [name]
    else:
        raise InvalidInput(f"path: there is no file or folder {absolute}", field="path")
    if not files:
        raise InvalidInput(f"path: {_what_is_in(absolute, format)}", field="path")
    if len(files) > MAX_SHARDS:
        raise InvalidInput(f"path: {absolute} holds {len(files):,} files; at most {MAX_SHARDS:,} are supported", field="path")
    stamps = tuple(_stamp(os.path.join(folder, file)) for file in files)
    return Found(path=absolute, folder=folder, files=tuple(files), stamps=stamps)


def measure_files(found: Found, format: Format, shard_size: int) -> tuple[FileFacts, ...]:
    """Count the samples of each file.

    Raises DatasetMismatch, naming the file, if one is damaged, cannot be read, or changes meanwhile.
    """
    return tuple(_measured(found.folder, file, format, shard_size) for file in found.files)


def _absolute(path: Any) -> str:
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str) or not text or "\0" in text:
        raise InvalidInput(f"path must be the path of a file or folder, got {path!r}", field="path")
    if "://" in text:
        raise InvalidInput(f"path must be a file or folder on this machine, got the URL {text.split('://')[0]}://...", field="path")
    return os.path.abspath(text)


def _below(folder: str, format: Format) -> Iterator[str]:
    """Names, relative to ``folder``, with / between their parts."""
    for name in _everything_below(folder):
        if name.endswith(format.suffixes):
            yield name


def _everything_below(folder: str) -> Iterator[str]:
    def refuse(exc: OSError) -> None:
        raise DatasetMismatch(f"{exc.filename} cannot be listed: {exc.strerror}", file=exc.filename) from exc

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        within = "" if parent == folder else os.path.relpath(parent, folder) + "/"
        yield from (within + name for name in files if not name.startswith((".", "_")))


def _what_is_in(folder: str, format: Format) -> str:
    others = sorted(_everything_below(folder))
    if not others:
        return f"{folder} is empty"
    wanted = " or ".join(f"*{suffix}" for suffix in format.suffixes)
    return f"{folder} holds no {wanted} file for format {format.name!r}; it holds {len(others):,} others such as {others[0]}"


def _stamp(path: str) -> tuple[int, int]:
    try:
        path.encode()
        facts = os.stat(path)
    except UnicodeEncodeError as exc:
        raise DatasetMismatch(f"{path!r}: the name of a data file must be UTF-8; rename it", file=path) from exc
    except OSError as exc:
        raise DatasetMismatch(f"{path} cannot be read: {exc.strerror}", file=path) from exc
    if not stat.S_ISREG(facts.st_mode):
        raise DatasetMismatch(f"{path} is no ordinary file", file=path)
    return facts.st_size, facts.st_mtime_ns


def _measured(folder: str, file: str, format: Format, shard_size: int) -> FileFacts:
    path = os.path.join(folder, file)
    try:
        with open(path, "rb") as opened:
            before = os.fstat(opened.fileno())
            measure = format.measure(opened, shard_size)
            after = os.fstat(opened.fileno())
    except OSError as exc:
        raise DatasetMismatch(f"{path} cannot be read: {exc.strerror}", file=path) from exc
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DatasetMismatch(f"{path} changed while its samples were counted: register it when nobody writes to it", file=path)
    return FileFacts(file=file, samples=measure.samples, size_bytes=after.st_size, mtime_ns=after.st_mtime_ns, marks=measure.marks)
