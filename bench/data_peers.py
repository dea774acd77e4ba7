"""What today's loaders make of the same samples: torch's DataLoader over the same files, mosaicml-streaming over the same in MDS.

Each is measured in a process of its own (``python -m bench.data_peers PEER FOLDER BATCH WORKERS`` prints samples per second), so that
neither its memory nor its settings touch the figures beside it. A peer that is not installed, does not load, or does not end is left
out, and stderr says so. Each is given its best of reading in the process and in two worker processes, in the order of the files, from
the page cache, without augmentation; JSON is parsed by orjson, as dtr does. What was written for a peer, FOLDER/mds, stays for dtr.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

__all__ = ["samples_per_s"]

WORKERS = (0, 2)
COLUMNS = {"id": "int64", "x": "float64", "tokens": "ndarray:int64:32"}  # of the JSON lines, as MDS calls them
TIMEOUT_S = 60


def samples_per_s(folder: Path, batch_size: int) -> dict[str, float]:
    """``torch``, ``torch_npy`` and ``streaming``, those that are installed -> samples per second."""
    best: dict[str, float] = {}
    for peer in PEERS:
        for workers in WORKERS:
            found = _measured(peer, folder, batch_size, workers)
            if found is not None:
                best[peer] = max(best.get(peer, 0.0), found)
    return best


def _measured(peer: str, folder: Path, batch_size: int, workers: int) -> float | None:
    command = [sys.executable, "-W", "ignore", "-m", "bench.data_peers", peer, str(folder), str(batch_size), str(workers)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        why = f"it did not end within {TIMEOUT_S} s"
    else:
        if ended.returncode == 0:
            return float(json.loads(ended.stdout.splitlines()[-1]))
        why = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
    print(f"bench.data: no figure of {peer} with {workers} workers: {why}", file=sys.stderr)
    return None


def main(argv: list[str]) -> int:
    """Measure one peer."""
    peer, folder, batch_size, workers = argv[0], Path(argv[1]), int(argv[2]), int(argv[3])
    batches = PEERS[peer](folder, batch_size, workers)
    started = time.perf_counter()
    samples = sum(len(batch["id"] if isinstance(batch, dict) else batch) for batch in batches)
    print(json.dumps(samples / (time.perf_counter() - started)), flush=True)
    return 0


# --- torch ----------------------------------------------------------------------------------------------------------------


def _torch_lines(folder: Path, batch_size: int, workers: int) -> Iterable[Any]:
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Lines(IterableDataset):  # type: ignore[misc, unused-ignore]
        """JSON lines, each worker its own files."""

        def __iter__(self) -> Iterator[dict[str, Any]]:
            info = get_worker_info()
            for path in sorted((folder / "jsonl").iterdir())[info.id if info else 0 :: info.num_workers if info else 1]:
                with path.open("rb") as file:
                    for line in file:
                        row = orjson.loads(line)
                        row["tokens"] = np.array(row["tokens"])
                        yield row

    loader: Iterable[Any] = DataLoader(Lines(), batch_size=batch_size, num_workers=workers)
    return loader


def _torch_rows(folder: Path, batch_size: int, workers: int) -> Iterable[Any]:
    from torch.utils.data import DataLoader, Dataset

    files = [np.load(path, mmap_mode="r") for path in sorted((folder / "npy").iterdir())]

    class Rows(Dataset):  # type: ignore[misc, unused-ignore]
        """Mapped npy files, a row at a time."""

        def __len__(self) -> int:
            return sum(map(len, files))

        def __getitem__(self, index: int) -> Any:
            return np.array(files[index // len(files[0])][index % len(files[0])])

    loader: Iterable[Any] = DataLoader(Rows(), batch_size=batch_size, num_workers=workers)
    return loader


# --- streaming ------------------------------------------------------------------------------------------------------------


def _streaming(folder: Path, batch_size: int, workers: int) -> Iterable[Any]:
    from torch.utils.data import DataLoader

    streaming: Any = importlib.import_module("streaming")
    if not (folder / "mds").exists():
        with streaming.MDSWriter(out=str(folder / "mds"), columns=COLUMNS, size_limit=1 << 24) as writer:
            for path in sorted((folder / "jsonl").iterdir()):
                for line in path.read_bytes().splitlines():
                    row = orjson.loads(line)
                    writer.write({**row, "tokens": np.array(row["tokens"])})
    made = streaming.StreamingDataset(local=str(folder / "mds"), batch_size=batch_size, shuffle=False)
    loader: Iterable[Any] = DataLoader(made, batch_size=batch_size, num_workers=workers)
    return loader


PEERS = {"torch": _torch_lines, "torch_npy": _torch_rows, "streaming": _streaming}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
