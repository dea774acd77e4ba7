"""What a registered data set is: its spec, the facts of its files, and its shards. Values, written to Redis as plain fields."""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any, Final
from urllib.parse import quote, unquote

import numpy as np
import orjson
from numpy.typing import NDArray

from dtr.datasets.formats import Columns, Format, Span, format_of_fields
from dtr.datasets.sources.cache import EXHAUSTED
from dtr.datasets.sources.copies import Copies, Stamp, compression_of, copies, difference, is_remote
from dtr.errors import DatasetChanged, DatasetMismatch, DataUnavailable, DtrError, InvalidInput, StateCorrupt

__all__ = ["Dataset", "DatasetSpec", "FileFacts", "Shard", "digest_of"]

# What a disk says of a file that it cannot give back. Any other error is this host's: its permissions, mounts, network or limits.
DAMAGED: Final = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EILSEQ})
_FACTS = re.compile(
    r"samples=(\d{1,18}) size_bytes=(\d{1,18}) mtime_ns=(-?\d{1,20}) marks=((?:\d{1,18}(?:,\d{1,18})*)?)(?: plain_bytes=(\d{1,18}))?"
    r"(?: tag=(\S+))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """One file as it was when it was registered.

    ``marks`` are the bytes at which its shards begin, if samples differ in size; ``plain_bytes`` has its content, if it is compressed,
    else 0. A file in a store has a ``tag``, such as its ETag, and no ``mtime_ns``: 0.
    """

    file: str
    samples: int
    size_bytes: int
    mtime_ns: int
    marks: tuple[int, ...] = ()
    plain_bytes: int = 0
    tag: str = ""

    @property
    def stamp(self) -> Stamp:
        """What it must still have when it is read."""
        return Stamp(size_bytes=self.size_bytes, mtime_ns=self.mtime_ns, tag=self.tag)

    def to_text(self) -> str:
        """As it stands in Redis: ``samples=... size_bytes=... mtime_ns=... marks=0,...``."""
        marks, plain = ",".join(map(str, self.marks)), f" plain_bytes={self.plain_bytes}" if self.plain_bytes else ""
        tag = f" tag={quote(self.tag, safe='')}" if self.tag else ""
        return f"samples={self.samples} size_bytes={self.size_bytes} mtime_ns={self.mtime_ns} marks={marks}{plain}{tag}"

    @classmethod
    def from_text(cls, file: str, text: str) -> FileFacts:
        """What `to_text` wrote; raises StateCorrupt for anything else."""
        match = _FACTS.fullmatch(text)
        if match is None:
            raise StateCorrupt(f"data set: the facts of file {file!r} are not readable: {text[:80]!r}")
        marks = tuple(map(int, match[4].split(","))) if match[4] else ()
        numbers = [int(number or 0) for number in match.group(1, 2, 3, 5)]
        return cls(
            file=file, samples=numbers[0], size_bytes=numbers[1], mtime_ns=numbers[2], marks=marks, plain_bytes=numbers[3],
            tag=unquote(match[6] or ""),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One version of a data set, without its files.

    ``path`` is what was given, made absolute; ``folder`` is where the files' names begin: the path, or what holds it if it is a
    file. ``digest`` covers everything but name, version and time, so equal digests mean the same data.
    """

    name: str
    version: int
    path: str
    folder: str
    format: Format
    total_samples: int
    shard_size: int
    shards: int
    files: int
    shuffle: bool
    seed: int
    digest: str
    registered_at_ms: int

    def to_fields(self) -> dict[str, str]:
        """As it stands in Redis."""
        return {
            "version": str(self.version),
            "path": self.path,
            "folder": self.folder,
            "format": self.format.name,
            **self.format.options(),
            "total_samples": str(self.total_samples),
            "shard_size": str(self.shard_size),
            "shards": str(self.shards),
            "files": str(self.files),
            "shuffle": str(self.shuffle).lower(),
            "seed": str(self.seed),
            "digest": self.digest,
            "registered_at_ms": str(self.registered_at_ms),
        }

    @classmethod
    def from_fields(cls, name: str, fields: Mapping[str, str]) -> DatasetSpec:
        """What `to_fields` wrote; raises StateCorrupt if a field is missing or no such value."""
        try:
            return cls(
                name=name,
                format=format_of_fields(fields),
                shuffle={"true": True, "false": False}[fields["shuffle"]],
                path=fields["path"],
                folder=fields["folder"],
                digest=fields["digest"],
                **{key: int(fields[key]) for key in _INTEGERS},
            )
        except (KeyError, ValueError) as exc:
            raise StateCorrupt(f"data set {name!r}: its spec in Redis lacks a field or has a wrong one: {exc}") from exc


_INTEGERS = ("version", "total_samples", "shard_size", "shards", "files", "seed", "registered_at_ms")


def digest_of(*, path: str, format: Format, shard_size: int, shuffle: bool, seed: int, files: Sequence[FileFacts]) -> str:
    """The digest of a spec: SHA-256 over its canonical JSON, in hex, cut to 128 bits."""
    content = {
        "path": path,
        "format": format.name,
        "options": dict(format.options()),
        "shard_size": shard_size,
        "shuffle": shuffle,
        "seed": seed,
        "files": [[facts.file, facts.to_text()] for facts in files],
    }
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Samples ``start`` to ``stop`` (exclusive) of one file; ``str()`` shows it as ``part-00000.jsonl[0:10000]``.

    A value that may be pickled. Reading touches only its own bytes, and raises DatasetChanged, naming the file, if the file is
    not as it was when it was registered, also if it changes while it is read.
    """

    dataset: str
    version: int
    index: int
    file: str
    start: int
    stop: int
    folder: str = field(repr=False)
    format: Format = field(repr=False)
    span: Span = field(repr=False)
    stamp: Stamp = field(repr=False)
    copies: Copies | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.file}[{self.start}:{self.stop}]"

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, columns: Sequence[str] | None = None) -> Columns:
        """All samples as arrays by column, first axis the sample; all columns if None.

        Raises:
            DatasetChanged: the file is gone, or was written since.
            DatasetMismatch: it does not hold what it should, or cannot be read.
            InvalidInput: there is no such column; the message names those that there are.
            DataUnavailable: this host cannot read it, by no fault of the file: memory, descriptors, permissions, a mount.
            StoreUnavailable, StoreRefused, FolderFull, ConfigError: as `dtr.datasets.sources.copies.Copies.open`.
        """
        return self.read_spans([self.span], columns)[0]

    def read_spans(self, spans: Sequence[Span], columns: Sequence[str] | None = None) -> list[Columns]:
        """Samples of its file, span by span, from the file as it is opened once. Raises as `read`."""
        with self._reading() as file:
            try:
                found = [self.format.read(file, span, columns) for span in spans]
            except MemoryError as exc:
                raise DataUnavailable(
                    f"{self} of data set {self.dataset!r}: there is not memory enough for its {len(self):,} samples; register the data set "
                    "with a smaller shard_size, or read fewer columns"
                ) from exc
            if not self._is_copy():
                self._compare(os.fstat(file.fileno()))  # somebody may have written to it meanwhile
            return found

    def iterate(self) -> Iterator[Any]:
        """The samples, one by one: an object of a JSON line, a row of an array, a block of tokens. Raises as `read`."""
        with self._reading() as file:
            yield from self.format.iterate(file, self.span)

    def columns(self) -> tuple[str, ...]:
        """The names under which `read` returns values."""
        with self._reading() as file:
            return self.format.columns(file)

    @property
    def path(self) -> str:
        """The file's own path or URL."""
        return os.path.join(self.folder, self.file)

    def check_unchanged(self) -> None:
        """Raise DatasetChanged, naming the file, unless it has the size and time of modification that were registered.

        A file in a store is looked at when it is read.

        Raises DatasetMismatch, and DataUnavailable, if it cannot be looked at.
        """
        if is_remote(self.folder):
            return
        try:
            self._compare(os.stat(self.path))
        except OSError as exc:
            raise self._unreadable(exc) from exc

    @contextlib.contextmanager
    def _reading(self) -> Iterator[BufferedReader]:
        """The file, opened; what the system says while it is read is told apart here, whoever has wrapped it."""
        try:
            with self._open() as file:
                yield file
        except (DatasetMismatch, OSError) as exc:
            cause = exc if isinstance(exc, OSError) else exc.__cause__
            if isinstance(exc, DatasetChanged) or not isinstance(cause, OSError) or isinstance(cause, DtrError):
                raise
            if cause.errno is None or cause.errno in DAMAGED:  # libraries raise OSError without a number for a file that is damaged
                raise
            raise self._unreadable(cause) from exc

    def _is_copy(self) -> bool:
        return is_remote(self.folder) or bool(compression_of(self.file))

    def _open(self) -> BufferedReader:
        if self._is_copy():
            self.check_unchanged()
            return (self.copies or copies()).open(self.folder, self.file, self.stamp)
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - the caller closes it
        except OSError as exc:
            raise self._unreadable(exc) from exc
        try:
            self._compare(os.fstat(file.fileno()))
        except BaseException:
            file.close()
            raise
        return file

    def _compare(self, facts: os.stat_result) -> None:
        now = Stamp(size_bytes=facts.st_size, mtime_ns=facts.st_mtime_ns)
        if now != self.stamp:
            raise DatasetChanged(
                f"{self.path} changed since data set {self.dataset!r} version {self.version} was registered: "
                f"{difference(self.stamp, now)}; register the data set again, or put the file back",
                file=self.path,
            )

    def _unreadable(self, exc: OSError) -> DatasetMismatch | DataUnavailable:
        what = f"{self.path} of data set {self.dataset!r} version {self.version} cannot be read"
        if isinstance(exc, FileNotFoundError | NotADirectoryError):
            return DatasetChanged(f"{what}: {exc.strerror}", file=self.path)
        if exc.errno in EXHAUSTED:
            return DataUnavailable(f"{what}: this process is out of {EXHAUSTED[exc.errno]} ({exc.strerror})", file=self.path)
        if exc.errno in DAMAGED:
            return DatasetMismatch(f"{what}: {exc.strerror}", file=self.path)
        return DataUnavailable(
            f"{what} on this host: {exc.strerror}; see to its permissions, mounts and network: the file is not to blame", file=self.path
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A data set's spec with its files. Shards count from 0 through the files in their order; none crosses a file.

    ``copies`` is where this process, and those that it hands shards to, keep copies of files; None: where the environment says.
    """

    spec: DatasetSpec
    files: tuple[FileFacts, ...]
    copies: Copies | None = field(default=None, repr=False, compare=False)
    first_shards: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = (-(-facts.samples // self.spec.shard_size) for facts in self.files)
        object.__setattr__(self, "first_shards", tuple(itertools.accumulate(counts, initial=0)))
        held = (len(self.files), sum(facts.samples for facts in self.files), self.first_shards[-1])
        declared = (self.spec.files, self.spec.total_samples, self.spec.shards)
        if held != declared:
            raise StateCorrupt(
                f"data set {self.spec.name!r} version {self.spec.version}: (files, samples, shards) are {declared} in its spec "
                f"and {held} by its files"
            )

    def shard(self, index: int) -> Shard:
        """The shard of this number. Raises InvalidInput if there is none."""
        spec = self.spec
        if not 0 <= index < spec.shards:
            raise InvalidInput(f"shard must be from 0 to {spec.shards - 1} in data set {spec.name!r}, got {index}", field="shard")
        number = bisect.bisect_right(self.first_shards, index) - 1
        facts, within = self.files[number], index - self.first_shards[number]
        start, stop = within * spec.shard_size, min((within + 1) * spec.shard_size, facts.samples)
        bounds = (*facts.marks, facts.plain_bytes or facts.size_bytes)
        first_byte, end_byte = bounds[within : within + 2] if facts.marks else (0, 0)
        return Shard(
            dataset=spec.name,
            version=spec.version,
            index=index,
            file=facts.file,
            start=start,
            stop=stop,
            folder=spec.folder,
            format=spec.format,
            span=Span(start=start, stop=stop, first_byte=first_byte, end_byte=end_byte),
            stamp=facts.stamp,
            copies=self.copies,
        )

    def size_of(self, index: int) -> int:
        """Samples in the shard of this number, which must be there: asked at every batch, so no shard is made for it."""
        size = self.spec.shard_size
        number = bisect.bisect_right(self.first_shards, index) - 1
        return min(size, self.files[number].samples - (index - self.first_shards[number]) * size)

    def sizes(self) -> NDArray[np.int64]:
        """Samples in each shard, by number."""
        size, found = self.spec.shard_size, np.full(self.spec.shards, self.spec.shard_size, dtype=np.int64)
        samples = np.array([facts.samples for facts in self.files], dtype=np.int64)
        ends, filled = np.array(self.first_shards[1:], dtype=np.int64), samples > 0
        found[ends[filled] - 1] = (samples[filled] - 1) % size + 1
        return found

    def shards(self) -> Iterator[Shard]:
        """Every shard in order."""
        return map(self.shard, range(self.spec.shards))
