"""What the data plane costs: the loader against the bare reader of the same files, the ledger against bare scripts, and resuming.

The loader of one rank, ledger and all, against a loop that reads the same shards one after the other, in alternating rounds, and beside
the loaders of :mod:`bench.data_peers`; their figures and ratios are absent where they are not installed. A lease and a report against an
EVALSHA that does nothing with the same keys and arguments, over the same client. The time from a restored data state in the middle of ten
million samples to the first batch. Then an epoch of 1,000 workers on 100,000 shards: :mod:`bench.data_crowd`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import data_crowd, data_peers, server
from bench.report import Report, parser
from dtr.config import Settings
from dtr.datasets.consuming.datastate import Dynamic
from dtr.datasets.consuming.ledger import KEEP_MS, Ledger
from dtr.datasets.consuming.reports import Reports
from dtr.datasets.plane import DataPlane, plane_of
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.runs import World
from dtr.session import Session

__all__ = ["main"]

TRIVIAL = "return {KEYS[1], ARGV[1]}"
OPTIONS: dict[str, Any] = {
    "batch_size": 256, "global_batch_size": None, "epochs": 1, "columns": None, "seed": 0, "prefetch": 4, "mode": "dynamic",
    "tail": "empty", "window": None,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    flags = parser("data", "What the loader and its ledger cost.")
    flags.add_argument("--rounds", type=int, default=5, help="alternating pairs")
    flags.add_argument("--samples", type=int, default=200_000, help="of the files that are read")
    flags.add_argument("--epoch-samples", type=int, default=10_000_000, help="of the epoch that is resumed in its middle")
    flags.add_argument("--operations", type=int, default=5_000, help="leases and reports, each")
    flags.add_argument("--workers", type=int, default=1_000, help="simulated")
    flags.add_argument("--shards", type=int, default=100_000, help="that they share")
    flags.add_argument("--no-peers", action="store_true", help="without torch and mosaicml-streaming")
    options = flags.parse_args(argv)
    found = _Found()
    with server.running() as url, tempfile.TemporaryDirectory(prefix="dtr-bench-data-") as name:
        folder = Path(name)
        _reading(url, folder, options.samples, options.rounds, found)
        if not options.no_peers:
            _beside_peers(url, folder, options.samples, options.rounds, found)
        _operations(url, folder, options.operations, options.rounds, found)
        _resuming(url, folder, options.epoch_samples, found)
        found.figures |= data_crowd.measure(url, options.workers, options.shards)
    params = {name.replace("-", "_"): getattr(options, name) for name in ("rounds", "samples", "operations", "workers", "shards", "seed")}
    Report(
        name="data", params=params, figures=found.figures, limit=found.limit, peer=found.peer, ratios=found.ratios
    ).emit(as_json=options.json)  # fmt: skip
    return 0


@dataclass(slots=True)
class _Found:
    """What was measured so far."""

    figures: dict[str, float] = field(default_factory=dict)
    limit: dict[str, float] = field(default_factory=dict)
    peer: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)


@contextmanager
def _rank(url: str, folder: Path, job: str) -> Iterator[tuple[DataPlane, DatasetRegistry, Session]]:
    """A job of one rank, in a run."""
    settings = Settings.load(environ={}, redis_url=url, job=job, staging=str(folder / "staging"))
    with (
        closing(Session(settings, worker_id="w0", rank=0, world=World(low=1, high=1))) as session,
        closing(DatasetRegistry(url, job=job)) as registry,
    ):
        session.start().form()
        yield plane_of(session), registry, session


# --- reading --------------------------------------------------------------------------------------------------------------


def _reading(url: str, folder: Path, samples: int, rounds: int, found: _Found) -> None:
    for kind, size_bytes in {"jsonl": _write_lines(folder / "jsonl", samples), "npy": _write_rows(folder / "npy", samples)}.items():
        _read(url, folder, kind, "" if kind == "jsonl" else f"_{kind}", (samples, size_bytes), rounds, found)


def _read(url: str, folder: Path, kind: str, key: str, size: tuple[int, int], rounds: int, found: _Found) -> None:
    """Loader and bare reader over ``folder / kind``; ``size`` is in samples and bytes."""
    samples, size_bytes = size
    pairs = []
    for n in range(rounds + 1):
        with _rank(url, folder, f"read-{kind}-{n}") as (plane, registry, _):
            registry.register("d", path=folder / kind, format=kind, shard_size=5_000)
            bare_s = _timed(lambda registry=registry: [shard.read() for shard in registry.get("d").shards()] and None)  # type: ignore[misc]
            loader_s = _timed(lambda plane=plane, registry=registry: _consume(plane, registry))  # type: ignore[misc]
            plane.end_run()
        if n:  # the first round warms the page cache
            pairs.append((bare_s, loader_s))
    median_s = statistics.median(loader for _, loader in pairs)
    found.figures[f"samples_per_s{key}"], found.figures[f"mb_per_s{key}"] = samples / median_s, size_bytes / 1e6 / median_s
    found.limit[f"bare_samples_per_s{key}"] = samples / statistics.median(bare for bare, _ in pairs)
    found.ratios[f"over_bare_reader{key}"] = statistics.median(bare / loader for bare, loader in pairs)


def _beside_peers(url: str, folder: Path, samples: int, rounds: int, found: _Found) -> None:
    """The ratios are of the same files: where a peer needs a format of its own, the loader reads that too."""
    speeds = data_peers.samples_per_s(folder, OPTIONS["batch_size"])
    if "streaming" in speeds:
        size_bytes = sum(path.stat().st_size for path in (folder / "mds").iterdir())
        _read(url, folder, "mds", "_mds", (samples, size_bytes), min(rounds, 2), found)
    for peer, key in {"torch": "", "torch_npy": "_npy", "streaming": "_mds"}.items():
        if peer in speeds:
            found.peer[f"{peer}_samples_per_s"] = speeds[peer]
            found.ratios[f"over_{peer}"] = found.figures[f"samples_per_s{key}"] / speeds[peer]


def _consume(plane: DataPlane, registry: DatasetRegistry) -> None:
    for step, batch in enumerate(plane.loader(registry, "d", **OPTIONS)):
        plane.consumed(batch, step)


def _write_lines(folder: Path, samples: int) -> int:
    folder.mkdir()
    for part in range(4):
        rows = range(part * samples // 4, (part + 1) * samples // 4)
        text = "".join(json.dumps({"id": i, "x": i / samples, "tokens": list(range(i % 7, i % 7 + 32))}) + "\n" for i in rows)
        (folder / f"{part}.jsonl").write_text(text)
    return sum(path.stat().st_size for path in folder.iterdir())


def _write_rows(folder: Path, samples: int) -> int:
    folder.mkdir()
    for part in range(4):
        np.save(folder / f"{part}.npy", np.full((samples // 4, 1024), part, dtype=np.uint8))
    return sum(path.stat().st_size for path in folder.iterdir())


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# --- the ledger -----------------------------------------------------------------------------------------------------------


def _operations(url: str, folder: Path, count: int, rounds: int, found: _Found) -> None:
    np.save(folder / "ops.npy", np.zeros(2 * count * rounds, dtype=np.uint8))
    with _rank(url, folder, "operations") as (_, registry, session):
        registry.register("ops", path=folder / "ops.npy", format="npy", shard_size=2)
        spec = registry.get("ops").spec
        ledger = Ledger(session, spec, 0)
        ledger.open(Dynamic(version=1, digest=spec.digest, seed=0))
        state, run, who = session.state, session.run, session.identity
        sha = state.redis.script_load(TRIVIAL)
        keys = [state.keys.meta, state.keys.roster, state.keys.fences, ledger.keys.ledger, ledger.keys.taken, ledger.quarantine_key]
        args = [who.state_id, run.id, "w0", 0, who.incarnation, 5, 1, 0, 0, KEEP_MS, " ".join(map(str, range(64))), 1]
        reports = Reports(url, "bench")
        reports.connect()
        report_keys = [state.keys.roster, ledger.keys.ledger, ledger.keys.done]
        report = [f"{who.state_id} {run.id}", "w0", 0, who.incarnation, 1, 3, 25, 7, "7:0-25", 1, KEEP_MS, 0, 1, "0-1"]
        shares: dict[str, list[float]] = {"lease": [], "report": []}
        for n in range(rounds):
            trivial_s = _timed(lambda: [state.redis.evalsha(sha, len(keys), *keys, *args) for _ in range(count)] and None)
            mine = range(n * count, (n + 1) * count)
            lease_s = _timed(lambda mine=mine: [ledger.lease([k], want=1, have=0, anything=False) for k in mine] and None)  # type: ignore[misc]
            report_s = _timed(lambda: _send(reports, report_keys, report, count))
            shares["lease"].append(trivial_s / lease_s)
            shares["report"].append(trivial_s / report_s)
            found.limit["evalsha_per_s"], found.figures["leases_per_s"], found.figures["reports_per_s"] = (
                count / seconds for seconds in (trivial_s, lease_s, report_s)
            )
        reports.close()
    found.ratios["lease_over_evalsha"] = statistics.median(shares["lease"])
    found.ratios["report_over_evalsha"] = statistics.median(shares["report"])


def _send(reports: Reports, keys: list[str], report: list[Any], count: int) -> None:
    for n in range(count):
        reports.send("ledger_report", keys, report)
        if n % 100 == 99 and not reports.flush(30):
            raise RuntimeError("the server does not answer reports")


# --- resuming -------------------------------------------------------------------------------------------------------------


def _resuming(url: str, folder: Path, samples: int, found: _Found) -> None:
    np.save(folder / "long.npy", np.arange(samples, dtype=np.int32))
    slowest = 0.0
    for mode in ("dynamic", "deterministic"):
        with _rank(url, folder, f"resume-{mode}") as (plane, registry, session):
            registry.register("long", path=folder / "long.npy", format="npy", shard_size=max(1, samples // 10_000), shuffle=True)
            spec = registry.get("long").spec
            state: dict[str, Any] = {"version": 1, "digest": spec.digest, "seed": 0, "epoch": 1, "mode": mode}
            asked = OPTIONS
            if mode == "dynamic":  # every other shard: the longest text that a state can have
                state |= {"done": ",".join(str(n) for n in range(0, spec.shards, 2)), "partial": {"1": "0-1"}}
            else:
                state |= {"batch": samples // 512, "global_batch_size": 256, "window": 0, "tail": "empty"}
                asked = OPTIONS | {"batch_size": None, "global_batch_size": 256, "window": 0}
            plane.end_run()

            def first(plane: DataPlane = plane, state: dict[str, Any] = state, mode: str = mode, asked: dict[str, Any] = asked) -> None:
                plane.restored({"long": state})
                next(plane.loader(registry, "long", **(asked | {"mode": mode, "epochs": 3})))

            took_s = _timed(first)
            found.figures[f"resume_{mode}_s"], slowest = took_s, max(slowest, took_s)
            plane.end_run()
            session.check()
    found.figures["resume_s"] = slowest


if __name__ == "__main__":
    raise SystemExit(main())
