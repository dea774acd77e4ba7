"""Was each sample consumed exactly once? From the trainers' own logs: what they were given, by the numbers in the samples themselves.

Guarantee: nothing of the loader, its ledger or its batches is used here or in what the logs say, so that no fault of theirs can hide
itself. (This module imports nothing of dtr; a test holds it to that.)

Each trainer appends a line to a log of its own after each step and before the save that might make the step last. In the end the lines of
the surviving lineage, each of its runs up to the step that was taken from it, must hold every sample of each ended epoch exactly once;
lines of steps that a restore left behind do not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Entry", "Position", "Proof", "SampleLog", "position_of", "prove", "read_logs"]

Numbers: TypeAlias = NDArray[np.int64]
Ranges: TypeAlias = tuple[tuple[int, int], ...]  # half open

_SUFFIX: Final = ".samples.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A rank trained on ``samples`` of ``epoch`` in this step: ranges of their numbers, in the order in which they came."""

    run: str
    step: int
    rank: int
    epoch: int
    samples: Ranges

    def to_line(self) -> str:
        """One line of JSON without its end; samples as ``0-96 1280-1300``, half open."""
        text = " ".join(f"{start}-{stop}" for start, stop in self.samples)
        return json.dumps({"run": self.run, "step": self.step, "rank": self.rank, "epoch": self.epoch, "samples": text})

    @classmethod
    def from_line(cls, line: str) -> Entry:
        """What `to_line` wrote; raises KeyError, TypeError or ValueError for anything else."""
        fields = json.loads(line)
        return cls(**{**fields, "samples": _parsed(fields["samples"].split())})


class SampleLog:
    """The trainer's side: one file for each process. A line is written in one call, so one who is killed leaves whole lines.

    Args:
        folder: where the logs go.
        worker: who writes.
    """

    def __init__(self, folder: Path, worker: str) -> None:
        path = folder / f"{worker}-{os.getpid()}{_SUFFIX}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, *, run: str, step: int, rank: int, epoch: int, numbers: Numbers) -> None:
        """These samples were trained on; an empty batch is a line as well."""
        entry = Entry(run=run, step=step, rank=rank, epoch=epoch, samples=_ranges(numbers))
        os.write(self._descriptor, (entry.to_line() + "\n").encode())

    def close(self) -> None:
        os.close(self._descriptor)


def read_logs(folder: Path) -> Iterator[Entry]:
    """The whole lines of all logs."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        text = path.read_text()
        yield from map(Entry.from_line, text[: text.rfind("\n") + 1].splitlines())


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place in the data: ``consumed`` of ``epoch``, sorted and merged, and all of those before it."""

    epoch: int
    consumed: Ranges

    @property
    def samples(self) -> int:
        return sum(stop - start for start, stop in self.consumed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What the logs say of a lineage.

    Attributes:
        samples: of the data set, numbered from 0.
        position: where the lineage stands; all epochs before its own have ended, and so has this one if all of it is consumed.
        consumed: samples by the lineage, in all its epochs.
        lost: samples of ended epochs that nobody trained on.
        twice: how often a sample was trained on that had been before in its epoch.
        strange: samples that are not of the data set.
        abandoned_steps: steps that a restore left behind.
        abandoned_samples: those of them: they were consumed again, and do not count.
    """

    samples: int
    position: Position
    consumed: int
    lost: int
    twice: int
    strange: int
    abandoned_steps: int
    abandoned_samples: int

    @property
    def whole_epochs(self) -> int:
        """How many epochs have ended."""
        return self.position.epoch + (self.position.samples == self.samples)

    @property
    def exact(self) -> bool:
        """Whether every sample of each ended epoch was consumed once, and none of the current one more than once."""
        return self.consumed > 0 and not (self.lost or self.twice or self.strange)


def prove(entries: Iterable[Entry], lineage: Mapping[str, int], *, samples: int) -> Proof:
    """Count.

    Args:
        entries: of all trainers, in any order.
        lineage: the runs that led to the end, with the last step taken from each, inclusive.
        samples: of the data set.
    """
    counts: dict[int, Numbers] = {}
    left_behind: set[tuple[str, int]] = set()
    strange = abandoned = 0
    for entry in entries:
        size = sum(stop - start for start, stop in entry.samples)
        if entry.step > lineage.get(entry.run, -1):
            left_behind.add((entry.run, entry.step))
            abandoned += size
            continue
        seen = counts.setdefault(entry.epoch, np.zeros(samples, dtype=np.int64))
        for start, stop in entry.samples:
            seen[start:stop] += 1
            strange += max(0, stop - max(start, samples))
    last = max(counts, default=0)
    nothing = np.zeros(samples, dtype=np.int64)
    return Proof(
        samples=samples,
        position=Position(epoch=last, consumed=_ranges(np.flatnonzero(counts.get(last, nothing)))),
        consumed=sum(int(seen.sum()) for seen in counts.values()),
        lost=sum(int((counts.get(epoch, nothing) == 0).sum()) for epoch in range(last)),
        twice=sum(int(np.maximum(seen - 1, 0).sum()) for seen in counts.values()),
        strange=strange,
        abandoned_steps=len(left_behind),
        abandoned_samples=abandoned,
    )


def position_of(record: Mapping[str, Any], *, shard_size: int, samples: int) -> Position:
    """Where a checkpoint says that it stands, from its manifest's data state: shards that are done, and ranges of others.

    Raises KeyError, TypeError or ValueError for anything else.
    """
    seen = np.zeros(samples, dtype=bool)
    for first, last in (_bounds(text) for text in _listed(record["done"])):
        seen[first * shard_size : (last + 1) * shard_size] = True
    for shard, text in record["partial"].items():
        for start, stop in _parsed(_listed(text)):
            seen[int(shard) * shard_size + start : int(shard) * shard_size + stop] = True
    return Position(epoch=int(record["epoch"]), consumed=_ranges(np.flatnonzero(seen)))


def _listed(text: str) -> Sequence[str]:
    return text.split(",") if text else ()


def _bounds(text: str) -> tuple[int, int]:
    """``3-7``, or ``5`` for ``5-5``."""
    first, mark, last = text.partition("-")
    return int(first), int(last if mark else first)


def _parsed(texts: Iterable[str]) -> Ranges:
    return tuple(_bounds(text) for text in texts)


def _ranges(numbers: Numbers) -> Ranges:
    """Numbers in their order, as half-open ranges where they follow each other."""
    if not len(numbers):
        return ()
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    starts, stops = numbers[[0, *cuts]], numbers[[*(cuts - 1), -1]] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))
