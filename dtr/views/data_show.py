"""One data set: what it is, what of it is left out and why, and how far the newest checkpoint has come with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtr.checkpoint.survey import lineage_of, read_manifest, survey
from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import BY_RANGES, Cursor, DataState, parse
from dtr.datasets.consuming.ledger import quarantined
from dtr.datasets.consuming.ledger import release as release_shards
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.registering.spec import Dataset
from dtr.datasets.timemachine.history import History
from dtr.datasets.timemachine.keeping import kept_skips
from dtr.datasets.timemachine.skipping import read_skips
from dtr.datasets.timemachine.skips import Skips, merged_skips, parse_target
from dtr.errors import DatasetNotFound, NotFound
from dtr.state.client import mask
from dtr.state.job import JobState
from dtr.views.data_history import FileRange, in_files
from dtr.views.reading import reading
from dtr.views.stored import Sources

__all__ = ["CommittedView", "NoteView", "QuarantinedView", "ReleaseView", "ShowView", "SkippedView", "newest_data", "read", "release"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedView:
    """A shard that cannot be read, and is nobody's."""

    shard: int
    file: str
    start: int
    stop: int
    samples: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedView:
    """Samples that a person took out. ``applies`` is False if the file has changed since, so that they say nothing of it."""

    file: str
    start: int
    stop: int
    samples: int
    reason: str
    at_ms: int
    applies: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteView:
    """What an epoch excepted from "each sample once": skipped, dropped, padded or quarantined."""

    epoch: int
    kind: str
    samples: int
    files: tuple[FileRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedView:
    """How far the newest commit has come: ``epoch`` is under way, those before are over."""

    run: str
    step: int
    mode: str
    version: int
    epoch: int
    consumed: int
    notes: tuple[NoteView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowView:
    """A data set. ``registered`` is False if Redis does not know it and the store had to tell; ``committed`` is None without a commit."""

    job: str
    name: str
    version: int
    registered: bool
    format: str
    path: str
    total_samples: int
    shard_size: int
    shards: int
    files: int
    size_bytes: int
    shuffle: bool
    seed: int
    digest: str
    registered_at_ms: int
    quarantined: tuple[QuarantinedView, ...]
    skipped: tuple[SkippedView, ...]
    committed: CommittedView | None


def read(sources: Sources, name: str) -> ShowView:
    """All about one data set.

    Raises:
        DatasetNotFound: neither Redis nor the newest commit in the store knows it.
        CoordinatorUnavailable, StoreUnavailable, StateCorrupt, ManifestInvalid.
    """
    point, data = newest_data(sources)
    committed = parse(name, data[name]) if name in data else None
    current = _registered(sources.state, name, committed is not None and sources.store is not None)
    dataset = current or _of_store(sources, name, committed)
    reasons, skips = _left_out(sources, name, dataset, committed)
    spec = dataset.spec
    return ShowView(
        job=sources.job, name=name, version=spec.version, registered=current is not None, format=spec.format.name, path=mask(spec.path),
        total_samples=spec.total_samples, shard_size=spec.shard_size, shards=spec.shards, files=spec.files,
        size_bytes=sum(facts.size_bytes for facts in dataset.files), shuffle=spec.shuffle, seed=spec.seed, digest=spec.digest,
        registered_at_ms=spec.registered_at_ms,
        quarantined=tuple(_quarantined(dataset, shard, error) for shard, error in sorted(reasons.items())),
        skipped=tuple(_skipped(dataset, skips)),
        committed=None if committed is None else _committed(dataset, point, committed),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseView:
    """Shards that were let out of quarantine, and those that were asked for and not in it."""

    job: str
    dataset: str
    released: tuple[QuarantinedView, ...]
    not_there: tuple[int, ...]


def release(state: JobState, name: str, shards: Sequence[int]) -> ReleaseView:
    """Let shards of a data set out of quarantine, all if none is named; from the next epoch or run on they are read again.

    Raises:
        DatasetNotFound, CoordinatorUnavailable, StateCorrupt.
        InvalidInput: there is no such shard.
    """
    with reading(state):
        dataset = DatasetRegistry(state.url, job=state.job, client=state.redis).get(name)
        errors = quarantined(state, dataset.spec)
    wanted = [dataset.shard(number).index for number in dict.fromkeys(shards)] or list(errors)
    released = release_shards(state, dataset.spec, wanted) if wanted else ()
    return ReleaseView(
        job=state.job, dataset=name, released=tuple(_quarantined(dataset, number, errors.get(number, "")) for number in released),
        not_there=tuple(number for number in wanted if number not in released),
    )  # fmt: skip


def newest_data(sources: Sources) -> tuple[tuple[str, int], Mapping[str, Any]]:
    """The newest commit on the lineage, and its data state; ('', -1) and nothing without one, or without a store."""
    if sources.store is None:
        return ("", -1), {}
    holdings = survey(sources.store)
    lineage = lineage_of(sources.store, sources.url, holdings, sources.state)
    for run, step in lineage.newest_first(holdings.decided):
        try:
            manifest = read_manifest(sources.store, run, step)
        except NotFound:
            continue  # retired meanwhile
        if manifest.decision == "commit":
            return (run, step), manifest.data
    return ("", -1), {}


def _registered(state: JobState | None, name: str, elsewhere: bool) -> Dataset | None:
    if state is None:
        return None
    try:
        with reading(state):
            return DatasetRegistry(state.url, job=state.job, client=state.redis).get(name)
    except DatasetNotFound:
        if not elsewhere:
            raise
        return None


def _of_store(sources: Sources, name: str, committed: DataState | None) -> Dataset:
    if committed is None:
        raise DatasetNotFound(f"no commit of job {sources.job} in {sources.url} has a data set {name!r}", name=name)
    return History(None, sources.store, sources.url).dataset(name, committed.digest)


def _left_out(sources: Sources, name: str, dataset: Dataset, committed: DataState | None) -> tuple[dict[int, str], Skips]:
    """Quarantined shards with their errors, as Redis or else the newest commit has them, and skips: those of Redis, store and commit."""
    reasons: dict[int, str] = {}
    skips: Skips = {} if committed is None else committed.skips
    state = sources.state
    if sources.store is not None:
        skips = merged_skips(skips, kept_skips(sources.store, name).get(name, {}))
    if state is not None:  # what is in quarantine now; a commit also knows of those that were let out since
        with reading(state):
            return quarantined(state, dataset.spec), merged_skips(skips, read_skips(state, name))
    if committed is not None and committed.digest == dataset.spec.digest:
        for of_epoch in committed.notes.get("quarantined", {}).values():
            reasons |= of_epoch
    return reasons, skips


def _quarantined(dataset: Dataset, number: int, error: str) -> QuarantinedView:
    shard = dataset.shard(number)
    return QuarantinedView(shard=number, file=shard.file, start=shard.start, stop=shard.stop, samples=len(shard), error=error)


def _skipped(dataset: Dataset, skips: Skips) -> list[SkippedView]:
    stamps = {facts.file: facts.stamp for facts in dataset.files}
    found = []
    for target, one in skips.items():
        file, start, stop = parse_target(target)
        applies = stamps.get(file) == one.stamp
        found.append(
            SkippedView(file=file, start=start, stop=stop, samples=stop - start, reason=one.reason, at_ms=one.at_ms, applies=applies)
        )
    return sorted(found, key=lambda view: (view.file, view.start, view.stop))


def _committed(dataset: Dataset, point: tuple[str, int], state: DataState) -> CommittedView:
    same = state.digest == dataset.spec.digest
    return CommittedView(
        run=point[0], step=point[1], mode=state.mode, version=state.version, epoch=state.epoch,
        consumed=consumed_of(dataset, state) if same else 0, notes=tuple(_notes(dataset, state)) if same else (),
    )  # fmt: skip


def consumed_of(dataset: Dataset, state: DataState) -> int:
    """How many samples of its epoch a state has consumed."""
    if isinstance(state, Cursor):
        return min(state.batch * state.global_batch_size, dataset.spec.total_samples)
    whole = sum(len(dataset.shard(number)) for start, stop in state.done for number in range(start, stop))
    return whole + sum(map(ranges.count, state.partial.values()))


def _notes(dataset: Dataset, state: DataState) -> list[NoteView]:
    found = []
    for kind, epochs in state.notes.items():
        for epoch, held in sorted(epochs.items()):
            pieces = [
                (shard, start, stop)
                for shard, text in held.items()
                for start, stop in (ranges.parse_ranges(text) if kind in BY_RANGES else ((0, len(dataset.shard(shard))),))
            ]
            count = sum(stop - start for _, start, stop in pieces)
            found.append(NoteView(epoch=epoch, kind=kind, samples=count, files=in_files(dataset, pieces)))
    return found
