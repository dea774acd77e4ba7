"""How fast a staged part becomes a durable checkpoint, beside a raw write to the same disk and beside what others do to the same S3 server.

What is measured of dtr is the way from the claim of a part to COMMITTED, by a real uploader with default settings: checksums, manifest,
reading it back and all. The time from staged to claimed is reported apart. Each comparison alternates, and its ratio is the median of the
rounds' ratios. The best peer is the one with the least median time; each has the best of the settings that were tried for it before.

``uploader_extra_mb`` is what all of the uploader's processes together hold at most, beyond slots and what they held when idle; it is taken
in a last round of each kind, which is not timed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import server, uploaders
from bench.report import Report, parser
from bench.upload_peers import Bucket, Cost, How, Put, measured, peers, quickest
from bench.uploaders import Took, Worker, took
from dtr.checkpoint.manager import CheckpointManager
from dtr.config import Settings
from dtr.runs import World
from dtr.session import Session

__all__ = ["main"]

MIB = 1 << 20
TRIED_SHARE = 4  # peers' settings are tried with a file of a quarter of the size: of 512 MiB, four of the largest parts
WRITE_BYTES = MIB  # the quickest for a raw write: the source stays in the cache
State = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Found:
    """The sections of the report as they fill."""

    figures: dict[str, float] = field(default_factory=dict)
    limit: dict[str, float] = field(default_factory=dict)
    peer: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    params: dict[str, float] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    flags = parser("upload", "How fast a staged part becomes a durable checkpoint, beside a raw write and beside other S3 clients.")
    flags.add_argument("--mib", type=int, default=2048, help="size of the part for the local store (default 2048)")
    flags.add_argument("--pairs", type=int, default=5, help="alternating pairs with a raw write (default 5)")
    flags.add_argument("--s3-mib", type=int, default=512, help="size of the part for the S3 server (default 512)")
    flags.add_argument("--rounds", type=int, default=7, help="alternating rounds with the peers (default 7)")
    flags.add_argument("--rank-mib", type=int, default=64, help="size of each part where 4 and 8 ranks save at once (default 64)")
    flags.add_argument("--folder", type=Path, help="on the disk to be measured (default: where temporary files go)")
    flags.add_argument("--short", action="store_true", help="512 MiB, 128 MiB for S3, 3 pairs and rounds")
    options = flags.parse_args(argv)
    if options.short:
        options.mib, options.s3_mib, options.pairs, options.rounds = 512, 128, 3, 3
    found = Found()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dtr-bench-", dir=options.folder)))
        bucket = stack.enter_context(_s3_server(folder))
        url = stack.enter_context(server.running())
        worker = stack.enter_context(uploaders.worker(url, folder))
        worker.came_up(url)
        _local(found, url, folder, worker, options.mib * MIB, options.pairs, options.seed)
        _beside_peers(found, url, bucket, worker, options.s3_mib * MIB, options.rounds, options.seed)
        stores = {"local": str(folder / "ranks"), "s3": _store_url(bucket)}
        _many_ranks(found, url, stores, worker, options.rank_mib * MIB, min(options.rounds, 3), options.seed)
    found.figures["uploader_extra_mb"] = (worker.peak_bytes - worker.idle_bytes) / 1e6
    found.figures["uploader_idle_mb"] = worker.idle_bytes / 1e6
    params = {
        "mib": options.mib, "pairs": options.pairs, "s3_mib": options.s3_mib, "rounds": options.rounds, "rank_mib": options.rank_mib,
        "seed": options.seed, **found.params,
    }  # fmt: skip
    Report(
        name="upload", params=params, figures=found.figures, limit=found.limit, peer=found.peer, ratios=found.ratios
    ).emit(as_json=options.json)  # fmt: skip
    return 0


# --- one part, one disk ---------------------------------------------------------------------------------------------


def _local(found: Found, url: str, folder: Path, worker: Worker, size_bytes: int, pairs: int, seed: int) -> None:
    state = _state(size_bytes, seed)
    ours, raw = [], []
    with _manager(url, str(folder / "store"), "local") as manager:
        for step in range(pairs + 1):  # the first one makes the slot, and starts the uploader's clients
            one, limit = _saved(manager, state, step), _raw_write(folder / "raw", state, size_bytes)
            if step:
                ours.append(one)
                raw.append(limit)
        with worker:
            _saved(manager, state, pairs + 1)
    shutil.rmtree(folder / "store", ignore_errors=True)  # the uploader lets older commits go at the same time
    found.ratios["local_over_raw"] = statistics.median(limit / one.upload_s for limit, one in zip(raw, ours, strict=True))
    found.figures["local_mb_s"] = size_bytes / 1e6 / statistics.median(one.upload_s for one in ours)
    found.figures["dispatch_ms"] = statistics.median(one.dispatch_s for one in ours) * 1000
    found.limit["raw_write_mb_s"] = size_bytes / 1e6 / statistics.median(raw)


def _raw_write(path: Path, state: State, size_bytes: int) -> float:
    """Seconds that a plain write and fsync of as many bytes takes."""
    content = next(iter(state.values())).view(np.uint8)[:WRITE_BYTES].tobytes()
    begin = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        for _ in range(0, size_bytes, WRITE_BYTES):
            os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    taken = time.perf_counter() - begin
    path.unlink()
    return taken


# --- one part, one S3 server ----------------------------------------------------------------------------------------


def _beside_peers(found: Found, url: str, bucket: Bucket, worker: Worker, size_bytes: int, rounds: int, seed: int) -> None:
    others = peers(bucket)
    costs: dict[str, list[Cost]] = {name: [] for name in ("dtr", *others)}
    state = _state(size_bytes, seed)
    ways = _ways(found, others, _state(size_bytes // TRIED_SHARE, seed))
    source = _as_file(state)
    try:
        with _manager(url, _store_url(bucket), "s3") as manager:
            for step in range(rounds + 1):
                for name in _rotated([*costs], step):
                    if name == "dtr":
                        cpu_s = worker.cpu_s()
                        wall_s = _saved(manager, state, step).upload_s
                        cost = Cost(wall_s=wall_s, cpu_s=worker.cpu_s() - cpu_s)
                    else:
                        cost = measured(others[name], source, f"peers/{name}", ways[name])
                    if step:
                        costs[name].append(cost)
            with worker:
                _saved(manager, state, rounds + 1)
    finally:
        source.unlink()
    best = min(others, key=lambda name: statistics.median(cost.wall_s for cost in costs[name]))
    beside = [*zip(costs["dtr"], costs[best], strict=True)]
    found.ratios["s3_over_best_peer"] = statistics.median(peer.wall_s / ours.wall_s for ours, peer in beside)
    found.ratios["cpu_over_best_peer"] = statistics.median(ours.cpu_s / peer.cpu_s for ours, peer in beside)
    for name, taken in costs.items():
        section = found.figures if name == "dtr" else found.peer
        prefix = "s3" if name == "dtr" else name
        section[f"{prefix}_mb_s"] = size_bytes / 1e6 / statistics.median(cost.wall_s for cost in taken)
        section[f"{prefix}_cpu_s_per_gb"] = statistics.median(cost.cpu_s for cost in taken) / (size_bytes / 1e9)


def _ways(found: Found, others: Mapping[str, Put], state: State) -> dict[str, How]:
    """The quickest way of each peer, which is noted among the report's parameters."""
    source = _as_file(state)
    try:
        ways = {name: quickest(put, source, f"peers/{name}") for name, put in others.items()}
    finally:
        source.unlink()
    for name, how in ways.items():
        found.params |= {f"{name}_part_mib": how.part_mib, f"{name}_at_once": how.at_once}
    return ways


def _rotated(names: list[str], by: int) -> list[str]:
    """Another order each round, so that nobody always comes after the same one."""
    by %= len(names)
    return names[by:] + names[:by]


def _as_file(state: State) -> Path:
    """The peers' source: in memory as the slot is."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    descriptor, path = tempfile.mkstemp(prefix="dtr-bench-", dir=base)
    with open(descriptor, "wb") as file:
        file.writelines(array.data for array in state.values())
    return Path(path)


# --- many ranks at once ---------------------------------------------------------------------------------------------


def _many_ranks(found: Found, url: str, stores: Mapping[str, str], worker: Worker, part_bytes: int, rounds: int, seed: int) -> None:
    """Ranks that save together: their bytes over the time from the first claim to the commit."""
    state = _state(part_bytes, seed)
    for kind, store in stores.items():
        for size in (4, 8):
            with _ranks(url, store, f"{kind}-{size}", size) as managers, ThreadPoolExecutor(size) as pool:
                taken = []
                for step in range(rounds + 2):  # the first one makes the slots, the last one is watched
                    with worker if step > rounds else contextlib.nullcontext():
                        handles = [*pool.map(lambda manager, step=step: manager.save_async(state, step), managers)]
                        for handle in handles:
                            handle.durable.result(timeout=600)
                        taken.append(took(_state_of(managers[0]), handles[0].run, step))
                        uploaders.settled(Path(managers[0].settings.staging))
            found.figures[f"{kind}_{size}_ranks_mb_s"] = size * part_bytes / 1e6 / statistics.median(one.upload_s for one in taken[1:-1])


@contextlib.contextmanager
def _ranks(url: str, store: str, job: str, size: int) -> Iterator[list[CheckpointManager]]:
    """The managers of one run, each with a session of its own, as the ranks' processes would have."""
    settings = Settings.load(redis_url=url, job=job, store=store)
    sessions = [Session(settings, worker_id=f"w{rank}", rank=rank, world=World(low=size, high=size)) for rank in range(size)]
    managers = [CheckpointManager(store, session=session) for session in sessions]
    try:
        for session in sessions:
            session.start()
        with ThreadPoolExecutor(size) as pool:
            list(pool.map(lambda session: session.form(), sessions))
        yield managers
    finally:
        for manager, session in zip(managers, sessions, strict=True):
            manager.close(0.5)
            session.close()


# --- common ground --------------------------------------------------------------------------------------------------


def _state(size_bytes: int, seed: int) -> State:
    return {"w": np.random.default_rng(seed).random(size_bytes // 4, dtype=np.float32)}


def _manager(url: str, store: str, job: str) -> CheckpointManager:
    return CheckpointManager(store, coordinator_url=url, job=f"upload-{job}")


def _saved(manager: CheckpointManager, state: State, step: int) -> Took:
    """One save, until its slot is free again."""
    handle = manager.save_async(state, step)
    handle.durable.result(timeout=600)
    found = took(_state_of(manager), handle.run, step)
    uploaders.settled(Path(manager.settings.staging))
    return found


def _state_of(manager: CheckpointManager) -> Any:
    session = manager._session
    if session is None:
        raise RuntimeError("a manager that has saved has a session")
    return session.state


def _store_url(bucket: Bucket) -> str:
    return f"s3://{bucket.name}/dtr?endpoint={bucket.endpoint}&region={bucket.region}"


@contextlib.contextmanager
def _s3_server(folder: Path) -> Iterator[Bucket]:
    """A real S3 server of its own; its credentials are in the environment meanwhile."""
    from tests.servers import seaweed_server

    before = dict(os.environ)
    with seaweed_server(folder / "s3") as weed:
        os.environ.update(weed.env)
        try:
            yield Bucket(endpoint=weed.endpoint, name=weed.bucket, region=weed.region)
        finally:
            os.environ.clear()
            os.environ.update(before)


if __name__ == "__main__":
    sys.exit(main())
