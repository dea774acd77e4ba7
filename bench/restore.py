"""How fast a checkpoint is restored, beside a raw parallel read of the same object and beside a copy of memory.

What is measured of dtr is the whole call of ``restore``: lineage, manifest, the bytes verified, the arrays built. The raw read is what the
medium allows: as many threads as dtr uses, which are there already, each with pieces of its own, straight into memory; the same checksum
is verified on the way, of each block (as large as dtr's) while it is in the processor's cache. Both have their files in the page cache, and
both take new memory; with ``into`` both fill memory that was touched before. A slot in memory is compared with one copy per array into
touched memory, by threads that are there already: ``slot_over_memcpy`` is a restore into arrays that are there, as those of a rank that
survived, and ``slot_new_over_memcpy`` one that has to take new memory. All pairs alternate, and each ratio is the median of the pairs'.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import server
from bench.report import Report, parser
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.restoring.fetch import new_memory
from dtr.checkpoint.restoring.nearby import THREADS as MEMORY_THREADS
from dtr.checkpoint.restoring.source import OBJECT_BLOCK_BYTES
from dtr.checkpoint.survey import read_manifest
from dtr.checkpoint.uploading.upload import Uploader
from dtr.config import Settings
from dtr.host import host_id
from dtr.store import open_store

__all__ = ["main"]

MIB: Final = 1 << 20
RUNS_AHEAD: Final = 1  # not counted: the first of each takes its threads, clients and pages
State = dict[str, Any]
Call = Callable[[], object]


@dataclass(slots=True, kw_only=True)
class Found:
    """The sections of the report as they fill."""

    figures: dict[str, float] = field(default_factory=dict)
    limit: dict[str, float] = field(default_factory=dict)
    peer: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, limit: str, ours: list[float], theirs: list[float], size_bytes: int) -> None:
        """The rates of both, in MiB/s."""
        self.figures[f"{name}_mib_per_s"] = size_bytes / MIB / statistics.median(ours)
        self.limit[f"{limit}_mib_per_s"] = size_bytes / MIB / statistics.median(theirs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    flags = parser("restore", "How fast a checkpoint is restored, beside a raw read of the same object and a copy of memory.")
    flags.add_argument("--mib", type=int, default=1024, help="size of the state (default 1024)")
    flags.add_argument("--arrays", type=int, default=64, help="arrays of the state (default 64)")
    flags.add_argument("--pairs", type=int, default=7, help="alternating pairs (default 7)")
    flags.add_argument("--s3-mib", type=int, default=256, help="size of the state on the S3 server; 0: none (default 256)")
    flags.add_argument("--folder", type=Path, help="on the disk to be read (default: where temporary files go)")
    flags.add_argument("--short", action="store_true", help="256 MiB, 64 MiB on S3, 3 pairs")
    flags.add_argument("--no-peers", action="store_true", help="only dtr and the raw read")
    options = flags.parse_args(argv)
    if options.short:
        options.mib, options.s3_mib, options.pairs = 256, 64, 3
    found = Found()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dtr-bench-", dir=options.folder)))
        staging = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="dtr-bench-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        )
        settings = Settings.load(redis_url=stack.enter_context(server.running()), staging=staging, job="restore", environ={})
        state = _state(options.mib * MIB, options.arrays, options.seed)
        _local(found, settings, str(folder / "store"), state, options.pairs)
        if not options.no_peers:
            _peers(found, folder, state)
        if options.s3_mib:
            bucket = stack.enter_context(_s3_server(folder))
            _remote(
                found, replace(settings, job="remote"), bucket, _state(options.s3_mib * MIB, options.arrays, options.seed), options.pairs
            )
    params = {"mib": options.mib, "arrays": options.arrays, "pairs": options.pairs, "s3_mib": options.s3_mib, "seed": options.seed}
    report = Report(name="restore", params=params, figures=found.figures, limit=found.limit, peer=found.peer, ratios=found.ratios)
    report.emit(as_json=options.json)
    return 0


def _state(size_bytes: int, count: int, seed: int) -> State:
    rng = np.random.default_rng(seed)
    return {f"w{n}": rng.random(max(1, size_bytes // count // 4), dtype=np.float32) for n in range(count)}


def _blank(state: State) -> State:
    return {name: np.full_like(array, -1.0) for name, array in state.items()}


def _local(found: Found, settings: Settings, store: str, state: State, pairs: int) -> None:
    """From a local store, whole, in place and in part; and from the slot that the save left."""
    with CheckpointManager(store, settings=settings) as manager:
        run = _commit(manager, settings, state)
        _memory(manager, state, pairs, found)
        # Another process would not see this one's slots; this reader does not look at them.
        with (
            CheckpointManager(store, settings=replace(settings, staging=f"{settings.staging}/none")) as reader,
            _pool(open_store(store).reads_at_once) as pool,
        ):
            facts = read_manifest(open_store(store).child(settings.job), run, 0).parts[0]
            path = f"{store}/{settings.job}/{facts.object}"
            size_bytes, into = facts.size_bytes, _blank(state)
            touched = np.ones(size_bytes, np.uint8)
            ours, raw = _pairs(reader.restore, lambda: _raw_read(pool, path, facts, new_memory(size_bytes)), pairs)
            found.add("local", "raw_read", ours, raw, size_bytes)
            found.ratios["over_raw_read"] = _ratio(raw, ours)
            ours, raw = _pairs(lambda: reader.restore(into=into), lambda: _raw_read(pool, path, facts, touched), pairs)
            found.add("local_into", "raw_read_touched", ours, raw, size_bytes)
            found.ratios["over_raw_read_into"] = _ratio(raw, ours)
            tenth = [name for n, name in enumerate(state) if n % 10 == 0]
            ours, _ = _pairs(lambda: reader.restore(only=tenth), lambda: None, pairs)
            found.figures["local_tenth_ms"] = statistics.median(ours) * 1000
            _check(state, reader.restore(), "store")


def _memory(manager: CheckpointManager, state: State, pairs: int, found: Found) -> None:
    """From the slot, beside one copy per array into memory that was touched before."""
    targets, into, size_bytes = _blank(state), _blank(state), sum(array.nbytes for array in state.values())
    restored = manager.restore()
    _check(state, restored, "slot")
    del restored
    with _pool(min(MEMORY_THREADS, os.cpu_count() or 1)) as pool:
        ours, copies = _pairs(manager.restore, lambda: _memcpy(pool, state, targets), pairs)
        found.add("slot", "memcpy", ours, copies, size_bytes)
        found.ratios["slot_new_over_memcpy"] = _ratio(ours, copies)
        ours, copies = _pairs(lambda: manager.restore(into=into), lambda: _memcpy(pool, state, targets), pairs)
        found.figures["slot_into_mib_per_s"] = size_bytes / MIB / statistics.median(ours)
        found.ratios["slot_over_memcpy"] = _ratio(ours, copies)


def _remote(found: Found, settings: Settings, bucket: Any, state: State, pairs: int) -> None:
    """From a real S3 server, beside ranged GETs by boto3 straight into memory."""
    url = f"s3://{bucket.bucket}/dtr?endpoint={bucket.endpoint}&region={bucket.region}"
    with CheckpointManager(url, settings=settings) as manager:
        run = _commit(manager, settings, state)
    threads = open_store(url).reads_at_once
    with CheckpointManager(url, settings=replace(settings, staging=f"{settings.staging}/none")) as reader, _pool(threads) as pool:
        facts = read_manifest(open_store(url).child(settings.job), run, 0).parts[0]
        get = _getter(bucket, f"dtr/{settings.job}/{facts.object}", threads)
        ours, raw = _pairs(reader.restore, lambda: _verified(pool, get, facts, new_memory(facts.size_bytes)), pairs)
        found.add("s3", "s3_raw_read", ours, raw, facts.size_bytes)
        found.ratios["s3_over_raw_read"] = _ratio(raw, ours)
        _check(state, reader.restore(), "store")


def _commit(manager: CheckpointManager, settings: Settings, state: State) -> str:
    """Save the state as step 0, and carry it to the store in this process; the run's name."""
    handle = manager.save_async(state, 0)
    uploader = Uploader(redis_url=settings.redis_url, staging=settings.staging, host=host_id(settings.staging))
    try:
        deadline = time.monotonic() + 600
        while not handle.durable.done():
            if time.monotonic() > deadline:
                raise RuntimeError("the benchmark's checkpoint was not committed within 10 minutes")
            with contextlib.suppress(Exception):  # Redis has not heard of the save yet
                uploader.upload_part(settings.job, handle.run, 0, 0)
            time.sleep(0.1)
    finally:
        uploader.close()
    return handle.durable.result().run


def _pairs(ours: Call, theirs: Call, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, alternating; the order within a pair changes, too."""
    taken: tuple[list[float], list[float]] = ([], [])
    for n in range(pairs + RUNS_AHEAD):
        for which in (0, 1) if n % 2 else (1, 0):
            begin = time.perf_counter()
            kept = (ours, theirs)[which]()
            seconds = time.perf_counter() - begin
            del kept  # giving the memory back is not part of it
            if n >= RUNS_AHEAD:
                taken[which].append(seconds)
    return taken


def _ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


# --- what the medium allows -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that wait for work: what a figure is compared with does not start its own while the clock runs."""
    started = threading.Barrier(threads + 1)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(started.wait)
        started.wait()
        yield pool


def _raw_read(pool: ThreadPoolExecutor, path: str, facts: PartFacts, memory: Any) -> Any:
    """The object, read piece by piece by a few threads and verified; the memory."""
    descriptor = os.open(path, os.O_RDONLY)

    def fill(view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(descriptor, [view], offset)
            view, offset = view[count:], offset + count

    try:
        return _verified(pool, fill, facts, memory)
    finally:
        os.close(descriptor)


def _verified(pool: ThreadPoolExecutor, fill: Callable[[memoryview, int], None], facts: PartFacts, memory: Any) -> Any:
    from awscrt.checksums import crc64nvme

    def piece(start: int) -> bool:
        end, at, crc = min(start + facts.piece_bytes, facts.size_bytes), start // facts.piece_bytes * 16, 0
        for low in range(start, end, OBJECT_BLOCK_BYTES):
            block = memoryview(memory)[low : min(low + OBJECT_BLOCK_BYTES, end)]
            fill(block, low)
            crc = crc64nvme(block, crc)
        return bool(crc == int(facts.pieces[at : at + 16], 16))

    if not all(pool.map(piece, range(0, facts.size_bytes, facts.piece_bytes))):
        raise RuntimeError("the raw read met a wrong checksum")
    return memory


def _memcpy(pool: ThreadPoolExecutor, state: State, targets: State) -> None:
    """One copy per array, by as many threads as dtr uses."""
    list(pool.map(lambda name: np.copyto(targets[name], state[name]), state))


def _getter(bucket: Any, key: str, threads: int) -> Callable[[memoryview, int], None]:
    import boto3
    from botocore.config import Config

    config = Config(max_pool_connections=threads, response_checksum_validation="when_required", s3={"addressing_style": "path"})
    client: Any = boto3.client("s3", endpoint_url=bucket.endpoint, region_name=bucket.region, config=config)

    def get(view: memoryview, offset: int) -> None:
        answer = client.get_object(Bucket=bucket.bucket, Key=key, Range=f"bytes={offset}-{offset + len(view) - 1}")
        while view and (count := answer["Body"].readinto(view)):
            view = view[count:]

    return get


def _check(state: State, restored: Any, source: str) -> None:
    """What is measured is right."""
    if restored.source != source or any(not np.array_equal(restored.state[name], array) for name, array in state.items()):
        raise RuntimeError(f"the restore from the {source} came from the {restored.source}, or is wrong")


@contextlib.contextmanager
def _s3_server(folder: Path) -> Iterator[Any]:
    from tests.servers import seaweed_server

    before = dict(os.environ)
    with seaweed_server(folder / "s3") as weed:
        os.environ.update(weed.env)
        try:
            yield weed
        finally:
            os.environ.clear()
            os.environ.update(before)


def _peers(found: Found, folder: Path, state: State) -> None:
    """What others need for the same state, from the same disk; those that are installed. None of them verifies a byte."""
    ways: dict[str, Call] = {}
    with contextlib.suppress(ImportError):
        from safetensors.numpy import load_file, save_file

        save_file(state, str(folder / "peer.safetensors"))
        ways["safetensors_load_file"] = lambda: load_file(str(folder / "peer.safetensors"))
    with contextlib.suppress(ImportError):
        import torch

        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, folder / "peer.pt")
        ways["torch_load"] = lambda: torch.load(folder / "peer.pt")
    for name, load in ways.items():
        taken, _ = _pairs(load, lambda: None, 3)
        found.peer[f"{name}_mib_per_s"] = sum(array.nbytes for array in state.values()) / MIB / statistics.median(taken)


if __name__ == "__main__":
    sys.exit(main())
