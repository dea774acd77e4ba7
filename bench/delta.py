"""What delta saves: bytes that go into the store for each save after the first, and the seconds until it is committed.

Four models learn between the saves (see ``bench.delta_models``): adapters beside frozen weights (LoRA), a few layers of a frozen stack, an
embedding table of which some rows occur, and, for the cost where nothing can be won, a model that trains every weight. The same saves are
made with ``delta=off``. Every last save is restored and compared, and timed: from chunks, and from whole objects.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench import server, uploaders
from bench.delta_models import MIB, MODELS
from bench.report import Report, parser
from dtr.checkpoint.delta.chunks import digest_of
from dtr.checkpoint.manager import CheckpointManager
from dtr.config import Settings
from dtr.state.job import JobState

__all__ = ["main"]

Delta = Literal["off", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One model's saves: bytes of the state; bytes and seconds of each save; seconds of the restore of the last."""

    state_bytes: int
    written_bytes: tuple[int, ...]
    seconds: tuple[float, ...]
    restore_s: float
    rests: int  # saves that delta will leave alone from now on

    def later(self, values: Sequence[float]) -> float:
        """The median of the saves after the first."""
        return statistics.median(values[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    flags = parser("delta", "Bytes and seconds of a save with delta, beside the same save without.")
    flags.add_argument("--mib", type=int, default=256, help="size of each state (default 256)")
    flags.add_argument("--saves", type=int, default=6, help="saves of each model (default 6; the fourth that does not pay is the last)")
    options = flags.parse_args(argv)
    figures: dict[str, float] = {}
    ratios: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dtr-bench-")))
        url = stack.enter_context(server.running())
        stack.enter_context(uploaders.worker(url, folder, DTR_KEEP_LAST="0"))
        for name, make in MODELS.items():
            auto, off = (
                _run(url, folder / f"{name}-{delta}", make(options.mib * MIB, options.seed), delta, options.saves) for delta in _BOTH
            )
            figures[f"{name}_state_mb"] = auto.state_bytes / 1e6
            figures[f"{name}_written_mb"] = auto.later(auto.written_bytes) / 1e6
            figures[f"{name}_commit_s"], figures[f"{name}_restore_s"] = auto.later(auto.seconds), auto.restore_s
            ratios[f"{name}_written"] = auto.later(auto.written_bytes) / off.later(off.written_bytes)
            ratios[f"{name}_seconds"] = auto.later(auto.seconds) / off.later(off.seconds)
            ratios[f"{name}_first_seconds"] = auto.seconds[0] / off.seconds[0]
            ratios[f"{name}_restore"] = auto.restore_s / off.restore_s
            figures[f"{name}_rests"] = auto.rests
        limit = {"blake3_gb_per_s": _hash_speed(options.seed)}
    params = {"mib": options.mib, "saves": options.saves, "seed": options.seed}
    Report(name="delta", params=params, figures=figures, limit=limit, ratios=ratios).emit(as_json=options.json)
    return 0


_BOTH: tuple[Delta, Delta] = ("auto", "off")


def _run(url: str, folder: Path, model: Any, delta: Delta, saves: int) -> Run:
    """Train and save in turn, on a store of its own, which is removed afterwards."""
    written, seconds, job = [], [], f"delta-{folder.name}"
    settings = replace(Settings.load(redis_url=url, job=job, keep_last=0), delta=delta)
    with CheckpointManager(str(folder), settings=settings) as manager:
        for step in range(saves):
            model.train()
            before = _stored_bytes(folder)
            began = time.perf_counter()
            size_bytes = manager.save_async(model.state(), step).durable.result(timeout=600).size_bytes
            seconds.append(time.perf_counter() - began)
            written.append(_stored_bytes(folder) - before)
        uploaders.settled(Path(settings.staging))
    restore_s = statistics.median(_restore_s(settings, folder, model.state()) for _ in range(3))
    with contextlib.closing(JobState(url, job, name="bench")) as state:
        rests = int(state.redis.hget(state.keys.delta, "0/rest") or 0)
    shutil.rmtree(folder)
    return Run(state_bytes=size_bytes, written_bytes=tuple(written), seconds=tuple(seconds), restore_s=restore_s, rests=rests)


def _restore_s(settings: Settings, folder: Path, state: dict[str, Any]) -> float:
    """Restore from the store, as a process does that has no slot, and compare; seconds of the restore."""
    with tempfile.TemporaryDirectory() as elsewhere:
        with CheckpointManager(str(folder), settings=replace(settings, staging=elsewhere)) as reader:
            began = time.perf_counter()
            found = reader.restore()
            seconds = time.perf_counter() - began
        if found is None or not _alike(found.state, state):
            raise RuntimeError(f"{folder.name}: what was restored is not what was saved")
    return seconds


def _alike(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return list(one) == list(other) and all(_alike(one[name], other[name]) for name in other)
    return bool(np.array_equal(one, other))


def _stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _hash_speed(seed: int) -> float:
    """Of one core."""
    data = memoryview(np.random.default_rng(seed).bytes(64 * MIB))
    began = time.perf_counter()
    digest_of([data])
    return len(data) / (time.perf_counter() - began) / 1e9


if __name__ == "__main__":
    sys.exit(main())
