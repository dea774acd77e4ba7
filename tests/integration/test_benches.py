"""Each benchmark runs, in tiny sizes, and prints one JSON object with the figures that its readers look for."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from typing import Any

import pytest

TINY: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "beat": (
        ["--requests", "500", "--rounds", "1", "--members", "20", "--seconds", "0.5", "--beats", "20"],
        {"ratios": ["beat_over_trivial_50", "beat_over_trivial_1000"], "figures": ["core_share_1000", "agent_p50_ms", "agent_p99_ms"]},
    ),
    "barrier": (
        ["--processes", "4", "--rounds", "5", "--warmup", "2", "--pairs", "1", "--waiters", "2", "--deaths", "1"],
        {"ratios": ["p50_over_raw"], "figures": ["p50_ms", "p99_ms", "death_to_error_ms"]},
    ),
    "upload": (
        ["--mib", "8", "--pairs", "1", "--s3-mib", "8", "--rounds", "1", "--rank-mib", "1"],
        {
            "ratios": ["local_over_raw", "s3_over_best_peer", "cpu_over_best_peer"],
            "figures": ["uploader_extra_mb", "uploader_idle_mb", "dispatch_ms"],
        },
    ),
    "delta": (
        ["--mib", "4", "--saves", "2"],
        {
            "ratios": ["lora_written", "frozen_written", "embedding_written", "full_written", "lora_restore"],
            "figures": ["lora_state_mb", "lora_written_mb", "lora_commit_s"],
        },
    ),
    "data": (
        [
            *("--rounds", "1", "--samples", "2000", "--epoch-samples", "20000", "--operations", "50"),
            *("--workers", "20", "--shards", "210", "--no-peers"),
        ],
        {
            "ratios": ["over_bare_reader", "over_bare_reader_npy", "lease_over_evalsha", "report_over_evalsha"],
            "figures": [
                *("resume_s", "slowest_script_ms_1000", "slowest_on_the_clock_ms_1000", "samples_per_s", "mb_per_s"),
                *("deterministic_samples_per_s", "deterministic_samples_per_s_npy", "core_share_1000", "redis_mb_1000"),
            ],
        },
    ),
    "restore": (
        ["--mib", "2", "--s3-mib", "1", "--pairs", "1", "--no-peers"],
        {
            "ratios": ["over_raw_read", "over_raw_read_into", "slot_over_memcpy", "slot_new_over_memcpy", "s3_over_raw_read"],
            "figures": ["local_mib_per_s", "slot_mib_per_s", "s3_mib_per_s"],
        },
    ),
    "stall": (
        ["--mib", "4", "--pairs", "1", "--tiny", "20", "--window-s", "0.02", "--no-peers", "--no-caps"],
        {
            "ratios": [
                "stall_over_memcpy",
                "stall_over_memcpy_small",
                "stall_over_memcpy_bf16",
                "loop_slowdown",
                "loop_slowdown_two_threads",
                "loop_slowdown_memory",
            ],
            "figures": ["us_per_tiny_array"],
        },
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_prints_its_figures(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One JSON object on stdout: name, params, figures, limit, peer, ratios; the last five hold finite numbers alone."""
    if name == "beat" and shutil.which("redis-benchmark") is None:
        pytest.skip("no redis-benchmark on PATH (.ci/run installs one)")
    arguments, keys = TINY[name]
    main = importlib.import_module(f"bench.{name}").main
    assert main(["--json", *arguments]) == 0
    report: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert list(report) == ["name", "params", "figures", "limit", "peer", "ratios"]
    assert report["name"] == name
    for section in ("params", "figures", "limit", "peer", "ratios"):
        assert all(math.isfinite(value) for value in report[section].values())
    for section, wanted in keys.items():
        assert all(report[section][key] > 0 or "slowdown" in key for key in wanted)  # a loop may even be faster


def test_without_redis_benchmark_it_says_so(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """bench.beat names what is missing and where it comes from, and exits with 4."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert importlib.import_module("bench.beat").main(["--json"]) == 4
    assert "redis-benchmark" in capfd.readouterr().err
