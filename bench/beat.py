"""What a beat costs the server, and what it costs an agent.

The real beat against a trivial EVALSHA with the same KEYS and ARGV, from redis-benchmark, so that network and parsing cost the same
and the ratio is the script's own work. Then 1,000 members that beat once a second, with the server's CPU from INFO, beside the trivial
script sent the same way: that is what waking the server costs. Once as launchers send them, a host's members together over the
connection of their host, and once as trainers without a launcher do, each over a connection of its own (``..._alone``). Last, the
latency that one Python agent sees.
"""

from __future__ import annotations

import csv
import io
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from hiredis import pack_command

from bench import server
from bench.report import Report, parser
from dtr.membership import BeatCall, Identity, beat_all, beat_arguments, join, open_state
from dtr.state.job import JobState
from dtr.state.scripts import load

__all__ = ["main"]

TRIVIAL = "return {KEYS[1], ARGV[1]}"
TTL_MS, INTERVAL_MS = 5_000, 1_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    flags = parser("beat", "What a beat costs the server, and what it costs an agent.")
    flags.add_argument("--requests", type=int, default=60_000, help="per round of redis-benchmark")
    flags.add_argument("--rounds", type=int, default=5, help="alternating pairs")
    flags.add_argument("--members", type=int, default=1_000, help="members that beat once a second")
    flags.add_argument("--per-host", type=int, default=8, help="members that share a launcher")
    flags.add_argument("--seconds", type=float, default=6.0, help="how long they beat")
    flags.add_argument("--beats", type=int, default=3_000, help="beats of the one agent")
    options = flags.parse_args(argv)
    tool = shutil.which("redis-benchmark") or shutil.which("valkey-benchmark")
    if tool is None:
        print("bench.beat needs redis-benchmark on PATH (Debian: apt-get install redis-tools)", file=sys.stderr)
        return 4
    with server.running() as url:
        state = JobState(url, "bench", name="bench")
        who = _members(state, options.members)
        ratios, limit, figures = {}, {}, {}
        for connections in (50, 1_000):
            pairs = [_pair(tool, url, state, who[0], connections, options.requests) for _ in range(options.rounds)]
            ratios[f"beat_over_trivial_{connections}"] = statistics.median(real / trivial for real, trivial in pairs)
            figures[f"beats_per_s_{connections}"] = statistics.median(real for real, _ in pairs)
            limit[f"trivial_per_s_{connections}"] = statistics.median(trivial for _, trivial in pairs)
        trivial, real = state.redis.script_load(TRIVIAL), load("member_beat").sha
        for together, suffix in ((options.per_host, ""), (1, "_alone")):
            hosts = [who[n : n + together] for n in range(0, len(who), together)]
            shares = [[_core_share(url, state, hosts, options.seconds, sha) for sha in (trivial, real)] for _ in range(3)]
            limit[f"trivial_share_1000{suffix}"], figures[f"core_share_1000{suffix}"] = (
                statistics.median(each) * 1_000 / options.members for each in zip(*shares, strict=True)
            )
        latencies = _agent_latencies(state, who[1], options.beats)
        figures["agent_p50_ms"], figures["agent_p99_ms"] = _percentile(latencies, 50), _percentile(latencies, 99)
        limit["ping_p50_ms"] = _percentile(_ping_latencies(state, options.beats), 50)
        state.close()
    params = {
        "requests": options.requests, "rounds": options.rounds, "members": options.members, "per_host": options.per_host,
        "seconds": options.seconds, "beats": options.beats, "seed": options.seed,
    }  # fmt: skip
    Report(name="beat", params=params, figures=figures, limit=limit, ratios=ratios).emit(as_json=options.json)
    return 0


def _members(state: JobState, count: int) -> list[Identity]:
    state_id = open_state(state)
    found = []
    for n in range(max(2, count)):
        who = Identity(state_id=state_id, worker_id=f"w{n:04d}", incarnation=f"{n:012x}", host="bench", pid=1)
        join(state, who, ttl_ms=600_000)
        found.append(who)
    return found


def _call(state: JobState, who: Identity, number: int) -> tuple[list[str], list[Any]]:
    return beat_arguments(state, BeatCall(who=who, number=number, ttl_ms=600_000, interval_ms=INTERVAL_MS, step=1234))


def _pair(tool: str, url: str, state: JobState, who: Identity, connections: int, requests: int) -> tuple[float, float]:
    """Requests per second of the real and of the trivial script."""
    keys, args = _call(state, who, 1)
    sha = state.redis.script_load(TRIVIAL)
    state.redis.script_load(load("member_beat").text)
    real = _benchmark(tool, url, connections, requests, load("member_beat").sha, keys, args)
    trivial = _benchmark(tool, url, connections, requests, sha, keys, args)
    return real, trivial


def _benchmark(tool: str, url: str, connections: int, requests: int, sha: str, keys: list[str], args: list[Any]) -> float:
    port = str(urlsplit(url).port)
    command = [tool, "-p", port, "-c", str(connections), "-n", str(requests), "--csv", "EVALSHA", sha, str(len(keys)), *keys]
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, check=True, timeout=600)
    if "ERR" in done.stderr or "error" in done.stdout.lower():
        raise RuntimeError(f"redis-benchmark: {done.stdout} {done.stderr}")
    return float(list(csv.reader(io.StringIO(done.stdout)))[-1][1])


def _core_share(url: str, state: JobState, hosts: Sequence[Sequence[Identity]], seconds: float, sha: str) -> float:
    """Share of one core that the server spends on every member sending this script once a second, those of a host in one write."""
    port = urlsplit(url).port
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in hosts]
    waiting = selectors.DefaultSelector()
    for connection in sockets:
        connection.setblocking(False)
        waiting.register(connection, selectors.EVENT_READ)
    first = int(state.redis.hget(state.keys.worker(hosts[-1][-1].worker_id), "beat")) + 1
    before, begin, sent, asked, answered = _cpu_s(state), time.monotonic(), 0, 0, 0
    end = begin + seconds
    while (now := time.monotonic()) < end or answered < asked:
        due = int((min(now, end) - begin) * len(hosts))
        for n in range(sent, due):
            calls = [_call(state, who, first + n // len(hosts)) for who in hosts[n % len(hosts)]]
            sockets[n % len(hosts)].sendall(b"".join(_packed("EVALSHA", sha, len(keys), *keys, *args) for keys, args in calls))
            asked += len(calls)
        sent = max(sent, due)
        for key, _ in waiting.select(timeout=0.005):
            reply = key.fileobj.recv(65_536)  # type: ignore[union-attr]
            if b"\r\n-" in b"\r\n" + reply:
                raise RuntimeError(reply.decode())
            answered += reply.count(b"*")  # an array begins each answer, and no word in one has an asterisk
    spent, passed = _cpu_s(state) - before, time.monotonic() - begin
    for connection in sockets:
        connection.close()
    return spent / passed


def _packed(*command: Any) -> bytes:
    words: Any = command
    packed: bytes = pack_command(words)
    return packed


def _cpu_s(state: JobState) -> float:
    info = state.redis.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def _agent_latencies(state: JobState, who: Identity, count: int) -> list[float]:
    first = int(state.redis.hget(state.keys.worker(who.worker_id), "beat")) + 1
    found = []
    for number in range(first, first + count):
        begin = time.perf_counter()
        beat_all(state, [BeatCall(who=who, number=number, ttl_ms=TTL_MS, interval_ms=INTERVAL_MS, step=1234)])
        found.append((time.perf_counter() - begin) * 1000)
    return found


def _ping_latencies(state: JobState, count: int) -> list[float]:
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        state.redis.ping()
        found.append((time.perf_counter() - begin) * 1000)
    return found


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


if __name__ == "__main__":
    sys.exit(main())
