"""What to type elsewhere while the demo runs. Pure but for looking at what is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from urllib.parse import urlsplit

__all__ = ["advice", "command_of"]


def command_of(executable: str, cwd: str, *, which: Callable[[str], str | None] = shutil.which) -> str:
    """How this dtr is called from ``cwd``: by name if that is it, else by path, else as a module."""
    beside = os.path.join(os.path.dirname(executable), "dtr")
    found = which("dtr")
    if found is not None and os.path.realpath(found) == os.path.realpath(beside):
        return "dtr"
    program, as_module = (beside, "") if os.access(beside, os.X_OK) else (executable, " -m dtr")
    near = os.path.relpath(program, cwd)
    return (program if near.startswith(os.pardir) else near) + as_module


def advice(
    url: str, job: str, flower: str | None, *, executable: str, cwd: str, which: Callable[[str], str | None] = shutil.which
) -> list[str]:
    """Lines for people.

    Args:
        url: of the server.
        job: of the demo.
        flower: its address, if it runs.
        executable: this Python.
        cwd: where the demo was started.
        which: finds programs.
    """
    dtr = command_of(executable, cwd, which=which)
    meta = f"'dtr:{{{job}}}:meta'"
    client = f"redis-cli -p {urlsplit(url).port}" if which("redis-cli") else f"{dtr} redis-cli"
    return [
        "meanwhile, in another terminal:",
        f"  export DTR_REDIS_URL={url}",
        f"  {dtr} status",
        f"  {dtr} events --follow",
        f"  {dtr} data progress",
        f"  {client} HGETALL {meta}",
        *([f"and in a browser, Flower: {flower}"] if flower else []),
    ]
