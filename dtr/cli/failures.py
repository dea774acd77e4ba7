"""An error as a person and a program get it: one line on stderr, an exit code, and an object on stdout where JSON was asked for."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import orjson
import rich_click as click

from dtr.errors import DtrError

__all__ = ["Invocation", "describe", "report"]

INTERRUPTED: Final = 130
_USAGE: Final = 2
_PASSWORD: Final = re.compile(r"(://[^\s:/@\[]*):[^\s/]*@")


@dataclass(slots=True)
class Invocation:
    """What one run of ``dtr`` turned out to be: its options set this while they are parsed."""

    as_json: bool = False


def describe(exc: BaseException) -> tuple[int, str, str]:
    """Exit code, code and message of an error; the message is one line and has no password."""
    if isinstance(exc, DtrError):
        code, kind, message = exc.exit_code, type(exc).__name__, exc.message
    elif isinstance(exc, click.ClickException):
        where = exc.ctx.command_path if isinstance(exc, click.UsageError) and exc.ctx is not None else "dtr"
        hint = f" Try `{where} --help`." if isinstance(exc, click.UsageError) else ""
        code, kind, message = exc.exit_code, "Usage" if exc.exit_code == _USAGE else "Error", exc.format_message() + hint
    elif isinstance(exc, OSError) and exc.strerror:
        code, kind, message = 1, type(exc).__name__, f"{exc.filename}: {exc.strerror}" if exc.filename else exc.strerror
    else:
        code, kind, message = 1, "Internal", f"this is a mistake in dtr: {type(exc).__name__}: {exc} (at {_place(exc)})"
    return code, kind, _PASSWORD.sub(r"\1:***@", " ".join(message.split()))


def report(exc: BaseException, args: Sequence[str], invocation: Invocation) -> int:
    """Tell of the error that ended a command, and return the exit code."""
    if isinstance(exc, (KeyboardInterrupt, click.Abort)):
        code, kind, message = INTERRUPTED, "Interrupted", ""
    elif isinstance(exc, BrokenPipeError):
        code, kind, message = 1, "BrokenPipe", ""
    else:
        code, kind, message = describe(exc)
    try:
        if message and (invocation.as_json or _asked_for_json(exc, args)):
            sys.stdout.write(orjson.dumps({"error": message, "code": kind, "exit_code": code}).decode() + "\n")
        sys.stdout.flush()
    except OSError:
        _let_go_of_stdout()
    if message:
        with contextlib.suppress(OSError):
            print(f"dtr: {message}", file=sys.stderr, flush=True)
    return code


def _place(exc: BaseException) -> str:
    frames = traceback.extract_tb(exc.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"


def _asked_for_json(exc: BaseException, args: Sequence[str]) -> bool:
    """Whether a command that knows --json was given it, although its options could not be parsed."""
    ctx = exc.ctx if isinstance(exc, click.UsageError) else None
    return ctx is not None and "--json" in args and any("--json" in parameter.opts for parameter in ctx.command.params)


def _let_go_of_stdout() -> None:
    """Nobody reads any more: whatever is still buffered goes nowhere, so that the interpreter's own flush is quiet too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
