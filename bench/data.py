"""What the data plane costs: the loader against the bare reader of the same files, the ledger against bare scripts, and resuming.

The loader of one rank, ledger and all, against a loop that reads the same shards one after the other, in alternating rounds. A lease and a
report against an EVALSHA that does nothing with the same keys and arguments, over the same client. The time from a restored data state in
the middle of ten million samples to the first batch. Then 1,000 workers on 100,000 shards: the server's CPU, memory and slowest script.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench import server
from bench.report import Report, parser
from dtr.config import Settings
from dtr.datasets.datastate import Dynamic
from dtr.datasets.ledger import KEEP_MS, Ledger, base_digest, taken_bits
from dtr.datasets.plane import DataPlane, plane_of
from dtr.datasets.registry import DatasetRegistry
from dtr.datasets.reports import Reports
from dtr.membership import Identity, join, open_state
from dtr.runs import Run, World, read_run
from dtr.session import Session
from dtr.state.job import JobState

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
    options = flags.parse_args(argv)
    figures: dict[str, float] = {}
    limit: dict[str, float] = {}
    peer: dict[str, float] = {}
    ratios: dict[str, float] = {}
    with server.running() as url, tempfile.TemporaryDirectory(prefix="dtr-bench-data-") as folder:
        _reading(url, Path(folder), options.samples, options.rounds, figures, limit, peer, ratios)
        _operations(url, Path(folder), options.operations, options.rounds, figures, limit, ratios)
        _resuming(url, Path(folder), options.epoch_samples, figures)
        _crowd(url, options.workers, options.shards, figures)
    params = {name.replace("-", "_"): getattr(options, name) for name in ("rounds", "samples", "operations", "workers", "shards", "seed")}
    Report(name="data", params=params, figures=figures, limit=limit, peer=peer, ratios=ratios).emit(as_json=options.json)
    return 0


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


def _reading(
    url: str, folder: Path, samples: int, rounds: int, figures: dict[str, float], limit: dict[str, float], peer: dict[str, float],
    ratios: dict[str, float],
) -> None:  # fmt: skip
    sizes = {"jsonl": _write_lines(folder / "jsonl", samples), "npy": _write_rows(folder / "npy", samples)}
    for kind, size_bytes in sizes.items():
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
        key = "" if kind == "jsonl" else f"_{kind}"
        figures[f"samples_per_s{key}"], figures[f"mb_per_s{key}"] = samples / median_s, size_bytes / 1e6 / median_s
        limit[f"bare_samples_per_s{key}"] = samples / statistics.median(bare for bare, _ in pairs)
        ratios[f"over_bare_reader{key}"] = statistics.median(bare / loader for bare, loader in pairs)
    torch_s = _torch_s(folder / "npy")
    if torch_s is not None:
        peer["torch_samples_per_s_npy"] = samples / torch_s
        ratios["over_torch_npy"] = figures["samples_per_s_npy"] / peer["torch_samples_per_s_npy"]


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


def _torch_s(folder: Path) -> float | None:
    """The DataLoader of torch over the same rows, a map-style data set of mapped files, read in this process as ours is."""
    try:
        from torch.utils.data import DataLoader, Dataset
    except ImportError:
        return None
    files = [np.load(path, mmap_mode="r") for path in sorted(folder.iterdir())]

    class Mapped(Dataset):  # type: ignore[misc, unused-ignore]
        def __len__(self) -> int:
            return sum(map(len, files))

        def __getitem__(self, index: int) -> Any:
            return np.array(files[index // len(files[0])][index % len(files[0])])

    return _timed(lambda: [None for _ in DataLoader(Mapped(), batch_size=256)] and None)


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# --- the ledger -----------------------------------------------------------------------------------------------------------


def _operations(
    url: str, folder: Path, count: int, rounds: int, figures: dict[str, float], limit: dict[str, float], ratios: dict[str, float]
) -> None:
    np.save(folder / "ops.npy", np.zeros(2 * count * rounds, dtype=np.uint8))
    with _rank(url, folder, "operations") as (_, registry, session):
        registry.register("ops", path=folder / "ops.npy", format="npy", shard_size=2)
        spec = registry.get("ops").spec
        ledger = Ledger(session, spec, 0)
        ledger.open(Dynamic(version=1, digest=spec.digest, seed=0))
        state, run, who = session.state, session.run, session.identity
        sha = state.redis.script_load(TRIVIAL)
        keys = [state.keys.meta, state.keys.roster, state.keys.fences, *ledger.keys, ledger.quarantine_key]
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
            limit["evalsha_per_s"], figures["leases_per_s"], figures["reports_per_s"] = (
                count / seconds for seconds in (trivial_s, lease_s, report_s)
            )
        reports.close()
    ratios["lease_over_evalsha"] = statistics.median(shares["lease"])
    ratios["report_over_evalsha"] = statistics.median(shares["report"])


def _send(reports: Reports, keys: list[str], report: list[Any], count: int) -> None:
    for n in range(count):
        reports.send("ledger_report", keys, report)
        if n % 100 == 99 and not reports.flush(30):
            raise RuntimeError("the server does not answer reports")


# --- resuming -------------------------------------------------------------------------------------------------------------


def _resuming(url: str, folder: Path, samples: int, figures: dict[str, float]) -> None:
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
            figures[f"resume_{mode}_s"], slowest = took_s, max(slowest, took_s)
            plane.end_run()
            session.check()
    figures["resume_s"] = slowest


# --- many workers ---------------------------------------------------------------------------------------------------------


def _crowd(url: str, workers: int, shards: int, figures: dict[str, float]) -> None:
    with closing(JobState(url, "crowd", name="bench")) as state:
        members, run = _formed(state, workers)
        keys = state.keys.ledger("d", 0, run.id)
        base = Dynamic(version=1, digest="d", seed=0)
        state.redis.config_set("slowlog-log-slower-than", 100)
        state.redis.config_set("slowlog-max-len", 20_000)
        bits = taken_bits(base, shards)
        for who in members:
            open_args = [1, "d", "dynamic", 0, shards, base_digest(base), bits, KEEP_MS]
            where = [state.keys.meta, state.keys.roster, state.keys.run(run.id), keys.ledger, keys.taken]
            state.call("ledger_open", where, [*_seat(who, run), *open_args])
        rounds, each, slowest = 5, max(1, shards // workers), []
        before, started = state.redis.info("cpu"), time.perf_counter()
        for turn in range(rounds):
            state.redis.slowlog_reset()
            for rank, who in enumerate(members):
                _live(state, run, who, keys, candidates=range(rank * each, (rank + 1) * each), turn=turn)
            slowest.append(max((entry["duration"] / 1000 for entry in state.redis.slowlog_get(20_000)), default=0.1))
        busy_s, after = time.perf_counter() - started, state.redis.info("cpu")
        used_s = sum(after[key] - before[key] for key in ("used_cpu_user", "used_cpu_sys"))
        # Of each round the slowest; of these the median, since a server that is preempted shows that as a slow script.
        figures["slowest_script_ms_1000"], figures["slowest_once_ms_1000"] = statistics.median(slowest), max(slowest)
        figures["core_share_1000"] = used_s / (rounds * workers) * 1_000  # each worker takes a shard and reports a batch every second
        figures["operations_per_s"] = 2 * rounds * workers / busy_s
        parts = [keys.ledger, keys.taken, keys.done, state.keys.fences]
        figures["redis_bytes_1000"] = sum(state.redis.memory_usage(key, samples=0) or 0 for key in parts)


def _formed(state: JobState, workers: int) -> tuple[list[Identity], Run]:
    state_id, k = open_state(state), state.keys
    members = [
        Identity(state_id=state_id, worker_id=f"w{n:04d}", incarnation=f"{n:012x}", host="bench", pid=1) for n in range(max(2, workers))
    ]
    for who in members:
        join(state, who, ttl_ms=3_600_000)
    name = "0001-data"
    for n, who in enumerate(members):
        state.call(
            "form_arrive",
            [k.meta, k.members, k.fences, k.roster, k.forming, k.wake, k.events, k.run(name)],
            [state_id, who.worker_id, who.incarnation, n, who.host, len(members), len(members), 0, name, ""],
        )
    return members, read_run(state, name, worker_id=members[0].worker_id)


def _seat(who: Identity, run: Run) -> list[Any]:
    return [who.state_id, run.id, who.worker_id, run.roster[who.worker_id].rank, who.incarnation]


def _live(state: JobState, run: Run, who: Identity, keys: Any, *, candidates: range, turn: int) -> None:
    """One worker takes a shard, as it does when the last one is read, and reports a batch."""
    k, first = state.keys, candidates[turn % len(candidates)]
    wanted = " ".join(map(str, candidates[turn % len(candidates) :][:64]))
    state.call(
        "ledger_lease",
        [k.meta, k.roster, k.fences, *keys, k.quarantine("d", "d")],
        [*_seat(who, run), turn, 1, turn, 0, KEEP_MS, wanted, turn + 1],
    )
    args = [f"{who.state_id} {run.id}", *_seat(who, run)[2:], turn, turn, 256, turn, f"{first}:0-256", turn - 8, KEEP_MS]
    state.call("ledger_report", [k.roster, keys.ledger, keys.done], args)


if __name__ == "__main__":
    raise SystemExit(main())
