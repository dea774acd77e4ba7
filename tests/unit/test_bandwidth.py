"""The host's bandwidth cap: one debt for all processes, that survives them, and that nothing makes endless."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

from dtr.checkpoint.uploading.bandwidth import Bandwidth


@pytest.fixture
def now() -> float:
    return time.monotonic()


def test_bytes_are_paid_once_they_are_sent(tmp_path: Path, now: float) -> None:
    """The time that sending took counts: only what was sent too fast is waited for."""
    bandwidth = Bandwidth(str(tmp_path), mbps=10.0)
    assert bandwidth.pay(5_000_000, now) == pytest.approx(now + 0.5)
    assert bandwidth.pay(5_000_000, now + 3.0) == pytest.approx(now + 3.5), "a slow link owes nothing, and saves nothing up"


def test_all_uploads_of_a_host_share_it(tmp_path: Path, now: float) -> None:
    """Another process's bytes count as one's own, also when that process is gone."""
    assert Bandwidth(str(tmp_path), mbps=1.0).pay(2_000_000, now) == pytest.approx(now + 2)
    assert Bandwidth(str(tmp_path), mbps=1.0).pay(1_000_000, now) == pytest.approx(now + 3)
    assert Bandwidth(str(tmp_path / ".."), mbps=1.0).pay(1_000_000, now) == pytest.approx(now + 1), "another host's folder"


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 48, struct.pack("<40sd", b"0" * 36, 1e12), struct.pack("<40sd", b"?" * 40, float("nan"))],
    ids=["empty", "short", "garbage", "another boot", "nan"],
)
def test_a_debt_that_cannot_be_is_none(tmp_path: Path, now: float, content: bytes) -> None:
    """Of another boot, whose clock was another, or of no writer of ours."""
    (tmp_path / ".bandwidth").write_bytes(content)
    assert Bandwidth(str(tmp_path), mbps=1.0).pay(1_000_000, now) == pytest.approx(now + 1)


def test_a_holder_that_is_stopped_stops_nobody(tmp_path: Path, now: float) -> None:
    """The file is locked and stays so: the others go on all the same."""
    import fcntl

    with (tmp_path / ".bandwidth").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert Bandwidth(str(tmp_path), mbps=1.0).pay(1_000_000, now) == pytest.approx(now + 1)


def test_without_the_file_a_process_keeps_to_it_alone(tmp_path: Path, now: float, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that is gone or full: the cap still holds for each upload process, and one line says so."""
    bandwidth = Bandwidth(str(tmp_path / "gone"), mbps=1.0)
    assert bandwidth.pay(1_000_000, now) == pytest.approx(now + 1)
    assert bandwidth.pay(1_000_000, now) == pytest.approx(now + 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_nobody_else_may_read_or_redirect_it(tmp_path: Path, now: float) -> None:
    """A link that somebody laid there is not followed."""
    (tmp_path / "secret").write_bytes(b"x" * 48)
    (tmp_path / ".bandwidth").symlink_to(tmp_path / "secret")
    Bandwidth(str(tmp_path), mbps=1.0).pay(1_000_000, now)
    assert (tmp_path / "secret").read_bytes() == b"x" * 48
    os.unlink(tmp_path / ".bandwidth")
    Bandwidth(str(tmp_path), mbps=1.0).pay(1_000_000, now)
    assert (tmp_path / ".bandwidth").stat().st_mode & 0o777 == 0o600
