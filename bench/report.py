"""The one shape in which every benchmark reports: what was run, what came out, what bounds it, and what a peer does.

Guarantee: ``--json`` prints one JSON object and nothing else, with the keys name, params, figures, limit, peer and ratios; all
but the name are flat objects of finite numbers. Without it the same numbers stand in a table.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

__all__ = ["Report", "parser"]

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of one benchmark. Units stand in the names: ``place_ms``, ``peak_mb``.

    Args:
        name: of the benchmark, as in ``python -m bench.NAME``.
        params: sizes and seed, enough to run it again.
        figures: what was measured of dtr.
        limit: what the medium itself does in the same run (memcpy, raw write, bare EVALSHA, ...).
        peer: what another way to do the same costs in the same run.
        ratios: figures over limit or peer.

    """

    name: str
    params: Numbers
    figures: Numbers
    limit: Numbers = field(default_factory=dict)
    peer: Numbers = field(default_factory=dict)
    ratios: Numbers = field(default_factory=dict)

    def __post_init__(self) -> None:
        for section, numbers in self.sections():
            for key, value in numbers.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise TypeError(f"{self.name}: {section}.{key} must be a finite number, got {value!r}")

    def sections(self) -> list[tuple[str, Numbers]]:
        """Name and numbers of each section, in the order of the report."""
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "name"]

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps({"name": self.name, **{section: dict(numbers) for section, numbers in self.sections()}}, allow_nan=False)

    def to_table(self) -> str:
        """The same for people, in at most 80 columns for names of ordinary length."""
        lines = [self.name]
        width = max((len(key) for _, numbers in self.sections() for key in numbers), default=0)
        for section, numbers in self.sections():
            for position, (key, value) in enumerate(numbers.items()):
                lines.append(f"  {section if position == 0 else '':8} {key:{width}}  {_shown(value):>14}")
        return "\n".join(lines)

    def emit(self, *, as_json: bool) -> None:
        """Print the report."""
        print(self.to_json() if as_json else self.to_table(), flush=True)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has: ``--json`` and ``--seed``."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    made.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    made.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    return made
