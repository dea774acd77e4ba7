"""A large transfer cut into pieces: each is moved once, the first error ends it all, and nothing is left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from dtr.store.pieces import OverError, Piece, cut, go_on, move

SIZE, PIECE = 100, 7
PIECES = -(-SIZE // PIECE)
WITHIN_S = 30


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Whatever happens, no thread outlives the call."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dtr-store")]


@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5, 50])
def test_each_piece_is_moved_once(threads: int, ramp: bool) -> None:
    """Whatever the number of threads, also of more than there are pieces."""
    moved: list[Piece] = []
    move(lambda piece, over: moved.append(piece), cut(SIZE, PIECE), threads=threads, ramp=ramp)
    assert sorted(moved, key=lambda piece: piece.number) == list(cut(SIZE, PIECE))


def test_nothing_to_move_ends_at_once() -> None:
    """No piece, no call, no progress."""
    told: list[int] = []
    move(lambda piece, over: pytest.fail("there is no piece"), iter(()), threads=3, progress=told.append)
    assert told == []


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_grows_up_to_the_whole(threads: int) -> None:
    """Told in the caller's thread, ascending, and the last is everything."""
    told: list[int] = []
    where: set[str] = set()

    def progress(done_bytes: int) -> None:
        told.append(done_bytes)
        where.add(threading.current_thread().name)

    move(lambda piece, over: None, cut(SIZE, PIECE), threads=threads, progress=progress)
    assert told == sorted(told)
    assert told[-1] == SIZE
    assert where == {threading.current_thread().name}


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_is_raised_and_ends_the_rest(threads: int) -> None:
    """Those under way are told, and what they raise for it is not what the caller sees."""
    begun: list[int] = []

    def work(piece: Piece, over: threading.Event) -> None:
        begun.append(piece.number)
        if piece.number == 2:
            raise ValueError("disk on fire")
        if threads > 1:
            assert over.wait(WITHIN_S)
            go_on(over)

    with pytest.raises(ValueError, match="disk on fire"):
        move(work, cut(SIZE, PIECE), threads=threads)
    assert len(begun) <= max(2, threads)


def test_an_error_of_progress_ends_it_and_is_raised() -> None:
    """That is how a caller cancels."""
    begun: list[int] = []

    def cancel(done_bytes: int) -> None:
        raise KeyboardInterrupt

    def work(piece: Piece, over: threading.Event) -> None:
        begun.append(piece.number)
        if piece.number > 1:
            assert over.wait(WITHIN_S)

    with pytest.raises(KeyboardInterrupt):
        move(work, cut(SIZE, PIECE), threads=3, progress=cancel)
    assert len(begun) <= 4


def test_an_error_of_the_pieces_themselves_is_raised() -> None:
    """The iterator may look at what is to be moved."""

    def broken() -> Iterator[Piece]:
        yield from cut(20, PIECE)
        raise OSError("the list ended early")

    with pytest.raises(OSError, match="ended early"):
        move(lambda piece, over: None, broken(), threads=3)


def test_a_ramp_begins_with_one_and_never_has_more_than_its_threads() -> None:
    """One at first, one more with each that is done."""
    mutex, running, most, by_number = threading.Lock(), 0, 0, dict[int, int]()

    def work(piece: Piece, over: threading.Event) -> None:
        nonlocal running, most
        with mutex:
            running += 1
            most, by_number[piece.number] = max(most, running), running
        with mutex:
            running -= 1

    move(work, cut(SIZE, 1), threads=4, ramp=True)
    assert by_number[1] == 1
    assert by_number[2] <= 2
    assert most <= 4


def test_threads_that_cannot_be_started_end_those_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third is one too many for the system: the error is the caller's, and the first two end."""
    start, count = threading.Thread.start, 0

    def limited(thread: threading.Thread) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        move(lambda piece, over: pytest.fail("not all threads were there"), cut(SIZE, PIECE), threads=3)


def test_who_is_told_that_it_is_over_raises_over() -> None:
    """What `go_on` is for."""
    over = threading.Event()
    go_on(over)
    over.set()
    with pytest.raises(OverError):
        go_on(over)
