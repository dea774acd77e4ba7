"""The time machine as views: what a step consumed, that batch again, and samples taken out of a data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtr.checkpoint.survey import record_key
from dtr.datasets.consuming import ranges
from dtr.datasets.loading.batch import SampleRange, samples_of
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.registering.spec import Dataset
from dtr.datasets.timemachine.history import Consumed, History, Moment
from dtr.datasets.timemachine.keeping import keep_skip
from dtr.datasets.timemachine.skipping import tell_skip
from dtr.datasets.timemachine.skips import Skip, checked, parse_target
from dtr.errors import CoordinatorUnavailable, DatasetNotFound, InvalidInput, NotFound, StoreRefused, StoreUnavailable
from dtr.state.client import translate
from dtr.views.reading import reading
from dtr.views.stored import Sources

__all__ = ["BatchView", "FileRange", "ReplayView", "RowsView", "SkipView", "WhichView", "export", "replay", "skip", "which"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """Samples ``start`` to ``stop`` (exclusive) of a file."""

    file: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.file}:{self.start}-{self.stop}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchView:
    """One batch that one rank consumed. Files ascend; the order of the samples within the batch is what `replay` gives.

    ``skipped`` had their place in it and were left out; ``padded`` were given again, so that it was full.
    """

    rank: int
    dataset: str
    version: int
    mode: str
    epoch: int
    number: int
    samples: int
    files: tuple[FileRange, ...]
    padded: tuple[FileRange, ...]
    skipped: tuple[FileRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WhichView:
    """What one step consumed; ``source`` is redis or store, ``on_lineage`` is False if the job did not go on from this run's step."""

    job: str
    run: str
    step: int
    on_lineage: bool
    source: str
    batches: tuple[BatchView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsView:
    """A batch and its samples: ``dtypes`` and ``shapes`` by column, and the samples as rows."""

    batch: BatchView
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayView:
    """A step's batches again; ``file`` is where they were written, empty if nowhere."""

    job: str
    run: str
    step: int
    on_lineage: bool
    source: str
    file: str
    batches: tuple[RowsView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipView:
    """Samples that are left out from now on; ``new`` is False if they were before.

    ``in_store`` is False, and ``note`` says why, if only Redis and the next checkpoint have it on record.
    """

    job: str
    dataset: str
    version: int
    file: str
    start: int
    stop: int
    samples: int
    reason: str
    new: bool
    in_store: bool
    note: str


def which(sources: Sources, step: int, *, rank: int | None = None, run: str | None = None) -> WhichView:
    """What a step consumed.

    Raises:
        StepUnknown, DatasetNotFound, StateCorrupt, CoordinatorUnavailable, StoreUnavailable.
    """
    found = _moment(sources, step, rank, run)
    return WhichView(
        job=sources.job, run=found.run, step=step, on_lineage=found.on_lineage, source=found.source,
        batches=tuple(map(_batch, found.consumed)),
    )  # fmt: skip


def replay(
    sources: Sources, step: int, *, rank: int | None = None, run: str | None = None, columns: Sequence[str] | None = None,
    most: int | None = None, file: Path | None = None,
) -> ReplayView:  # fmt: skip
    """A step's batches again, read from the data set's files.

    Args:
        sources: where the record is.
        step, rank, run: as for `which`.
        columns: to read; default: all.
        most: so many rows of each batch are in the view; None: all.
        file: an ``.npz`` to be written, which must not be there: an array for each column, ``NAME.RANK.NUMBER.COLUMN``.

    Raises as `which`; DatasetMismatch, ShardUnreadable: the files are not what they were; InvalidInput: no such column, a file in the way.
    """
    found = _moment(sources, step, rank, run)
    batches: list[RowsView] = []
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for one in found.consumed:
        values = one.read(columns).columns
        if file is not None:
            arrays |= {f"{one.dataset.spec.name}.{one.rank}.{one.number}.{name}": _plain(name, held) for name, held in values.items()}
        count = min([len(held) for held in values.values()], default=0)
        shown = count if most is None else min(count, most)
        batches.append(
            RowsView(
                batch=_batch(one), dtypes={name: str(held.dtype) for name, held in values.items()},
                shapes={name: held.shape for name, held in values.items()},
                rows=tuple({name: _json(held[at]) for name, held in values.items()} for at in range(shown)),
            )
        )  # fmt: skip
    if file is not None:
        export(file, arrays)
    return ReplayView(
        job=sources.job, run=found.run, step=step, on_lineage=found.on_lineage, source=found.source,
        file="" if file is None else str(file), batches=tuple(batches),
    )  # fmt: skip


def export(file: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write the arrays so that numpy reads them without pickle; the file appears whole, or not at all. Raises InvalidInput."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as out:
            np.savez(out, allow_pickle=False, **arrays)
        os.link(temporary, file)
    except FileExistsError as exc:
        raise InvalidInput(f"out: {file} is there already: name a new file", field="out") from exc
    finally:
        temporary.unlink(missing_ok=True)


def skip(sources: Sources, name: str | None, target: str, reason: str) -> SkipView:
    """Leave samples out of a data set from now on; on record in Redis and, if one is known, in the store. Safe to repeat.

    Args:
        sources: Redis, and the store if one is known.
        name: of the data set; None: of the one that has the file.
        target: FILE:START-STOP.
        reason: for people.

    Raises:
        DatasetNotFound: there is no such data set, or none that has the file.
        InvalidInput: it has no such samples, or no reason is given.
        CoordinatorUnavailable: nobody knows whether it is on record; do it again.
    """
    state = sources.state
    if state is None:
        raise CoordinatorUnavailable(f"a skip is put on record in Redis first; {sources.note}")
    with reading(state):
        registry = DatasetRegistry(state.url, job=state.job, client=state.redis)
        dataset = registry.get(name) if name is not None else _having(registry, parse_target(target)[0])
        name = dataset.spec.name
        where, record = checked(dataset, target, reason, state.server_now_ms())
        new = tell_skip(state, name, where, record)
    why_not = _keep(sources, name, where, record)
    file, _, span = where.rpartition(":")
    start, _, stop = span.partition("-")
    return SkipView(
        job=state.job, dataset=name, version=dataset.spec.version, file=file, start=int(start), stop=int(stop),
        samples=int(stop) - int(start), reason=record.reason, new=new, in_store=not why_not, note=why_not,
    )  # fmt: skip


def _having(registry: DatasetRegistry, file: str) -> Dataset:
    """The one data set of the job that has a file; raises InvalidInput that names the candidates if there are several."""
    everyone = [registry.get(spec.name) for spec in registry.list()]
    found = [dataset for dataset in everyone if any(facts.file == file for facts in dataset.files)]
    names = [dataset.spec.name for dataset in found or everyone]
    if not found:
        raise DatasetNotFound(f"no data set of the job has a file {file!r}; it has: {', '.join(names) or 'none'}", name=file)
    if len(found) > 1:
        raise InvalidInput(f"name: data sets {', '.join(names)} have a file {file!r}: name one of them before it", field="name")
    return found[0]


def _keep(sources: Sources, name: str, where: str, record: Skip) -> str:
    """Put it into the store too; '' or why that was not done."""
    if sources.store is None or sources.state is None:
        return "no store is known"
    with reading(sources.state), translate(sources.state.url):
        run = sources.state.redis.hget(sources.state.keys.meta, "last_run")
    try:
        if run:
            sources.store.size(record_key(run))
        keep_skip(sources.store, name, where, record)
    except NotFound:  # a folder of another host, by the same name
        return f"{sources.url} holds nothing of run {run}"
    except (StoreUnavailable, StoreRefused) as exc:
        return exc.message
    return ""


# --- how ------------------------------------------------------------------------------------------------------------


def _moment(sources: Sources, step: int, rank: int | None, run: str | None) -> Moment:
    history = History(sources.state, sources.store, sources.url)
    if sources.state is None:
        return history.at(step, rank=rank, run=run)
    with reading(sources.state):
        return history.at(step, rank=rank, run=run)


def _batch(one: Consumed) -> BatchView:
    return BatchView(
        rank=one.rank, dataset=one.dataset.spec.name, version=one.dataset.spec.version, mode=one.mode, epoch=one.epoch, number=one.number,
        samples=samples_of((*one.ranges, *one.padded)), files=in_files(one.dataset, one.ranges),
        padded=in_files(one.dataset, one.padded), skipped=in_files(one.dataset, one.skipped),
    )  # fmt: skip


def in_files(dataset: Dataset, given: Sequence[SampleRange]) -> tuple[FileRange, ...]:
    """Samples of shards as samples of files, ascending, what touches joined."""
    held: dict[str, list[tuple[int, int]]] = {}
    for number, start, stop in given:
        shard = dataset.shard(number)
        held.setdefault(shard.file, []).append((shard.start + start, shard.start + stop))
    return tuple(
        FileRange(file=file, start=start, stop=stop) for file, pairs in sorted(held.items()) for start, stop in ranges.normal(pairs)
    )


def _plain(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The values in a dtype that needs no pickle: texts and bytes as such."""
    if values.dtype != np.object_:
        return values
    kinds = {type(value) for value in values.tolist()}
    if kinds <= {str} or kinds <= {bytes}:
        return np.array(values.tolist(), dtype=np.str_ if kinds <= {str} else np.bytes_)
    raise InvalidInput(f"columns: {name!r} holds objects, which no .npz takes: leave it out, or use --json", field="columns")


def _json(value: Any) -> Any:
    """A value as JSON has it: bytes are shown by their length."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _json(held) for key, held in value.items()}
    return [_json(held) for held in value] if isinstance(value, list | tuple) else value
