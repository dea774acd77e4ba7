"""The one loader of Lua scripts: reads ``lua/NAME.lua``, sends it by digest, and turns its errors into exceptions.

A script is one transition. Its header (what it does, KEYS, ARGV, RETURNS, ERRORS, WRITES, IDEMPOTENT, INCLUDE) is parsed here,
and compared with the body by ``tests/lua/test_headers.py``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

import redis
from redis import exceptions as rx

from dtr.errors import BY_CODE, DtrError

__all__ = ["Header", "Parameter", "Script", "Scripts", "catalogue", "error_of", "load", "preload"]

_SECTIONS: Final = ("KEYS", "ARGV", "RETURNS", "ERRORS", "WRITES", "IDEMPOTENT", "INCLUDE")
_PARAMETER: Final = re.compile(r"(\d+)(\+?)\s+(\w+)\s+(\w+)\s+(\S.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One of KEYS or ARGV; ``rest`` when it stands for this and all that follow."""

    position: int
    name: str
    kind: str
    about: str
    rest: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the comment at the top of a script promises."""

    about: str
    keys: tuple[Parameter, ...]
    args: tuple[Parameter, ...]
    returns: str
    errors: tuple[str, ...]
    writes: tuple[str, ...]
    idempotent: str
    include: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A script as it is sent: ``text`` begins with the functions that it includes."""

    name: str
    header: Header
    body: str
    text: str
    sha: str


def _folder() -> Any:
    return resources.files("dtr.state") / "lua"


def parse_header(source: str) -> Header:
    """The header of a script; raises ValueError that names the line."""
    about: list[str] = []
    sections: dict[str, list[str]] = {name: [] for name in _SECTIONS}
    current: list[str] = about
    for line in source.splitlines():
        if not line.startswith("--"):
            break
        text = line[2:].strip()
        word, _, rest = text.partition(" ")
        if word in sections:
            current = sections[word]
            text = rest.strip()
        if text:
            current.append(text)
    return Header(
        about=" ".join(about),
        keys=_parameters(sections["KEYS"]),
        args=_parameters(sections["ARGV"]),
        returns=" ".join(sections["RETURNS"]),
        errors=tuple(_words(sections["ERRORS"])),
        writes=tuple(_words(sections["WRITES"])),
        idempotent=" ".join(sections["IDEMPOTENT"]),
        include=tuple(_words(sections["INCLUDE"])),
    )


def _words(lines: Sequence[str]) -> list[str]:
    words = " ".join(lines).split()
    return [] if words == ["none"] else words


def _parameters(lines: Sequence[str]) -> tuple[Parameter, ...]:
    found: list[Parameter] = []
    for line in lines:
        if line == "none":
            continue
        match = _PARAMETER.fullmatch(line)
        if match is None:
            raise ValueError(f"expected 'N name type what it is', got {line!r}")
        position, rest, name, kind, about = match.groups()
        if int(position) != len(found) + 1:
            raise ValueError(f"expected number {len(found) + 1}, got {line!r}")
        found.append(Parameter(position=int(position), name=name, kind=kind, about=about, rest=bool(rest)))
    return tuple(found)


@cache
def load(name: str) -> Script:
    """Read the script ``name``; raises FileNotFoundError if there is none."""
    body = (_folder() / f"{name}.lua").read_text(encoding="utf-8")
    header = parse_header(body)
    included = [(_folder() / "include" / f"{part}.lua").read_text(encoding="utf-8") for part in header.include]
    text = "\n".join([*included, body])
    return Script(name=name, header=header, body=body, text=text, sha=hashlib.sha1(text.encode()).hexdigest())  # noqa: S324 - Redis's id


def catalogue() -> Iterator[Script]:
    """Every script, by name."""
    for entry in sorted(_folder().iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".lua"):
            yield load(entry.name.removesuffix(".lua"))


@cache
def preload() -> None:
    """Read every script, once: whatever is installed over this version later, a running process goes on as it began."""
    for _ in catalogue():
        continue


def error_of(exc: rx.ResponseError) -> DtrError | None:
    """The exception that stands for a script's ``error_reply``, or None if it is none of ours."""
    # An engine may add where the script failed: "CODE detail script: SHA, on @user_script:12." or "... (call to f_SHA)".
    code, _, detail = str(exc).partition(" ")
    kind = BY_CODE.get(code)
    if kind is None:
        return None
    return kind(detail or None, code=code)


class Scripts:
    """Calls scripts over one client."""

    __slots__ = ("_redis",)

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def call(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run the script ``name``; its answer as redis-py gives it.

        Raises:
            DtrError: the exception of the script's error code.
            redis.RedisError: anything else; translated by the caller.
        """
        preload()
        script = load(name)
        try:
            try:
                return self._redis.evalsha(script.sha, len(keys), *keys, *args)
            except rx.NoScriptError:
                return self._redis.eval(script.text, len(keys), *keys, *args)
        except rx.ResponseError as exc:
            known = error_of(exc)
            if known is None:
                raise
            raise known from None  # it is ours: how redis-py carried it helps nobody

    def call_all(self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
        """Run the script ``name`` for several (KEYS, ARGV) in one write, one after the other; the answer or the exception of each.

        Raises:
            redis.RedisError: the connection broke; nobody knows which of them ran.
        """
        preload()
        script = load(name)
        answers = self._sent("EVALSHA", script.sha, calls)
        unknown = [n for n, answer in enumerate(answers) if isinstance(answer, rx.NoScriptError)]
        for n, answer in zip(unknown, self._sent("EVAL", script.text, [calls[n] for n in unknown]), strict=True):
            answers[n] = answer
        return [(error_of(answer) or answer) if isinstance(answer, rx.ResponseError) else answer for answer in answers]

    def _sent(self, command: str, script: str, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
        pipeline: Any = self._redis.pipeline(transaction=False)
        for keys, args in calls:
            pipeline.execute_command(command, script, len(keys), *keys, *args)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        if any(isinstance(answer, rx.ReadOnlyError) for answer in answers):  # a replica by now: the next call finds who is the master
            self._redis.connection_pool.disconnect()
        return answers
