"""A server for benchmarks: the one that ``dtr up`` would start, on a free port, in a folder that goes away."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dtr.stack.server import command, find, look

__all__ = ["free_port", "running"]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The URL of a server that ends with the block."""
    port = free_port()
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="dtr-bench-", dir=base) as folder:
        child = subprocess.Popen(command(find(Path(folder)), port, Path(folder)), stdout=subprocess.DEVNULL, cwd=folder)
        url = f"redis://127.0.0.1:{port}/0"
        try:
            deadline = time.monotonic() + 30
            while look(url) is None:
                if child.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server for the benchmark did not start: exit status {child.poll()}")
                time.sleep(0.02)
            yield url
        finally:
            child.terminate()
            child.wait(timeout=30)
