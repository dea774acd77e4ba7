"""`dtr ckpt` on a job that moved: the same job, run again with another folder as its store, on the same Redis."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtr.cli import main
from dtr.config import Settings
from tests.history import state
from tests.ranks import running
from tests.uploading import uploading


class Moved:
    """Run a committed 10 and 20 in the folder ``old``; then run b began afresh in ``new`` and committed 5 and 6."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.old, self.new = settings, folder / "old", folder / "new"
        with uploading(settings):
            self.a = self._train(self.old, 10, 20)
            self.b = self._train(self.new, 5, 6)

    def _train(self, store: Path, *steps: int) -> str:
        with running(replace(self.settings, store=str(store)), store, 1) as job:
            for step in steps:
                job.commit(lambda rank, at=step: state(at, rank.rank), step)
            return job.ranks[0].session.run.id

    def manifest(self, store: Path, run: str, step: int) -> Path:
        return store / self.settings.job / "runs" / run / f"{step:012d}" / "manifest.json"


@pytest.fixture
def moved(settings: Settings, tmp_path: Path) -> Moved:
    return Moved(settings, tmp_path)


@pytest.fixture
def dtr(settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command on that job; ``call.err`` is what it said on stderr."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*args: str, code: int = 0, store: Path | None = None) -> str:
        given = [] if store is None else ["--store", str(store)]
        got = main([*args, *given, "--url", settings.redis_url, "--job", settings.job])
        out, err = capsys.readouterr()
        assert got == code, (out, err)
        call.err = err  # type: ignore[attr-defined]
        return out

    return call


def rows(out: str) -> list[tuple[Any, ...]]:
    return [(row["step"], row["state"], row["in_store"], row["store"]) for row in json.loads(out)["checkpoints"]]


def checked(out: str) -> list[tuple[int, bool]]:
    return [(one["step"], one["ok"]) for one in json.loads(out)["checkpoints"]]


def test_ls_says_which_checkpoints_are_in_another_store(moved, dtr):
    """Each row has its own store, and a line says how many are in one that was not asked."""
    out = dtr("ckpt", "ls", "--json")
    assert rows(out) == [
        (6, "COMMITTED", True, moved.new.as_uri()), (5, "COMMITTED", True, moved.new.as_uri()),
        (20, "ABANDONED", None, moved.old.as_uri()), (10, "ABANDONED", None, moved.old.as_uri()),
    ]  # fmt: skip
    found = json.loads(out)
    assert found["elsewhere"] == [{"store": moved.old.as_uri(), "checkpoints": 2}]
    assert found["note"] == f"2 checkpoints belong to {moved.old.as_uri()}, as Redis says; that store was not asked"
    human = dtr("ckpt", "ls")
    assert found["note"] in human
    assert [line.endswith(moved.old.as_uri()) for line in human.splitlines()[-4:]] == [False, False, True, True]
    assert found["note"] in dtr("ckpt", "log")


def test_a_run_whose_successor_began_afresh_was_left_as_a_whole(moved, dtr):
    """The job did not go on from any step of it, in whatever store."""
    found = json.loads(dtr("ckpt", "ls", "--json"))["checkpoints"]
    assert [row["reason"] for row in found] == ["", "", *["the job went on without this run"] * 2]


def test_ls_of_a_store_that_holds_nothing_of_the_job_says_so(moved, dtr, tmp_path):
    """A misspelt folder: what Redis knows is listed, but not as if it were there."""
    human = dtr("ckpt", "ls", store=tmp_path / "misspelt")
    said = [f"2 checkpoints belong to {folder.as_uri()}" for folder in (moved.new, moved.old)]
    assert f"{', '.join(said)}, as Redis says; those stores were not asked" in human


def test_show_names_the_store_of_the_checkpoint_itself(moved, dtr):
    """It is the old one, which was not asked; so nothing is said of what only its manifest tells."""
    found = json.loads(dtr("ckpt", "show", f"{moved.a}/10", "--json"))
    assert (found["store"], found["checkpoint"]["in_store"]) == (moved.old.as_uri(), None)
    human = dtr("ckpt", "show", f"{moved.a}/10")
    assert f"store        {moved.old.as_uri()}, as Redis says; it was not asked" in human
    assert "continues" not in human
    asked = dtr("ckpt", "show", f"{moved.a}/10", store=moved.old)
    assert asked.splitlines()[-4].split() == ["store", moved.old.as_uri()]
    assert "continues    nothing" in asked


def test_verify_reads_what_the_asked_store_should_have_and_counts_the_rest(moved, dtr):
    """The newest run's store, or the one that was given; never a stop at a checkpoint of the other."""
    out = dtr("ckpt", "verify", "--all", "--json")
    assert checked(out) == [(6, True), (5, True)]
    assert json.loads(out)["elsewhere"] == [{"store": moved.old.as_uri(), "checkpoints": 2}]
    assert f"2 checkpoints belong to {moved.old.as_uri()}, as Redis says; that store was not asked" in dtr("ckpt", "verify", "--all")
    out = dtr("ckpt", "verify", "--all", "--json", store=moved.old)
    assert checked(out) == [(20, True), (10, True)]
    assert json.loads(out)["elsewhere"] == [{"store": moved.new.as_uri(), "checkpoints": 2}]


def test_verify_of_a_copy_reads_what_the_copy_has(moved, dtr, tmp_path):
    """A backup: Redis says that all belongs to the original, but the copy is what was asked for."""
    shutil.copytree(moved.old, tmp_path / "backup")
    assert checked(dtr("ckpt", "verify", "--all", "--json", store=tmp_path / "backup")) == [(20, True), (10, True)]
    assert rows(dtr("ckpt", "ls", "--json", store=tmp_path / "backup"))[2:] == [
        (20, "ABANDONED", True, (tmp_path / "backup").as_uri()), (10, "ABANDONED", True, (tmp_path / "backup").as_uri()),
    ]  # fmt: skip


def test_verify_goes_on_after_a_manifest_that_is_missing(moved, dtr):
    """It is a failed result among the others, and exit 5."""
    moved.manifest(moved.new, moved.b, 6).unlink()
    out = dtr("ckpt", "verify", "--all", "--json", code=5)
    assert checked(out) == [(6, False), (5, True)]
    assert json.loads(out)["checkpoints"][0]["error"] == "it was committed, but its manifest is not in the store"
    assert dtr.err == f"dtr: 1 of 2 checkpoints damaged: {moved.b}/6\n"
    assert checked(dtr("ckpt", "verify", f"{moved.b}/6", "--json", code=5)) == [(6, False)]


def test_verify_of_a_store_without_any_of_the_commits_is_no_success(moved, dtr, tmp_path):
    """Nothing was read, so nothing is ok; where the commits are is in the message."""
    assert dtr("ckpt", "verify", "--all", store=tmp_path / "misspelt", code=1) == ""
    assert "misspelt holds no commit of job" in dtr.err
    assert moved.old.as_uri() in dtr.err
    assert moved.new.as_uri() in dtr.err
    assert dtr.err.count("\n") == 1


@pytest.mark.parametrize("command", ["verify", "diff", "export"])
def test_a_name_in_another_store_is_told_with_that_store(moved, dtr, tmp_path, command):
    """What to give as --store is in the message."""
    rest = {"verify": [], "diff": [f"{moved.b}/5"], "export": [str(tmp_path / "out")]}[command]
    dtr("ckpt", command, f"{moved.a}/10", *rest, code=1)
    assert f"{moved.new.as_uri()} holds no decision about {moved.a}/10" in dtr.err
    assert f"it belongs to {moved.old.as_uri()}, as Redis says: give that as --store" in dtr.err


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_job_that_nobody_knows_is_said_once(dtr, command):
    """No commit and no store: one line with what to do."""
    assert dtr("ckpt", command, code=1) == ""
    assert dtr.err.count("\n") == 1
    assert dtr.err.count("give --store to look there") == 1


def test_ls_without_a_store_says_that_none_is_known(dtr):
    """The list is there, and so is the remedy, once."""
    assert "0 checkpoints" in dtr("ckpt", "ls")
    assert dtr.err.count("give --store to look there") == 1


def test_the_help_of_ls_says_what_it_reads(dtr):
    """It is no check of what is in the manifests."""
    assert (
        "as Redis's index has it; of a commit it is checked that the store has its manifest, not what that says: see `verify`"
        in " ".join(dtr("ckpt", "ls", "--help").split())
    )
