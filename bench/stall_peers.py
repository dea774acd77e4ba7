"""How long today's ways hold a trainer up for the same state; those that are installed."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["stalls_ms"]

ROUNDS = 3

Save = Callable[[], Callable[[], Any] | None]  # one save; what it returns waits for what goes on behind


def stalls_ms(state: dict[str, Any], folder: Path) -> dict[str, float]:
    """Milliseconds of each way, the median of three saves after a first one that is not counted."""
    found = {}
    warnings.filterwarnings("ignore", module="torch")  # of a single process without a process group, which is meant
    for name, save in _ways(state, folder):
        taken = []
        for _ in range(1 + ROUNDS):
            begin = time.perf_counter()
            wait = save()
            taken.append(time.perf_counter() - begin)
            if wait is not None:
                wait()
        found[f"{name}_ms"] = statistics.median(taken[1:]) * 1000
    return found


def _ways(state: dict[str, Any], folder: Path) -> Iterator[tuple[str, Save]]:
    with contextlib.suppress(ImportError):
        from safetensors.numpy import save_file

        yield "safetensors_save_file", lambda: save_file(state, str(folder / "peer.safetensors"))
        (folder / "peer.safetensors").unlink()
    try:
        import torch
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    except ImportError:
        return
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    yield "torch_save", lambda: torch.save(tensors, folder / "peer.pt")
    (folder / "peer.pt").unlink()
    yield "dcp_async_save", lambda: _started(dcp.async_save(tensors, checkpoint_id=str(folder / "dcp")))
    options = StagingOptions(use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False)
    stager = DefaultStager(options)
    yield "dcp_async_save_shm", lambda: _started(dcp.async_save(tensors, checkpoint_id=str(folder / "dcps"), async_stager=stager))


def _started(response: Any) -> Callable[[], Any]:
    wait: Callable[[], Any] = getattr(response, "upload_completion", response).result
    return wait
