"""How commands end: by Ctrl-C, a closed pipe, a full disk, a server that restarts or stays silent; and what a terminal gets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from dtr.config import Settings
from dtr.runs import World
from dtr.session import Session
from dtr.state.job import JobState
from tests.commands import start, together
from tests.servers import RedisServer


@pytest.fixture
def crew(make_session, settings: Settings) -> list[Session]:
    """Three members of one job in a run."""
    sessions = [make_session(f"node-{rank}", rank=rank, world=World(low=3, high=3)) for rank in range(3)]
    together(sessions, lambda session: (session.start(), session.form()))
    return sessions


@pytest.fixture
def follower(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """`dtr events --follow --json` on the job of the test."""
    process = start(["events", "--follow", "--json", "--url", settings.redis_url, "--job", settings.job])
    yield process
    process.kill()
    process.communicate()


def read_until(process: subprocess.Popen[str], kind: str) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(json.loads(line))
        if seen[-1]["event"] == kind:
            return seen
    raise AssertionError(f"it ended: {process.stderr.read() if process.stderr else ''}")


def test_follow_shows_what_happens_and_ends_by_ctrl_c(crew, follower):
    """Events as they come, each once, one JSON document a line; SIGINT is exit 130 without a traceback."""
    first = read_until(follower, "run_formed")
    crew[2].close(reason="signal 9")
    then = read_until(follower, "run_ended")
    assert [event["event"] for event in then] == ["departed", "run_ended"]
    ids = [event["id"] for event in first + then]
    assert len(set(ids)) == len(ids)
    follower.send_signal(signal.SIGINT)
    assert follower.wait(10) == 130
    assert follower.stderr is not None
    assert "Traceback" not in follower.stderr.read()


@pytest.mark.parametrize("kept", [True, False])
def test_follow_survives_a_restart_of_redis(kept, tmp_path):
    """It says that Redis is away and back, and goes on; with an emptied server it reads the new stream from its beginning."""
    server = RedisServer("valkey", tmp_path / "server", args=("--appendonly", "yes" if kept else "no"))
    with server:
        state = JobState(server.url, "j", name="test")
        state.redis.xadd(state.keys.events, {"event": "first"})
        process = start(["events", "--follow", "--json", "--url", server.url, "--job", "j"])
        try:
            read_until(process, "first")
            server.kill()
            assert process.stderr is not None
            assert "cannot be reached" in process.stderr.readline()
            server.start()
            assert "answers again" in process.stderr.readline()
            if not kept:  # as if the server's clock went back
                state.redis.xadd(state.keys.events, {"event": "early"}, id="5-1")
                assert [event["event"] for event in read_until(process, "early")] == ["early"]
            state.redis.xadd(state.keys.events, {"event": "second"})
            assert [event["event"] for event in read_until(process, "second")] == ["second"]
        finally:
            process.kill()
            process.communicate()
            state.close()


def test_a_closed_pipe_ends_quietly(settings, raw):
    """`dtr events | head -1` leaves nothing on stderr, and dtr does not go on for nobody."""
    key = f"dtr:{{{settings.job}}}:events"
    pipeline = raw.pipeline()
    for number in range(5000):
        pipeline.xadd(key, {"event": "joined", "n": str(number), "filler": "x" * 200})
    pipeline.execute()
    for extra in ([], ["--json"]):
        process = start(["events", "-n", "5000", "--url", settings.redis_url, "--job", settings.job, *extra])
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=30)
        assert err == ""
        assert process.returncode == 1


@pytest.mark.parametrize("command", ["status", "workers", "barriers", "ring", "events -f", "data ls", "ckpt ls"])
def test_ctrl_c_while_redis_does_not_answer(command):
    """A server that accepts and stays silent: SIGINT ends every command at once, exit 130, no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = start([*command.split(), "--job", "j", "--url", f"redis://127.0.0.1:{silent.getsockname()[1]}"])
        silent.settimeout(30)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == ""


def test_a_full_disk_is_one_line(settings):
    """/dev/full: the write fails, and the message says so."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dtr", "config", "show"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "dtr: No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("command", ["config show", "config show --json"])
def test_a_stream_that_the_caller_closed_is_no_error(command, closed):
    """A cron job without stdout or stderr: exit 0 all the same, and no traceback."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m dtr {command} {closed}', sys.executable], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_letters_that_the_stream_cannot_write_become_question_marks(crew, settings):
    """An ASCII terminal gets every line, with ? for the separators."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    process = start(["status", "--url", settings.redis_url, "--job", settings.job], env=env)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert " ? generation" in out


def test_no_colour_where_none_is_wanted(crew, settings):
    """A pipe gets plain text; so does a terminal with NO_COLOR, and only a terminal without it gets colours."""
    args = ["workers", "--url", settings.redis_url, "--job", settings.job]
    assert "\x1b" not in subprocess.run([sys.executable, "-m", "dtr", *args], capture_output=True, text=True, timeout=30, check=True).stdout
    assert b"\x1b[32m" in on_a_terminal(args, {})
    assert b"\x1b[32m" not in on_a_terminal(args, {"NO_COLOR": "1"})


def on_a_terminal(args: list[str], environ: dict[str, str]) -> bytes:
    import pty

    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environ}
    process = subprocess.Popen([sys.executable, "-m", "dtr", *args], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    out = b""
    try:
        while chunk := os.read(ours, 65536):
            out += chunk
    except OSError:
        pass  # the other end was closed
    os.close(ours)
    assert process.wait(30) == 0
    return out
