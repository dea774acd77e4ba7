"""A large object's pieces on their way to a cloud, and what is said meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from dtr.store import cloud_pieces, pieces
from dtr.store.cloud_pieces import PIECES_AT_ONCE, Pieces, is_temporary, temporary_name, watch
from dtr.store.pieces import OverError

COUNT = 9


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_SMALLEST_BYTES", 1 << 20)
    monkeypatch.setattr(cloud_pieces, "_TICK_S", 0)


class Seconds:
    """A clock on which every look takes ten seconds."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 10
        return self.now

    def wall(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_pieces_are_the_content() -> None:
    """All of it, in order, without a copy, and never counted as done before obstore can have sent them."""
    content = memoryview(bytes(range(256)) * ((COUNT << 20) // 256))[: (COUNT << 20) - 5]
    sent = Pieces(content)
    seen, done = [], []
    for piece in sent:
        done.append(sent.done_bytes >> 20)
        seen.append(piece)
        assert piece.obj is content.obj
    assert b"".join(seen) == content
    assert [len(piece) for piece in seen] == [1 << 20] * (COUNT - 1) + [(1 << 20) - 5]
    assert done == [max(0, given - PIECES_AT_ONCE - 1) for given in range(1, COUNT + 1)]


def test_over_means_no_more() -> None:
    """The next request for a piece ends the transfer."""
    sent = Pieces(memoryview(bytes(3 << 20)))
    next(sent)
    sent.over.set()
    with pytest.raises(OverError):
        next(sent)


def test_progress_and_standstill_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Each look reports; a transfer without a new piece is logged after half a minute, and again after the next."""
    sent, reported = Pieces(memoryview(bytes(COUNT << 20))), list[int]()

    def until_over() -> Iterator[bool]:
        for _ in range(COUNT - 1):
            next(sent)
            yield False
        yield from [False] * 9
        yield True

    over = until_over()
    with caplog.at_level(logging.WARNING, "dtr.store"):
        watch("part", sent, lambda: next(over), reported.append, Seconds())
    assert reported == [max(0, given - PIECES_AT_ONCE - 1) << 20 for given in range(1, COUNT)] + [3 << 20] * 9
    said = [record.getMessage() for record in caplog.records]
    assert 2 <= len(said) <= 4
    assert all("no piece of part was completed" in line for line in said)


def test_what_progress_raises_comes_out() -> None:
    """That is how a caller cancels."""

    def cancel(done: int) -> None:
        raise KeyError(done)

    with pytest.raises(KeyError):
        watch("part", Pieces(memoryview(bytes(2 << 20))), lambda: False, cancel, Seconds())


def test_temporary_names() -> None:
    """In the key's folder, its own for each writer, known as one of that key only."""
    first, second = temporary_name("runs/1/part"), temporary_name("runs/1/part")
    assert first != second
    assert first.startswith("runs/1/.dtr-")
    assert is_temporary(first)
    assert is_temporary(first, of="part")
    assert not is_temporary(first, of="art")
    assert not is_temporary("runs/1/part")
    assert temporary_name("part").count("/") == 0
