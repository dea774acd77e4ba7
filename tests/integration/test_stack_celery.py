"""`dtr up` and `dtr down` as a person uses them: the real server, uploader and Flower."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.config import Settings
from dtr.host import host_id
from dtr.stack import Record, Stack, processes
from dtr.state.client import connect
from dtr.state.keys import uploader
from tests.servers import free_port
from tests.waiting import eventually


class Person:
    """Someone at a shell, with a home, ports and a staging folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.flower_port = free_port(), free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.staging = folder / "staging"
        self.env = {
            **os.environ,
            "DTR_HOME": str(folder / "home"),
            "DTR_REDIS_URL": self.url,
            "DTR_STAGING": str(self.staging),
            "DTR_FLOWER_PORT": str(self.flower_port),
        }

    def types(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "dtr", *words], env=self.env, capture_output=True, text=True, timeout=120, check=False)

    def leaves_running(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dtr", *words]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def stack(self) -> Stack:
        return Stack(self.folder / "home", Settings.load(redis_url=self.url, staging=str(self.staging)))

    def record(self) -> Record:
        found = self.stack().status()
        assert found is not None
        return found


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    made = Person(tmp_path)
    yield made
    made.stack().down()


def runs(record: Record) -> list[str]:
    return [service.name for service in record.services if processes.alive(service.process)]


def get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_up_detached_answers_everywhere_and_down_ends_it(person):
    """When the command returns, server, uploader and Flower answer, on this machine only; a second one changes nothing."""
    first = person.types("up", "--detach")
    assert first.returncode == 0, first.stderr
    assert f"http://127.0.0.1:{person.flower_port}" in first.stdout
    record = person.record()
    assert runs(record) == ["redis", "uploader", "flower"]
    with connect(person.url, name="test") as client:
        assert client.exists(uploader(host_id(str(person.staging))))
    assert get(person.flower_port, "/") == 200
    for port in (person.port, person.flower_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)

    second = person.types("up", "--detach")
    assert (second.returncode, second.stdout.splitlines()[0].split(",")[0]) == (0, "already up")
    assert person.record() == record
    assert person.types("redis-cli", "PING").stdout == "PONG\n"

    ended = person.types("down")
    assert (ended.returncode, ended.stdout) == (0, "ended redis, uploader, flower\n")
    assert runs(record) == []


def test_up_in_front_shows_the_logs_and_ends_with_ctrl_c(person):
    """One Ctrl-C, exit status 130, nothing left running."""
    with person.leaves_running("up", "--no-flower") as front:
        assert front.stdout is not None
        shown = []
        for line in front.stdout:
            shown.append(line)
            if line.startswith("Ctrl-C"):
                break
        record = person.record()
        assert runs(record) == ["redis", "uploader"]
        with connect(person.url, name="test") as client:
            client.bgrewriteaof()  # so that the server has something to say
        shown.append(next(line for line in front.stdout if line.startswith("redis ")))
        assert "| " in shown[-1]
        front.send_signal(signal.SIGINT)
        assert front.wait(60) == 130, shown
    assert runs(record) == []
    assert not processes.alive(record.supervisor)


def test_up_in_front_ends_when_it_is_killed_or_told_from_elsewhere(person):
    """`dtr down` in another terminal ends it with status 0; SIGKILL leaves nothing behind either."""
    with person.leaves_running("up", "--no-flower") as front:
        eventually(lambda: (found := person.stack().status()) is not None and found.state == "ready", what="the stack")
        assert person.types("down").returncode == 0
        assert front.wait(60) == 0
    with person.leaves_running("up", "--no-flower") as front:
        eventually(lambda: (found := person.stack().status()) is not None and found.state == "ready", what="the stack")
        record = person.record()
        front.kill()
    eventually(lambda: runs(record) == [] and not processes.alive(record.supervisor), what="the end of the stack")
