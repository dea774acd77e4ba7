"""A checkpoint opened for reading its tensors one by one: from a store, or from a folder that was exported. Nothing is verified before it
is read, and nothing that is read is unverified.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from dtr.checkpoint.format import tree
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.keeping.exported import ABOUT, Exported
from dtr.checkpoint.manifest import Manifest, Replicated
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.restoring.contract import Source
from dtr.checkpoint.restoring.scattered import Extent, Located, header_of, headers_of, locate
from dtr.checkpoint.restoring.source import Pieces, PieceSource, source_of
from dtr.errors import IntegrityError, InvalidInput
from dtr.store import Store

__all__ = ["Opened", "RankState", "file_source", "open_folder", "open_stored", "read_about", "tree_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What one rank saved: ``spec`` is its tree, ``tensors`` where each of them is."""

    rank: int
    spec: Any
    tensors: Mapping[str, Located]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The parts of a checkpoint by rank; closes them at the end of a ``with`` block."""

    name: str
    world_size: int
    replicated: Replicated
    sources: Mapping[int, Source]

    def states(self) -> Iterable[RankState]:
        """Each rank's state in turn; of a state that is replicated as a whole, that of its one part."""
        if self.replicated == "some":
            headers = headers_of(self.sources)
            for rank in sorted(self.sources):
                whole = locate(headers, rank)
                yield RankState(rank=rank, spec=whole.spec, tensors=whole.tensors)
            return
        for rank, source in sorted(self.sources.items()):
            header = header_of(source)
            if TREE not in header.metadata:
                raise IntegrityError(f"{source.name} is a safetensors file, but no part of a checkpoint: it holds no {TREE}")
            located = {}
            for place in header.places:
                extent = Extent(rank=rank, start=header.data_start + place.start, end=header.data_start + place.end)
                located[place.name] = Located(place=place, extents=(extent,), common=False)
            yield RankState(rank=rank, spec=tree.decode(header.metadata[TREE]), tensors=located)

    def read(self, located: Located, start: int, end: int) -> bytearray:
        """Bytes [start, end) of a tensor, counted from its beginning."""
        found, at = bytearray(end - start), 0
        view = memoryview(found)
        for extent in located.extents:
            low, high = max(start, at), min(end, at + extent.end - extent.start)
            if low < high:
                self.sources[extent.rank].read_into(view[low - start : high - start], extent.start + low - at)
            at += extent.end - extent.start
        return found

    def close(self) -> None:
        """Let go of all parts."""
        for source in self.sources.values():
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_stored(store: Store, manifest: Manifest) -> Opened:
    """A commit in a store; raises IntegrityError if it is none."""
    name = name_of(manifest.run, manifest.step)
    if manifest.decision != "commit":
        raise IntegrityError(f"{name} {manifest.fate}: {manifest.reason}")
    sources = {part.rank: source_of(store, part) for part in manifest.parts}
    return Opened(name=name, world_size=manifest.world_size, replicated=manifest.replicated, sources=sources)


def open_folder(folder: Path) -> Opened:
    """A checkpoint that was exported; raises InvalidInput or ManifestInvalid if the folder holds none."""
    about = read_about(folder)
    sources: dict[int, Source] = {}
    try:
        for one in about.files:
            sources[one.rank] = file_source(folder / one.file, Pieces.of(one.facts(f"runs/{one.file}")))
    except BaseException:
        for source in sources.values():
            source.close()
        raise
    return Opened(name=str(folder), world_size=about.world_size, replicated=about.replicated, sources=sources)


def read_about(folder: Path) -> Exported:
    """What the folder's ``checkpoint.json`` says."""
    try:
        content = (folder / ABOUT).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise InvalidInput(f"folder must be one that `dtr ckpt export` wrote: {folder} holds no {ABOUT}", field="folder") from exc
    except OSError as exc:
        raise InvalidInput(f"folder cannot be read: {exc.strerror}: {folder / ABOUT}", field="folder") from exc
    return Exported.parse(content)


def file_source(path: Path, pieces: Pieces) -> PieceSource:
    """A file on this machine, verified against ``pieces``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise IntegrityError(f"file {path} is missing") from exc
    except OSError as exc:
        raise InvalidInput(f"folder cannot be read: {exc.strerror}: {path}", field="folder") from exc

    def check() -> None:
        there = os.fstat(descriptor).st_size
        if there != pieces.size_bytes:
            raise IntegrityError(f"file {path} has {there} bytes, {ABOUT} says {pieces.size_bytes}")

    def fill(view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise IntegrityError(f"file {path} ended after {offset + done} of {pieces.size_bytes} bytes")
            done += count

    held = [descriptor]

    def close() -> None:
        while held:
            os.close(held.pop())

    try:
        check()
    except BaseException:
        close()
        raise
    return PieceSource(
        name=f"file {path}", where="store", pieces=pieces, fill=fill, check=check, threads=2, block_bytes=8 << 20, close=close
    )


def tree_text(spec: Any) -> bytes:
    """A tree as indented JSON, for people."""
    return orjson.dumps(spec, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
