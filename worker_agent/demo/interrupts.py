"""Ctrl-C, SIGTERM and SIGHUP as one KeyboardInterrupt, raised only where it may be.

Guarantees: outside `allowed` a signal interrupts nothing and is kept for the next `allowed`; inside, the first one raises, and those
that follow do not disturb the clearing up that it began.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Final

__all__ = ["Interrupts"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """For the main thread of a process. Nothing changes before `install`."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._raised = False
        self._allowed = False

    def install(self) -> None:
        """Take over the signals, save SIGHUP where ``nohup`` has it ignored; one that came while they were blocked counts."""
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    @property
    def status(self) -> int:
        """The exit status of a process that ended by the signal, as shells have it: 130 for Ctrl-C."""
        return 128 + (self.number or signal.SIGINT)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Within the block the first signal raises KeyboardInterrupt, at once if it came before."""
        self._allowed = True
        try:
            self._raise_once()
            yield
        finally:
            self._allowed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
        if self._allowed:
            self._raise_once()

    def _raise_once(self) -> None:
        if self.number is not None and not self._raised:
            self._raised = True
            raise KeyboardInterrupt
