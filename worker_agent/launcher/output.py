"""Where the output of trainers goes: straight through, or, when several share it, line by line through the relay."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["Output"]

log = logging.getLogger(__name__)

_RELAY: Final = str(Path(__file__).with_name("relay.py"))
_ALL_ENDED: Final = b"end"


class Output:
    """Hands out descriptors for stdout and stderr. Starts the relay at the first use if ``labelled``."""

    def __init__(self, *, labelled: bool) -> None:
        self._labelled = labelled
        self._control: socket.socket | None = None
        self._relay: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def streams(self, label: str) -> Iterator[tuple[int | None, int | None]]:
        """The descriptors for one trainer, None for the launcher's own; to be used within the block, by starting it."""
        if not self._labelled:
            yield None, None
            return
        with contextlib.ExitStack() as opened:
            sources: list[int] = []
            targets: list[int] = []
            for _ in range(2):
                for end, ends in zip(os.pipe(), (sources, targets), strict=True):
                    opened.callback(os.close, end)
                    ends.append(end)
            try:
                socket.send_fds(self._started(), [f"[{label}] ".encode()], sources)
            except (BrokenPipeError, ConnectionResetError):
                log.warning("the process that labels output has gone: what trainers print from now on comes without labels")
                self._labelled = False
                yield None, None
                return
            yield targets[0], targets[1]

    def _started(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._relay = subprocess.Popen(
                    [sys.executable, "-I", "-S", _RELAY, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        return self._control

    def close(self, within_s: float) -> None:
        """All trainers have ended: wait until what they printed is written; an output that does not flow is given up."""
        control, self._control = self._control, None
        relay, self._relay = self._relay, None
        if control is None or relay is None:
            return
        with control:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                control.send(_ALL_ENDED)
            try:
                relay.wait(within_s)
            except subprocess.TimeoutExpired:
                relay.kill()
                relay.wait()
                log.warning("the output did not take what the trainers printed last within %g s; the rest is lost", within_s)
