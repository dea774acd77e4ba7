"""Where a loader goes on from a restored data state. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import BY_RANGES, Cursor, DataState, Dynamic, Notes
from dtr.datasets.consuming.ranges import Ranges
from dtr.datasets.loading.feed import batches_of, left_from
from dtr.datasets.loading.order import EpochOrder
from dtr.datasets.loading.plan import Plan, Tail
from dtr.datasets.registering.spec import Dataset
from dtr.errors import DataConflict

__all__ = ["abandoned", "beginning", "going_on", "next_epoch", "with_whole_shards"]


def going_on(plan: Plan, base: DataState) -> DataState:
    """``base`` as the place where ``plan`` goes on; an epoch that is wholly consumed, or out of it on record, is over.

    Raises DataConflict if the state is of another data set, mode or sequence than the plan, naming what differs.
    """
    spec = plan.dataset.spec
    wanted: dict[str, Any] = {"mode": plan.mode, "digest": spec.digest}
    if plan.mode == "deterministic":
        wanted |= {"seed": plan.seed, "global_batch_size": plan.batch_size, "window": plan.window, "tail": plan.tail}
    for what, value in wanted.items():
        if getattr(base, what, None) != value:
            raise DataConflict(
                f"data set {spec.name!r}: the restored data state has {what} {getattr(base, what, None)}, the loader {value}: within an "
                "epoch neither data set nor mode nor sequence may change",
                name=spec.name,
            )
    if isinstance(base, Cursor):
        return base
    given, done = _given(base), _done(plan.dataset, base)
    if not _left(plan.dataset, base):
        return Dynamic(version=spec.version, digest=spec.digest, seed=plan.seed, epoch=base.epoch + 1, notes=base.notes, skips=base.skips)
    return Dynamic(
        version=spec.version, digest=spec.digest, seed=plan.seed, epoch=base.epoch, done=done,
        partial={shard: held for shard, held in given.items() if not ranges.contains(done, shard)}, notes=base.notes, skips=base.skips,
    )  # fmt: skip


def beginning(plan: Plan, epoch: int = 0, after: DataState | None = None) -> DataState:
    """Nothing of ``epoch`` is consumed yet; the records of earlier epochs, and skips, are those of ``after``."""
    spec = plan.dataset.spec
    notes: Notes = {kind: {e: held for e, held in of.items() if e < epoch} for kind, of in after.notes.items()} if after is not None else {}
    facts: dict[str, Any] = {
        "version": spec.version, "digest": spec.digest, "seed": plan.seed, "epoch": epoch, "notes": notes,
        "skips": after.skips if after is not None else {},
    }  # fmt: skip
    if plan.mode == "dynamic":
        return Dynamic(**facts)
    return Cursor(**facts, global_batch_size=plan.batch_size, window=plan.window, tail=plan.tail)


def next_epoch(dataset: Dataset | None, base: DataState) -> int | None:
    """The epoch whose beginning ``base`` stands at; None in the middle of one.

    Args:
        dataset: that ``base`` is of; None if nobody knows it any more: then the end of an epoch cannot be told.
    """
    if isinstance(base, Cursor):
        begun, over = base.batch > 0, dataset is not None and base.batch >= _batches(dataset, base)
    else:
        begun, over = bool(base.done or base.partial), dataset is not None and not _left(dataset, base)
    return base.epoch + 1 if over else None if begun else base.epoch


def abandoned(dataset: Dataset, base: DataState) -> DataState:
    """``base`` with what its epoch has left of ``dataset`` on record as dropped."""
    rest: dict[int, Ranges]
    if isinstance(base, Cursor):
        spec = dataset.spec
        order = EpochOrder.of(dataset.sizes(), seed=base.seed, epoch=base.epoch, shuffle=spec.shuffle, window=base.window)
        rest = left_from(order, base.batch * base.global_batch_size)
    else:
        given = _given(base)
        numbers = (shard for start, stop in _left(dataset, base) for shard in range(start, stop))
        rest = {shard: ranges.minus(((0, dataset.size_of(shard)),), given.get(shard, ())) for shard in numbers}
    dropped = dict(base.notes.get("dropped", {}))
    held = dict(dropped.get(base.epoch, {}))
    for shard, more in rest.items():
        held[shard] = ranges.format_ranges(ranges.union(ranges.parse_ranges(held.get(shard, "")), more))
    return replace(base, notes={**base.notes, "dropped": {**dropped, base.epoch: held}})


def with_whole_shards(plan: Plan, state: Dynamic) -> Dynamic:
    """The same consumption, each whole shard by its number: so equal consumption is an equal state."""
    size_of = plan.dataset.shard
    whole = {shard for shard, held in state.partial.items() if ranges.count(held) == len(size_of(shard))}
    partial = {shard: held for shard, held in state.partial.items() if shard not in whole}
    return replace(state, done=ranges.union(state.done, ranges.of_numbers(whole)), partial=partial)


def _batches(dataset: Dataset, base: Cursor) -> int:
    return batches_of(dataset.spec.total_samples, base.global_batch_size, cast("Tail", base.tail))


def _done(dataset: Dataset, base: Dynamic) -> Ranges:
    """Shards that the epoch will not give again."""
    whole = (shard for shard, held in _given(base).items() if ranges.count(held) == len(dataset.shard(shard)))
    return ranges.union(base.done, ranges.normal((shard, shard + 1) for shard in whole))


def _left(dataset: Dataset, base: Dynamic) -> Ranges:
    """Shards of which the epoch still has samples to give."""
    gone = base.notes.get("quarantined", {}).get(base.epoch, {})
    out = ranges.union(_done(dataset, base), ranges.normal((shard, shard + 1) for shard in gone))
    return ranges.minus(((0, dataset.spec.shards),), out)


def _given(base: Dynamic) -> dict[int, Ranges]:
    """Shard -> what of it the epoch will not give again: what was consumed, and what is on record as left out."""
    found = dict(base.partial)
    for kind in BY_RANGES:
        if kind != "padded":
            for shard, text in base.notes.get(kind, {}).get(base.epoch, {}).items():
                found[shard] = ranges.union(found.get(shard, ()), ranges.parse_ranges(text))
    return found
