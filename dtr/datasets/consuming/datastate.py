"""The data state of one data set: what a lineage has consumed of it. Pure: written into each part of a checkpoint, merged in its manifest.

In ``dynamic`` mode consumption is a set of sample ranges by shard, not a cursor: a shard that was let go may be taken up by a rank that
lags, so a prefix would lose samples at a cut. Only the newest epoch is kept as sets; finished ones are its number. What an epoch left
out or gave twice on purpose is on record in ``notes``, for every epoch.

`merged` is the least upper bound of states of one data set: idempotent, commutative and associative, so it does not matter in which order
the ranks' states arrive, or how often. In ``deterministic`` mode the state is one cursor, and the further one is the merge.

As JSON, whole shards by their numbers, both ends included, and samples of a shard as half-open ranges of positions within it::

    {"mode": "dynamic", "version": 1, "digest": "...", "seed": 7, "epoch": 1, "done": "0-5,9", "partial": {"7": "0-40"},
     "notes": {"quarantined": {"0": {"3": "DatasetMismatch: ..."}}}}
    {"mode": "deterministic", "version": 1, "digest": "...", "seed": 7, "epoch": 1, "batch": 340, "global_batch_size": 256, ...}

``skips`` are what a person took out for good (`dtr.datasets.timemachine.skips`), ``notes["skipped"]`` which samples of which epoch that
has cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dtr import names
from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.ranges import Ranges
from dtr.datasets.timemachine.skips import Skips, merged_skips, parse_skips
from dtr.errors import DataConflict, InvalidInput, StateCorrupt

__all__ = ["BY_RANGES", "NOTES", "Cursor", "DataState", "Dynamic", "Notes", "merged", "parse", "parse_all", "shared"]

# What is excepted from "every sample exactly once", and only this: text is a reason (quarantined), or else sample ranges.
NOTES: Final = ("quarantined", "skipped", "dropped", "padded")
BY_RANGES: Final = ("skipped", "dropped", "padded")
MAX_SHARD: Final = 1_000_000

Notes = Mapping[str, Mapping[int, Mapping[int, str]]]  # kind -> epoch -> shard -> reason, or ranges
_OF_SEQUENCE: Final = {"dynamic": (), "deterministic": ("seed", "global_batch_size", "window", "tail")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """Consumption as sets. ``done`` has whole shards by number, ``partial`` the consumed ranges of others; both of ``epoch`` alone."""

    version: int
    digest: str
    seed: int
    epoch: int = 0
    done: Ranges = ()
    partial: Mapping[int, Ranges] = field(default_factory=dict)
    notes: Notes = field(default_factory=dict)
    skips: Skips = field(default_factory=dict)

    mode = "dynamic"

    def to_json(self) -> dict[str, Any]:
        """As it stands in parts and manifests."""
        return {
            "mode": self.mode,
            "version": self.version,
            "digest": self.digest,
            "seed": self.seed,
            "epoch": self.epoch,
            "done": ranges.format_numbers(self.done),
            "partial": {str(shard): ranges.format_ranges(held) for shard, held in sorted(self.partial.items())},
        } | _record_to_json(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Deterministic mode: ``batch`` global batches of ``epoch`` were consumed. The rest says which sequence that is a place in."""

    version: int
    digest: str
    seed: int
    global_batch_size: int
    window: int
    tail: str
    epoch: int = 0
    batch: int = 0
    notes: Notes = field(default_factory=dict)
    skips: Skips = field(default_factory=dict)

    mode = "deterministic"

    def to_json(self) -> dict[str, Any]:
        """As it stands in parts and manifests."""
        return {
            "mode": self.mode,
            "version": self.version,
            "digest": self.digest,
            "seed": self.seed,
            "epoch": self.epoch,
            "batch": self.batch,
            "global_batch_size": self.global_batch_size,
            "window": self.window,
            "tail": self.tail,
        } | _record_to_json(self)


DataState = Dynamic | Cursor


def merged(name: str, states: Iterable[DataState]) -> DataState:
    """The least state that has consumed what any of ``states`` has.

    Raises DataConflict if they are not states of one sequence of one data set, naming what differs.
    """
    found: DataState | None = None
    for state in states:
        found = state if found is None else _join(name, found, state)
    if found is None:
        raise InvalidInput(f"data set {name!r}: there is no state to merge", field="states")
    return found


def _join(name: str, one: DataState, other: DataState) -> DataState:
    record: dict[str, Any] = {"notes": _join_notes(one.notes, other.notes), "skips": merged_skips(one.skips, other.skips)}
    if one.epoch != other.epoch:  # the later one: it began when the earlier epoch had ended for every rank
        return replace(max(one, other, key=lambda state: state.epoch), **record)
    for what in ("mode", "version", "digest", *_OF_SEQUENCE[one.mode]):
        if getattr(one, what) != getattr(other, what, None):
            raise DataConflict(
                f"data set {name!r}: two ranks have another {what} of it, {getattr(one, what)} and {getattr(other, what, None)}: "
                "every rank must load the same data set in the same way",
                name=name,
            )
    if isinstance(one, Cursor) or isinstance(other, Cursor):
        return replace(max(one, other, key=lambda state: getattr(state, "batch", 0)), **record)
    seed = max(one.seed, other.seed)  # the order of shards only: what was consumed does not depend on it
    done = ranges.union(one.done, other.done)
    partial = {shard: ranges.union(one.partial.get(shard, ()), other.partial.get(shard, ())) for shard in {**one.partial, **other.partial}}
    inside = {shard: held for shard, held in partial.items() if not ranges.contains(done, shard)} if done else partial
    return replace(one, seed=seed, done=done, partial=inside, **record)


def shared(one: DataState, other: DataState) -> dict[int, Ranges | None]:
    """What both have consumed: shard -> positions, None for a whole shard. States of two ranks must share nothing."""
    if isinstance(one, Cursor) or isinstance(other, Cursor) or one.epoch != other.epoch:
        return {}
    found: dict[int, Ranges | None] = {}
    for start, stop in ranges.common(one.done, other.done):
        found |= dict.fromkeys(range(start, stop))
    for whole, parts in ((one, other), (other, one)):
        found |= {shard: held for shard, held in parts.partial.items() if whole.done and ranges.contains(whole.done, shard)}
    for shard in one.partial.keys() & other.partial.keys():
        both = ranges.common(one.partial[shard], other.partial[shard])
        if both:
            found[shard] = both
    return found


# --- notes ------------------------------------------------------------------------------------------------------------


def _join_notes(one: Notes, other: Notes) -> Notes:
    if one == other or not other:
        return one
    if not one:
        return other
    return {kind: _join_epochs(kind, one.get(kind, {}), other.get(kind, {})) for kind in NOTES if kind in one or kind in other}


def _join_epochs(kind: str, one: Mapping[int, Mapping[int, str]], other: Mapping[int, Mapping[int, str]]) -> dict[int, dict[int, str]]:
    joined: dict[int, dict[int, str]] = {}
    for epoch in sorted({**one, **other}):
        held = joined[epoch] = dict(one.get(epoch, {}))
        for shard, text in other.get(epoch, {}).items():
            held[shard] = _join_texts(kind, held[shard], text) if shard in held else text
    return joined


def _join_texts(kind: str, one: str, other: str) -> str:
    if kind in BY_RANGES:
        return ranges.format_ranges(ranges.union(ranges.parse_ranges(one), ranges.parse_ranges(other)))
    return min(one, other)  # two reasons for one shard: which one is kept does not matter, but that it is always the same


def _record_to_json(state: DataState) -> dict[str, Any]:
    skips = {"skips": {target: skip.to_json() for target, skip in sorted(state.skips.items())}} if state.skips else {}
    return _notes_to_json(state.notes) | skips


def _notes_to_json(notes: Notes) -> dict[str, Any]:
    if not notes:
        return {}
    shown = {
        kind: {str(epoch): {str(shard): text for shard, text in sorted(held.items())} for epoch, held in sorted(notes[kind].items())}
        for kind in NOTES
        if notes.get(kind)
    }
    return {"notes": shown} if shown else {}


# --- parsing: what a manifest or a part holds is taken on no trust -----------------------------------------------------


def parse(name: str, document: Any) -> DataState:
    """What `to_json` wrote; raises StateCorrupt, naming the field, for anything else."""
    what = f"the data state of data set {name!r}"
    if not isinstance(document, Mapping):
        raise StateCorrupt(f"{what} must be an object, got {str(document)[:60]!r}")
    mode = document.get("mode")
    try:
        numbers: dict[str, Any] = {key: names.step(document.get(key), key) for key in ("version", "seed", "epoch")}
        digest = document.get("digest")
        if not isinstance(digest, str):
            raise InvalidInput(f"digest must be text, got {str(digest)[:60]!r}", field="digest")
        record: dict[str, Any] = {"notes": _parse_notes(document.get("notes", {})), "skips": parse_skips(document.get("skips", {}))}
        if mode == "dynamic":
            done = ranges.parse_numbers(document.get("done", ""))
            if done and done[-1][1] > MAX_SHARD:
                raise InvalidInput(f"done must be shards below {MAX_SHARD}, got {done[-1][1] - 1}", field="done")
            return Dynamic(**numbers, digest=digest, done=done, partial=_parse_partial(document.get("partial", {})), **record)
        if mode == "deterministic":
            tail = document.get("tail")
            if tail not in {"empty", "pad", "drop"}:
                raise InvalidInput(f"tail must be empty, pad or drop, got {str(tail)[:60]!r}", field="tail")
            return Cursor(
                **numbers,
                digest=digest,
                batch=names.step(document.get("batch"), "batch"),
                global_batch_size=names.positive(document.get("global_batch_size"), "global_batch_size"),
                window=names.step(document.get("window"), "window"),
                tail=str(tail),
                **record,
            )
    except (InvalidInput, TypeError, AttributeError) as exc:
        raise StateCorrupt(f"{what}: {exc}") from exc
    raise StateCorrupt(f"{what}: mode must be dynamic or deterministic, got {str(mode)[:60]!r}")


def parse_all(document: Mapping[str, Any]) -> dict[str, DataState]:
    """Every data set's state of a part or a manifest, by name; raises StateCorrupt."""
    return {names.name(name, "data set"): parse(name, state) for name, state in document.items()}


def _parse_partial(document: Mapping[str, str]) -> dict[int, Ranges]:
    return {_shard(shard): ranges.parse_ranges(text) for shard, text in document.items()}


def _parse_notes(document: Mapping[str, Any]) -> Notes:
    found: dict[str, dict[int, dict[int, str]]] = {}
    for kind, epochs in document.items():
        if kind not in NOTES:
            raise InvalidInput(f"notes must be of {', '.join(NOTES)}, got {str(kind)[:60]!r}", field="notes")
        found[kind] = {int(epoch): {_shard(shard): str(text) for shard, text in held.items()} for epoch, held in epochs.items()}
        if kind in BY_RANGES:
            for held in found[kind].values():
                for text in held.values():
                    ranges.parse_ranges(text)
    return found


def _shard(text: str) -> int:
    if not isinstance(text, str) or not text.isascii() or not text.isdigit() or int(text) >= MAX_SHARD:
        raise InvalidInput(f"a shard must be a number below {MAX_SHARD}, got {str(text)[:60]!r}", field="partial")
    return int(text)
