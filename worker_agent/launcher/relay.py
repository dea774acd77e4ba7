r"""Puts the lines of several trainers on one output, each with its trainer's label: ``python -I -S relay.py CONTROL_FD``.

It is a process of its own, so that an output that does not flow (a pager, a full disk) holds back neither beats nor the detection of
an exit, and so that trainers outlive a killed launcher: nobody else would read their pipes. It imports nothing of dtr and starts fast.

Over CONTROL_FD come messages, one trainer each: its label, with two descriptors, to read its stdout and its stderr from. A message
without descriptors means that all trainers have ended: what is in the pipes is written, and the relay ends. If the control closes
without that, the launcher was killed, and the relay goes on until the last trainer closes its pipes.

Bytes pass unchanged; a line ends at ``\n`` or ``\r`` (a progress bar). A line without end is cut at 1 MiB.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys

LONGEST_LINE_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16
LONGEST_LABEL_BYTES = 256


def cut(data: bytes) -> tuple[list[bytes], bytes]:
    r"""The complete lines of ``data``, with their ends, and the rest. A ``\r`` at the very end may yet become ``\r\n``: it waits."""
    lines = data.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        return lines[:-1], lines[-1]
    return lines, b""


class Stream:
    """One pipe and where its lines go."""

    def __init__(self, source: int, target: int, label: bytes) -> None:
        self.source, self.target, self.label = source, target, label
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """What is to be written now that ``data`` has come."""
        lines, self.rest = cut(self.rest + data)
        if len(self.rest) > LONGEST_LINE_BYTES:
            lines.append(self.rest + b"\n")
            self.rest = b""
        return b"".join(self.label + line for line in lines)

    def finish(self) -> bytes:
        """What is to be written at the end: a last line without end gets one."""
        rest, self.rest = self.rest, b""
        return self.label + rest + b"\n" if rest else b""


class Relay:
    """Reads all pipes; ``broken`` targets (nobody reads them any more) are discarded, so that trainers are not ended by them."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, None)
        self.streams: set[Stream] = set()
        self.broken: set[int] = set()

    def run(self) -> None:
        launcher_is_there = True
        while launcher_is_there or self.streams:
            for key, _ in self.selector.select():
                if key.data is not None:
                    self.read(key.data)
                    continue
                message, descriptors, _, _ = socket.recv_fds(self.control, LONGEST_LABEL_BYTES, 2)
                if descriptors:
                    self.add(message, descriptors)
                elif message:
                    self.drain()
                    return
                else:
                    launcher_is_there = False
                    self.selector.unregister(self.control)

    def add(self, label: bytes, descriptors: list[int]) -> None:
        for source, target in zip(descriptors, (1, 2), strict=True):
            os.set_blocking(source, False)
            stream = Stream(source, target, label)
            self.streams.add(stream)
            self.selector.register(source, selectors.EVENT_READ, stream)

    def read(self, stream: Stream) -> bool:
        """Pass on what is there; False if there was nothing."""
        try:
            data = os.read(stream.source, CHUNK_BYTES)
        except BlockingIOError:
            return False
        if data:
            self.write(stream.target, stream.feed(data))
            return True
        self.write(stream.target, stream.finish())
        self.selector.unregister(stream.source)
        self.streams.remove(stream)
        os.close(stream.source)
        return False

    def drain(self) -> None:
        for stream in list(self.streams):
            while self.read(stream):
                pass
            self.write(stream.target, stream.finish())

    def write(self, target: int, data: bytes) -> None:
        view = memoryview(data)
        while view and target not in self.broken:
            try:
                view = view[os.write(target, view) :]
            except BlockingIOError:  # somebody made the terminal non-blocking
                with selectors.DefaultSelector() as waiting:
                    waiting.register(target, selectors.EVENT_WRITE)
                    waiting.select()
            except OSError:
                self.broken.add(target)


def main(argv: list[str]) -> int:
    """Ends with its pipes, not with the signals that a terminal or a scheduler sends to all."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(argv[0])) as control:
        Relay(control).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
