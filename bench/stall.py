"""How long a save holds the trainer up, beside a copy of memory and beside what people use today; and what the upload costs its loop.

The stall is the whole call of ``CheckpointManager.save_async``, as a trainer makes it, with a real uploader that empties the slots.
The limit is one copy per array into memory that was touched before, by as many threads as dtr uses. Both alternate; the first save,
which makes the slots, is not counted. Between two saves the bench waits until the last is durable and the next slot is warm: a real
trainer computes for longer than that. The loops run beside uploads of half the state. ``cap_mbps_*`` is there for a loop only where
the default, no cap, makes it 5 % slower or more.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench import server, stall_loop, stall_peers, uploaders
from bench.report import Report, parser
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.staging.filling import COPY_THREADS

__all__ = ["main"]

MIB = 1 << 20
State = dict[str, Any]
Numbers = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    flags = parser("stall", "How long a save holds the trainer up, and what the upload costs its loop, beside memcpy and peers.")
    flags.add_argument("--mib", type=int, default=1024, help="size of the state (default 1024)")
    flags.add_argument("--pairs", type=int, default=5, help="alternating pairs (default 5)")
    flags.add_argument("--tiny", type=int, default=20_000, help="arrays of 1 KiB in the last case (default 20,000)")
    flags.add_argument("--window-s", type=float, default=1.0, help="how long a loop runs without an upload (default 1.0)")
    flags.add_argument("--no-peers", action="store_true", help="only dtr and memcpy")
    flags.add_argument("--no-caps", action="store_true", help="do not look for the bandwidth cap of a loop that is 5 %% slower")
    options = flags.parse_args(argv)
    figures: Numbers = {}
    ratios: Numbers = {}
    limit: Numbers = {}
    large = _arrays(64, options.mib * MIB // 64, np.float32, options.seed)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dtr-bench-")))
        url = stack.enter_context(server.running())
        half = dict(list(large.items())[:32])
        with uploaders.worker(url, folder):
            _stalls(url, folder, large, options, figures, ratios, limit)
            for suffix, loop in stall_loop.LOOPS.items():
                ratios[f"loop_slowdown{suffix}"] = stall_loop.slowdown(
                    url, folder / f"loop{suffix}", half, loop, options.pairs, options.window_s
                )
        peer = {} if options.no_peers else stall_peers.stalls_ms(large, folder)
        for suffix in stall_loop.LOOPS:
            if options.no_caps or ratios[f"loop_slowdown{suffix}"] < stall_loop.BOUND:
                continue
            found = stall_loop.cap_for(url, folder, suffix, min(options.pairs, 3), options.window_s, seed=options.seed)
            figures[f"cap_mbps{suffix}"], figures[f"slowdown_at_cap{suffix}"] = found
    params = {"mib": options.mib, "pairs": options.pairs, "tiny": options.tiny, "threads": COPY_THREADS, "seed": options.seed}
    Report(name="stall", params=params, figures=figures, limit=limit, peer=peer, ratios=ratios).emit(as_json=options.json)
    return 0


def _stalls(url: str, folder: Path, large: State, options: Any, figures: Numbers, ratios: Numbers, limit: Numbers) -> None:
    size = options.mib * MIB
    cases = {
        "": large,
        "_small": _arrays(max(1, size // (MIB // 2)), MIB // 2, np.float32, options.seed),
        "_bf16": _bfloat16(64, size // 64, options.seed),
    }
    for suffix, state in cases.items():
        stalls, copies = _pairs(url, folder / f"case{suffix}", state, options.pairs)
        ratios[f"stall_over_memcpy{suffix}"] = statistics.median(s / c for s, c in zip(stalls, copies, strict=True))
        figures[f"stall_ms{suffix}"] = statistics.median(stalls) * 1000
        limit[f"memcpy_ms{suffix}"] = statistics.median(copies) * 1000
    stalls, copies = _pairs(url, folder / "tiny", _arrays(options.tiny, 1024, np.float32, options.seed), options.pairs)
    figures["us_per_tiny_array"] = statistics.median(stalls) * 1e6 / options.tiny
    limit["memcpy_us_per_tiny_array"] = statistics.median(copies) * 1e6 / options.tiny


def _arrays(count: int, size_bytes: int, dtype: Any, seed: int) -> State:
    rng = np.random.default_rng(seed)
    return {f"w{n}": rng.random(size_bytes // np.dtype(dtype).itemsize, dtype=dtype) for n in range(count)}


def _bfloat16(count: int, size_bytes: int, seed: int) -> State:
    """bfloat16 as torch has it where torch is there; else the same two bytes as integers."""
    raw = {name: array.view(np.uint16) for name, array in _arrays(count, size_bytes, np.float32, seed).items()}
    try:
        import torch
    except ImportError:
        return raw
    return {name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for name, array in raw.items()}


def _pairs(url: str, folder: Path, state: State, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each save and of each copy, alternating."""
    sources = [_bytes(array) for array in state.values()]
    targets = [np.ones(len(array), np.uint8) for array in sources]
    stalls, copies = [], []
    with CheckpointManager(str(folder), coordinator_url=url, job=f"stall-{folder.name}") as manager:
        for step in range(pairs + 1):  # the first one makes the slots
            begin = time.perf_counter()
            handle = manager.save_async(state, step=step)
            stall = time.perf_counter() - begin
            handle.durable.result(timeout=600)
            time.sleep(0.5)  # slots become free when the uploader has seen the commit
            copy = _memcpy(sources, targets)
            if step:
                stalls.append(stall)
                copies.append(copy)
    return stalls, copies


def _bytes(array: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if not isinstance(array, np.ndarray):
        import torch

        array = array.view(torch.int16).numpy()
    found: np.ndarray[Any, np.dtype[np.uint8]] = array.reshape(-1).view(np.uint8)
    return found


def _memcpy(sources: Sequence[Any], targets: Sequence[Any]) -> float:
    """One copy per array, by as many threads as dtr uses, which stand ready."""
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        list(pool.map(abs, range(COPY_THREADS)))
        shares = [range(n, len(sources), COPY_THREADS) for n in range(COPY_THREADS)]

        def copy(share: range) -> None:
            for n in share:
                np.copyto(targets[n], sources[n])

        begin = time.perf_counter()
        list(pool.map(copy, shares))
        return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
