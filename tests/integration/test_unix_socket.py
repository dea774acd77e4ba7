"""A coordinator that is reached over a Unix socket: members, barriers, a Celery worker, the commands."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dtr.cli import main
from dtr.config import Settings
from tests.ranks import running
from tests.servers import valkey_server
from tests.workers import worker


@pytest.fixture
def unix(settings: Settings, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a job whose server has a Unix socket; its path is short, since the kernel takes no more than 107 bytes."""
    folder = tempfile.mkdtemp(prefix="dtr-unix-")
    path = Path(folder) / "redis.sock"
    with valkey_server(tmp_path / "server", ["--unixsocket", str(path)]):
        yield replace(settings, redis_url=f"unix://{path}", broker_url=None)
    shutil.rmtree(folder)


def test_a_job_over_a_unix_socket(unix: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks meet, save through a Celery worker and restore; ``dtr status`` reads it all."""
    with worker(url=unix.redis_url, staging=unix.staging), running(unix, tmp_path / "store", 2) as job:
        for _ in range(20):
            assert job.each(lambda rank: rank.session.barrier("b")) == [None, None]
        commits = job.commit(lambda rank: {"rank": rank.rank}, 7)
        assert [commit.step for commit in commits] == [7, 7]
        assert main(["status", "--url", unix.redis_url, "--job", unix.job]) == 0
        assert unix.redis_url in capsys.readouterr().out
