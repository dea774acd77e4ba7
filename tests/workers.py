"""Real Celery workers for tests, started as people start them: ``celery -A tasks worker``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import redis

from dtr.host import host_id
from dtr.state.keys import uploader
from tests.waiting import eventually

ROOT = Path(__file__).parent.parent
QUICK = {
    "DTR_SCAN_INTERVAL_S": "0.3", "DTR_LEASE_S": "1", "DTR_UPLOAD_PROCESSES": "2", "DTR_MAX_ATTEMPTS": "3", "DTR_SHUTDOWN_GRACE_S": "2",
}  # fmt: skip


def celery(*args: str, url: str, staging: Path | str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """``celery -A tasks ARGS`` in a process group of its own, its output in a file."""
    log = tempfile.NamedTemporaryFile("w+", prefix="dtr-celery-", suffix=".log")  # noqa: SIM115 - as long as the child
    child = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tasks", *args],
        stdout=log, stderr=log, stdin=subprocess.DEVNULL, text=True, cwd=ROOT,
        env={**os.environ, "DTR_REDIS_URL": url, "DTR_STAGING": str(staging), **(env or {})},
        start_new_session=True,
    )  # fmt: skip
    child.log = log  # type: ignore[attr-defined]
    return child


def log_of(child: subprocess.Popen[str]) -> str:
    """What it has written so far."""
    return Path(child.log.name).read_text()  # type: ignore[attr-defined]


def end(child: subprocess.Popen[str]) -> None:
    """Kill the child and all of its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait(30)
    child.log.close()  # type: ignore[attr-defined]


@contextlib.contextmanager
def worker(*, url: str, staging: Path | str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """An uploader that is there: its presence is in Redis, and its pool has answered."""
    child = celery("worker", url=url, staging=staging, env={**QUICK, **env})
    try:
        wait_for_worker(child, url, staging)
        yield child
    finally:
        end(child)


def wait_for_worker(child: subprocess.Popen[str], url: str, staging: Path | str) -> None:
    """Return once the worker shows itself."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        key = uploader(host_id(str(staging)))

        def there() -> bool:
            assert child.poll() is None, log_of(child)
            return bool(client.hget(key, "pid") == str(child.pid))

        eventually(there, timeout_s=60, what="an uploader's presence")


def pool(child: subprocess.Popen[str]) -> list[int]:
    """The pids of a worker's pool processes."""
    return [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
