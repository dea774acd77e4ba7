"""Where the bytes of one part are, and how they are read: in parallel, into memory that is there already, verified on the way.

A part is one safetensors file. It may lie in the store, in a slot that is still in memory, in the local cache folder, or in chunks; a
``Source`` gives its bytes whatever it is. Whoever reads sees bytes that were verified, or an IntegrityError: never others.

The manifest has the checksum of each piece of an object, so a range costs the pieces that it touches. Where it has none (an object that
another version wrote), only the whole can be verified: then a range costs the whole, once.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from dtr.checkpoint import checksum
from dtr.checkpoint.delta.source import ChunkSource
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.patience import patiently
from dtr.checkpoint.restoring.contract import Source, Where
from dtr.clock import SYSTEM, Clock
from dtr.errors import ChecksumMismatch, IntegrityError, InvalidInput, NotFound, SlotUnavailable
from dtr.store import Store
from dtr.store.base import as_bytes
from dtr.store.pieces import Piece, move

__all__ = ["PIECE_BYTES", "PieceSource", "Pieces", "check_object", "source_of"]

PIECE_BYTES: Final = 16 << 20  # of what has no pieces of its own
OBJECT_BLOCK_BYTES: Final = 8 << 20  # one request; each opens the file, or asks the service, anew

T = TypeVar("T")
Fill = Callable[[memoryview, int], None]  # fill the buffer with the bytes from an offset on, or raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """What bytes must be: a whole of ``size_bytes``, in pieces of ``piece_bytes``, each with its CRC64NVME.

    ``crcs`` is empty where the pieces' are not known; then ``whole`` is, or nothing is (-1).
    """

    size_bytes: int
    piece_bytes: int
    crcs: tuple[int, ...] = ()
    whole: int = -1

    @classmethod
    def of(cls, facts: PartFacts) -> Pieces:
        """Those of the part's file: of its own object's pieces, or of the whole where it is put together from chunks."""
        whole = int(facts.state_checksum.rpartition(":")[2], 16)
        if facts.kind != "file":
            return cls(size_bytes=facts.state_bytes, piece_bytes=PIECE_BYTES, whole=whole)
        crcs = tuple(int(facts.pieces[at : at + 16], 16) for at in range(0, len(facts.pieces), 16))
        return cls(size_bytes=facts.size_bytes, piece_bytes=facts.piece_bytes or PIECE_BYTES, crcs=crcs, whole=whole)

    def covering(self, start: int, end: int) -> Iterator[Piece]:
        """The pieces that hold the bytes [start, end), in order."""
        for index in range(start // self.piece_bytes, -(-end // self.piece_bytes)):
            at = index * self.piece_bytes
            yield Piece(number=index + 1, start=at, end=min(at + self.piece_bytes, self.size_bytes))


class PieceSource:
    """A file or object that ``fill`` reads, block by block; verified against ``pieces`` while a block is still in the processor's cache.

    Args:
        name: for people.
        where: what kind of place it is.
        pieces: what the bytes must be.
        fill: reads a block; called by several threads at once.
        check: raises IntegrityError unless there is as much as there should be.
        threads: how many read at once.
        block_bytes: the most that ``fill`` is asked for at a time.
        close: what to let go of.
    """

    def __init__(
        self,
        *,
        name: str,
        where: Where,
        pieces: Pieces,
        fill: Fill,
        threads: int,
        block_bytes: int,
        check: Callable[[], None] = lambda: None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.where, self.state_bytes = name, where, pieces.size_bytes
        self.piece_bytes = pieces.piece_bytes if pieces.crcs or pieces.whole < 0 else 0
        self._pieces, self._fill, self._block_bytes, self._close = pieces, fill, block_bytes, close
        self.threads = threads
        self.check = check
        self._whole: bytearray | None = None
        self._head: bytearray | None = None
        self._mutex = threading.Lock()

    def head(self, *, keep: bool = False) -> bytearray:
        """See :class:`Source`. It is the first piece, or the whole where that alone can be verified."""
        if keep and not self.piece_bytes:
            with self._blamed():
                return self._verified_whole()
        head = bytearray(min(self.piece_bytes or self.state_bytes, self.state_bytes))
        self.read_into(head)
        if keep:
            self._head = head
        return head

    def read_into(self, buffer: memoryview | bytearray, offset: int = 0) -> None:
        """See :class:`Source`."""
        view = as_bytes(buffer)
        end = offset + len(view)
        if not 0 <= offset <= end <= self.state_bytes:
            raise InvalidInput(f"{self.name} has {self.state_bytes} bytes; there is no range [{offset}, {end})", field="offset")
        with self._blamed():
            if self.piece_bytes:
                self._read_range(view, offset)
            elif len(view) == self.state_bytes:
                self._read_whole(view)
            else:
                view[:] = memoryview(self._verified_whole())[offset:end]

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """An error says which source it was: a part that also lies elsewhere is then read there."""
        try:
            yield
        except (IntegrityError, SlotUnavailable) as exc:
            exc.facts |= {"source": self.name, "where": self.where}
            raise

    def close(self) -> None:
        """See :class:`Source`."""
        self._whole = self._head = None
        close, self._close = self._close, lambda: None
        close()

    def __repr__(self) -> str:
        return f"<{self.name}, {self.state_bytes} bytes>"

    def read_scattered(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill ``views`` one after the other with the bytes from ``offset`` on; together they must begin and end at edges of pieces.

        Raises:
            As :meth:`read_into`.
        """
        at, never = 0, threading.Event()
        rest = deque(views)
        for piece in self._pieces.covering(offset, offset + sum(len(view) for view in views)):
            held, at = list[memoryview](), 0
            while at < piece.size_bytes:
                view = rest.popleft()
                take = min(len(view), piece.size_bytes - at)
                held.append(view[:take])
                if take < len(view):
                    rest.appendleft(view[take:])
                at += take
            if (head := self._head) is not None and piece.start == 0:
                for view, end in zip(held, itertools.accumulate(len(view) for view in held), strict=True):
                    view[:] = memoryview(head)[end - len(view) : end]
                continue
            with self._blamed():
                self._check(piece, self._crc_of(held, piece.start, never))

    def _read_range(self, view: memoryview, offset: int) -> None:
        end = offset + len(view)

        def read(piece: Piece, over: threading.Event) -> None:
            low, high = max(piece.start, offset), min(piece.end, end)
            inside = view[low - offset : high - offset]
            if (head := self._head) is not None and piece.start == 0:
                inside[:] = memoryview(head)[low:high]
                return
            whole = inside if len(inside) == piece.size_bytes else memoryview(bytearray(piece.size_bytes))
            self._check(piece, self._crc_of([whole], piece.start, over))
            if whole is not inside:
                inside[:] = whole[low - piece.start : high - piece.start]

        self._move(read, offset, end)

    def _read_whole(self, view: memoryview) -> None:
        """The pieces' checksums are not known: they are computed side by side, and put together."""
        crcs: dict[int, int] = {}

        def read(piece: Piece, over: threading.Event) -> None:
            crcs[piece.number] = self._crc_of([view[piece.start : piece.end]], piece.start, over)

        self._move(read, 0, self.state_bytes)
        ordered = [crcs[number] for number in sorted(crcs)]
        total = checksum.combined(ordered, self.state_bytes, self._pieces.piece_bytes)
        if total != self._pieces.whole:
            raise ChecksumMismatch(
                f"{self.name} has checksum {checksum.text_of(total)}, its manifest says {checksum.text_of(self._pieces.whole)}"
            )

    def _verified_whole(self) -> bytearray:
        with self._mutex:
            if self._whole is None:
                whole = bytearray(self.state_bytes)
                self._read_whole(memoryview(whole))
                self._whole = whole
            return self._whole

    def _move(self, read: Callable[[Piece, threading.Event], None], start: int, end: int) -> None:
        pieces = self._pieces.covering(start, end)
        move(read, pieces, threads=self.threads if end - start > self._pieces.piece_bytes else 1)

    def _crc_of(self, views: Iterable[memoryview], start: int, over: threading.Event) -> int:
        """Read into ``views``; the checksum of what was read, of nothing useful where another piece has failed or none is known."""
        from awscrt.checksums import crc64nvme

        crc = 0
        for view in views:
            for at in range(0, len(view), self._block_bytes):
                if over.is_set():
                    return crc
                block = view[at : at + self._block_bytes]
                self._fill(block, start + at)
                if self._pieces.whole >= 0:
                    crc = crc64nvme(block, crc)
            start += len(view)
        return crc

    def _check(self, piece: Piece, crc: int) -> None:
        if self._pieces.crcs and crc != self._pieces.crcs[piece.number - 1]:
            wanted = checksum.text_of(self._pieces.crcs[piece.number - 1])
            raise ChecksumMismatch(
                f"{self.name} has checksum {checksum.text_of(crc)} in bytes {piece.start} to {piece.end}, its manifest says {wanted}"
            )


def source_of(store: Store, facts: PartFacts, *, patience_s: float = 60.0, clock: Clock = SYSTEM) -> Source:
    """The part as the store has it, whatever kind of object that is.

    Args:
        store: of the job.
        facts: what the manifest says of the part.
        patience_s: how long a store that is away is tried, for each piece.
        clock: for that.
    """
    if facts.kind == "chunks":
        return ChunkSource(store, facts, patience_s=patience_s, clock=clock)
    return _object(store, facts, patience_s, clock)


def _object(store: Store, facts: PartFacts, patience_s: float, clock: Clock) -> PieceSource:
    """The object is the file."""

    def persist(call: Callable[[], T]) -> T:
        return patiently(call, patience_s=patience_s, what=f"object {facts.object} can be read", clock=clock)

    def fill(view: memoryview, offset: int) -> None:
        try:
            count = persist(lambda: store.read_into(facts.object, view, offset))
        except NotFound as exc:
            raise IntegrityError(f"object {facts.object} is missing") from exc
        if count != len(view):
            raise IntegrityError(f"object {facts.object} ended after {offset + count} of {facts.size_bytes} bytes")

    return PieceSource(
        name=f"object {facts.object}",
        where="store",
        pieces=Pieces.of(facts),
        fill=fill,
        threads=store.reads_at_once,
        block_bytes=OBJECT_BLOCK_BYTES,
        check=lambda: persist(lambda: check_object(store, facts)),
    )


def check_object(store: Store, facts: PartFacts) -> None:
    """Raise IntegrityError unless the store holds the object in its full length."""
    try:
        there = store.size(facts.object)
    except NotFound as exc:
        raise IntegrityError(f"object {facts.object} is missing") from exc
    if there != facts.size_bytes:
        raise IntegrityError(f"object {facts.object} has {there} bytes, its manifest says {facts.size_bytes}")
