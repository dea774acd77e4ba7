"""`dtr redis-cli` beside the real one, and what `dtr up` and `dtr down` say and return."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.servers import RedisServer, free_port

COMMANDS = r"""FLUSHALL
SET a "x y\n\x01\"z"
GET a
GET none
LPUSH l 1 2 3 4 5 6 7 8 9 10
LRANGE l 0 -1
HSET h f v g w
HGETALL h
EVAL "return {1,{2,{'a','b'},{}},{err='X bad'},false,{ok='Y'}}" 0
EVAL "return {}" 0
INCR a
PING
SET 'it''s' b
SET 'it is' "b"
unknown command

CLIENT INFO
XADD s 1-1 f v
XRANGE s - +
CONFIG GET maxmemory*
EVAL "local t={} for i=1,12 do t[i]={i,i} end return t" 0
"""

NO_PROGRAMS = "/nonexistent"  # a PATH without redis-cli


def dtr(
    *args: str, env: Mapping[str, str] | None = None, path: str | None = None, typed: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own; ``path`` replaces PATH."""
    environ = {**os.environ, **(env or {})}
    if path is not None:
        environ["PATH"] = path
    return subprocess.run(
        [sys.executable, "-m", "dtr", *args],
        input=typed or "",
        capture_output=True,
        text=True,
        env=environ,
        cwd=cwd,
        timeout=60,
        check=False,
    )


def without_ids(text: str) -> list[str]:
    return [line for line in text.splitlines() if "laddr=" not in line]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """A server for this module, of the engine whose redis-cli is compared."""
    with RedisServer("valkey", tmp_path_factory.mktemp("redis-cli")) as running:
        yield running


@pytest.mark.parametrize("mode", ["--raw", "--no-raw"])
def test_our_client_prints_what_redis_cli_prints(server, mode):
    """Every kind of reply, of typing, and of error, byte by byte."""
    real = shutil.which("redis-cli")
    if real is None:
        pytest.skip("no redis-cli on PATH (.ci/run installs it)")
    expected = subprocess.run([real, "-p", str(server.port), mode], input=COMMANDS, capture_output=True, text=True, check=False)
    ours = dtr("redis-cli", "--url", server.url, mode, typed=COMMANDS, path=NO_PROGRAMS)
    assert without_ids(ours.stdout) == without_ids(expected.stdout)
    assert ours.returncode == expected.returncode == 0


def test_one_command_and_its_exit_code(server):
    """As redis-cli: 0 for an error reply, 1 if -e asks for it."""
    assert dtr("redis-cli", "--url", server.url, "SET", "k", "v w", path=NO_PROGRAMS).stdout == "OK\n"
    assert dtr("redis-cli", "--url", server.url, "GET", "k", path=NO_PROGRAMS).stdout == "v w\n"
    wrong = dtr("redis-cli", "--url", server.url, "INCR", "k", path=NO_PROGRAMS)
    assert (wrong.returncode, wrong.stdout) == (0, "ERR value is not an integer or out of range\n\n")
    assert dtr("redis-cli", "--url", server.url, "-e", "INCR", "k", path=NO_PROGRAMS).returncode == 1


def test_another_database(server):
    """-n after the command, or the number in the URL."""
    dtr("redis-cli", "--url", server.url, "-n", "5", "SET", "there", "1", path=NO_PROGRAMS)
    url = server.url.rpartition("/")[0] + "/5"
    assert dtr("redis-cli", "--url", url, "EXISTS", "there", path=NO_PROGRAMS).stdout == "1\n"
    assert dtr("redis-cli", "--url", server.url, "EXISTS", "there", path=NO_PROGRAMS).stdout == "0\n"


def test_at_a_terminal_it_asks_and_shows_types(server):
    """A prompt with the server's address, replies with their types, and `quit`."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "dtr", "redis-cli", "--url", server.url, "-n", "6"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "PATH": NO_PROGRAMS}) as shell:
        os.close(theirs)
        os.write(ours, b"set typed 1\nget typed\nincr typed\nquit\n")
        assert shell.wait(60) == 0
    shown = os.read(ours, 65_536).decode()
    os.close(ours)
    assert f"127.0.0.1:{server.port}> " in shown
    assert all(line in shown for line in ("OK\r\n", '"1"\r\n', "(integer) 2\r\n"))


def test_an_option_that_only_the_real_one_has(server):
    """It is a usage error that says what to install."""
    done = dtr("redis-cli", "--url", server.url, "--bigkeys", path=NO_PROGRAMS)
    assert done.returncode == 2
    assert "--bigkeys" in done.stderr
    assert "redis-tools" in done.stderr


@pytest.mark.parametrize("path", [None, NO_PROGRAMS])
def test_nobody_at_the_url_is_exit_4(path):
    """Whichever client would have been run."""
    done = dtr("redis-cli", "--url", f"redis://:hush@127.0.0.1:{free_port()}/0", "PING", path=path)
    assert done.returncode == 4
    assert "dtr up" in done.stderr
    assert "hush" not in done.stderr


@pytest.mark.parametrize("path", [None, NO_PROGRAMS])
def test_a_password_gets_in_and_is_not_shown(tmp_path, path):
    """Ours and the real one authenticate; a wrong password is refused."""
    with RedisServer("valkey", tmp_path, args=["--requirepass", "hush"]) as locked:
        url = f"redis://:hush@127.0.0.1:{locked.port}/0"
        done = dtr("redis-cli", "--url", url, "PING", path=path)
        assert done.stdout == "PONG\n"
        assert "hush" not in done.stdout + done.stderr


def test_a_wrong_password_is_exit_4(tmp_path):
    """It says that the server refuses, without the password that was given."""
    with RedisServer("valkey", tmp_path, args=["--requirepass", "hush"]) as locked:
        done = dtr("redis-cli", "--url", f"redis://:wrong-one@127.0.0.1:{locked.port}/0", "PING", path=NO_PROGRAMS)
    assert done.returncode == 4
    assert "refuses" in done.stderr
    assert "wrong-one" not in done.stderr


def test_down_without_up_says_so(tmp_path):
    """Exit 0: what was asked for is true."""
    done = dtr("down", env={"DTR_HOME": str(tmp_path / "home")})
    assert (done.returncode, done.stdout) == (0, "nothing is up\n")


def test_up_that_cannot_start_its_server_is_exit_4(tmp_path):
    """One line says what failed, the end of the log is shown, and nothing is left."""
    home = tmp_path / "home"
    (home / "redis").mkdir(parents=True)
    (home / "redis" / "appendonlydir").write_text("in the way")
    url = f"redis://127.0.0.1:{free_port()}/0"
    env = {"DTR_HOME": str(home), "DTR_STAGING": str(tmp_path / "staging")}
    done = dtr("up", "--detach", "--url", url, env=env)
    assert done.returncode == 4
    assert "redis ended with status 1" in done.stderr.splitlines()[-1]
    assert dtr("down", env=env).stdout == "nothing is up\n"


def test_up_on_data_that_no_server_reads_is_exit_3(tmp_path):
    """The writer is named; the data are not touched."""
    home = tmp_path / "home"
    (home / "redis").mkdir(parents=True)
    (home / "redis" / "written-by.json").write_text('{"engine": "redis", "version": [99, 0]}')
    env = {"DTR_HOME": str(home), "DTR_STAGING": str(tmp_path / "staging")}
    done = dtr("up", "-d", "--url", f"redis://127.0.0.1:{free_port()}/0", env=env)
    assert done.returncode == 3
    assert "Redis 99.0" in done.stderr


def test_the_real_redis_cli_is_used_where_it_is(tmp_path):
    """It gets the arguments, and the password by its environment."""
    program = tmp_path / "redis-cli"
    program.write_text('#!/bin/sh\necho "$REDISCLI_AUTH" "$@"\n')
    program.chmod(0o755)
    with RedisServer("valkey", tmp_path / "server", args=["--requirepass", "hush"]) as locked:
        done = dtr(
            "redis-cli", "--url", f"redis://me:hush@127.0.0.1:{locked.port}/2", "GET", "x", "--raw", path=f"{tmp_path}:/bin:/usr/bin"
        )
    assert done.stdout == f"hush -h 127.0.0.1 -p {locked.port} -n 2 --user me GET x --raw\n"
