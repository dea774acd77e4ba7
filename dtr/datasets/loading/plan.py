"""How one rank loads a data set: the arguments of a loader, checked, as values. Pure."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from dtr import names
from dtr.datasets.registering.spec import Dataset
from dtr.errors import ConfigError, InvalidInput

__all__ = ["Mode", "Plan", "Reading", "Tail", "planned", "reading"]

Mode = Literal["dynamic", "deterministic"]
Tail = Literal["empty", "pad", "drop"]
Start = Literal["spawn", "fork"]

WINDOW: Final = 1 << 14  # samples that deterministic mode permutes among each other
PREFETCH_BYTES: Final = 256 << 20
MOST_PROCESSES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one rank loads a data set; all ranks of a run load it alike. ``batch_size`` is the global one in deterministic mode."""

    dataset: Dataset
    mode: Mode
    batch_size: int
    epochs: int | None
    columns: tuple[str, ...] | None
    seed: int
    window: int
    tail: Tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How batches are read ahead of the trainer; it changes nothing of what they hold, and ranks may differ in it.

    Args:
        prefetch: batches that wait, at most.
        prefetch_bytes: of what waits, and as much again of shards kept for batches to come; one of each is there however large.
        processes: that read; 0: a thread does.
        start: of processes.
        as_torch: whether columns are tensors.
    """

    prefetch: int = 8
    prefetch_bytes: int = PREFETCH_BYTES
    processes: int = 0
    start: Start = "spawn"
    as_torch: bool = False


def reading(*, prefetch: Any, prefetch_bytes: Any = None, processes: Any = 0, start: Any = "spawn", as_torch: Any = False) -> Reading:
    """The arguments that say how to read ahead, checked.

    Raises:
        InvalidInput: names the one which is wrong.
        ConfigError: tensors were asked for, and torch is not installed.
    """
    if start not in ("spawn", "fork"):
        raise InvalidInput(f"start must be 'spawn' or 'fork', got {start!r}", field="start")
    if not isinstance(as_torch, bool):
        raise InvalidInput(f"as_torch must be True or False, got {as_torch!r}", field="as_torch")
    if as_torch and importlib.util.find_spec("torch") is None:
        raise ConfigError("as_torch=True needs torch: pip install 'dtr[torch]'", field="as_torch")
    return Reading(
        prefetch=names.positive(prefetch, "prefetch", 10_000),
        prefetch_bytes=PREFETCH_BYTES if prefetch_bytes is None else names.positive(prefetch_bytes, "prefetch_bytes"),
        processes=0 if processes == 0 and not isinstance(processes, bool) else names.positive(processes, "processes", MOST_PROCESSES),
        start=cast("Start", start),
        as_torch=as_torch,
    )


def planned(
    dataset: Dataset, *, batch_size: Any, global_batch_size: Any, epochs: Any, columns: Any, seed: Any, mode: Any, tail: Any, window: Any
) -> Plan:
    """The arguments that say what to load, checked; raises InvalidInput that names the one which is wrong."""
    if mode not in ("dynamic", "deterministic"):
        raise InvalidInput(f"mode must be 'dynamic' or 'deterministic', got {mode!r}", field="mode")
    if tail not in ("empty", "pad", "drop"):
        raise InvalidInput(f"tail must be 'empty', 'pad' or 'drop', got {tail!r}", field="tail")
    if window is not None and mode != "deterministic":
        raise InvalidInput("window belongs to deterministic mode: leave it out", field="window")
    return Plan(
        dataset=dataset,
        mode=cast("Mode", mode),
        batch_size=_size(mode, batch_size, global_batch_size),
        epochs=None if epochs is None else names.positive(epochs, "epochs"),
        columns=_columns(columns),
        seed=dataset.spec.seed if seed is None else names.step(seed, "seed"),
        window=(WINDOW if window is None else names.step(window, "window")) if mode == "deterministic" else 1,
        tail=cast("Tail", tail),
    )


def _size(mode: str, batch_size: Any, global_batch_size: Any) -> int:
    """Of the two sizes the one that the mode takes."""
    sizes = {"batch_size": batch_size, "global_batch_size": global_batch_size}
    if mode == "dynamic":
        given, other, what = "batch_size", "global_batch_size", "the samples of each rank's batch"
    else:
        given, other = "global_batch_size", "batch_size"
        what = "the samples of all ranks' batches together: the sequence of these must not depend on the number of ranks"
    size, unwanted = sizes[given], sizes[other]
    if unwanted is not None:
        both = f" beside {given}={size!r}: leave it out" if size is not None else ""
        raise InvalidInput(f"{other}={unwanted!r}{both}: {mode} mode takes {given}, {what}", field=other if size is not None else given)
    if size is None:
        raise InvalidInput(f"{given} is missing: {mode} mode takes it, {what}", field=given)
    return names.positive(size, given, 1 << 31)


def _columns(columns: Any) -> tuple[str, ...] | None:
    if columns is None:
        return None
    listed = [] if isinstance(columns, str | bytes) or not hasattr(columns, "__iter__") else list(columns)
    if not listed or not all(isinstance(column, str) for column in listed):
        raise InvalidInput(f"columns must be a list of names, such as ['x', 'y'], or None for all, got {columns!r}", field="columns")
    if len(set(listed)) < len(listed):
        raise InvalidInput(f"columns has a name twice: {', '.join(listed)}", field="columns")
    return tuple(listed)
