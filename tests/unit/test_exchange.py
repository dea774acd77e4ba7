"""The exchange under barriers: two commands in one write, and one wake-up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dtr.errors import CoordinatorUnavailable
from dtr.state import exchange
from dtr.state.exchange import Exchange

Script = Callable[[socket.socket], None]


@pytest.fixture
def served() -> Iterator[Callable[[Script], Exchange]]:
    """Start a server that says what the test wants once redis-py's greeting is through; returns a client of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def start(script: Script) -> Exchange:
        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                while b"PING" not in (said := peer.recv(65_536)):
                    peer.sendall(b"+OK\r\n" * (said.count(b"CLIENT") + said.count(b"HELLO")))
                script(peer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return Exchange(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", "test")

    yield start
    for thread in threads:
        thread.join()
    listener.close()


PATIENCE_S = exchange.MAX_BLOCK_MS / 1000 + 5  # then the kernel gives up on a reply
PING = b"*1\r\n$4\r\nPING\r\n*1\r\n$4\r\nPING\r\n"  # what is sent does not matter here


def test_the_shortest_reply_behind_an_early_first_one_is_not_slept_through(
    served: Callable[[Script], Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given "wait" that was read before XREAD's empty reply came, then that reply wakes the waiter, not the end of its patience."""
    go = threading.Event()

    def script(peer: socket.socket) -> None:
        peer.sendall(b":0\r\n")
        go.wait()
        peer.sendall(b"*-1\r\n")
        while peer.recv(100):
            pass

    asked = served(script)
    received = exchange.Exchange._next

    def late(self: Exchange) -> object:
        threading.Timer(0.3, go.set).start()
        return received(self)

    monkeypatch.setattr(exchange.Exchange, "_next", late)
    began = time.monotonic()
    assert asked.ask(PING) == (0, None)
    assert time.monotonic() - began < PATIENCE_S - 1
    asked.close()


def test_a_server_that_goes_away_is_told(served: Callable[[Script], Exchange]) -> None:
    """Given a first reply and then the end of the connection, then the caller learns that nobody knows what happened."""
    asked = served(lambda peer: peer.sendall(b":0\r\n"))
    with pytest.raises(CoordinatorUnavailable):
        asked.ask(PING)
