"""dtr: shards data, coordinates workers, checkpoints asynchronously and recovers, for one process or thousands.

The names here are imported at their first use, so that ``import dtr`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtr.checkpoint.manager import CheckpointManager
    from dtr.datasets.registering.registry import DatasetRegistry

    __version__: str

__all__ = ["CheckpointManager", "DatasetRegistry", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "CheckpointManager":
        from dtr.checkpoint.manager import CheckpointManager

        return CheckpointManager
    if name == "DatasetRegistry":
        from dtr.datasets.registering.registry import DatasetRegistry

        return DatasetRegistry
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("dtr")
        except PackageNotFoundError:  # a source tree that nobody installed
            return "0+source"
    raise AttributeError(f"module 'dtr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
