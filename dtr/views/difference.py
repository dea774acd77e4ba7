"""Two checkpoints beside each other: which tensors and values differ, and by how much."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtr.checkpoint.keeping.diff import TensorDiff, ValueDiff, diff
from dtr.checkpoint.keeping.exported import ABOUT
from dtr.checkpoint.restoring import opened
from dtr.checkpoint.restoring.opened import Opened
from dtr.checkpoint.survey import read_manifest
from dtr.errors import InvalidInput, NotFound
from dtr.views import stored
from dtr.views.stored import Sources

__all__ = ["DiffView", "Side", "is_folder", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two: RUN/STEP or a folder."""

    name: str
    world_size: int
    replicated: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffView:
    """``same`` counts the tensors of which every bit is the same; ``tensors`` are the others, ``values`` what is no tensor."""

    a: Side
    b: Side
    identical: bool
    same: int
    tensors: tuple[TensorDiff, ...]
    values: tuple[ValueDiff, ...]
    compared_bytes: int
    seconds: float


def is_folder(word: str) -> bool:
    """Whether a name is that of an exported folder rather than of a checkpoint in the store."""
    return Path(word, ABOUT).exists() or Path(word).is_dir()


def read(a: str, b: str, sources: Callable[[], Sources]) -> DiffView:
    """Compare two checkpoints, each RUN/STEP, ``latest``, or a folder that was exported.

    Args:
        a, b: their names.
        sources: where those in the store are looked for; asked only if one of them is there.

    Raises:
        InvalidInput: a name is none.
        NoCheckpoint: there is no such commit.
        IntegrityError, StoreUnavailable, CoordinatorUnavailable.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(_open(word, sources)) for word in (a, b))
        same, tensors, values, compared = 0, [], [], 0
        for found in diff(one, two):
            if isinstance(found, ValueDiff):
                values.append(found)
                continue
            if found.what == "same":
                same += 1
            else:
                tensors.append(found)
        compared = sum(source.state_bytes for side in (one, two) for source in side.sources.values())
        return DiffView(
            a=_side(one), b=_side(two), identical=not tensors and not values, same=same, tensors=tuple(tensors), values=tuple(values),
            compared_bytes=compared, seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip


def _open(word: str, sources: Callable[[], Sources]) -> Opened:
    if is_folder(word):
        return opened.open_folder(Path(word))
    found = sources()
    if found.store is None:
        raise InvalidInput("store must be known to compare what is in it: give --store, or set DTR_STORE", field="store")
    ((run, step),) = stored.targets(found, [word])
    try:
        return opened.open_stored(found.store, read_manifest(found.store, run, step))
    except NotFound as exc:
        raise stored.missing(found, run, step) from exc


def _side(one: Opened) -> Side:
    return Side(name=one.name, world_size=one.world_size, replicated=one.replicated)
