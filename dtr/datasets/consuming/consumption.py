"""What one rank has handed to its trainer and what its trainer has consumed of one data set in one run. Pure bookkeeping in memory.

Handed out is not consumed: only `consume` makes it so, after the optimizer step. In dynamic mode, what an epoch handed out and nobody
reported by the time that its trainer reports a batch of the next one is on record as dropped, since a finished epoch is only a number. In
deterministic mode the state is a cursor, which has no place for a batch that was left out: batches are reported one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import BY_RANGES, Cursor, Dynamic
from dtr.datasets.consuming.ranges import Ranges
from dtr.datasets.loading.batch import Batch, Order, SampleRange
from dtr.datasets.timemachine.skips import Skips
from dtr.errors import InvalidInput

__all__ = ["Consumption"]

Sets = dict[int, Ranges]


class Consumption:
    """One rank's consumption in one run.

    Args:
        start: where the run begins; of it only the facts of the sequence and, in deterministic mode, the cursor.
        size_of: samples in a shard.
        batches: of an epoch, in deterministic mode.
        skips: those that this rank knows.
    """

    def __init__(self, start: Dynamic | Cursor, size_of: Callable[[int], int], batches: int = 0, skips: Callable[[], Skips] = dict) -> None:
        self._start, self._size_of, self._batches, self._skips = start, size_of, batches, skips
        self.epoch = start.epoch
        self.samples = 0  # consumed in this epoch
        self._cursor = start.batch if isinstance(start, Cursor) else 0
        self._consumed: Sets = {}  # of shards that are not consumed whole
        self._whole: set[int] = set()
        self._handed: dict[int, Sets] = {}
        self._notes: dict[str, dict[int, dict[int, str]]] = {}

    def hand_out(self, batch: Batch | Order) -> None:
        """A batch goes to the trainer."""
        if isinstance(self._start, Dynamic):
            _add(self._handed.setdefault(batch.epoch, {}), batch.ranges)

    def check(self, batches: Sequence[Batch]) -> None:
        """Whether the trainer may report these, in this order; changes nothing.

        Raises InvalidInput if one was reported before, belongs to an epoch that is over, or, in deterministic mode, is not the next.
        """
        epoch, cursor, given = self.epoch, self._cursor, set[tuple[int, int]]()
        for batch in batches:
            at = (batch.epoch, batch.number)
            following = (epoch, cursor) if cursor < self._batches else (epoch + 1, 0)
            known = at in given or (batch.epoch == self.epoch and self._is_known(batch))
            if batch.epoch < epoch or known:
                raise InvalidInput(
                    f"batch {batch.number} of epoch {batch.epoch} of data set {batch.dataset!r} was reported before: give each batch to "
                    "step() once",
                    field="batch",
                )
            if isinstance(self._start, Cursor) and at != following:
                raise InvalidInput(
                    f"batch {following[1]} of epoch {following[0]} of data set {batch.dataset!r} was not passed to step(), and batch "
                    f"{batch.number} of epoch {batch.epoch} is: pass every batch, in order; pass a batch that you left out of the "
                    "optimizer step too",
                    field="batch",
                )
            given.add(at)
            epoch, cursor = batch.epoch, batch.number + 1

    def consume(self, batch: Batch) -> None:
        """The trainer has consumed a batch, which `check` let pass."""
        if batch.epoch > self.epoch:
            self._turn_to(batch.epoch)
        if isinstance(self._start, Dynamic):
            self._add(batch)
        self._cursor = batch.number + 1
        self.samples += sum(stop - start for _, start, stop in batch.ranges)
        for kind, given in (("padded", batch.padded), ("skipped", batch.skipped)):
            for shard, start, stop in given:
                self._note_ranges(kind, batch.epoch, shard, ((start, stop),))

    def note(self, kind: str, epoch: int, shard: int, text: str) -> None:
        """Put on record what an epoch leaves out."""
        if kind in BY_RANGES:
            self._note_ranges(kind, epoch, shard, ranges.parse_ranges(text))
        else:
            self._notes.setdefault(kind, {}).setdefault(epoch, {})[shard] = text

    def unreported(self) -> int:
        """Samples of the current epoch that were handed out and not consumed."""
        handed = self._handed.get(self.epoch, {})
        return sum(ranges.count(ranges.minus(held, self._held(shard))) for shard, held in handed.items())

    def state(self) -> Dynamic | Cursor:
        """This rank's own share of the data state; what was consumed before the run is not in it."""
        start, notes = self._start, {kind: {e: dict(held) for e, held in epochs.items()} for kind, epochs in self._notes.items()}
        if isinstance(start, Cursor):
            return Cursor(
                version=start.version, digest=start.digest, seed=start.seed, global_batch_size=start.global_batch_size, window=start.window,
                tail=start.tail, epoch=self.epoch, batch=self._cursor, notes=notes, skips=self._skips(),
            )  # fmt: skip
        done = ranges.of_numbers(self._whole)
        partial = dict(self._consumed)
        return Dynamic(
            version=start.version, digest=start.digest, seed=start.seed, epoch=self.epoch, done=done, partial=partial, notes=notes,
            skips=self._skips(),
        )  # fmt: skip

    def _add(self, batch: Batch) -> None:
        _add(self._consumed, batch.ranges)
        for shard in {shard for shard, _, _ in batch.ranges}:
            if self._consumed[shard] == ((0, self._size_of(shard)),):
                del self._consumed[shard]
                self._whole.add(shard)

    def _held(self, shard: int) -> Ranges:
        return ((0, self._size_of(shard)),) if shard in self._whole else self._consumed.get(shard, ())

    def _is_known(self, batch: Batch) -> bool:
        if isinstance(self._start, Cursor):
            return batch.number < self._cursor
        for shard, start, stop in batch.ranges:
            held = self._held(shard)
            # The usual case first: on from where the last batch ended.
            if held and start < held[-1][1] and ranges.common(held, ((start, stop),)):
                return True
        return False

    def _turn_to(self, epoch: int) -> None:
        for ended in [e for e in self._handed if e < epoch]:
            for shard, held in self._handed.pop(ended).items():
                left = ranges.minus(held, self._held(shard) if ended == self.epoch else ())
                if left:
                    self._note_ranges("dropped", ended, shard, left)
        self.epoch, self._consumed, self._whole, self._cursor, self.samples = epoch, {}, set(), 0, 0

    def _note_ranges(self, kind: str, epoch: int, shard: int, more: Ranges) -> None:
        held = self._notes.setdefault(kind, {}).setdefault(epoch, {})
        held[shard] = ranges.format_ranges(ranges.union(ranges.parse_ranges(held.get(shard, "")), more))


def _add(sets: Sets, given: Sequence[SampleRange]) -> None:
    for shard, start, stop in given:
        sets[shard] = ranges.plus(sets.get(shard, ()), start, stop)
