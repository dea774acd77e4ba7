"""The data state of all ranks after a batch, from the ledger. Pure.

The ledger has, for each rank, the ranges of the newest batches that were handed out, told before the trainer got them, and sums by shard of
what is older. A rank that gave its batch to the collective of step s and has not reported step s yet is in the others' model all the same;
so what counts is what was handed out through that batch, not what was reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import Dynamic, merged
from dtr.datasets.consuming.ranges import Ranges
from dtr.errors import StateCorrupt

__all__ = ["cut_at", "handed_out"]


def cut_at(name: str, base: Dynamic, ledger: Mapping[str, str], done: bytes, through: int) -> Dynamic:
    """The data state after batch ``through`` of the run's part of the epoch.

    Args:
        name: of the data set, for messages.
        base: where the run began in this epoch.
        ledger: the fields of its hash.
        done: its bitmap of shards that were consumed whole.
        through: the last batch that counts.

    Raises StateCorrupt if a rank's sums are already ahead of ``through``, or a field is not readable.
    """
    outs: dict[int, Ranges] = {}
    for key, text in ledger.items():
        kind, _, rest = key.partition("/")
        try:
            if kind == "out" and int(rest.partition("/")[2]) <= through:
                for shard, held in _parsed(text):
                    outs[shard] = ranges.union(outs.get(shard, ()), held)
            elif kind == "part":
                outs[int(rest)] = ranges.union(outs.get(int(rest), ()), ranges.parse_ranges(text))
        except ValueError as exc:
            raise StateCorrupt(f"the ledger of data set {name!r} has a field that is not readable: {key}={text[:60]!r}") from exc
    first_kept = _first_kept(ledger)
    if through < max(first_kept.values(), default=0) - 1:
        raise StateCorrupt(f"the ledger of data set {name!r} has only sums of batches after {through}: restore a checkpoint")
    numbers = np.flatnonzero(np.unpackbits(np.frombuffer(done, dtype=np.uint8)))
    whole = ranges.normal((int(n), int(n) + 1) for n in numbers)
    found = merged(name, [base, replace(base, done=whole, partial=outs)])
    return found if isinstance(found, Dynamic) else base


def handed_out(ledger: Mapping[str, str]) -> dict[int, int]:
    """Rank -> the newest batch that it was given."""
    return {rank: max(numbers) for rank, numbers in _numbers(ledger).items()}


def _first_kept(ledger: Mapping[str, str]) -> dict[int, int]:
    """Rank -> the first batch whose ranges are on record by themselves."""
    return {rank: min(numbers) for rank, numbers in _numbers(ledger).items()}


def _numbers(ledger: Mapping[str, str]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for key in ledger:
        if key.startswith("out/"):
            rank, number = map(int, key.removeprefix("out/").split("/"))
            found.setdefault(rank, []).append(number)
    return found


def _parsed(text: str) -> list[tuple[int, Ranges]]:
    words = [word.partition(":") for word in text.split()]
    return [(int(shard), ranges.parse_ranges(held)) for shard, _, held in words]
