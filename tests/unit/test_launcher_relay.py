"""Lines of several trainers on one output: whole, labelled, byte for byte, whatever happens to the launcher or the reader."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import eventually
from worker_agent.launcher import relay
from worker_agent.launcher.relay import Stream, cut


@pytest.mark.parametrize(
    ("data", "lines", "rest"),
    [
        (b"", [], b""),
        (b"a", [], b"a"),
        (b"a\n", [b"a\n"], b""),
        (b"a\n\nb", [b"a\n", b"\n"], b"b"),
        (b"a\r\nb", [b"a\r\n"], b"b"),
        (b"a\r", [], b"a\r"),
        (b"10%\r20%\r", [b"10%\r"], b"20%\r"),
        (b"\xff\x00\x1c\x85\n\xe2", [b"\xff\x00\x1c\x85\n"], b"\xe2"),
    ],
)
def test_lines_are_cut_at_their_ends_only(data: bytes, lines: list[bytes], rest: bytes) -> None:
    """A carriage return may become the first half of a line's end; bytes that are line ends in other encodings are none."""
    assert cut(data) == (lines, rest)


def test_bytes_pass_unchanged_however_they_arrive() -> None:
    """With an empty label, what comes out is what went in, plus the end of a last line that had none."""
    chance = random.Random(3)
    data = bytes(chance.choice(b"ab\r\n\xff\x00") for _ in range(20_000))
    stream, out, at = Stream(0, 1, b""), b"", 0
    while at < len(data):
        size = chance.randrange(1, 50)
        out += stream.feed(data[at : at + size])
        at += size
    out += stream.finish()
    assert out in {data, data + b"\n"}


def test_a_line_without_end_is_cut() -> None:
    """Memory is bounded: after 1 MiB a line is passed on as it is."""
    stream = Stream(0, 1, b"[0] ")
    chunk = b"x" * relay.CHUNK_BYTES
    out = b"".join(stream.feed(chunk) for _ in range(40))
    assert len(stream.rest) <= relay.LONGEST_LINE_BYTES
    assert out.count(b"\n") == 2
    assert out.replace(b"[0] ", b"").replace(b"\n", b"") + stream.rest == chunk * 40


class RunningRelay:
    """The real process, with its control and its output."""

    def __init__(self, stdout: int) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", relay.__file__, str(theirs.fileno())],
                stdout=stdout, stderr=stdout, pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def trainer(self, label: bytes) -> tuple[int, int]:
        """The write ends of a trainer's stdout and stderr."""
        pairs = [os.pipe(), os.pipe()]
        socket.send_fds(self.control, [label], [read for read, _ in pairs])
        for read, _ in pairs:
            os.close(read)
        return pairs[0][1], pairs[1][1]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def running(output: Path) -> Iterator[RunningRelay]:
    with output.open("wb") as file:
        found = RunningRelay(file.fileno())
    yield found
    found.control.close()
    found.process.kill()
    found.process.wait()


def test_two_trainers_share_an_output(running: RunningRelay, output: Path) -> None:
    """Lines are whole and bear their trainer's label; a half line is kept until it is whole, or its trainer has ended."""
    (out, err), (other, _) = running.trainer(b"[0] "), running.trainer(b"[1] ")
    os.write(out, b"half ")
    os.write(other, b"one\ntwo\nrest")
    eventually(lambda: output.read_bytes() == b"[1] one\n[1] two\n", what="the lines of 1")
    os.write(out, b"line\n")
    eventually(lambda: output.read_bytes().endswith(b"[0] half line\n"), what="the line of 0")
    os.write(err, b"error\n")
    eventually(lambda: output.read_bytes().endswith(b"[0] error\n"), what="the error of 0")
    os.close(other)
    eventually(lambda: output.read_bytes().endswith(b"[1] rest\n"), what="the rest of 1")


def test_at_the_end_everything_printed_is_written_even_if_somebody_holds_the_pipe(running: RunningRelay, output: Path) -> None:
    """A daemon that a trainer left behind keeps the pipe open: the relay ends all the same, with what was in it."""
    out, _ = running.trainer(b"[0] ")
    lines = b"".join(b"line %d\n" % n for n in range(2000))
    os.write(out, lines + b"end")
    running.control.send(b"end")
    assert running.process.wait(30) == 0
    assert output.read_bytes() == b"".join(b"[0] " + line for line in (lines + b"end\n").splitlines(keepends=True))


def test_trainers_outlive_a_killed_launcher(running: RunningRelay, output: Path) -> None:
    """The control closes without a word: the relay goes on until the last trainer has closed its pipes."""
    out, err = running.trainer(b"[0] ")
    running.control.close()
    os.write(out, b"still here\n")
    eventually(lambda: output.read_bytes() == b"[0] still here\n", what="the line")
    os.close(err)
    os.write(out, b"and here")
    os.close(out)
    assert running.process.wait(30) == 0
    assert output.read_bytes() == b"[0] still here\n[0] and here\n"


def test_a_reader_that_has_gone_does_not_end_trainers() -> None:
    """`dtr run ... | head -1`: what nobody reads is thrown away, and writing goes on."""
    reader, writer = os.pipe()
    running = RunningRelay(writer)
    os.close(writer)
    try:
        out, _ = running.trainer(b"[0] ")
        os.close(reader)
        for _ in range(100):
            os.write(out, b"x" * 10_000 + b"\n")  # far more than the pipe holds: it is being read
        running.control.send(b"end")
        assert running.process.wait(30) == 0
    finally:
        running.control.close()
        running.process.kill()
        running.process.wait()
