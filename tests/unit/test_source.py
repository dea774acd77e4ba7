"""Sources: whatever range is asked for, what comes back was verified, and damage anywhere in the pieces that it touches is an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr.checkpoint import checksum
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.restoring.contract import Source
from dtr.checkpoint.restoring.source import Pieces, PieceSource, source_of
from dtr.errors import ChecksumMismatch, IntegrityError, InvalidInput, StoreUnavailable
from dtr.store import Store, open_store

PIECE = 1000
SIZE = 10 * PIECE + 7
DATA = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8).tobytes()


def facts_of(data: bytes, *, pieces: bool = True) -> PartFacts:
    """Those of the object ``part``."""
    crcs = checksum.pieces_of(data, PIECE)
    return PartFacts(
        rank=0, worker="w", incarnation="0" * 12, object="part", size_bytes=len(data), checksum=checksum.of(data),
        piece_bytes=PIECE if pieces else 0, pieces=checksum.hex_of(crcs) if pieces else "",
    )  # fmt: skip


def memory_source(data: bytes, facts: PartFacts, *, block_bytes: int = 300, threads: int = 3) -> PieceSource:
    """Bytes in memory as a source."""

    def fill(view: memoryview, offset: int) -> None:
        view[:] = data[offset : offset + len(view)]

    return PieceSource(name="memory", where="slot", pieces=Pieces.of(facts), fill=fill, threads=threads, block_bytes=block_bytes)


def read(source: Source, start: int, end: int) -> bytes:
    buffer = bytearray(end - start)
    source.read_into(buffer, start)
    return bytes(buffer)


ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)


@settings(max_examples=60, deadline=None)
@given(where=ranges, pieces=st.booleans(), threads=st.sampled_from([1, 3]))
def test_any_range_is_that_of_the_bytes(where: list[int], pieces: bool, threads: int) -> None:
    """With the checksums of pieces, and with that of the whole alone."""
    start, end = where
    assert read(memory_source(DATA, facts_of(DATA, pieces=pieces), threads=threads), start, end) == DATA[start:end]


@settings(max_examples=60, deadline=None)
@given(where=ranges.filter(lambda r: r[0] < r[1]), at=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_an_error_where_its_piece_is_read(where: list[int], at: int, bit: int) -> None:
    """A range that touches the piece is refused, also where the bit is outside the range; any other is right."""
    start, end = where
    damaged = bytearray(DATA)
    damaged[at] ^= 1 << bit
    source = memory_source(bytes(damaged), facts_of(DATA))
    touched = start // PIECE <= at // PIECE <= (end - 1) // PIECE
    if touched:
        with pytest.raises(ChecksumMismatch, match="memory") as failed:
            read(source, start, end)
        assert failed.value.facts["where"] == "slot"
    else:
        assert read(source, start, end) == DATA[start:end]


def test_without_pieces_any_damage_is_found_by_any_range() -> None:
    """Only the whole can be verified then, and it is."""
    damaged = bytearray(DATA)
    damaged[-1] ^= 1
    source = memory_source(bytes(damaged), facts_of(DATA, pieces=False))
    for start, end in ((0, SIZE), (5, 6)):
        with pytest.raises(ChecksumMismatch):
            read(source, start, end)


def test_a_range_reads_only_the_pieces_that_it_touches() -> None:
    """A byte of one piece costs that piece."""
    asked: list[tuple[int, int]] = []

    def fill(view: memoryview, offset: int) -> None:
        asked.append((offset, len(view)))
        view[:] = DATA[offset : offset + len(view)]

    source = PieceSource(name="m", where="store", pieces=Pieces.of(facts_of(DATA)), fill=fill, threads=1, block_bytes=PIECE)
    assert read(source, 3500, 3501) == DATA[3500:3501]
    assert asked == [(3000, PIECE)]


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (SIZE, 1), (0, SIZE + 1)])
def test_a_range_outside_is_refused(start: int, length: int) -> None:
    """Before anything is read."""
    with pytest.raises(InvalidInput, match=f"{SIZE} bytes"):
        memory_source(DATA, facts_of(DATA)).read_into(bytearray(length), start)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = open_store(tmp_path)
    opened.put("part", DATA)
    return opened


def test_an_object_is_read_and_checked(store: Store) -> None:
    """The object as the store has it; missing, shorter and longer ones are told before memory is taken."""
    source = source_of(store, facts_of(DATA), patience_s=0)
    source.check()
    assert read(source, 0, SIZE) == DATA
    store.put("part", DATA + b"x")
    with pytest.raises(IntegrityError, match=f"has {SIZE + 1} bytes"):
        source_of(store, facts_of(DATA), patience_s=0).check()
    store.put("part", DATA[:-1])
    with pytest.raises(IntegrityError, match="ended after"):
        read(source_of(store, facts_of(DATA), patience_s=0), 0, SIZE)
    store.delete("part")
    with pytest.raises(IntegrityError, match="is missing"):
        source_of(store, facts_of(DATA), patience_s=0).check()


def test_a_store_that_is_away_is_tried_again_for_that_piece_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One 503 costs one more request, not the whole part."""
    real, asked = type(store).read_into, list[int]()

    def flaky(self: Store, key: str, buffer: memoryview, offset: int = 0) -> int:
        asked.append(offset)
        if asked.count(offset) == 1 and offset == 3000:
            raise StoreUnavailable("503")
        return real(self, key, buffer, offset)

    monkeypatch.setattr(type(store), "read_into", flaky)
    assert read(source_of(store, facts_of(DATA)), 0, SIZE) == DATA
    assert sorted(asked) == sorted([*range(0, SIZE, PIECE), 3000])


def test_closing_twice_and_reading_a_whole_without_pieces_keeps_nothing(store: Store) -> None:
    """What a range had to keep in memory goes with the source."""
    source = source_of(store, replace(facts_of(DATA, pieces=False)), patience_s=0)
    assert read(source, 5, 9) == DATA[5:9]
    source.close()
    source.close()
