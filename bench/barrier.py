"""Barriers of 100 processes beside the raw exchange, torch's TCPStore, and the time from a death to the last waiter's error.

*Ours* is :class:`dtr.barrier.Barriers` as an agent uses it. *Raw* is the least that Redis can do for the same: a script that counts
a set and writes one stream entry, and an XREAD BLOCK, packed by hand and sent in one write. Both run in the same processes, in turn.
A latency is one participant's time from arrival to release; the participants arrive together, because a round follows a round.
"""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import redis
from hiredis import Reader, pack_command

from bench import server
from bench.report import Report, parser
from dtr.barrier import Barriers
from dtr.membership import Identity, join, open_state
from dtr.runs import Run, new_run_name, read_run
from dtr.state.exchange import Exchange
from dtr.state.job import JobState

__all__ = ["main"]

RAW = """
redis.call('SADD', KEYS[1], ARGV[1])
if redis.call('SCARD', KEYS[1]) == tonumber(ARGV[2]) then redis.call('XADD', KEYS[2], '*', 'state', 'RELEASED') end
return 1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    flags = parser("barrier", "Barriers of 100 processes beside the raw exchange, and the time from a death to the last error.")
    flags.add_argument("--processes", type=int, default=100)
    flags.add_argument("--rounds", type=int, default=100, help="barriers in each half of a pair")
    flags.add_argument("--warmup", type=int, default=20, help="barriers before each half, not counted")
    flags.add_argument("--pairs", type=int, default=5, help="alternating pairs of ours and raw")
    flags.add_argument("--waiters", type=int, default=31, help="waiters that a death interrupts")
    flags.add_argument("--deaths", type=int, default=20, help="how often one is killed; 0 leaves that part out")
    options = flags.parse_args(argv)
    with server.running() as url:
        halves = _measure(url, options.processes, options.rounds, options.warmup, options.pairs)
        peer = _tcpstore(options.processes, options.rounds) if importlib.util.find_spec("torch") else {}
        figures = {
            "p50_ms": statistics.median(p50 for p50, _ in halves["ours"]),
            "p99_ms": statistics.median(p99 for _, p99 in halves["ours"]),
        }
        limit = {
            "raw_p50_ms": statistics.median(p50 for p50, _ in halves["raw"]),
            "raw_p99_ms": statistics.median(p99 for _, p99 in halves["raw"]),
        }
        ratio = statistics.median(ours[0] / raw[0] for ours, raw in zip(halves["ours"], halves["raw"], strict=True))
        if options.deaths:
            from bench.barrier_deaths import deaths

            found = deaths(url, options.waiters + 1, options.deaths)
            figures["death_to_error_ms"] = max(found)
            figures["death_to_error_median_ms"] = statistics.median(found)
    params = {name: value for name, value in vars(options).items() if name != "json"}
    Report(name="barrier", params=params, figures=figures, limit=limit, peer=peer, ratios={"p50_over_raw": ratio}).emit(
        as_json=options.json
    )
    return 0


# --- ours and raw, in the same processes -----------------------------------------------------------------------------


def _measure(url: str, processes: int, rounds: int, warmup: int, pairs: int) -> dict[str, list[tuple[float, float]]]:
    """p50 and p99 in ms of each half of each pair."""
    state = JobState(url, "bench", name="bench")
    who, run = _formed(state, processes)
    state.redis.script_load(RAW)
    context = mp.get_context("fork")
    pipes: list[Connection] = []
    children = []
    for member in who:
        ours, theirs = context.Pipe()
        child = context.Process(target=_participant, args=(theirs, url, member, run.id, processes), daemon=True)
        child.start()
        children.append(child)
        pipes.append(ours)
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "raw": []}
    try:
        for pair in range(pairs):
            for kind in ("ours", "raw") if pair % 2 == 0 else ("raw", "ours"):
                for pipe in pipes:
                    pipe.send((kind, f"{kind}{pair}", rounds, warmup))
                taken = sorted(ms for pipe in pipes for ms in pipe.recv())
                found[kind].append((taken[len(taken) // 2], taken[len(taken) * 99 // 100]))
    finally:
        for pipe in pipes:
            pipe.send(None)
        for child in children:
            child.join(timeout=30)
        state.close()
    return found


def _formed(state: JobState, count: int) -> tuple[list[Identity], Run]:
    state_id = open_state(state)
    who = [Identity(state_id=state_id, worker_id=f"w{n}", incarnation=f"{n:012x}", host="bench", pid=1) for n in range(count)]
    k, name = state.keys, new_run_name(1)
    for rank, member in enumerate(who):
        join(state, member, ttl_ms=3_600_000)
        keys = [k.meta, k.members, k.fences, k.roster, k.forming, k.wake, k.events, k.run(name)]
        state.call("form_arrive", keys, [state_id, member.worker_id, member.incarnation, rank, "bench", count, count, 0, name, ""])
    return who, read_run(state, name, worker_id="w0")


def _participant(pipe: Connection, url: str, who: Identity, run_id: str, expected: int) -> None:
    state = JobState(url, "bench", name="bench")
    run = read_run(state, run_id, worker_id=who.worker_id)
    barriers = Barriers(state, Exchange(url, "bench"), who, run)
    raw = _Raw(url, who.worker_id, expected)
    while (order := pipe.recv()) is not None:
        kind, name, rounds, warmup = order
        taken = []
        for n in range(rounds + warmup):
            begin = time.perf_counter()
            if kind == "ours":
                barriers.wait(name, timeout_s=60)
            else:
                raw.wait(f"{name}:{n}")
            taken.append((time.perf_counter() - begin) * 1000)
        pipe.send(taken[warmup:])


class _Raw:
    """The two commands in one write over a plain socket, and nothing else."""

    def __init__(self, url: str, worker: str, expected: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", urlsplit(url).port))
        self._reader = Reader(notEnoughData=False)
        self._sha = redis.Redis.from_url(url).script_load(RAW)
        self._worker, self._expected = worker, expected

    def wait(self, name: str) -> None:
        arrive: Any = ("EVALSHA", self._sha, 2, f"raw:{name}", f"raw:{name}:wake", self._worker, self._expected)
        wait: Any = ("XREAD", "BLOCK", 60_000, "STREAMS", f"raw:{name}:wake", "raw:wake", "0-0", "0-0")
        self._socket.sendall(pack_command(arrive) + pack_command(wait))
        for _ in range(2):
            while self._reader.gets() is False:
                self._reader.feed(self._socket.recv(65_536))


# --- a peer ----------------------------------------------------------------------------------------------------------


def _tcpstore(processes: int, rounds: int) -> dict[str, float]:
    """A barrier over torch's TCPStore: each adds to a counter, and the last sets the key that all wait for."""
    context = mp.get_context("spawn")
    port, queue = server.free_port(), context.Queue()
    children = [context.Process(target=_tcpstore_participant, args=(port, n, processes, rounds, queue)) for n in range(processes)]
    for child in children:
        child.start()
    taken = sorted(ms for _ in children for ms in queue.get(timeout=600))
    for child in children:
        child.join(timeout=60)
    return {"tcpstore_p50_ms": taken[len(taken) // 2], "tcpstore_p99_ms": taken[len(taken) * 99 // 100]}


def _tcpstore_participant(port: int, rank: int, processes: int, rounds: int, queue: Any) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, processes, rank == 0)
    taken = []
    for n in range(rounds + 10):
        begin = time.perf_counter()
        if store.add(f"count{n}", 1) == processes:
            store.set(f"go{n}", b"1")
        store.wait([f"go{n}"])
        taken.append((time.perf_counter() - begin) * 1000)
    queue.put(taken[10:])
    # Rank 0 serves the store: it may end only when the others have.
    if store.add("done", 1) == processes:
        store.set("all-done", b"1")
    if rank == 0:
        store.wait(["all-done"])


if __name__ == "__main__":
    sys.exit(main())
