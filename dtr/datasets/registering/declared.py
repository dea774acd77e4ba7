"""What the caller of ``register`` declares, checked, and whether the files that were found agree with it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dtr import names
from dtr.datasets.formats import Format
from dtr.datasets.registering.spec import Dataset, DatasetSpec, FileFacts, digest_of
from dtr.datasets.sources.files import Found
from dtr.errors import DatasetMismatch, InvalidInput
from dtr.placement import MAX_SHARDS

__all__ = ["Declared", "check_total", "dataset_of", "declare", "is_registered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A data set as its owner describes it, without its files."""

    name: str
    format: Format
    total_samples: int | None
    shard_size: int
    shuffle: bool
    seed: int


def declare(name: Any, format: Format, *, total_samples: Any, shard_size: Any, shuffle: Any, seed: Any) -> Declared:
    """The checked description; raises InvalidInput that names the argument which is wrong."""
    if not isinstance(shuffle, bool):
        raise InvalidInput(f"shuffle must be True or False, got {shuffle!r}", field="shuffle")
    declared = Declared(
        name=names.name(name, "name"),
        format=format,
        total_samples=None if total_samples is None else names.positive(total_samples, "total_samples"),
        shard_size=names.positive(shard_size, "shard_size"),
        shuffle=shuffle,
        seed=names.step(seed, "seed"),
    )
    if declared.total_samples is not None:
        _check_shards(-(-declared.total_samples // declared.shard_size), declared.total_samples, declared.shard_size)
    return declared


def check_total(declared: Declared, held: int, found: Found) -> None:
    """Raise DatasetMismatch, with the numbers, unless the files hold what was declared, and anything at all."""
    where = f"the {len(found.files):,} file{'s' if len(found.files) > 1 else ''} at {found.path}"
    if held == 0:
        raise DatasetMismatch(f"data set {declared.name!r}: {where} hold no samples", samples=0)
    if declared.total_samples not in (None, held):
        raise DatasetMismatch(
            f"data set {declared.name!r}: {where} hold {held:,} samples, but total_samples is {declared.total_samples:,}; "
            "correct the one or the other",
            samples=held,
            total_samples=declared.total_samples,
        )


def dataset_of(declared: Declared, found: Found, files: tuple[FileFacts, ...], *, now_ms: int) -> Dataset:
    """The data set as its first version; raises InvalidInput if it would have too many shards."""
    samples = sum(facts.samples for facts in files)
    shards = sum(-(-facts.samples // declared.shard_size) for facts in files)
    _check_shards(shards, samples, declared.shard_size)
    spec = DatasetSpec(
        name=declared.name,
        version=1,
        path=found.path,
        folder=found.folder,
        format=declared.format,
        total_samples=samples,
        shard_size=declared.shard_size,
        shards=shards,
        files=len(files),
        shuffle=declared.shuffle,
        seed=declared.seed,
        digest=digest_of(
            path=found.path,
            format=declared.format,
            shard_size=declared.shard_size,
            shuffle=declared.shuffle,
            seed=declared.seed,
            files=files,
        ),
        registered_at_ms=now_ms,
    )
    return Dataset(spec=spec, files=files)


def is_registered(current: Dataset, declared: Declared, found: Found) -> bool:
    """Whether ``current`` is what is declared, and no file was added, removed or changed since; nothing is read for it."""
    spec = current.spec
    return (spec.path, spec.format, spec.shard_size, spec.shuffle, spec.seed) == (
        found.path,
        declared.format,
        declared.shard_size,
        declared.shuffle,
        declared.seed,
    ) and [(facts.file, facts.stamp) for facts in current.files] == list(zip(found.files, found.stamps, strict=True))


def _check_shards(shards: int, samples: int, shard_size: int) -> None:
    if shards > MAX_SHARDS:
        raise InvalidInput(
            f"shard_size {shard_size:,} makes {shards:,} shards of {samples:,} samples; at most {MAX_SHARDS:,} are supported, "
            f"so use a shard_size of at least {-(-samples // MAX_SHARDS):,}",
            field="shard_size",
        )
