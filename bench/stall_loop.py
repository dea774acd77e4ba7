"""What an upload costs the trainer beside it: three loops, each with and without one.

The loop runs in this process, as a trainer does; the upload is a real one, by the Celery worker, of a state that was just saved here.
Each pair measures the same loop with nothing else going on, then from the return of ``save_async`` until the checkpoint is durable.
Without a cap, which is the default, an upload already gives way to trainers; a cap is looked for only where that is not enough.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import uploaders
from dtr.checkpoint.manager import CheckpointManager

__all__ = ["BOUND", "LOOPS", "Loop", "cap_for", "slowdown"]

MIB: Final = 1 << 20
CAPPED_S: Final = 1.5  # how long a capped upload shall take
CAPS_MBPS: Final = (400, 200, 100, 50, 25, 12)
BOUND: Final = 0.05  # by which part of itself a loop may be slower


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """``make`` makes one unit of work, some milliseconds long; ``threads`` do it side by side."""

    make: Callable[[], Callable[[], object]]
    threads: int = 1

    def seconds_per_unit(self, go_on: Callable[[float], bool]) -> float:
        """Run as long as ``go_on(seconds so far)`` says so, by each thread at least one unit."""
        taken = [0.0] * self.threads
        work = [self.make() for _ in range(self.threads)]

        def run(n: int) -> None:
            begin, units = time.perf_counter(), 0
            while units == 0 or go_on(time.perf_counter() - begin):
                work[n]()
                units += 1
            taken[n] = (time.perf_counter() - begin) / units

        others = [threading.Thread(target=run, args=(n,)) for n in range(1, self.threads)]
        for other in others:
            other.start()
        run(0)
        for other in others:
            other.join()
        return statistics.mean(taken)


def _compute() -> Callable[[], object]:
    """Sines of 16,384 numbers: they fit into the processor's own cache."""
    angles = np.linspace(0.0, 1.0, 16_384)
    into = np.empty_like(angles)

    def unit() -> None:
        for _ in range(20):
            np.sin(angles, out=into)

    return unit


def _memory() -> Callable[[], object]:
    """Copies of 64 MiB: nothing of it stays in any cache."""
    source, target = np.ones(64 * MIB, np.uint8), np.ones(64 * MIB, np.uint8)
    return lambda: np.copyto(target, source)


LOOPS: Final = {"": Loop(make=_compute), "_two_threads": Loop(make=_compute, threads=2), "_memory": Loop(make=_memory)}


def slowdown(url: str, folder: Path, state: dict[str, Any], loop: Loop, pairs: int, window_s: float) -> float:
    """By which part of itself the loop is slower during an upload: the median of on/off pairs. 0.03 is 3 %.

    ``window_s`` is how long the loop runs alone; beside an upload it runs as long as that takes.
    """
    found = []
    with CheckpointManager(str(folder), coordinator_url=url, job=f"loop-{folder.name}") as manager:
        manager.save_async(state, step=0).durable.result(timeout=600)
        loop.seconds_per_unit(lambda seconds: seconds < window_s / 4)
        for step in range(1, pairs + 1):
            off = loop.seconds_per_unit(lambda seconds: seconds < window_s)
            handle = manager.save_async(state, step=step)
            on = loop.seconds_per_unit(lambda _, durable=handle.durable: not durable.done())  # type: ignore[misc]
            handle.durable.result(timeout=600)
            found.append(on / off - 1)
            time.sleep(0.5)  # what the disk still does on its own, and the next slot
    return statistics.median(found)


def cap_for(url: str, folder: Path, suffix: str, pairs: int, window_s: float, *, seed: int) -> tuple[float, float]:
    """The largest cap in MB/s, of CAPS_MBPS, at which that loop is less than 5 % slower, and by how much it is; the smallest if none.

    A smaller cap is taken to slow the loop less, so that the search halves what is left instead of trying each.
    """
    slower_by: dict[int, float] = {}
    low, high = 0, len(CAPS_MBPS) - 1
    while low <= high:
        middle = (low + high) // 2
        cap = CAPS_MBPS[middle]
        state = {"w": np.random.default_rng(seed).random(int(cap * CAPPED_S * 1e6) // 8)}
        with uploaders.worker(url, folder, DTR_UPLOAD_MBPS=str(cap)):
            slower_by[cap] = slowdown(url, folder / f"cap{cap}{suffix}", state, LOOPS[suffix], pairs, window_s)
        low, high = (low, middle - 1) if slower_by[cap] < BOUND else (middle + 1, high)
    kept = [cap for cap, by in slower_by.items() if by < BOUND]
    best = max(kept) if kept else min(slower_by)
    return float(best), slower_by[best]
