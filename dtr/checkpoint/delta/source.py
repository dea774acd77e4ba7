"""A part that lies in chunks, read as if it were one file: each chunk verified whole, on its way into the caller's memory."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from dtr.checkpoint import checksum
from dtr.checkpoint.delta.chunks import CHUNK_BYTES, Chunk, Recipe
from dtr.checkpoint.delta.damage import note_damage
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.patience import patiently
from dtr.checkpoint.restoring.contract import Where
from dtr.clock import SYSTEM, Clock
from dtr.errors import ChecksumMismatch, IntegrityError, InvalidInput, NotFound
from dtr.store import Store
from dtr.store.base import as_bytes
from dtr.store.pieces import Piece, move

__all__ = ["ChunkSource", "recipe_of"]

_THREADS: Final = 8
_KEPT: Final = 4  # chunks in memory: small tensors that share one are often read one after the other


def recipe_of(store: Store, facts: PartFacts) -> Recipe:
    """The recipe that a manifest names, checked against what the manifest says of it.

    Raises:
        IntegrityError: it is missing, damaged, or that of another part.
    """
    try:
        content = store.get(facts.object)
    except NotFound as exc:
        raise IntegrityError(f"object {facts.object} is missing") from exc
    if len(content) != facts.size_bytes:
        raise IntegrityError(f"object {facts.object} has {len(content)} bytes, its manifest says {facts.size_bytes}")
    if (found := checksum.of(content)) != facts.checksum:
        raise ChecksumMismatch(f"object {facts.object} has checksum {found}, its manifest says {facts.checksum}")
    recipe = Recipe.parse(content)
    if (recipe.rank, recipe.state_bytes, recipe.state_checksum) != (facts.rank, facts.state_bytes, facts.state_checksum):
        raise IntegrityError(f"object {facts.object} is the recipe of another part than its manifest says")
    return recipe


class ChunkSource:
    """See :class:`dtr.checkpoint.restoring.source.Source`. The recipe is read at the first read; a wrong chunk is put on record.

    Args:
        store: of the job.
        facts: what the manifest says of the part, of kind ``chunks``.
        patience_s: how long a store that is away is tried, for each chunk.
        clock: for that.
    """

    def __init__(self, store: Store, facts: PartFacts, *, patience_s: float = 60.0, clock: Clock = SYSTEM) -> None:
        self.name, self.where, self.state_bytes = f"chunks of {facts.object}", _IN_STORE, facts.state_bytes
        self.piece_bytes = min(CHUNK_BYTES, facts.state_bytes)
        self._store, self._facts, self._patience_s, self._clock = store, facts, patience_s, clock
        self._mutex = threading.Lock()
        self._recipe: Recipe | None = None
        self._checked = False
        self._spans: list[tuple[int, int, int, int]] = []  # offset in the file, length, chunk, offset in the chunk
        self._kept: OrderedDict[int, memoryview] = OrderedDict()

    def check(self) -> None:
        """See :class:`dtr.checkpoint.restoring.source.Source`: every chunk is asked for its size, once."""
        recipe = self._opened()
        if self._checked:
            return

        def look(chunk: Chunk) -> int:
            return self._persist(lambda: self._store.size(chunk.key), chunk)

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="dtr-look") as pool:
            for chunk, there in zip(recipe.chunks, pool.map(look, recipe.chunks), strict=True):
                if there != chunk.size_bytes:
                    raise IntegrityError(f"{chunk.key} has {there} bytes, the recipe says {chunk.size_bytes}")
        self._checked = True

    def head(self, *, keep: bool = False) -> bytes:
        """See :class:`dtr.checkpoint.restoring.source.Source`. It is in the recipe, which is in memory anyhow: no chunk is read."""
        return self._opened().header

    def read_into(self, buffer: memoryview | bytearray, offset: int = 0) -> None:
        """See :class:`dtr.checkpoint.restoring.source.Source`."""
        view = as_bytes(buffer)
        end = offset + len(view)
        if not 0 <= offset <= end <= self.state_bytes:
            raise InvalidInput(f"{self.name} has {self.state_bytes} bytes; there is no range [{offset}, {end})", field="offset")
        recipe = self._opened()
        head = recipe.header[offset:end]
        view[: len(head)] = head
        wanted: dict[int, list[tuple[int, int, int]]] = {}  # chunk -> offset in the view, offset in the chunk, length
        for start, length, number, inside in self._overlapping(offset, end):
            low, high = max(start, offset), min(start + length, end)
            wanted.setdefault(number, []).append((low - offset, inside + low - start, high - low))

        def fetch(piece: Piece, over: threading.Event) -> None:
            number = numbers[piece.number - 1]
            self._fetch(recipe.chunks[number], number, view, wanted[number], over)

        numbers = list(wanted)
        pieces = (Piece(number=n, start=0, end=recipe.chunks[number].size_bytes) for n, number in enumerate(numbers, start=1))
        move(fetch, pieces, threads=_THREADS if len(numbers) > 1 else 1)

    def verify(self) -> None:
        """Read every chunk once; raises IntegrityError that names the first that is not what was committed."""
        recipe = self._opened()

        def look(piece: Piece, over: threading.Event) -> None:
            if not over.is_set():
                chunk = recipe.chunks[piece.number - 1]
                self._read(chunk, memoryview(bytearray(chunk.size_bytes)))

        pieces = (Piece(number=n, start=0, end=chunk.size_bytes) for n, chunk in enumerate(recipe.chunks, start=1))
        move(look, pieces, threads=_THREADS)

    def close(self) -> None:
        """See :class:`dtr.checkpoint.restoring.source.Source`."""
        with self._mutex:
            self._kept.clear()

    def __repr__(self) -> str:
        return f"<{self.name}, {self.state_bytes} bytes>"

    def _opened(self) -> Recipe:
        with self._mutex:
            if self._recipe is None:
                found = patiently(
                    lambda: recipe_of(self._store, self._facts),
                    patience_s=self._patience_s,
                    what=f"{self.name} can be read",
                    clock=self._clock,
                )
                self._spans = sorted(_spans(found))
                self._recipe = found
            return self._recipe

    def _overlapping(self, offset: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        at = max(0, bisect.bisect_right(self._spans, offset, key=lambda span: span[0]) - 1)
        for span in self._spans[at:]:
            if span[0] >= end:
                return
            if span[0] + span[1] > offset:
                yield span

    def _fetch(self, chunk: Chunk, number: int, view: memoryview, wanted: list[tuple[int, int, int]], over: threading.Event) -> None:
        if over.is_set():
            return
        if len(wanted) == 1 and wanted[0][2] == chunk.size_bytes:
            self._read(chunk, view[wanted[0][0] : wanted[0][0] + chunk.size_bytes])
            return
        content = self._whole(chunk, number)
        for at, inside, length in wanted:
            view[at : at + length] = content[inside : inside + length]

    def _whole(self, chunk: Chunk, number: int) -> memoryview:
        """A chunk of which only some is wanted; the last few stay in memory."""
        with self._mutex:
            if (kept := self._kept.get(number)) is not None:
                self._kept.move_to_end(number)
                return kept
        content = memoryview(bytearray(chunk.size_bytes))
        self._read(chunk, content)
        with self._mutex:
            self._kept[number] = content
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return content

    def _persist(self, call: Callable[[], int], chunk: Chunk) -> int:
        try:
            return patiently(call, patience_s=self._patience_s, what=f"{chunk.key} can be read", clock=self._clock)
        except NotFound as exc:
            raise IntegrityError(f"{chunk.key} is missing") from exc

    def _read(self, chunk: Chunk, view: memoryview) -> None:
        count = self._persist(lambda: self._store.read_into(chunk.key, view, 0), chunk)
        if count != len(view):
            raise IntegrityError(f"{chunk.key} ended after {count} of {len(view)} bytes")
        if (crc := checksum.crc_of(view)) != chunk.crc:
            note_damage(self._store, chunk.key)
            raise ChecksumMismatch(f"{chunk.key} has checksum {checksum.text_of(crc)}, the recipe says {checksum.text_of(chunk.crc)}")


_IN_STORE: Final[Where] = "store"


def _spans(recipe: Recipe) -> Iterator[tuple[int, int, int, int]]:
    for number, chunk in enumerate(recipe.chunks):
        inside = 0
        for start, length in chunk.ranges:
            yield start, length, number, inside
            inside += length
