"""``dtr redis-cli``: the ``redis-cli`` or ``valkey-cli`` on PATH, connected to the coordinator; without one, a small client like it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final, Self
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import rich_click as click

from dtr.cli.resp import Failure, ProtocolError, Reply, encode, pretty, raw, read_reply, split
from dtr.config import Settings
from dtr.errors import CoordinatorRefused, CoordinatorUnavailable
from dtr.stack import listening
from dtr.state.client import check_url, mask

__all__ = ["redis_cli"]

_CONNECT_TIMEOUT_S: Final = 5.0
# The replies to these are texts for people, shown as they are even on a terminal.
_TEXTS: Final = frozenset(
    {(b"info",), (b"lolwut",), (b"client", b"list"), (b"client", b"info"), (b"cluster", b"info"), (b"cluster", b"nodes")}
    | {(b"memory", b"doctor"), (b"latency", b"doctor"), (b"latency", b"graph")}
)
_ENDLESS: Final = frozenset({b"monitor", b"subscribe", b"psubscribe", b"ssubscribe"})


@click.command(
    name="redis-cli",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="Talk to the coordinator as redis-cli does.",
)
@click.option("--url", metavar="URL", help="The coordinator; default: DTR_REDIS_URL, dtr.toml, redis://127.0.0.1:6379/0.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def redis_cli(ctx: click.Context, url: str | None, args: tuple[str, ...]) -> None:
    """Talk to the coordinator: `dtr redis-cli HGETALL dtr:{default}:meta`.

    Runs the `redis-cli` or `valkey-cli` on PATH with ARGS. Without one, a small client that prints the same does it: it takes a command, or
    reads commands from stdin, and knows `-n DB`, `-e` (exit 1 on an error reply), `--raw` and `--no-raw`.
    """
    target = check_url(Settings.load(redis_url=url).redis_url)
    if not listening(target, _CONNECT_TIMEOUT_S):
        raise CoordinatorUnavailable(f"Redis at {mask(target)} cannot be reached. Start one with `dtr up`, or check the URL.")
    program = shutil.which("redis-cli") or shutil.which("valkey-cli")
    if program is not None:
        _become(program, target, args)
    sys.stdout.flush()
    ctx.exit(_run(target, args))


def _become(program: str, url: str, args: Sequence[str]) -> None:
    """Replace this process; the password travels in the environment, where `ps` does not show it."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        where = ["-s", parts.path]
    else:
        where = ["-h", parts.hostname or "", "-p", str(parts.port or 6379), "-n", parts.path.strip("/") or "0"]
    where += ["--tls"] if parts.scheme == "rediss" else []
    where += ["--user", unquote(parts.username)] if parts.username else []
    auth = {"REDISCLI_AUTH": unquote(parts.password)} if parts.password else {}
    os.execve(program, [program, *where, *args], {**os.environ, **auth})  # noqa: S606 - no shell is wanted


# --- the small client ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    database: int | None
    fail_on_error: bool
    raw: bool
    command: tuple[bytes, ...]

    @classmethod
    def parse(cls, args: Sequence[str], *, terminal: bool) -> Self:
        rest = list(args)
        database, fail_on_error, as_raw = None, False, not terminal
        while rest and rest[0].startswith("-"):
            word = rest.pop(0)
            if word == "-n" and rest and rest[0].isdigit():
                database = int(rest.pop(0))
            elif word == "-e":
                fail_on_error = True
            elif word in {"--raw", "--no-raw"}:
                as_raw = word == "--raw"
            else:
                raise click.UsageError(
                    f"without redis-cli on PATH, the options are -n DB, -e, --raw and --no-raw, got {word!r}; "
                    "install redis-tools for the others"
                )
        return cls(database=database, fail_on_error=fail_on_error, raw=as_raw, command=tuple(map(os.fsencode, rest)))


def _run(url: str, args: Sequence[str]) -> int:
    options = _Options.parse(args, terminal=sys.stdout.isatty())
    with _Session.open(url, options.database) as session:
        commands = [options.command] if options.command else _typed(urlsplit(url))
        failed = [_show(session, command, options) for command in commands]
    return 1 if any(failed) and options.fail_on_error else 0


def _typed(parts: SplitResult) -> Iterator[tuple[bytes, ...]]:
    """Commands from stdin, one a line; with a prompt if a person types them."""
    place = parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
    lines = _prompted(f"{place}> ") if sys.stdin.isatty() else (line.rstrip(b"\n") for line in sys.stdin.buffer)
    for line in lines:
        try:
            words = split(line)
        except ValueError as exc:
            print(exc, flush=True)
            continue
        if words and words[0].lower() in {b"quit", b"exit"}:
            return
        if words:
            yield tuple(words)


def _prompted(prompt: str) -> Iterator[bytes]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and editing
    while True:
        try:
            yield os.fsencode(input(prompt))
        except EOFError:
            print()
            return


def _show(session: _Session, command: Sequence[bytes], options: _Options) -> bool:
    """Send one command and print what comes; whether it was an error."""
    reply = session.ask(command)
    _print(reply, command, options)
    while command[0].lower() in _ENDLESS and not isinstance(reply, Failure):
        _print(session.next(), command, options)
    return isinstance(reply, Failure)


def _print(reply: Reply, command: Sequence[bytes], options: _Options) -> None:
    sys.stdout.buffer.write(_shown(reply, tuple(word.lower() for word in command[:2]), as_raw=options.raw))
    sys.stdout.buffer.flush()


def _shown(reply: Reply, words: tuple[bytes, ...], *, as_raw: bool) -> bytes:
    if words in _TEXTS or words[:1] in _TEXTS:
        return raw(reply)
    return raw(reply) + b"\n" if as_raw else pretty(reply).encode()


class _Session:
    """One connection, authenticated and on its database; its errors are CoordinatorUnavailable."""

    def __init__(self, url: str, connection: socket.socket) -> None:
        self._url = url
        self._connection = connection
        self._stream: BinaryIO = connection.makefile("rb")

    @classmethod
    @contextlib.contextmanager
    def open(cls, url: str, database: int | None) -> Iterator[Self]:
        """Connect; raises CoordinatorRefused if the server does not let this user in."""
        parts = urlsplit(url)
        with _connected(url, parts) as connection:
            session = cls(url, connection)
            number = str(database) if database is not None else parts.path.strip("/") if parts.scheme != "unix" else ""
            hello: list[list[str]] = []
            if parts.password:
                hello.append(["AUTH", *([unquote(parts.username)] if parts.username else []), unquote(parts.password)])
            if number and number != "0":
                hello.append(["SELECT", number])
            for command in hello:
                reply = session.ask([word.encode() for word in command])
                if isinstance(reply, Failure):
                    raise CoordinatorRefused(f"Redis at {mask(url)} refuses: {reply.text.decode(errors='replace')}")
            yield session

    def ask(self, command: Sequence[bytes]) -> Reply:
        """Send a command and wait for its reply, for as long as it takes: it may be one that blocks."""
        with _unavailable(self._url):
            self._connection.sendall(encode(command))
        return self.next()

    def next(self) -> Reply:
        """The next reply."""
        with _unavailable(self._url):
            return read_reply(self._stream)


@contextlib.contextmanager
def _unavailable(url: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, ProtocolError, OSError) as exc:
        raise CoordinatorUnavailable(f"Redis at {mask(url)}: {exc}") from exc


def _connected(url: str, parts: SplitResult) -> socket.socket:
    with _unavailable(url):
        return _connect(parts)


def _connect(parts: SplitResult) -> socket.socket:
    if parts.scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(parts.path)
        return connection
    connection = socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=_CONNECT_TIMEOUT_S)
    if parts.scheme == "rediss":
        authority = parse_qs(parts.query).get("ssl_ca_certs", [None])[0]
        connection = ssl.create_default_context(cafile=authority).wrap_socket(connection, server_hostname=parts.hostname)
    connection.settimeout(None)
    return connection
