"""What tests of the command line share."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from dtr.session import Session

__all__ = ["start", "together"]


def together(sessions: Sequence[Session], call: Callable[[Session], Any]) -> None:
    """Do ``call`` with every session at the same time, as collective steps need it."""
    threads = [threading.Thread(target=call, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def start(args: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """`dtr ARGS` as a process of its own, with pipes for what it prints."""
    return subprocess.Popen([sys.executable, "-m", "dtr", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
