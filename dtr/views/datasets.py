"""The data sets that are registered for a job."""

from __future__ import annotations

from dataclasses import dataclass

from dtr.datasets.registering.registry import DatasetRegistry
from dtr.state.job import JobState
from dtr.views.reading import reading

__all__ = ["DatasetView", "DatasetsView", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetView:
    """The current version of one data set."""

    name: str
    version: int
    format: str
    path: str
    total_samples: int
    shard_size: int
    shards: int
    files: int
    shuffle: bool
    seed: int
    registered_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetsView:
    """The data sets of a job, by name."""

    job: str
    datasets: tuple[DatasetView, ...]


def read(state: JobState) -> DatasetsView:
    """Every data set of the job.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    with reading(state):
        specs = DatasetRegistry(state.url, job=state.job, client=state.redis).list()
    found = (
        DatasetView(
            name=spec.name,
            version=spec.version,
            format=spec.format.name,
            path=spec.path,
            total_samples=spec.total_samples,
            shard_size=spec.shard_size,
            shards=spec.shards,
            files=spec.files,
            shuffle=spec.shuffle,
            seed=spec.seed,
            registered_at_ms=spec.registered_at_ms,
        )
        for spec in specs
    )
    return DatasetsView(job=state.job, datasets=tuple(found))
