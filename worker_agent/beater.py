"""``python -m worker_agent beat``: the small process that beats for one trainer without a launcher (``beat="process"``).

It has a GIL of its own, so C code that holds the trainer's does not stop the beats. It speaks the launcher's protocol: registrations
come in on stdin, a line each; answers and news go out on stdout; it ends when stdin does, which is when the trainer ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from typing import Final

from dtr.beats import Beats
from dtr.errors import InvalidInput
from dtr.progress import Progress, read_page
from worker_agent.registration import LONGEST_LINE_BYTES, OK, Leave, Registration, error_line, news_line, parse_line

__all__ = ["serve"]

log = logging.getLogger(__name__)

# A terminal or a launcher sends these to the whole process group: the trainer may take its time to end, and beats until then.
_NOT_FOR_US: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)


def serve(source: int, target: int) -> int:
    """Beat for whoever registers, until ``source`` ends or the trainer says that it leaves; always 0."""
    for number in _NOT_FOR_US:
        signal.signal(number, signal.SIG_IGN)
    beats: Beats | None = None
    try:
        for line in _lines(source):
            try:
                said = parse_line(line)
            except InvalidInput as exc:
                _write(target, error_line(exc.message))
                continue
            if beats is not None:
                beats.stop()
            if isinstance(said, Leave):
                beats = None
                break
            _write(target, OK)
            beats = _beats(said, target)
    finally:
        if beats is not None:
            beats.stop()
    return 0


def _beats(told: Registration, target: int) -> Beats:
    last, parent = Progress(step=-1, phase="starting", at=0.0), os.getppid()

    def look() -> Progress:
        nonlocal last
        if os.getppid() != parent:  # a child that the trainer forked may hold our stdin open; the trainer itself has died
            os._exit(0)
        last = read_page(told.page) or last
        return last

    beats = Beats(told.redis_url, told.job, interval_ms=told.interval_ms)
    beats.add(
        told.who, ttl_ms=told.ttl_ms, number=told.number, read_progress=look,
        on_news=lambda news, detail: _write(target, news_line(told.who.incarnation, news, detail)),
    )  # fmt: skip
    return beats


def _lines(source: int) -> Iterator[bytes]:
    """The lines that come in, without their ends; a line that is too long ends it all."""
    unread = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := os.read(source, LONGEST_LINE_BYTES):
            *lines, unread = (unread + chunk).split(b"\n")
            yield from lines
            if len(unread) > LONGEST_LINE_BYTES:
                return


def _write(target: int, line: bytes) -> None:
    """The trainer may have ended; then nobody needs to know."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        os.write(target, line)
