"""Times on the command line."""

from __future__ import annotations

import math
from typing import Any

import rich_click as click

__all__ = ["Seconds"]


class Seconds(click.FloatRange):
    """A number of seconds within the range. What Python reads as a number and is no time, ``nan`` and ``inf``, is wrong usage."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"expected a number of seconds, got {value}.", param, ctx)
        return found
