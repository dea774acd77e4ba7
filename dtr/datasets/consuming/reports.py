"""Reports that nobody waits for: written into the kernel's hands, their answers read when the next one is sent.

Guarantees: `send` takes microseconds, opens no connection and never blocks, however slow the server is; what was sent at once before the
process is killed is Redis's (the kernel delivers it); reports arrive in order; those whose answer was never read are sent again over the
next connection, which harms nothing, since a report says what is so and not what to add.

A thread looks a few times a second whether an answer
is missing, and connects anew: the other ranks may wait for a report while its sender waits for them, and sends nothing more.

What waits while Redis is away is bounded, and nothing of the ledger is lost for it: see :mod:`dtr.datasets.consuming.shortening`.

So what a rank has handed out, and its data state of a step that it saves, outlive it from that moment on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from hiredis import Reader, ReplyError, pack_command
from redis import exceptions as rx

from dtr.datasets.consuming.shortening import Report, shortened
from dtr.state.client import connect_blocking
from dtr.state.scripts import load

__all__ = ["Reports"]

log = logging.getLogger(__name__)

MOST_UNANSWERED: Final = 1000  # on their way at once; of more than that, those are left that say what no later one says
READ_BYTES: Final = 65_536
READ_FROM: Final = 8  # answers that are owed, from which on a report stays to read them
LOOK_S: Final = 0.25
SILENT_LOOKS: Final = 20  # after which a connection without an answer is taken for lost
PASSING: Final = ("NOSCRIPT", "OOM", "MISCONF", "READONLY", "LOADING", "NOREPLICAS", "MASTERDOWN", "BUSY")
SCRIPTS: Final = ("ledger_report", "ckpt_data", "journal_note", "speed_note", "ledger_quarantine")


class Reports:
    """One process's reports, for any thread.

    Args:
        url: of Redis.
        name: what CLIENT LIST shows.
    """

    def __init__(self, url: str, name: str) -> None:
        self._pool = connect_blocking(url, name=name, block_s=1).connection_pool
        self._mutex, self._connecting = threading.Lock(), threading.Lock()
        self._over: threading.Event | None = None  # of the thread that looks after the connection
        self._connection: Any = None
        self._socket: Any = None
        self._reader: Any = None
        self._unanswered: deque[Report] = deque()
        self._under_way = self._tried = 0  # how many of them were handed to this connection, and to any
        self._longest = MOST_UNANSWERED
        self._unsent, self._answers = b"", 0
        self._pid = os.getpid()
        self.refused = ""  # the newest refusal, for whoever wonders why people see no progress

    def connect(self) -> None:
        """Open the connection, for the thread that reads ahead: this may take as long as Redis does. Raises nothing.

        From now on there is a thread that opens it again when it is lost.
        """
        if self._over is None:
            self._over = threading.Event()
            threading.Thread(target=self._look_after, args=(self._over,), name="dtr-reports", daemon=True).start()
        self._connect()

    def send(self, script: str, keys: Sequence[str], args: Sequence[Any], *, at_once: bool = True) -> None:
        """Send one report behind those that wait; raises nothing: a server that is away gets it later.

        One that need not go ``at_once`` goes with the next one, or a quarter of a second later: waking the kernel and the server for it is
        what would cost most.
        """
        with self._mutex:
            self._unanswered.append(Report(script=script, keys=tuple(keys), args=tuple(args)))
            if at_once:
                self._try_exchange(until=READ_FROM)
            if len(self._unanswered) - self._tried > self._longest:
                self._shorten()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all were answered; False if time ran out."""
        deadline = time.monotonic() + timeout_s
        while self._unanswered and time.monotonic() < deadline:
            with self._mutex:
                self._try_exchange()
            time.sleep(0.001)
        return not self._unanswered

    def close(self) -> None:
        """Close the connection; what was not answered is sent again if another one is opened."""
        if self._over is not None:
            self._over.set()
            self._over = None
        with self._mutex:
            self._try_exchange()
            self._drop()

    # --- the connection ---------------------------------------------------------------------------------------------

    def _look_after(self, over: threading.Event) -> None:
        silent, before = 0, self._answers
        while not over.wait(LOOK_S):
            if not self._unanswered:
                continue
            with self._mutex:
                self._try_exchange()
                silent, before = silent + 1 if self._answers == before else 0, self._answers
                if silent >= SILENT_LOOKS:
                    silent = 0
                    self._drop()
            if not over.is_set():
                self._connect()

    def _connect(self) -> None:
        with self._connecting:
            if self._connection is not None:
                return
            try:
                connection = self._pool.connection_class(**self._pool.connection_kwargs)
                connection.connect()
                for script in SCRIPTS:
                    connection.send_command("SCRIPT", "LOAD", load(script).text)
                    connection.read_response()
            except (rx.RedisError, OSError) as exc:
                log.debug("reports wait for Redis: %s", exc)
                return
            with self._mutex:
                self._socket = connection._sock  # noqa: SLF001 - redis-py has no public name for it
                self._socket.setblocking(False)
                self._reader, self._connection = Reader(encoding="utf-8", errors="surrogateescape"), connection
                self._try_exchange()

    def _shorten(self) -> None:
        """Of those that Redis cannot have heard, leave what must be said; as much again may come before the next time."""
        every = list(self._unanswered)
        left = shortened(every[self._tried :])
        self._unanswered = deque([*every[: self._tried], *left])
        self._longest = max(MOST_UNANSWERED, 2 * len(left))

    def _drop(self) -> None:
        connection, self._connection, self._unsent, self._under_way = self._connection, None, b"", 0
        if connection is not None and self._pid == os.getpid():
            connection.disconnect()

    def _try_exchange(self, until: int = 0) -> None:
        """``until``: leave so many answers to the next one."""
        try:
            if self._connection is not None:
                self._hand_over()
                if self._under_way >= until:
                    self._read()
        except (rx.RedisError, OSError, UnicodeError) as exc:
            log.debug("reports wait for Redis: %s", exc)
            self._drop()

    def _hand_over(self) -> None:
        """Give the kernel what it takes."""
        while self._under_way < min(len(self._unanswered), MOST_UNANSWERED):
            self._unsent += _packed(self._unanswered[self._under_way])
            self._under_way += 1
        self._tried = max(self._tried, self._under_way)
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def _read(self) -> None:
        """Take what has come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                chunk = self._socket.recv(READ_BYTES)
                if not chunk:
                    raise rx.ConnectionError("the server closed the connection")
                self._reader.feed(chunk)
                if len(chunk) < READ_BYTES:  # that was all, or the next exchange has the rest: asking again is what would cost most
                    break
        while (answer := self._reader.gets()) is not False:
            self._answered(answer)

    def _answered(self, answer: Any) -> None:
        if isinstance(answer, ReplyError) and str(answer).startswith(PASSING):
            # Redis forgot the script: a new connection loads it. Or it takes no writes just now. What waits is sent again.
            raise rx.ResponseError(str(answer))
        self._answers += 1
        if self._under_way:
            self._unanswered.popleft()
            self._under_way, self._tried = self._under_way - 1, self._tried - 1
        if isinstance(answer, ReplyError) and str(answer) != self.refused:
            self.refused = str(answer)
            log.debug("a report was refused: %s", answer)


def _packed(report: Report) -> bytes:
    packed: bytes = pack_command(("EVALSHA", load(report.script).sha, len(report.keys), *report.keys, *report.args))
    return packed
