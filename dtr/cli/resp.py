"""Redis's wire format (RESP2) read and shown as redis-cli does: for a terminal with types and numbers, elsewhere raw.

Statuses and strings, and nested errors, stay apart here, which client libraries blur. Pure, but for the stream that is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

__all__ = ["Failure", "ProtocolError", "Reply", "Status", "encode", "pretty", "raw", "read_reply", "split"]


class ProtocolError(Exception):
    """What came is not RESP2."""


@dataclass(frozen=True, slots=True)
class Status:
    """A short answer such as OK."""

    text: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """An error reply."""

    text: bytes


Reply = Status | Failure | int | bytes | list["Reply"] | None


def encode(command: Sequence[bytes]) -> bytes:
    """A command as it travels."""
    return b"*%d\r\n" % len(command) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in command)


def read_reply(stream: BinaryIO) -> Reply:
    """The next reply; blocks until it is complete.

    Raises:
        EOFError: the server closed the connection.
        ProtocolError: it is not RESP2.
    """
    line = stream.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError("the server closed the connection")
    kind, rest = line[:1], line[1:-2]
    if kind == b"+":
        return Status(rest)
    if kind == b"-":
        return Failure(rest)
    if kind not in b":$*" or not re.fullmatch(rb"-?\d+", rest):
        raise ProtocolError(f"unexpected answer {line[:40]!r}")
    number = int(rest)
    if kind == b":":
        return number
    if number < 0:
        return None
    if kind == b"*":
        return [read_reply(stream) for _ in range(number)]
    body = stream.read(number + 2)
    if len(body) != number + 2:
        raise EOFError("the server closed the connection")
    return body[:-2]


def raw(reply: Reply) -> bytes:
    """As redis-cli prints to a pipe: the bytes, one element a line."""
    if isinstance(reply, list):
        return b"\n".join(map(raw, reply))
    if isinstance(reply, Failure):
        return reply.text + b"\n"
    if isinstance(reply, Status):
        return reply.text
    if reply is None:
        return b""
    return b"%d" % reply if isinstance(reply, int) else reply


def pretty(reply: Reply, prefix: str = "") -> str:
    """As redis-cli prints to a terminal; ends in a newline. ``prefix`` indents what follows the first line of an array."""
    if isinstance(reply, list):
        if not reply:
            return "(empty array)\n"
        width = len(str(len(reply)))
        inner = prefix + " " * (width + 2)
        items = (f"{i:>{width}}) {pretty(item, inner)}" for i, item in enumerate(reply, 1))
        return prefix.join(items)
    if isinstance(reply, Failure):
        return f"(error) {reply.text.decode(errors='replace')}\n"
    if isinstance(reply, Status):
        return f"{reply.text.decode(errors='replace')}\n"
    if reply is None:
        return "(nil)\n"
    return f"(integer) {reply}\n" if isinstance(reply, int) else f"{_quoted(reply)}\n"


_ESCAPES: Final = {b: f"\\{chr(b)}" for b in b'\\"'} | dict(zip(b"\n\r\t\a\b", (r"\n", r"\r", r"\t", r"\a", r"\b"), strict=True))
_UNESCAPES: Final = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}
_WORD: Final = re.compile(rb"""\s*((?:"(?:\\.|[^"\\])*"(?=\s|$)|'(?:\\'|[^'])*'(?=\s|$)|[^\s"'])+)""", re.DOTALL)


def _quoted(text: bytes) -> str:
    return '"' + "".join(_ESCAPES.get(b) or (chr(b) if 32 <= b < 127 else f"\\x{b:02x}") for b in text) + '"'


def split(line: bytes) -> list[bytes]:
    r"""The words of a line that a person typed: ``"a b\x00"`` and ``'a b'`` are one word each.

    Raises:
        ValueError: a quotation is not closed, or something follows it without a space.
    """
    words, line = [], line.strip()
    while line:
        match = _WORD.match(line)
        if match is None or (match.end() < len(line) and not line[match.end() : match.end() + 1].isspace()):
            raise ValueError("Invalid argument(s)")
        words.append(re.sub(rb'"((?:\\.|[^"\\])*)"|\'((?:\\\'|[^\'])*)\'', _unquoted, match[1], flags=re.DOTALL))
        line = line[match.end() :].lstrip()
    return words


def _unquoted(match: re.Match[bytes]) -> bytes:
    if match[2] is not None:
        return match[2].replace(b"\\'", b"'")

    def one(escape: re.Match[bytes]) -> bytes:
        if escape[1] is not None:
            return bytes([int(escape[1], 16)])
        return _UNESCAPES.get(escape[2], escape[2])

    return re.sub(rb"\\(?:x([0-9a-fA-F]{2})|(.))", one, match[1], flags=re.DOTALL)
