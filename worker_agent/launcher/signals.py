"""Signals as something that a selector sees, in the order in which they came."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Final

__all__ = ["received", "signals_to_socket"]

CAUGHT: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP)


@contextlib.contextmanager
def signals_to_socket() -> Iterator[socket.socket]:
    """Within the block, the signals that concern a launcher arrive as bytes on this socket.

    One that was ignored at the start (``nohup``, a job in the background) stays ignored. Only in the main thread.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = {number: signal.getsignal(number) for number in CAUGHT}
        caught = [number for number in CAUGHT if before[number] is not signal.SIG_IGN]
        for number in caught:
            signal.signal(number, _noticed)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(wakeup)
            for number in caught:
                signal.signal(number, before[number])


def received(reader: socket.socket) -> list[int]:
    """The numbers of the signals that have arrived."""
    try:
        return [number for number in reader.recv(4096) if number in CAUGHT]
    except BlockingIOError:
        return []


def _noticed(number: int, frame: object) -> None:
    """The interpreter has put the number on the socket already."""
