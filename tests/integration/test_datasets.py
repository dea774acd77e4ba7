"""Data sets on a real server: registered by many at once, placed on the ranks of a run, found again when Redis forgot them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import redis

from dtr.config import Settings
from dtr.datasets import DatasetRegistry, DatasetSpec
from dtr.datasets.loading.shuffle import epoch_order
from dtr.datasets.registering.assignment import Assignment
from dtr.errors import (
    CoordinatorUnavailable,
    DatasetMismatch,
    DatasetNotFound,
    ForkedProcess,
    InvalidInput,
    NotJoined,
    RosterChanged,
    StateCorrupt,
)
from dtr.runs import World
from dtr.state.keys import Keys
from tests.servers import RedisServer, free_port

T = TypeVar("T")


@pytest.fixture
def registry(valkey: RedisServer, job: str) -> DatasetRegistry:
    return DatasetRegistry(valkey.url, job=job)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of 10 samples and one of 5."""
    path = tmp_path / "data"
    path.mkdir()
    for n, count in enumerate((10, 10, 5)):
        (path / f"part-{n}.jsonl").write_text("".join(f'{{"id": {n * 10 + i}}}\n' for i in range(count)))
    return path


def register(registry: DatasetRegistry, path: Path, **options: Any) -> DatasetSpec:
    return registry.register("d", **{"path": path, "format": "jsonl", "shard_size": 4, **options})


def all_at_once(actions: Sequence[Callable[[], T]]) -> list[T]:
    """The results of the actions, each in a thread of its own."""
    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(action) for action in actions]]


class TestRegistering:
    def test_a_spec_is_readable_with_redis_cli(self, registry: DatasetRegistry, folder: Path, raw: redis.Redis, job: str) -> None:
        """Plain fields, nothing to decode."""
        register(registry, folder, total_samples=25, shuffle=True, seed=3)
        fields = raw.hgetall(Keys(job).dataset("d"))
        expected = {"version": "1", "format": "jsonl", "total_samples": "25", "shards": "8", "files": "3", "shuffle": "true", "seed": "3"}
        assert expected.items() <= fields.items()
        assert fields["path"] == str(folder)

    def test_the_same_again_is_a_no_op_that_reads_no_file(
        self, registry: DatasetRegistry, folder: Path, raw: redis.Redis, job: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Same version, nothing written; also for a process that starts later and must look it up."""
        first = register(registry, folder)
        events = raw.xlen(Keys(job).events)
        monkeypatch.setattr("dtr.datasets.registering.registry.measure_files", None)
        assert register(registry, folder) == first
        assert register(DatasetRegistry(registry._url, job=job), folder, total_samples=25) == first
        assert raw.xlen(Keys(job).events) == events

    def test_a_changed_spec_is_a_new_version_and_the_earlier_one_stays(self, registry: DatasetRegistry, folder: Path) -> None:
        """Another shard size, then a changed file: versions 2 and 3, and version 1 as it was."""
        register(registry, folder)
        assert register(registry, folder, shard_size=5).version == 2
        (folder / "part-2.jsonl").write_text('{"id": 1}\n')
        assert register(registry, folder, shard_size=5).version == 3
        assert [registry.get("d", version).spec.shards for version in (1, 2, 3)] == [8, 5, 5]
        assert registry.get("d", 1).spec.total_samples == 25
        assert registry.get("d").spec.total_samples == 21
        assert [str(s) for s in registry.get("d", 1).shards()][:3] == ["part-0.jsonl[0:4]", "part-0.jsonl[4:8]", "part-0.jsonl[8:10]"]

    def test_going_back_to_an_earlier_spec_is_a_version_too(self, registry: DatasetRegistry, folder: Path) -> None:
        """Versions only ever count up."""
        register(registry, folder)
        register(registry, folder, shard_size=5)
        assert register(registry, folder).version == 3
        assert registry.get("d").spec.digest == registry.get("d", 1).spec.digest

    def test_counts_that_do_not_match_are_refused_also_for_what_is_registered(self, registry: DatasetRegistry, folder: Path) -> None:
        """Nothing is written the first time, and nothing passes the second time."""
        with pytest.raises(DatasetMismatch, match="hold 25 samples, but total_samples is 24"):
            register(registry, folder, total_samples=24)
        assert registry.list() == []
        register(registry, folder, total_samples=25)
        with pytest.raises(DatasetMismatch, match="hold 25 samples, but total_samples is 26"):
            register(registry, folder, total_samples=26)

    def test_many_register_at_once(self, valkey: RedisServer, job: str, folder: Path) -> None:
        """Every rank registers at its start: one version comes of it."""
        registries = [DatasetRegistry(valkey.url, job=job) for _ in range(8)]
        versions = [spec.version for spec in all_at_once([partial(register, r, folder) for r in registries])]
        assert versions == [1] * 8

    def test_different_specs_at_once_become_one_version_each(self, valkey: RedisServer, job: str, folder: Path) -> None:
        """Whoever loses a race registers the next version; none is lost."""
        registries = [DatasetRegistry(valkey.url, job=job) for _ in range(6)]
        specs = all_at_once([partial(register, r, folder, shard_size=n + 1) for n, r in enumerate(registries)])
        assert sorted(spec.version for spec in specs) == [1, 2, 3, 4, 5, 6]
        assert all(registries[0].get("d", spec.version).spec.shard_size == spec.shard_size for spec in specs)

    def test_more_files_than_fit_one_call(self, registry: DatasetRegistry, tmp_path: Path) -> None:
        """1,200 files are staged in pieces and come back whole."""
        for n in range(1_200):
            (tmp_path / f"{n:04d}.bin").write_bytes(bytes([n % 256]))
        registry.register("many", path=tmp_path, format="bin", dtype="uint8", sample_length=1, shard_size=1)
        again = DatasetRegistry(registry._url, job=registry._job).get("many")
        assert len(again.files) == 1_200
        assert again.shard(700).read()["tokens"].tolist() == [[700 % 256]]

    def test_the_list_has_every_data_set_by_name(self, registry: DatasetRegistry, folder: Path) -> None:
        """Current specs, sorted."""
        for name in ("zebra", "ape"):
            registry.register(name, path=folder, format="jsonl", shard_size=4)
        registry.register("ape", path=folder, format="jsonl", shard_size=5)
        assert [(spec.name, spec.version) for spec in registry.list()] == [("ape", 2), ("zebra", 1)]


class TestFinding:
    def test_an_unknown_data_set_is_refused_and_the_known_ones_named(self, registry: DatasetRegistry, folder: Path) -> None:
        """The error says what there is."""
        with pytest.raises(DatasetNotFound, match="no data set 'd'; it has: none"):
            registry.get_shard("d")
        register(registry, folder)
        with pytest.raises(DatasetNotFound, match="no data set 'e'; it has: d"):
            registry.get("e")
        with pytest.raises(DatasetNotFound, match="no data set 'd' version 2"):
            registry.get("d", 2)

    def test_a_data_set_that_redis_lost_is_registered_again_by_who_knows_it(
        self, registry: DatasetRegistry, folder: Path, raw: redis.Redis, job: str
    ) -> None:
        """Given an emptied Redis, then a process that used the data set goes on, with the version it knew."""
        register(registry, folder)
        register(registry, folder, shard_size=5)
        raw.delete(*raw.scan_iter(f"dtr:{{{job}}}:*"))
        assert len(registry.get_shard("d", worker_rank=0, world_size=1)) == 5
        assert DatasetRegistry(registry._url, job=job).get("d").spec.version == 2

    def test_facts_that_were_tampered_with_are_corrupt_state(
        self, registry: DatasetRegistry, folder: Path, raw: redis.Redis, job: str
    ) -> None:
        """The digest covers the files."""
        spec = register(registry, folder)
        raw.hset(Keys(job).dataset_files("d", spec.digest), "part-2.jsonl", "samples=5 size_bytes=55 mtime_ns=1 marks=0,44")
        with pytest.raises(StateCorrupt, match="not those that were registered"):
            DatasetRegistry(registry._url, job=job).get("d")

    def test_a_server_that_is_not_there_is_an_error_that_says_so(self, folder: Path) -> None:
        """Typed, and soon."""
        absent = DatasetRegistry(f"redis://127.0.0.1:{free_port()}/0", job="j")
        with pytest.raises(CoordinatorUnavailable, match="cannot be reached"):
            register(absent, folder)


class TestWithoutARun:
    def test_ranks_share_the_shards_without_asking_each_other(self, registry: DatasetRegistry, folder: Path) -> None:
        """Processes that are told the same world size compute the same, and each shard is somebody's."""
        register(registry, folder)
        parts = [registry.get_shard("d", rank, world_size=3) for rank in range(3)]
        assert sorted(shard.index for part in parts for shard in part) == list(range(8))
        assert sorted(map(len, parts)) == [2, 3, 3]
        other = DatasetRegistry(registry._url, job=registry._job)
        assert [other.get_shard("d", rank, world_size=3) for rank in range(3)] == parts

    def test_rank_and_world_size_come_from_the_environment(
        self, registry: DatasetRegistry, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """RANK and WORLD_SIZE as any launcher sets them; an argument beats them; without any, one rank has all."""
        register(registry, folder)
        assert len(registry.get_shard("d")) == 8
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", "3")
        assert registry.get_shard("d") == registry.get_shard("d", 3, world_size=4)
        assert len(registry.get_shard("d", 0, world_size=1)) == 8

    def test_an_epoch_has_every_shard_in_its_own_order(self, registry: DatasetRegistry, folder: Path) -> None:
        """Shards stay with their rank; the order is a function of seed and epoch."""
        register(registry, folder, shuffle=True, seed=1)
        epochs = [[str(s) for s in registry.get_shard("d", epoch=epoch)] for epoch in range(5)]
        assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
        assert len({tuple(epoch) for epoch in epochs}) == 5
        assert [str(s) for s in registry.get_shard("d", epoch=3)] == epochs[3]
        assert [s.index for s in registry.get_shard("d", epoch=3)] == epoch_order(1, 3, 8).tolist()
        register(registry, folder, shuffle=True, seed=2)
        assert [str(s) for s in registry.get_shard("d", epoch=3)] != epochs[3]
        register(registry, folder)
        assert [s.index for s in registry.get_shard("d", epoch=3)] == list(range(8))

    def test_a_file_that_changed_is_refused_by_name_before_it_is_read(self, registry: DatasetRegistry, folder: Path) -> None:
        """The shards of a changed file are not handed out."""
        register(registry, folder)
        os.utime(folder / "part-1.jsonl", ns=(1, 1))
        with pytest.raises(DatasetMismatch, match=r"part-1\.jsonl changed since data set 'd' version 1"):
            registry.get_shard("d")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"worker_rank": 3, "world_size": 3}, "worker_rank must be"),
            ({"worker_rank": -1}, "worker_rank must be"),
            ({"worker_rank": True}, "worker_rank must be"),
            ({"world_size": 0}, "world_size must be"),
            ({"epoch": -1}, "epoch must be"),
            ({"epoch": "1"}, "epoch must be"),
        ],
    )
    def test_wrong_numbers_are_refused_by_name(self, registry: DatasetRegistry, folder: Path, given: dict[str, Any], message: str) -> None:
        """A rank is below the world size, an epoch is from 0."""
        register(registry, folder)
        with pytest.raises(InvalidInput, match=message):
            registry.get_shard("d", **given)


class TestInARun:
    @pytest.fixture
    def spec(self, settings: Settings, folder: Path) -> DatasetSpec:
        return register(DatasetRegistry(settings.redis_url, job=settings.job), folder, shard_size=1)

    def test_all_ranks_ask_at_once_and_agree(self, make_session: Any, spec: DatasetSpec) -> None:
        """Given four ranks and no placement, when all ask at once, then each shard is one rank's, and one member computed it."""
        sessions = [make_session(f"w{n}", rank=n, world=World(low=4, high=4)).start() for n in range(4)]
        all_at_once([session.form for session in sessions])
        parts = all_at_once([partial(Assignment().in_run, s, spec, s.worker_id) for s in sessions])
        assert sorted(shard for part in parts for shard in part) == list(range(25))
        assert sorted(map(len, parts)) == [6, 6, 6, 7]
        events = [fields["event"] for _, fields in sessions[0].state.redis.xrange(sessions[0].state.keys.events)]
        assert events.count("placed") == 1
        assert Assignment().in_run(sessions[0], spec, "w3") == parts[3]

    def test_only_the_leavers_shards_move_and_they_come_back_to_nobody_else(self, make_session: Any, spec: DatasetSpec) -> None:
        """Given four ranks, when one leaves and the run forms again, then nothing else moves; the same for a rank that comes."""
        world = World(low=3, high=4)
        sessions = {f"w{n}": make_session(f"w{n}", world=world).start() for n in range(4)}
        keeps = {name: Assignment() for name in sessions}

        def placed(names: list[str]) -> dict[str, set[int]]:
            runs = all_at_once([sessions[name].form for name in names])
            assert {run.world_size for run in runs} == {len(names)}
            parts = all_at_once([partial(keeps[n].in_run, sessions[n], spec, n) for n in names])
            return dict(zip(names, map(set, parts), strict=True))

        before = placed(["w0", "w1", "w2", "w3"])
        sessions.pop("w1").close()
        with pytest.raises(RosterChanged, match="w1"):
            keeps["w0"].in_run(sessions["w0"], spec, "w0")
        after = placed(["w0", "w2", "w3"])
        assert all(before[name] <= after[name] for name in after)
        assert set().union(*after.values()) == set(range(25))
        sessions["new"] = make_session("new", world=world).start()
        keeps["new"] = Assignment()
        grown = placed(["w0", "w2", "w3", "new"])
        assert len(grown["new"]) == 25 // 4
        assert all(grown[name] <= after[name] for name in after)

    def test_a_placement_is_readable_with_redis_cli(self, make_session: Any, spec: DatasetSpec, raw: redis.Redis, job: str) -> None:
        """Worker -> its shards, as ranges."""
        session = make_session("w0").start()
        run = session.form()
        Assignment().in_run(session, spec, "w0")
        assert raw.hgetall(Keys(job).placement("d", run.generation)) == {"w0": "0-24"}

    def test_a_new_version_is_placed_anew_in_the_same_run(
        self, make_session: Any, settings: Settings, spec: DatasetSpec, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Shard numbers of another version mean other samples: no placement is carried over."""
        session = make_session("w0").start()
        session.form()
        assignment = Assignment()
        assert len(assignment.in_run(session, spec, "w0")) == 25
        changed = register(DatasetRegistry(settings.redis_url, job=settings.job), folder, shard_size=5)
        assert assignment.in_run(session, changed, "w0") == [0, 1, 2, 3, 4]
        assert "cannot be the start" not in caplog.text

    def test_a_damaged_parent_is_logged_and_not_used(self, make_session: Any, spec: DatasetSpec, caplog: pytest.LogCaptureFixture) -> None:
        """Given a placement that somebody damaged, when the next is computed, then it is whole, and the log says why it moved."""
        session = make_session("w0").start()
        run = session.form()
        Assignment().in_run(session, spec, "w0")
        session.state.redis.hset(session.state.keys.placement("d", run.generation), "w0", "garbage")
        session.close()
        again = make_session("w0").start()
        again.form()
        assert Assignment().in_run(again, spec, "w0") == list(range(25))
        assert "cannot be the start of the next placement" in caplog.text

    def test_the_registry_uses_the_session_of_its_process(self, make_session: Any, settings: Settings, spec: DatasetSpec) -> None:
        """With a session of the same server and job the run decides; a session of another job is none."""
        session = make_session("w0").start()
        registry = DatasetRegistry(settings.redis_url, job=settings.job)
        with pytest.raises(NotJoined):
            registry.get_shard("d")
        session.form()
        assert len(registry.get_shard("d", worker_rank=0)) == 25
        with pytest.raises(InvalidInput, match="world_size must be that of run"):
            registry.get_shard("d", world_size=2)
        with pytest.raises(InvalidInput, match="worker_rank must be"):
            registry.get_shard("d", worker_rank=1)
        session.close()
        assert len(registry.get_shard("d", world_size=5)) == 5

    def test_a_forked_child_gets_no_placement_of_its_own(self, make_session: Any, settings: Settings, spec: DatasetSpec) -> None:
        """Given a process in a run, when its forked child asks, then it is refused instead of being given others' shards."""
        make_session("w0").start().form()
        registry = DatasetRegistry(settings.redis_url, job=settings.job)
        shards = registry.get_shard("d")
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads
            child = os.fork()
        if child == 0:
            try:
                registry.get_shard("d")
                os.write(writer, b"no error")
            except ForkedProcess:
                os.write(writer, str(shards[0].read(["id"])["id"][0]).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            assert pipe.read() == "0"
        os.waitpid(child, 0)


RANK = """
import json, sys
from dtr.config import Settings
from dtr.datasets import DatasetRegistry
from dtr.runs import World
from dtr.session import Session

url, job, staging, folder, rank = sys.argv[1:]
session = Session(Settings.load(redis_url=url, job=job, staging=staging), worker_id=f"w{rank}", rank=int(rank), world=World(low=4, high=4))
session.start().form(60)
registry = DatasetRegistry(url, job=job)
registry.register("d", path=folder, format="jsonl", shard_size=1, shuffle=True)
shards = registry.get_shard("d", epoch=1)
print(json.dumps({"shards": [str(s) for s in shards], "ids": [int(i) for s in shards for i in s.read(["id"])["id"]]}))
session.barrier("done", timeout_s=60)
session.close()
"""


def test_four_processes_share_a_data_set(valkey: RedisServer, job: str, folder: Path, tmp_path: Path) -> None:
    """Ranks that register and ask at the same time read every sample exactly once between them."""
    arguments = [valkey.url, job, str(tmp_path / "staging"), str(folder)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments, str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        for n in range(4)
    ]
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * 4, outputs
    parts = [json.loads(output) for output, _ in outputs]
    assert sorted(np.concatenate([part["ids"] for part in parts]).tolist()) == list(range(25))
    assert sorted(len(part["shards"]) for part in parts) == [6, 6, 6, 7]
