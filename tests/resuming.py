"""Uploaders that are killed one after the other in one upload: forked from a process that has everything loaded, so each is up at once.

Every piece that one of them begins to send is on record in a file before its first byte, so that what was sent twice can be counted.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dtr.store.resume import Sent
from tests.uploads import ROOT, Training

_FORKS = """
import os, sys, time
from dtr.checkpoint.uploading.upload import Limits, Uploader
from dtr.store import copying, open_store, pieces, s3, s3_multipart
import boto3, awscrt.checksums
url, staging, host, job, run, piece_bytes, mbps, log = sys.argv[1:]
pieces._SMALLEST_BYTES = int(piece_bytes)
out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
send, append = s3_multipart._Upload._send_piece, copying.Copier.append

def noted_send(self, piece, over):
    os.write(out, b"%d\\n" % piece.number)
    send(self, piece, over)

def noted_append(self, start, end, crc=None):
    if start % int(piece_bytes) == 0:
        os.write(out, b"%d\\n" % (start // int(piece_bytes) + 1))
    return append(self, start, end, crc)

s3_multipart._Upload._send_piece, copying.Copier.append = noted_send, noted_append
limits = Limits(lease_s=0.6, max_attempts=3, mbps=float(mbps) or None)
for line in sys.stdin:
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("ended", flush=True)
        continue
    uploader = Uploader(redis_url=url, staging=staging, host=host, limits=limits)
    while uploader.upload_part(job, run, 1, 0) in {"BUSY", "LATER"}:
        time.sleep(0.02)
    os._exit(0)
"""


class Uploaders:
    """One after the other; ``kill`` ends the present one."""

    def __init__(self, training: Training, *, piece_bytes: int, mbps: float) -> None:
        self._training, self._log = training, Path(training.staging).parent / "sent.log"
        self._process = subprocess.Popen(
            [
                sys.executable, "-c", _FORKS, training.url, training.staging, training.host, training.job, training.run.id,
                f"{piece_bytes}", f"{mbps}", str(self._log),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.pid = 0

    def start(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.pid = int(self._process.stdout.readline())

    def kill(self) -> None:
        """SIGKILL, and wait for its end; one that has ended by itself is as good."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ended\n"

    def sent(self) -> Counter[int]:
        """How often each piece was begun."""
        with contextlib.suppress(FileNotFoundError):
            return Counter(int(line) for line in self._log.read_text().split())
        return Counter()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(60) == 0


@contextlib.contextmanager
def uploaders(training: Training, *, piece_bytes: int, mbps: float = 0.0) -> Iterator[Uploaders]:
    made = Uploaders(training, piece_bytes=piece_bytes, mbps=mbps)
    try:
        yield made
    finally:
        made.close()


def noted(training: Training) -> dict[int, Sent]:
    """The pieces on record."""
    from dtr.checkpoint.uploading.lease import sent_before

    part = (training.run.id, 1, 0)
    nonce = training.state.redis.hget(training.state.keys.transfer(*part), "nonce") or ""
    return sent_before(training.state, part, nonce)[1]


def killed_again_and_again(training: Training, running: Uploaders, kills: int, *, longest_s: float) -> int:
    """Kill one uploader after the other, each at a random moment after it got a piece further; returns how many died so."""
    rng = random.Random(7)
    for done in range(kills):
        before, deadline = len(noted(training)), time.monotonic() + 60
        running.start()
        while len(noted(training)) <= before and training.state_of() == "WRITING":
            assert time.monotonic() < deadline, f"uploader {done + 1} got no piece further than {before}"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, longest_s))
        running.kill()
        training.state.redis.hset(training.state.keys.parts(training.run.id, 1), "0/lease_until", 1)  # it died that long ago
        if training.state_of() != "WRITING":
            return done
    return kills
