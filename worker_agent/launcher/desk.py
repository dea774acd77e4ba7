"""Where trainers register: one Unix socket per seat, served from the launcher's loop without ever waiting for anyone.

A socket per seat says which trainer is talking, whatever wrapper, container or process group it runs in.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

from dtr.errors import InvalidInput, Unavailable
from worker_agent.launcher.plan import Seat
from worker_agent.registration import LONGEST_LINE_BYTES, OK, Leave, Registration, error_line, parse_line

__all__ = ["Desk", "Listener", "Visitor"]

log = logging.getLogger(__name__)

_UCRED: Final = struct.Struct("3i")  # pid, uid, gid
_OUT_OF_DESCRIPTORS_S: Final = 0.05


class Visitor:
    """One connection: ``seat`` it came in by, and the process behind it (0 if that cannot be seen from here)."""

    def __init__(self, seat: int, connection: socket.socket, on_deaf: Callable[[Visitor], None]) -> None:
        self.seat = seat
        self.connection = connection
        self.pid = _peer(connection)
        self.unread = b""
        self._on_deaf = on_deaf

    def send(self, line: bytes) -> None:
        """Send a line; if the connection does not take it at once it is closed, so that the trainer notices."""
        try:
            sent = self.connection.send(line)
        except OSError:
            sent = 0
        if sent < len(line):
            self._on_deaf(self)


class Listener(Protocol):
    """Who is told what visitors say."""

    def registered(self, visitor: Visitor, registration: Registration) -> None: ...
    def left(self, visitor: Visitor) -> None: ...
    def gone(self, visitor: Visitor) -> None: ...


class Desk:
    """Listens for the trainers of all seats.

    Args:
        selector: of the loop; the data of each key is a function to call.
        seats: have the paths of the sockets.
        listener: is told what visitors say.
    """

    def __init__(self, selector: selectors.BaseSelector, seats: Sequence[Seat], listener: Listener) -> None:
        self._selector, self._seats, self._listener = selector, seats, listener
        self._entrances: list[socket.socket] = []
        self._visitors: set[Visitor] = set()

    def open(self) -> None:
        """Make the sockets.

        Raises:
            Unavailable: one cannot be made.
        """
        for number, seat in enumerate(self._seats):
            try:
                entrance = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._entrances.append(entrance)
                entrance.bind(seat.socket)
            except OSError as exc:
                raise Unavailable(f"the socket {seat.socket} for a trainer cannot be made: {exc.strerror}") from exc
            entrance.listen(16)
            entrance.setblocking(False)
            self._watch(entrance, partial(self._accept, number, entrance))

    def _watch(self, connection: socket.socket, callback: Callable[[], None]) -> None:
        self._selector.register(connection, selectors.EVENT_READ, callback)

    def _accept(self, seat: int, entrance: socket.socket) -> None:
        try:
            connection, _ = entrance.accept()
        except BlockingIOError:
            return  # the caller went away again
        except OSError as exc:
            log.warning("a trainer cannot be heard: %s", exc)
            time.sleep(_OUT_OF_DESCRIPTORS_S)  # it stays in the queue: do not spin
            return
        connection.setblocking(False)
        visitor = Visitor(seat, connection, self._dismiss)
        self._visitors.add(visitor)
        self._watch(connection, partial(self._read, visitor))

    def _read(self, visitor: Visitor) -> None:
        try:
            chunk = visitor.connection.recv(LONGEST_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._dismiss(visitor)
            return
        *lines, visitor.unread = (visitor.unread + chunk).split(b"\n")
        for line in lines:
            self._hear(visitor, line)
        if len(visitor.unread) > LONGEST_LINE_BYTES:
            self._refuse(visitor, f"a line has at most {LONGEST_LINE_BYTES} bytes")

    def _hear(self, visitor: Visitor, line: bytes) -> None:
        if visitor not in self._visitors:
            return  # refused by an earlier line
        try:
            said = parse_line(line)
        except InvalidInput as exc:
            self._refuse(visitor, exc.message)
            return
        if isinstance(said, Leave):
            self._listener.left(visitor)
            return
        self._listener.registered(visitor, said)
        visitor.send(OK)

    def _refuse(self, visitor: Visitor, why: str) -> None:
        log.warning("a trainer's registration was refused: %s", why)
        visitor.send(error_line(why))
        self._dismiss(visitor)

    def _dismiss(self, visitor: Visitor) -> None:
        if visitor not in self._visitors:
            return
        self._visitors.remove(visitor)
        self._selector.unregister(visitor.connection)
        visitor.connection.close()
        self._listener.gone(visitor)

    def close(self) -> None:
        """Close every connection and remove the sockets."""
        for visitor in list(self._visitors):
            self._dismiss(visitor)
        for entrance in self._entrances:
            path = entrance.getsockname()
            entrance.close()
            if path:  # it was bound
                os.unlink(path)
        self._entrances.clear()


def _peer(connection: socket.socket) -> int:
    pid, _, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(pid)
