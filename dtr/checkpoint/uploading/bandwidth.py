"""One cap for all uploads of a host, whichever of its processes sends: a debt in a small file that all of them see.

Bytes are paid for once they are sent: each moves on the moment until which the link is paid, and the sender waits for that moment before
it sends more. So the first piece goes out at once, and an uploader that was killed owes only what it sent.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import struct
import time
from typing import Final

from dtr.checkpoint.staging.slots import boot_id

__all__ = ["Bandwidth"]

log = logging.getLogger(__name__)

_NAME: Final = ".bandwidth"
_RECORD: Final = struct.Struct("<40sd")  # the boot, since the clock begins anew with it; paid until, by CLOCK_MONOTONIC
_TRIES: Final = 50


class Bandwidth:
    """The cap of a host; for use by one process, whose threads may share it.

    Args:
        staging: the host's staging folder; the file lies in it.
        mbps: MB/s, of all uploads together.
    """

    def __init__(self, staging: str, mbps: float) -> None:
        self._path, self._bytes_per_s = f"{staging}/{_NAME}", mbps * 1e6
        self._alone_until_s = 0.0
        self._trouble = ""

    def pay(self, size_bytes: int, since_s: float) -> float:
        """Account for bytes sent since ``since_s``; returns until when to send nothing more. Both by ``time.monotonic``.

        Where the file cannot be used, this process keeps to the cap alone.
        """
        price_s = size_bytes / self._bytes_per_s
        try:
            return self._pay_together(price_s, since_s)
        except OSError as exc:
            if str(exc) != self._trouble:
                log.warning("%s cannot be used, so each upload process keeps to the bandwidth cap by itself: %s", self._path, exc)
            self._trouble = str(exc)
            self._alone_until_s = max(self._alone_until_s, since_s) + price_s
            return self._alone_until_s

    def _pay_together(self, price_s: float, since_s: float) -> float:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(descriptor)
            until_s = max(_read(descriptor), since_s) + price_s
            os.pwrite(descriptor, _RECORD.pack(boot_id().encode(), until_s), 0)
        finally:
            os.close(descriptor)
        return until_s


def _read(descriptor: int) -> float:
    """Until when the link is paid; 0.0 if nobody has sent anything since this machine booted."""
    content = os.pread(descriptor, _RECORD.size, 0)
    if len(content) != _RECORD.size:
        return 0.0
    boot, until_s = _RECORD.unpack(content)
    return float(until_s) if boot.rstrip(b"\0") == boot_id().encode() and math.isfinite(until_s) else 0.0


def _lock(descriptor: int) -> None:
    """Held for microseconds. Whoever was stopped just then must not stop the others: they go on without it, a little too fast."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.001)
        else:
            return
