"""Where a loader goes on from a restored data state. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import BY_RANGES, Cursor, DataState, Dynamic
from dtr.datasets.consuming.ranges import Ranges
from dtr.datasets.loading.plan import Plan
from dtr.errors import DataConflict

__all__ = ["going_on", "with_whole_shards"]


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
    given = _given(base)
    whole = ranges.normal((shard, shard + 1) for shard, held in given.items() if ranges.count(held) == len(plan.dataset.shard(shard)))
    done = ranges.union(base.done, whole)
    gone = base.notes.get("quarantined", {}).get(base.epoch, {})
    left = ranges.minus(((0, spec.shards),), ranges.union(done, ranges.normal((shard, shard + 1) for shard in gone)))
    if not left:
        return Dynamic(version=spec.version, digest=spec.digest, seed=plan.seed, epoch=base.epoch + 1, notes=base.notes, skips=base.skips)
    return Dynamic(
        version=spec.version, digest=spec.digest, seed=plan.seed, epoch=base.epoch, done=done,
        partial={shard: held for shard, held in given.items() if not ranges.contains(done, shard)}, notes=base.notes, skips=base.skips,
    )  # fmt: skip


def with_whole_shards(plan: Plan, state: Dynamic) -> Dynamic:
    """The same consumption, each whole shard by its number: so equal consumption is an equal state."""
    size_of = plan.dataset.shard
    whole = {shard for shard, held in state.partial.items() if ranges.count(held) == len(size_of(shard))}
    partial = {shard: held for shard, held in state.partial.items() if shard not in whole}
    return replace(state, done=ranges.union(state.done, ranges.of_numbers(whole)), partial=partial)


def _given(base: Dynamic) -> dict[int, Ranges]:
    """Shard -> what of it the epoch will not give again: what was consumed, and what is on record as left out."""
    found = dict(base.partial)
    for kind in BY_RANGES:
        if kind != "padded":
            for shard, text in base.notes.get(kind, {}).get(base.epoch, {}).items():
                found[shard] = ranges.union(found.get(shard, ()), ranges.parse_ranges(text))
    return found
