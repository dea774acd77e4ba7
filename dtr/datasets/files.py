"""The files of a data set where they lie, on disk or in a store: found, looked at and measured."""

from __future__ import annotations

import logging
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from typing import Any
from urllib.parse import urlsplit

from dtr.datasets.copies import compression_of, copies, is_remote, remote_store
from dtr.datasets.formats import Format
from dtr.datasets.listing import expand, index_of, static_folder
from dtr.datasets.spec import FileFacts
from dtr.errors import ConfigError, DatasetMismatch, InvalidInput, NotFound
from dtr.placement import MAX_SHARDS

__all__ = ["Found", "find_files", "measure_files"]

log = logging.getLogger(__name__)

_THREADS = 8
_TELL_S = 5.0
_INDEX = "index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The files of a data set, sorted by name, before anyone looked inside.

    ``stamps`` holds (size in bytes, mtime in ns) of each, the latter 0 in a store; ``counts`` the samples of those that an index lists.
    """

    path: str
    folder: str
    files: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]
    counts: Mapping[str, int] = field(default_factory=dict)


def find_files(path: Any, format: Format) -> Found:
    """The files of this format at ``path``.

    That is a file; a folder: all below it but hidden ones (``.name`` and ``_name``), or what its ``index.json`` lists; several of them by
    a brace pattern, ``train-{000..127}.tar`` or ``{train,extra}/x.jsonl``; or any of these as the URL of a store. A compressed file counts
    as what it is without ``.gz``, ``.zst`` or ``.zstd``.

    Raises:
        InvalidInput: there is nothing at the path, nothing in it, or no file of this format.
        DatasetMismatch: a file cannot be looked at; the message names it.
    """
    where = _absolute(path)
    if is_remote(where):
        found = _find_remote(where, format)
    elif not os.path.lexists(where) and "{" in where:
        folder = static_folder(where)
        found = folder, [os.path.relpath(one, folder) for one in expand(where)], {}
    elif os.path.isdir(where):
        found = _find_below(where, format)
    elif os.path.isfile(where):
        found = os.path.dirname(where), [os.path.basename(where)], {}
    else:
        raise InvalidInput(f"path: there is no file or folder {where}", field="path")
    folder, files, counts = found
    if len(files) > MAX_SHARDS:
        raise InvalidInput(f"path: {where} holds {len(files):,} files; at most {MAX_SHARDS:,} are supported", field="path")
    files = sorted(files)
    return Found(path=where, folder=folder, files=tuple(files), stamps=_stamps(folder, files), counts=counts)


def measure_files(found: Found, format: Format, shard_size: int) -> tuple[FileFacts, ...]:
    """Count the samples of each file, several at once; shows how far it is where somebody watches, else logs it.

    Raises DatasetMismatch, naming the file, if one is damaged, cannot be read, changes meanwhile, or holds another number of samples
    than the index says.
    """
    from rich.console import Console  # here, since trainers must start fast
    from rich.progress import Progress

    measure = partial(_measured, found, format, shard_size)
    facts: list[FileFacts] = []
    console, told = Console(stderr=True), time.monotonic()
    watched = sys.stderr.isatty() and len(found.files) > 1
    with Progress(console=console, transient=True, disable=not watched) as bar, ThreadPoolExecutor(_THREADS, "dtr-count") as pool:
        task = bar.add_task(f"counting the samples of {len(found.files):,} files", total=len(found.files))
        pending = [pool.submit(measure, number) for number in range(len(found.files))]
        try:
            for one in pending:
                facts.append(one.result())
                bar.advance(task)
                if not watched and time.monotonic() - told > _TELL_S:
                    told = time.monotonic()
                    log.info("counted the samples of %d of %d files in %s", len(facts), len(found.files), found.path)
        except BaseException:
            for one in pending:
                one.cancel()
            raise
    return tuple(facts)


def _absolute(path: Any) -> str:
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str) or not text or "\0" in text:
        raise InvalidInput(f"path must be the path of a file or folder, or a store's URL, got {path!r}", field="path")
    if text.startswith("file://"):
        return os.path.abspath(urlsplit(text).path)
    return text if is_remote(text) else os.path.abspath(text)


def _find_below(folder: str, format: Format) -> tuple[str, list[str], Mapping[str, int]]:
    try:
        with open(os.path.join(folder, _INDEX), "rb") as index:
            listed = index_of(index.read(), format.name, os.path.join(folder, _INDEX))
    except FileNotFoundError:
        listed = {}
    if listed:
        names = {names[0] if os.path.exists(os.path.join(folder, names[0])) else names[-1]: count for names, count in listed.items()}
        return folder, list(names), names
    files = list(_below(folder, format))
    if not files:
        raise InvalidInput(f"path: {_what_is_in(folder, format)}", field="path")
    return folder, files, {}


def _find_remote(url: str, format: Format) -> tuple[str, list[str], Mapping[str, int]]:
    """As on disk; the last name of the URL is a file if it has braces or the format's suffix."""
    base, mark, query = url.partition("?")
    parent, _, last = base.rpartition("/")
    if "{" in base:
        folder = static_folder(base)
        return f"{folder}{mark}{query}", [one[len(folder) + 1 :] for one in expand(base)], {}
    if _is_of(last, format):
        return f"{parent}{mark}{query}", [last], {}
    try:
        store = remote_store(url)
    except ConfigError as exc:
        raise InvalidInput(f"path: {exc.message.removeprefix('store ')}", field="path") from exc
    try:
        listed = index_of(store.get(_INDEX), format.name, f"{base}/{_INDEX}")
    except NotFound:
        listed = {}
    there = {key for key in store.list() if not any(part.startswith((".", "_")) for part in key.split("/"))}
    if listed:
        names = {names[0] if names[0] in there else names[-1]: count for names, count in listed.items()}
        return url, list(names), names
    files = [key for key in there if _is_of(key, format)]
    if not files:
        raise InvalidInput(f"path: {base} holds no {format.suffixes[0]} file for format {format.name!r}, of {len(there):,}", field="path")
    return url, files, {}


def _is_of(name: str, format: Format) -> bool:
    return (os.path.splitext(name)[0] if compression_of(name) else name).lower().endswith(format.suffixes)


def _below(folder: str, format: Format) -> Iterator[str]:
    """Names, relative to ``folder``, with / between their parts."""
    for name in _everything_below(folder):
        if _is_of(name, format):
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


def _stamps(folder: str, files: Sequence[str]) -> tuple[tuple[int, int], ...]:
    if not is_remote(folder):
        return tuple(_stamp(os.path.join(folder, file)) for file in files)
    store = remote_store(folder)

    def size_of(file: str) -> tuple[int, int]:
        try:
            return store.size(file), 0
        except NotFound as exc:
            raise DatasetMismatch(f"{folder.partition('?')[0]}/{file} is not there", file=file) from exc

    with ThreadPoolExecutor(_THREADS, "dtr-look") as pool:
        return tuple(pool.map(size_of, files))


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


def _measured(found: Found, format: Format, shard_size: int, number: int) -> FileFacts:
    file, (size_bytes, mtime_ns) = found.files[number], found.stamps[number]
    path, counted = os.path.join(found.folder, file), found.counts.get(file)
    if counted is not None and not format.has_marks:
        return FileFacts(file=file, samples=counted, size_bytes=size_bytes, mtime_ns=mtime_ns)
    copied = is_remote(found.folder) or bool(compression_of(file))
    try:
        with _open(found, number) if copied else open(path, "rb") as opened:
            before = os.fstat(opened.fileno())
            measure = format.measure(opened, shard_size)
            after = os.fstat(opened.fileno())
            now = (size_bytes, mtime_ns) if is_remote(found.folder) else _stamp(path)
    except OSError as exc:
        raise DatasetMismatch(f"{path} cannot be read: {exc.strerror}", file=path) from exc
    if before.st_size != after.st_size or now != (size_bytes, mtime_ns):
        raise DatasetMismatch(f"{path} changed while its samples were counted: register it when nobody writes to it", file=path)
    if counted not in {None, measure.samples}:
        raise DatasetMismatch(f"{path} holds {measure.samples:,} samples, {_INDEX} says {counted:,}", file=path)
    plain_bytes = after.st_size if compression_of(file) else 0
    return FileFacts(
        file=file, samples=measure.samples, size_bytes=size_bytes, mtime_ns=mtime_ns, marks=measure.marks, plain_bytes=plain_bytes
    )  # fmt: skip


def _open(found: Found, number: int) -> BufferedReader:
    size_bytes, mtime_ns = found.stamps[number]
    return copies().open(found.folder, found.files[number], size_bytes=size_bytes, mtime_ns=mtime_ns)
