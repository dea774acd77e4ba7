"""``dtr ckpt``: list, show and verify checkpoints."""

from __future__ import annotations

import rich_click as click

from dtr.views.checkpoints import CheckpointView, PartView
from dtr.views.words import duration, some

__all__ = ["ckpt", "progress"]


@click.group(short_help="List, show and verify checkpoints.")
def ckpt() -> None:
    """List, show and verify checkpoints."""


def progress(one: CheckpointView) -> str:
    """How far an open checkpoint is, and what it waits for."""
    age = "" if one.age_s is None else f" for {duration(one.age_s)}"
    waits = [f"rank {part.rank} {part_word(part)}" for part in one.parts or () if part.state != "done"]
    why = f": {one.reason}" if one.reason else f": {some(waits)}" if waits else ""
    return f"{one.run}/{one.step} {one.state.lower()}{age}, {one.done} of {one.expected} parts in the store{why}"


def part_word(part: PartView) -> str:
    """What a part is waiting for."""
    if part.state == "done":
        return "done"
    if part.state == "absent":
        return "not staged yet"
    if not part.uploader:
        return f"waits to be uploaded again: {part.error}" if part.error else "waits for an uploader"
    return f"uploading, {100 * part.progress_bytes // part.size_bytes} %" if part.size_bytes else "uploading"
