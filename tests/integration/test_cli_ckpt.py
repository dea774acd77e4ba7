"""`dtr ckpt` and `dtr rebuild` on checkpoints that were really saved and uploaded: from the index, from the store, and from both."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.uploading.upload import Uploader
from dtr.cli import main
from dtr.config import Settings
from dtr.runs import World
from dtr.session import Session
from tests.commands import together
from tests.waiting import eventually

NOBODY = "redis://127.0.0.1:1/0"


class Job:
    """Two ranks that save, and an uploader in this process that carries what it is told to."""

    def __init__(self, settings: Settings, sessions: list[Session]) -> None:
        self.settings, self.sessions = settings, sessions
        together(sessions, lambda session: (session.start(), session.form()))
        self.managers = [CheckpointManager(str(settings.store), session=session, fresh=True) for session in sessions]
        self.uploader = Uploader(redis_url=settings.redis_url, staging=settings.staging, host=sessions[0].host)
        self.run = sessions[0].run.id

    def save(self, step: int, *, upload: bool = True) -> None:
        for rank, manager in enumerate(self.managers):
            manager.save_async({"weights": np.full(1000, step + rank), "step": step}, step)
        for rank in range(len(self.managers) if upload else 1):
            eventually(lambda rank=rank: self.carried(step, rank), what=f"the upload of step {step} rank {rank}")

    def carried(self, step: int, rank: int) -> bool:
        return self.uploader.upload_part(self.settings.job, self.run, step, rank) in {"WRITING", "COMMITTED"}

    def forgotten(self, raw: Any) -> None:
        """The trainers have gone, and Redis was emptied: one that lived would register again."""
        self.close()
        for session in self.sessions:
            session.close()
        raw.delete(*raw.scan_iter(f"dtr:{{{self.settings.job}}}:*"))

    def close(self) -> None:
        self.uploader.close()
        for manager in self.managers:
            manager.close()


@pytest.fixture
def stored(settings: Settings, tmp_path: Path, make_session, monkeypatch):
    """Steps 10 and 20 are committed, of step 30 one part of two is in the store."""
    monkeypatch.setenv("COLUMNS", "80")
    chosen = replace(settings, store=str(tmp_path / "store"), ttl_s=60.0)
    sessions = [make_session(f"node-{rank}", settings=chosen, rank=rank, world=World(low=2, high=2)) for rank in range(2)]
    found = Job(chosen, sessions)
    found.save(10)
    found.save(20)
    found.save(30, upload=False)
    yield found
    found.close()


@pytest.fixture
def dtr(stored: Job, capsys):
    """Runs a command on that job; without its store unless that is given."""

    def call(*args: str, code: int = 0, url: str = stored.settings.redis_url, with_store: bool = False) -> str:
        store = ["--store", str(stored.settings.store)] if with_store else []
        got = main([*args, "--url", url, "--job", stored.settings.job, *store])
        out, err = capsys.readouterr()
        assert got == code, err
        call.err = err  # type: ignore[attr-defined]
        return out

    return call


def part_of(stored: Job, step: int, rank: int) -> Path:
    folder = Path(str(stored.settings.store), stored.settings.job, "runs", stored.run, f"{step:012d}")
    return next(folder.glob(f"part-{rank:05d}-*"))


def manifest_of(stored: Job, step: int) -> Path:
    return part_of(stored, step, 0).with_name("manifest.json")


def listed(out: str) -> list[tuple[int, str, bool]]:
    return [(row["step"], row["state"], row["latest"]) for row in json.loads(out)["checkpoints"]]


def test_ls_shows_both_what_is_committed_and_what_is_under_way(stored, dtr):
    """The newest first, with the latest marked; the store is the one that Redis names."""
    out = dtr("ckpt", "ls", "--json")
    assert listed(out) == [(30, "WRITING", False), (20, "COMMITTED", True), (10, "COMMITTED", False)]
    found = json.loads(out)
    assert found["store"].endswith("/store")
    assert found["latest"] == f"{stored.run}/20"
    assert [(row["in_index"], row["in_store"], row["done"]) for row in found["checkpoints"]] == [
        (True, False, 1), (True, True, 2), (True, True, 2),
    ]  # fmt: skip
    human = dtr("ckpt", "ls")
    assert max(map(len, human.splitlines())) <= 80
    assert "committed  latest" in human


def test_ls_works_from_the_store_while_redis_is_down(stored, dtr):
    """Commits, sizes and the latest come from the store; stderr says that Redis is missing, and the exit code is 0."""
    out = dtr("ckpt", "ls", "--json", url=NOBODY, with_store=True)
    assert listed(out) == [(20, "COMMITTED", True), (10, "COMMITTED", False)]
    assert {row["in_index"] for row in json.loads(out)["checkpoints"]} == {None}
    assert dtr.err.startswith("dtr: showing what the store holds, because Redis")
    assert dtr.err.count("\n") == 1
    dtr("ckpt", "ls", url=NOBODY, code=4)


def test_ls_tells_of_commits_that_redis_forgot(stored, dtr, raw):
    """An emptied Redis: the store's commits are listed as they are, each with the remedy."""
    stored.forgotten(raw)
    out = dtr("ckpt", "ls", "--json", with_store=True)
    assert listed(out) == [(20, "COMMITTED", True), (10, "COMMITTED", False)]
    assert {row["reason"] for row in json.loads(out)["checkpoints"]} == {"Redis does not know it: `dtr rebuild` tells it"}


def test_rebuild_fills_an_emptied_redis(stored, dtr, raw):
    """Afterwards the index alone tells what the store holds, and what may go, before any trainer starts; a second time changes nothing."""
    stored.forgotten(raw)
    for _ in range(2):
        out = dtr("rebuild", "--json", "--from", str(stored.settings.store))
        assert listed(out) == [(20, "COMMITTED", True), (10, "COMMITTED", False)]
        assert {row["in_index"] for row in json.loads(out)["checkpoints"]} == {True}
    assert raw.hget(f"dtr:{{{stored.settings.job}}}:meta", "latest") == f"{stored.run}/20"
    dtr("rebuild", code=3)
    assert "store is not set" in dtr.err
    dtr("ckpt", "gc", "--orphans", with_store=True)
    dtr("ckpt", "rm", f"{stored.run}/10", with_store=True)
    assert listed(dtr("ckpt", "ls", "--json", with_store=True)) == [(20, "COMMITTED", True)]


def test_rebuild_from_a_store_that_holds_nothing_of_the_job_changes_nothing(stored, dtr, raw, tmp_path):
    """A misspelt URL would else make an emptied Redis a fresh job, and list what Redis knows as if the store held it."""
    stored.forgotten(raw)
    assert dtr("rebuild", "--from", str(tmp_path / "misspelt"), code=1) == ""
    assert f"misspelt holds no run of job {stored.settings.job}" in dtr.err
    assert not [*raw.scan_iter(f"dtr:{{{stored.settings.job}}}:*")]


def test_a_commit_without_its_manifest_is_damaged(stored, dtr):
    """Redis says committed, the store has no decision: I1 is broken, and the list says so."""
    manifest_of(stored, 10).unlink()
    out = dtr("ckpt", "ls", "--json")
    assert (10, "DAMAGED", False) in listed(out)


def test_another_store_says_nothing_about_checkpoints_elsewhere(stored, dtr, tmp_path):
    """A job that moved: what Redis knows to be in the other store is not called damaged because this one lacks it."""
    out = dtr("ckpt", "ls", "--json", "--store", str(tmp_path / "moved-to"))
    assert listed(out) == [(30, "WRITING", False), (20, "COMMITTED", True), (10, "COMMITTED", False)]
    assert {row["in_store"] for row in json.loads(out)["checkpoints"]} == {None}


def test_show_has_every_part_with_its_facts(stored, dtr):
    """By RUN STEP, RUN/STEP, latest, or nothing; sizes and checksums are the manifest's."""
    found = [json.loads(dtr("ckpt", "show", *words, "--json")) for words in ([stored.run, "20"], [f"{stored.run}/20"], ["latest"], [])]
    assert found[0] == found[1] == found[2] == found[3]
    parts = found[0]["parts"]
    assert [(part["rank"], part["worker"], part["state"]) for part in parts] == [(0, "node-0", "done"), (1, "node-1", "done")]
    assert {part["size_bytes"] for part in parts} == {part_of(stored, 20, 0).stat().st_size}
    assert all(part["checksum"].startswith("crc64nvme:") and part["host"] == stored.sessions[0].host for part in parts)
    assert max(map(len, dtr("ckpt", "show").splitlines())) <= 80


def test_show_says_what_a_checkpoint_under_way_waits_for(stored, dtr):
    """One part is done, the other waits for an uploader."""
    eventually(lambda: json.loads(dtr("ckpt", "show", stored.run, "30", "--json"))["parts"][1]["state"] == "staged", what="the second rank")
    out = dtr("ckpt", "show", stored.run, "30")
    assert "1 of 2 parts" in out
    assert "waits for an" in out
    assert "continues" not in out, "no manifest tells it yet"


def test_show_says_what_fits_another_number_of_ranks(stored, dtr):
    """Sharded, or replicated in part: then only the rest needs as many ranks as saved it."""
    assert "sharded, world size 2" in dtr("ckpt", "show", stored.run, "20")
    for rank, manager in enumerate(stored.managers):
        manager.save_async({"weights": np.arange(1000.0), "own": np.full(3, rank)}, 40, replicated="weights")
    eventually(lambda: 40 in {step for step, *_ in listed(dtr("ckpt", "ls", "--json"))}, what="the save of step 40 in Redis")
    out = dtr("ckpt", "show", stored.run, "40")
    assert "replicated in part, the rest needs world size 2" in " ".join(out.split())


def test_show_works_from_the_store_while_redis_is_down(stored, dtr):
    """The manifest is enough."""
    found = json.loads(dtr("ckpt", "show", "latest", "--json", url=NOBODY, with_store=True))
    assert (found["checkpoint"]["step"], found["checkpoint"]["latest"], len(found["parts"])) == (20, True, 2)
    older = json.loads(dtr("ckpt", "show", stored.run, "10", "--json", url=NOBODY, with_store=True))
    assert (older["checkpoint"]["state"], older["checkpoint"]["latest"]) == ("COMMITTED", False)


def test_verify_reads_everything(stored, dtr):
    """The latest, one by name, and all: exit 0, with the number of parts and bytes."""
    found = json.loads(dtr("ckpt", "verify", "--json"))
    size_bytes = sum(part_of(stored, 20, rank).stat().st_size for rank in range(2))
    assert (found["ok"], found["checkpoints"][0]["size_bytes"], found["checkpoints"][0]["parts"]) == (True, size_bytes, 2)
    assert "ok       2 parts" in dtr("ckpt", "verify", stored.run, "10")
    assert [one["step"] for one in json.loads(dtr("ckpt", "verify", "--all", "--json"))["checkpoints"]] == [20, 10]
    assert json.loads(dtr("ckpt", "verify", "--all", "--json", url=NOBODY, with_store=True))["ok"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_verify_finds_every_damage(stored, dtr, damage):
    """A flipped bit, a truncated or missing object, a damaged manifest: exit 5; the intact checkpoint is still called so."""
    part = part_of(stored, 10, 1)
    if damage == "flip":
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.chmod(0o600)
        part.write_bytes(content)
    elif damage == "truncate":
        part.chmod(0o600)
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "remove":
        part.unlink()
    else:
        manifest = manifest_of(stored, 10)
        manifest.chmod(0o600)
        manifest.write_bytes(manifest.read_bytes()[:-20])
    found = json.loads(dtr("ckpt", "verify", "--all", "--json", code=5))
    assert found["ok"] is False
    assert [(one["step"], one["ok"]) for one in found["checkpoints"]] == [(20, True), (10, False)]
    assert dtr.err == f"dtr: 1 of 2 checkpoints damaged: {stored.run}/10\n"
    out = dtr("ckpt", "verify", stored.run, "10", code=5)
    assert "damaged" in out
    named = f"part-{1:05d}" if damage != "manifest" else f"runs/{stored.run}/{10:012d}/manifest.json: the manifest is"
    assert "".join(named.split()) in "".join(out.split())


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["0001-none", "5"], 1, "0001-none/5"),
        (["latest", "5"], 2, "expected RUN STEP, RUN/STEP, STEP or latest"),
        (["0001-a", "1e3"], 2, "expected RUN STEP"),
        (["0001-a", "99999999999999999999"], 2, "step must be an integer from 0 to"),
        (["../x/5"], 2, "expected RUN STEP"),
        (["a b", "5"], 2, "run must be"),
    ],
)
def test_names_that_are_none(stored, dtr, words, code, says):
    """What is no name is wrong usage; a name that nobody bears is exit 1."""
    for command in ("show", "verify"):
        assert dtr("ckpt", command, *words, code=code) == ""
        assert says in dtr.err
        assert dtr.err.count("\n") == 1


def test_a_job_without_checkpoints(settings, tmp_path, capsys):
    """An empty list is no error; nothing to show or verify is exit 1 and says so."""
    args = ["--url", settings.redis_url, "--job", settings.job, "--store", str(tmp_path / "nothing-there")]
    assert main(["ckpt", "ls", "--json", *args]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"] == []
    for command in ("show", "verify"):
        assert main(["ckpt", command, *args]) == 1
        assert "has no commit yet" in capsys.readouterr().err
    assert main(["ckpt", "verify", "--all", "--json", *args]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"] == []


def test_verify_needs_a_store(settings, capsys):
    """With no store known, it is wrong usage rather than a false 'ok'."""
    assert main(["ckpt", "verify", "--all", "--url", settings.redis_url, "--job", settings.job]) == 3
    assert "store must be known" in capsys.readouterr().err


def test_status_shows_the_latest_commit_and_the_open_checkpoint(stored, dtr):
    """Its age and size, and what the open one waits for."""
    page = json.loads(dtr("status", "--json"))["job"]
    assert (page["latest"]["step"], page["latest"]["state"]) == (20, "COMMITTED")
    assert [(ckpt["step"], ckpt["done"], ckpt["expected"]) for ckpt in page["open_checkpoints"]] == [(30, 1, 2)]
    out = dtr("status")
    assert f"latest       {stored.run}/20" in out
    assert "1 of 2 parts in the store" in " ".join(out.split())


def test_a_store_that_cannot_be_read_is_exit_4_or_3(stored, dtr, tmp_path):
    """A folder that cannot be listed is unavailable; what is no store is configuration."""
    assert main(["ckpt", "ls", "--url", NOBODY, "--job", "j", "--store", "ftp://x/y"]) == 3
    shutil.rmtree(str(stored.settings.store))
    assert (20, "DAMAGED", True) in listed(dtr("ckpt", "ls", "--json"))
