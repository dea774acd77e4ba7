"""Data sets: registered once, split into shards, placed on workers."""

from dtr.datasets.registry import DatasetRegistry
from dtr.datasets.spec import Dataset, DatasetSpec, Shard

__all__ = ["Dataset", "DatasetRegistry", "DatasetSpec", "Shard"]
