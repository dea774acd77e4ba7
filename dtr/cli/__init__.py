"""The command line: parse, call, print. What is shown comes from :mod:`dtr.views`; there is no logic here.

Exit codes: 0, 2 usage, 3 configuration, 4 unavailable, 5 integrity, 130 interrupted, 1 anything else. An error is one line on stderr,
without secrets; with ``--json``, stdout also gets it as ``{"error": ..., "code": ..., "exit_code": ...}``, so that what a program reads
there is valid JSON in any case.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``dtr`` and return its exit code."""
    try:
        from dtr.cli.group import run  # in here, so that Ctrl-C while it loads is no traceback either

        return run(argv)
    except KeyboardInterrupt:
        return 130
