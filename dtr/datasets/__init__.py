"""Data sets: registered once, split into shards, placed on workers."""

from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.registering.spec import Dataset, DatasetSpec, Shard

__all__ = ["Dataset", "DatasetRegistry", "DatasetSpec", "Shard"]
