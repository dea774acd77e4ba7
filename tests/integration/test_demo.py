"""The demo as a person or a CI job runs it, in small: real server, uploader, Flower, launcher and trainers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
SMALL = ["--hidden=128", "--corpus-bytes=500000", "--rejoin-after=3"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user who has settings and a broken store of their own, and no Redis on PATH; temporary folders go where the test looks."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "ps", "uname"):
        if (found := shutil.which(name)) is not None:
            (programs / name).symlink_to(found)
    (tmp_path / "tmp").mkdir()
    return {
        "PATH": str(programs),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": str(ROOT),
        "DTR_STORE": "s3://somebody-elses",
        "DTR_REDIS_URL": "redis://127.0.0.1:1/0",
        "DTR_TTL_S": "wrong",
    }


def demo(*options: str) -> list[str]:
    return [sys.executable, "-m", "dtr", "demo", *options]


def small(*options: str) -> list[str]:
    return [sys.executable, "-m", "worker_agent.demo", *SMALL, *options]


def ours(tmp_path: Path) -> set[str]:
    """Processes that were started with this test's temporary folder, and folders of theirs."""
    found = {str(path) for path in (tmp_path / "tmp").iterdir()}
    wanted = f"TMPDIR={tmp_path / 'tmp'}".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (wanted in (entry / "environ").read_bytes() or (entry / "cwd").readlink().is_relative_to(tmp_path)):
                found.add((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") or entry.name)
        except OSError:
            continue
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("dtr-demo-*")}


@contextmanager
def started(command: Sequence[str], environment: dict[str, str], cwd: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def test_a_small_demo_holds_every_check_and_leaves_nothing(tmp_path, environment):
    """Killed, noticed, restored, replaced: JSON on stdout, plain lines on stderr, all on the server that the package carries."""
    done = subprocess.run(small("--steps=60", "--json"), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert [check for check in outcome["checks"] if not check["ok"]] == []
    figures = outcome["figures"]
    assert (figures["workers"], figures["steps"]) == (4, 60)
    assert 0 < figures["noticed_ms"] < 5_000
    assert 0 < figures["recovery_s"] < 30
    assert figures["loss_last"] < figures["loss_first"]
    assert (figures["samples_lost"], figures["samples_twice"]) == (0, 0)
    assert figures["epochs"] > 1.5
    assert figures["samples_redone"] > 0
    assert "Valkey" in done.stderr
    assert "\x1b" not in done.stderr
    for told in (
        "SIGKILL to trainer 2",
        "noticed: Redis knew",
        "barrier 'gradients' broke: rank 2",
        "departed: signal 9",
        "on 3 ranks in",
        "the data goes back too: to",
        "epoch 0 ends with step",
        "trainer 2 is back",
    ):
        assert told in done.stderr
    assert ours(tmp_path) == set()


def test_two_trainers_nobody_killed_and_a_store_that_stays(tmp_path, environment):
    """The checkpoints are where they were asked for; --keep keeps the folder and says where."""
    options = ["--workers=2", "--steps=12", "--no-kill", "--keep", f"--store=file://{tmp_path / 'mine'}"]
    done = subprocess.run(small(*options), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 10 checks hold" in done.stdout
    assert "SIGKILL" not in done.stdout
    assert len(list((tmp_path / "mine").glob("demo-*/demo/runs/*/*/manifest.json"))) == 12
    (kept,) = (tmp_path / "tmp").iterdir()
    assert consumed(kept, epoch=0) == list(range(921))  # 12 steps of two times 96 samples, for 2.5 epochs
    assert len(set(consumed(kept, epoch=1))) == len(consumed(kept, epoch=1)) > 0
    assert f"kept: {kept}" in done.stdout
    assert ours(tmp_path) == {str(kept)}


def consumed(kept: Path, *, epoch: int) -> list[int]:
    """The samples that were trained on in this epoch, by the logs that anyone can read."""
    found: list[int] = []
    for log in (kept / "consumed").iterdir():
        for line in map(json.loads, log.read_text().splitlines()):
            ranges = line["samples"].split() if line["epoch"] == epoch else []
            found += [number for start, _, stop in (text.partition("-") for text in ranges) for number in range(int(start), int(stop))]
    return sorted(found)


def said_until(child: subprocess.Popen[str], awaited: str) -> str:
    """What it printed up to the line that has ``awaited`` in it."""
    said = ""
    assert child.stdout is not None
    for line in child.stdout:
        said += line
        if awaited in line:
            break
    return said


def test_redis_may_be_killed_as_well(tmp_path, environment):
    """Whoever kills the server of the demo sees training wait for it and go on, and every check hold."""
    with started(small("--workers=2", "--steps=600", "--no-kill"), environment, tmp_path) as child:
        said = said_until(child, "is saved")
        (record,) = (tmp_path / "tmp").glob("dtr-demo-*/home/stack.json")
        services = json.loads(record.read_text())["services"]
        os.kill(next(service["pid"] for service in services if service["name"] == "redis"), signal.SIGKILL)
        assert child.stdout is not None
        said += child.stdout.read()
        assert child.wait(60) == 0, said
    assert "Redis is away" in said
    assert "Redis answers again" in said
    assert ours(tmp_path) == set()


@pytest.mark.parametrize(("after", "number", "status"), [("starting Redis", signal.SIGINT, 130), ("run 0001", signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_behind(tmp_path, environment, after, number, status):
    """Ctrl-C while the stack starts, and a SIGTERM in mid-training."""
    before = shared_memory()
    with started(demo("--steps=100000", "--workers=2"), environment, tmp_path) as child:
        said = said_until(child, after)
        child.send_signal(number)
        assert child.stdout is not None
        said += child.stdout.read()
        assert child.wait(60) == status, said
        assert "Traceback" not in said
        assert "interrupted" in said
    eventually(lambda: not ours(tmp_path), what="everything has ended and is gone")
    assert shared_memory() <= before


def test_what_cannot_be_is_refused_before_anything_is_started(tmp_path, environment):
    """A wrong number, and a store that does not exist in this world; where JSON was asked for, a program is told as well."""
    before = sorted(os.listdir(tmp_path))
    for options, status, told in (
        (["--workers=99"], 2, "workers"),
        (["--workers=1"], 3, "--no-kill"),
        (["--no-kill", "--workers=1", "--steps=1"], 3, "steps"),
        (["--store=ftp://x/y"], 3, "ftp"),
        (["--store="], 3, "got ''"),
    ):
        done = subprocess.run(demo("--json", *options), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, told in done.stderr) == (status, True), done.stderr
        found = json.loads(done.stdout)
        assert (found["exit_code"], told in found["error"]) == (status, True)
    assert ours(tmp_path) == set()
    assert sorted(os.listdir(tmp_path)) == before
