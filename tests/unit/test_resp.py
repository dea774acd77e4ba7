"""The small redis-cli: the wire format read, shown and typed."""

from __future__ import annotations

import io
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr.cli.resp import Failure, ProtocolError, Status, encode, pretty, raw, read_reply, split


def read(wire: bytes):
    return read_reply(io.BytesIO(wire))


@pytest.mark.parametrize(
    ("wire", "reply", "shown", "plain"),
    [
        (b"+OK\r\n", Status(b"OK"), "OK\n", b"OK"),
        (b"-ERR no\r\n", Failure(b"ERR no"), "(error) ERR no\n", b"ERR no\n"),
        (b":-3\r\n", -3, "(integer) -3\n", b"-3"),
        (b"$2\r\nOK\r\n", b"OK", '"OK"\n', b"OK"),
        (b"$0\r\n\r\n", b"", '""\n', b""),
        (b"$4\r\n\r\n\x00\xff\r\n", b"\r\n\x00\xff", '"\\r\\n\\x00\\xff"\n', b"\r\n\x00\xff"),
        (b"$-1\r\n", None, "(nil)\n", b""),
        (b"*-1\r\n", None, "(nil)\n", b""),
        (b"*0\r\n", [], "(empty array)\n", b""),
        (b"*2\r\n:1\r\n*2\r\n$-1\r\n-X y\r\n", [1, [None, Failure(b"X y")]], None, b"1\n\nX y\n"),
    ],
)
def test_each_kind_of_reply_is_read_and_shown(wire, reply, shown, plain):
    """Statuses have no quotes, strings have; nil and errors are said."""
    assert read(wire) == reply
    assert raw(reply) == plain
    if shown is not None:
        assert pretty(reply) == shown


def test_nested_arrays_are_numbered_and_indented():
    """Numbers are aligned to the width of the last."""
    reply = [b"a", [1, [b"x", None]], *range(8)]
    lines = pretty(reply).splitlines()
    assert lines[:5] == [' 1) "a"', " 2) 1) (integer) 1", '    2) 1) "x"', "       2) (nil)", " 3) (integer) 0"]
    assert lines[-1] == "10) (integer) 7"


@pytest.mark.parametrize("wire", [b"", b"+OK", b"$5\r\nab", b"*2\r\n:1\r\n"])
def test_a_connection_that_ends_in_mid_reply_is_an_error(wire):
    """It is not taken for a shorter reply."""
    with pytest.raises(EOFError):
        read(wire)


@pytest.mark.parametrize("wire", [b"HTTP/1.1 400 Bad Request\r\n", b"\r\n", b"$x\r\n", b":\r\n", b"*1.5\r\n"])
def test_what_is_not_redis_is_an_error(wire):
    """A web server on the port is recognised."""
    with pytest.raises(ProtocolError):
        read(wire)


@given(st.lists(st.binary(), min_size=1))
def test_a_command_is_an_array_of_strings(words):
    """Whatever the bytes, the server reads back the same words."""
    assert read(encode(words)) == words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"  SET  a   1 ", [b"SET", b"a", b"1"]),
        (b'SET a "b c"', [b"SET", b"a", b"b c"]),
        (rb'SET a "\x00\n\"\\"', [b"SET", b"a", b'\x00\n"\\']),
        (rb"SET a 'it\'s \x00'", [b"SET", b"a", rb"it's \x00"]),
        (b"SET \"\" ''", [b"SET", b"", b""]),
        (b"", []),
    ],
)
def test_a_typed_line_becomes_words(line, words):
    """Double quotes know escapes, single quotes only their own."""
    assert split(line) == words


@pytest.mark.parametrize("line", [b'GET "a', b"GET 'a", b'GET "a"b', b"GET 'a'b"])
def test_an_unbalanced_line_is_refused(line):
    """As redis-cli refuses it."""
    with pytest.raises(ValueError, match="Invalid argument"):
        split(line)


@given(st.lists(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\"'\\")), min_size=1))
def test_plain_words_split_as_a_shell_does(words):
    """Against an implementation of the same idea that is not ours."""
    line = " ".join(words)
    assert split(line.encode()) == [word.encode() for word in shlex.split(line)]
