"""How a process ended, in the words of people, of Redis and of the shell."""

from __future__ import annotations

import signal
from dataclasses import dataclass

__all__ = ["Outcome", "signal_name"]


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; the number itself for one without a name (real-time signals)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An exit code, or the signal that killed it; ``note`` is what else is known.

    ``step`` is the last that it reported (-1: none), ``job`` whose step that is, empty where there is only one.
    """

    code: int | None = None
    signal: int | None = None
    step: int = -1
    job: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def status(self) -> int:
        """As a shell reports it: the code, or 128 + the signal."""
        return 128 + self.signal if self.signal is not None else (self.code or 0)

    @property
    def reason(self) -> str:
        """As it is recorded in Redis: ``exit 3``, ``signal 9 (SIGKILL)``."""
        what = f"signal {self.signal} ({signal_name(self.signal)})" if self.signal is not None else f"exit {self.code}"
        return f"{what}: {self.note}" if self.note else what

    def __str__(self) -> str:
        what = (
            f"was killed by signal {self.signal} ({signal_name(self.signal)})"
            if self.signal is not None
            else f"ended with exit status {self.code}"
        )
        where = f" at step {self.step}{f' of job {self.job}' if self.job else ''}" if self.step >= 0 else ""
        return f"{what}{where} ({self.note})" if self.note else f"{what}{where}"
