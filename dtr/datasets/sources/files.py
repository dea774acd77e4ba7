"""The files of a data set where they lie, on disk or in a store: found, looked at and measured."""

from __future__ import annotations

import itertools
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from dtr.datasets.formats import START_BYTES, Format
from dtr.datasets.registering.spec import FileFacts
from dtr.datasets.sources.cache import EXHAUSTED
from dtr.datasets.sources.copies import Copies, Stamp, compression_of, copies, first_bytes, is_remote, remote_store, stamp_of
from dtr.datasets.sources.listing import expand, index_of, static_folder
from dtr.errors import ConfigError, DatasetMismatch, DataUnavailable, DtrError, InvalidInput, NotFound
from dtr.placement import MAX_SHARDS

__all__ = ["Found", "find_files", "measure_files"]

log = logging.getLogger(__name__)

_THREADS = 8
_TELL_S = 5.0
_INDEX = "index.json"
_MAX_INDEX_BYTES = 512 << 20  # 500 bytes for each of the most files that there may be


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The files of a data set, sorted by name, before anyone looked inside.

    ``stamps`` are theirs in the same order; ``counts`` has the samples of those that an index lists.
    """

    path: str
    folder: str
    files: tuple[str, ...]
    stamps: tuple[Stamp, ...]
    counts: Mapping[str, int] = field(default_factory=dict)


def find_files(path: Any, format: Format) -> Found:
    """The files of this format at ``path``.

    That is a file; a folder: all below it but hidden ones (``.name`` and ``_name``), or what its ``index.json`` lists; several of them by
    a brace pattern, ``train-{000..127}.tar`` or ``{train,extra}/x.jsonl``; or any of these as the URL of a store. A compressed file counts
    as what it is without ``.gz``, ``.zst`` or ``.zstd``.

    Raises:
        InvalidInput: there is nothing at the path, nothing in it, or no file of this format; or one is named twice.
        DatasetMismatch: a file cannot be looked at; the message names it.
        DataUnavailable, StoreUnavailable, StoreRefused: this host, or the store, does not let us look.
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
    for one, next_one in itertools.pairwise(files):
        if one == next_one:
            raise InvalidInput(f"path: {where} names {one} twice; each file belongs to a data set once", field="path")
    return Found(path=where, folder=folder, files=tuple(files), stamps=_stamps(folder, files), counts=counts)


def measure_files(found: Found, format: Format, shard_size: int, kept: Copies | None = None) -> tuple[FileFacts, ...]:
    """Count the samples of each file, several at once; shows how far it is where somebody watches, else logs it.

    ``kept`` is where copies of files are kept; default: where the environment says.

    Raises DatasetMismatch, naming the file, if one is damaged, cannot be read, changes meanwhile, or holds another number of samples
    than the index says.
    """
    from rich.console import Console  # here, since trainers must start fast
    from rich.progress import Progress

    measure = partial(_measured, found, format, shard_size, kept)
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
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str) or not text.isprintable() or not text:
        raise InvalidInput(f"path must be the path of a file or folder, or a store's URL, in one line, got {path!r}", field="path")
    if text.startswith("file://"):
        return os.path.abspath(unquote(urlsplit(text).path))
    return text if is_remote(text) else os.path.abspath(text)


def _find_below(folder: str, format: Format) -> tuple[str, list[str], Mapping[str, int]]:
    path = os.path.join(folder, _INDEX)
    try:
        with open(path, "rb") as index:
            listed = index_of(index.read(_MAX_INDEX_BYTES), format.name, path)
    except FileNotFoundError:
        listed = {}
    except OSError as exc:
        raise _unreadable(path, exc) from exc
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
        if not is_remote(folder):
            raise InvalidInput(f"path: {base!r} has braces in the name of the bucket; only what follows it may have some", field="path")
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


def _stamps(folder: str, files: Sequence[str]) -> tuple[Stamp, ...]:
    if not is_remote(folder):
        return tuple(_stamp(os.path.join(folder, file)) for file in files)

    def stamp(file: str) -> Stamp:
        try:
            return stamp_of(folder, file)
        except NotFound as exc:
            raise DatasetMismatch(f"{folder.partition('?')[0]}/{file} is not there", file=file) from exc

    with ThreadPoolExecutor(_THREADS, "dtr-look") as pool:
        return tuple(pool.map(stamp, files))


def _stamp(path: str) -> Stamp:
    if not path.isprintable():  # neither are bytes that are no UTF-8
        raise DatasetMismatch(f"{path!r}: the name of a data file must be UTF-8 in one line; rename it", file=path)
    try:
        facts = os.stat(path)
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    if not stat.S_ISREG(facts.st_mode):
        raise DatasetMismatch(f"{path} is no ordinary file", file=path)
    return Stamp(size_bytes=facts.st_size, mtime_ns=facts.st_mtime_ns)


def _measured(found: Found, format: Format, shard_size: int, kept: Copies | None, number: int) -> FileFacts:
    file, stamp = found.files[number], found.stamps[number]
    path, counted = os.path.join(found.folder.partition("?")[0] if is_remote(found.folder) else found.folder, file), found.counts.get(file)
    copied = is_remote(found.folder) or bool(compression_of(file))
    if copied and counted is not None and not format.has_marks:
        promised = format.promised(first_bytes(found.folder, file, stamp, START_BYTES))
        _check_count(path, counted, promised)  # a look at its beginning, instead of a copy of it all
        return _facts(file, stamp, samples=counted)
    try:
        with (kept or copies()).open(found.folder, file, stamp) if copied else open(path, "rb") as opened:
            before = os.fstat(opened.fileno())
            measure = format.measure(opened, shard_size)
            after = os.fstat(opened.fileno())
            now = stamp if is_remote(found.folder) else _stamp(path)
    except DtrError:  # FolderFull is an OSError, too
        raise
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    except MemoryError as exc:
        raise DataUnavailable(f"{path}: there is not memory enough to count its samples", file=path) from exc
    if before.st_size != after.st_size or now != stamp:
        raise DatasetMismatch(f"{path} changed while its samples were counted: register it when nobody writes to it", file=path)
    _check_count(path, counted, measure.samples)
    return _facts(file, stamp, samples=measure.samples, marks=measure.marks, plain_bytes=after.st_size if compression_of(file) else 0)


def _check_count(path: str, counted: int | None, held: int | None) -> None:
    if counted is not None and held != counted:
        has = "no samples that can be counted" if held is None else f"{held:,} samples"
        raise DatasetMismatch(f"{path} holds {has}, {_INDEX} says {counted:,}; correct the index, or remove it", file=path)


def _facts(file: str, stamp: Stamp, *, samples: int, marks: tuple[int, ...] = (), plain_bytes: int = 0) -> FileFacts:
    return FileFacts(
        file=file, samples=samples, size_bytes=stamp.size_bytes, mtime_ns=stamp.mtime_ns, tag=stamp.tag, marks=marks,
        plain_bytes=plain_bytes,
    )  # fmt: skip


def _unreadable(path: str, exc: OSError) -> DatasetMismatch | DataUnavailable:
    if exc.errno in EXHAUSTED:
        return DataUnavailable(f"{path} cannot be read: this process is out of {EXHAUSTED[exc.errno]} ({exc.strerror})", file=path)
    return DatasetMismatch(f"{path} cannot be read: {exc.strerror}", file=path)
