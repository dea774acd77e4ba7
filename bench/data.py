"""What the data plane costs: the loader against the bare reader of the same files, the ledger against bare scripts, and resuming.

The loader of one rank, ledger and all, in alternating rounds against the bare reader, which reads the same shards one after the other with
the same code for the format, and against a plain loop of orjson or numpy, which shares no code with it (``over_plain_loop``); in
deterministic mode, too; and beside the loaders of :mod:`bench.data_peers`, whose figures and ratios are absent where they are not
installed. A lease and a report against an EVALSHA that does nothing, with the same keys and arguments and as many on their way
at once: leases one by one, reports by the hundred. The time from a restored data state in the middle of ten million samples to the first
batch. Then an epoch of 1,000 workers on 100,000 shards: :mod:`bench.data_crowd`.
"""

from __future__ import annotations

import itertools
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
import orjson
from hiredis import pack_command

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
    "batch_size": 256, "global_batch_size": None, "epochs": 1, "columns": None, "seed": 0, "prefetch": 8, "mode": "dynamic",
    "tail": "empty", "window": None,
}  # fmt: skip
IN_SEQUENCE = OPTIONS | {"mode": "deterministic", "batch_size": None, "global_batch_size": OPTIONS["batch_size"]}
CANDIDATES = 64  # as a loader asks for
AT_ONCE = 500  # operations of a kind, before it is another one's turn


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
        key = "" if kind == "jsonl" else f"_{kind}"
        _read(url, folder, kind, key, (samples, size_bytes), rounds, found)
        took_s = [_loading_s(url, folder, kind, f"sequence-{kind}-{n}", IN_SEQUENCE) for n in range(rounds)]
        found.figures[f"deterministic_samples_per_s{key}"] = samples / statistics.median(took_s)


def _read(url: str, folder: Path, kind: str, key: str, size: tuple[int, int], rounds: int, found: _Found) -> None:
    """Loader, bare reader and, where there is one, plain loop over ``folder / kind``; ``size`` is in samples and bytes."""
    samples, size_bytes = size
    rows = []
    for n in range(rounds + 1):
        plain_s = _timed(lambda: PLAIN[kind](folder / kind)) if kind in PLAIN else 0.0
        bare_s = _bare_s(url, folder, kind, f"bare-{kind}-{n}")
        loader_s = _loading_s(url, folder, kind, f"read-{kind}-{n}", OPTIONS)
        if n:  # the first round warms the page cache
            rows.append((plain_s, bare_s, loader_s))
    plain_s, bare_s, median_s = (statistics.median(of) for of in zip(*rows, strict=True))
    found.figures[f"samples_per_s{key}"], found.figures[f"mb_per_s{key}"] = samples / median_s, size_bytes / 1e6 / median_s
    found.limit[f"bare_samples_per_s{key}"] = samples / bare_s
    found.ratios[f"over_bare_reader{key}"] = statistics.median(bare / loader for _, bare, loader in rows)
    if kind in PLAIN:
        found.limit[f"plain_samples_per_s{key}"] = samples / plain_s
        found.ratios[f"over_plain_loop{key}"] = statistics.median(plain / loader for plain, _, loader in rows)


def _bare_s(url: str, folder: Path, kind: str, job: str) -> float:
    """All shards, one after the other, by the format's own reader: no ledger, no batches."""
    with _rank(url, folder, job) as (_, registry, _session):
        registry.register("d", path=folder / kind, format=kind, shard_size=5_000)
        return _timed(lambda: [shard.read() for shard in registry.get("d").shards()] and None)


def _loading_s(url: str, folder: Path, kind: str, job: str, options: dict[str, Any]) -> float:
    with _rank(url, folder, job) as (plane, registry, _):
        registry.register("d", path=folder / kind, format=kind, shard_size=5_000)
        took_s = _timed(lambda: _consume(plane, registry, options))
        plane.end_run()
    return took_s


def _plain_lines(folder: Path) -> None:
    """What anybody would write: a batch of lines at a time, parsed, and its columns as arrays."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            while lines := list(itertools.islice(file, OPTIONS["batch_size"])):
                rows = [orjson.loads(line) for line in lines]
                _ = {column: np.array([row[column] for row in rows]) for column in rows[0]}


def _plain_rows(folder: Path) -> None:
    size = OPTIONS["batch_size"]
    for path in sorted(folder.iterdir()):
        rows = np.load(path)
        for start in range(0, len(rows), size):
            _ = rows[start : start + size]


PLAIN: dict[str, Callable[[Path], None]] = {"jsonl": _plain_lines, "npy": _plain_rows}


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


def _consume(plane: DataPlane, registry: DatasetRegistry, options: dict[str, Any]) -> None:
    for step, batch in enumerate(plane.loader(registry, "d", **options)):
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
    np.save(folder / "ops.npy", np.zeros(2 * (count * rounds + CANDIDATES), dtype=np.uint8))
    with _rank(url, folder, "operations") as (_, registry, session):
        registry.register("ops", path=folder / "ops.npy", format="npy", shard_size=2)
        spec = registry.get("ops").spec
        ledger = Ledger(session, spec, 0)
        ledger.open(Dynamic(version=1, digest=spec.digest, seed=0))
        state, run, who = session.state, session.run, session.identity
        sha = state.redis.script_load(TRIVIAL)
        keys = [state.keys.meta, state.keys.roster, state.keys.fences, ledger.keys.ledger, ledger.keys.taken, ledger.quarantine_key]
        args = [who.state_id, run.id, "w0", 0, who.incarnation, 0, 1, 0, -1, KEEP_MS]
        report_keys = [state.keys.roster, ledger.keys.ledger, ledger.keys.done]
        report = [f"{who.state_id} {run.id}", "w0", 0, who.incarnation, 1, 3, 25, 7, "7:0-25", 1, KEEP_MS, 0, 1, "0-1"]
        reports = Reports(url, "bench")
        reports.connect()
        bare = state.redis.connection_pool.get_connection()
        ways: dict[str, Callable[[range], Any]] = {
            "evalsha": lambda some: [state.redis.evalsha(sha, len(keys), *keys, *args, _candidates(k), k) for k in some],
            "lease": lambda some: [ledger.lease(range(k, k + CANDIDATES), want=1, have=0, anything=False) for k in some],
            "piped": lambda some: _trivially(bare, [sha, len(report_keys), *report_keys, *report], len(some)),
            "report": lambda some: _report(reports, report_keys, report, len(some)),
        }
        took_s: dict[str, list[float]] = {name: [] for name in ways}
        for start in range(0, count * rounds, AT_ONCE):  # in turns so short that what else runs here disturbs all alike
            for name, call in ways.items():
                some = range(start, min(start + AT_ONCE, count * rounds))
                took_s[name].append(_timed(lambda call=call, some=some: call(some)) / len(some))  # type: ignore[misc]
        state.redis.connection_pool.release(bare)
        reports.close()
    per_s = {name: 1 / statistics.median(some) for name, some in took_s.items()}
    found.limit |= {"evalsha_per_s": per_s["evalsha"], "piped_evalsha_per_s": per_s["piped"]}
    found.figures |= {"leases_per_s": per_s["lease"], "reports_per_s": per_s["report"]}
    for ours, theirs in (("lease", "evalsha"), ("report", "piped")):
        pairs = zip(took_s[theirs], took_s[ours], strict=True)
        found.ratios[f"{ours}_over_evalsha"] = statistics.median(bare_s / own_s for bare_s, own_s in pairs)


def _candidates(first: int) -> str:
    return " ".join(map(str, range(first, first + CANDIDATES)))


def _trivially(connection: Any, command: list[Any], count: int) -> None:
    """The script that does nothing as reports are sent: one by one, and the answers of all read in the end."""
    for _ in range(count):
        connection.send_packed_command([pack_command(("EVALSHA", *command))])
    for _ in range(count):
        connection.read_response()


def _report(reports: Reports, keys: list[str], report: list[Any], count: int) -> None:
    for _ in range(count):
        reports.send("ledger_report", keys, report)
    if not reports.flush(30):
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
