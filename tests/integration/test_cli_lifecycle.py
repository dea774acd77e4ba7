"""`dtr ckpt log, gc, rm, pin` on a job with a branch that was left, from both sides and from either alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtr.checkpoint.manager import CheckpointManager
from dtr.config import Settings
from dtr.store import open_store
from tests.history import Dtr, History, made, runner

NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture
def history(settings: Settings, tmp_path: Path) -> History:
    return made(settings, tmp_path / "store")


@pytest.fixture
def dtr(history: History, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dtr:
    monkeypatch.setenv("COLUMNS", "80")
    return runner(history, capsys)


# --- log --------------------------------------------------------------------------------------------------------------


def test_log_draws_what_was_left_as_a_branch(history: History, dtr: Dtr) -> None:
    """The lineage is a straight line; step 30 stands beside it, above the checkpoint from which the job went on."""
    out = dtr("ckpt", "log")
    assert max(map(len, out.splitlines())) <= 80
    rows = [(line[:4].rstrip(), line[4:].split()[:2]) for line in out.partition("\n\n")[2].splitlines()]
    a, b = history.a, history.b
    assert rows == [
        ("*", [f"{b}/35", "committed"]), ("*", [f"{b}/25", "committed"]), ("o", [b, "run"]), ("| ~", [f"{a}/30", "abandoned"]),
        ("|/", []), ("*", [f"{a}/20", "committed"]), ("*", [f"{a}/10", "committed"]), ("o", [a, "run"]),
    ]  # fmt: skip
    assert f"continues {a}/20" in out
    assert "a fresh start" in out
    assert f"latest {b}/35" in out
    assert "loss 0.02857" in out


@pytest.mark.parametrize("side", ["store alone", "index alone", "emptied index"])
def test_log_works_from_either_side(history: History, dtr: Dtr, raw: Any, side: str) -> None:
    """The same history from the store's records while Redis is away or emptied, and from the index without a store."""
    whole = json.loads(dtr("ckpt", "log", "--json", store=str(history.folder)))
    if side == "emptied index":
        raw.delete(*raw.scan_iter(f"dtr:{{{history.settings.job}}}:*"))
    elif side == "index alone":
        raw.hset(f"dtr:{{{history.settings.job}}}:meta", "last_run", "0009-none")  # so that no store is known
        for run in (history.a, history.b):
            raw.hdel(f"dtr:{{{history.settings.job}}}:run:{run}", "store")
    away = {"url": NOBODY, "store": str(history.folder)} if side == "store alone" else {}
    found = json.loads(dtr("ckpt", "log", "--json", **(away if side != "emptied index" else {"store": str(history.folder)})))
    for one, other in zip(whole["runs"], found["runs"], strict=True):
        assert (one["run"], one["parent"], one["on_lineage"], one["left_at"]) == (
            other["run"], other["parent"], other["on_lineage"], other["left_at"],
        )  # fmt: skip
        assert [(c["step"], c["state"], c["metrics"]) for c in one["checkpoints"]] == [
            (c["step"], c["state"], c["metrics"]) for c in other["checkpoints"]
        ]
    assert found["head"] == history.b


def test_log_shows_what_retention_did(history: History, dtr: Dtr) -> None:
    """What was retired stays in the picture, in its place and without the objects; a pin is named."""
    dtr("ckpt", "gc", "--keep-last", "1")
    dtr("ckpt", "pin", "latest", "--note", "for the paper")
    out = dtr("ckpt", "log")
    rows = [(line[:4].rstrip(), line[4:].split()[:2]) for line in out.partition("\n\n")[2].splitlines()]
    a, b = history.a, history.b
    assert rows == [
        ("*", [f"{b}/35", "committed"]), (".", [f"{b}/25", "retired"]), ("o", [b, "run"]), ("| .", [f"{a}/30", "retired"]),
        ("|/", []), ("*", [f"{a}/20", "committed"]), (".", [f"{a}/10", "retired"]), ("o", [a, "run"]),
    ]  # fmt: skip
    assert "pinned: for the paper" in out
    assert "pinned       for the paper" in dtr("ckpt", "show")


# --- gc, rm, pin ------------------------------------------------------------------------------------------------------


def fates(out: str) -> dict[int, str]:
    return {one["step"]: one["act"] for one in json.loads(out)["checkpoints"]}


def test_gc_says_what_it_would_do_and_then_does_it(history: History, dtr: Dtr) -> None:
    """A dry run changes nothing; each commit has its reason; without any rule all stays."""
    assert set(fates(dtr("ckpt", "gc", "--json")).values()) == {"kept"}
    planned = dtr("ckpt", "gc", "--keep-last", "1", "--dry-run", "--json")
    assert fates(planned) == {35: "kept", 20: "kept", 25: "would retire", 10: "would retire", 30: "would retire"}
    why = {one["step"]: one["why"] for one in json.loads(planned)["checkpoints"]}
    assert (why[35], why[20]) == ("newest; one of the last 1", f"run {history.b} continues it")
    human = dtr("ckpt", "gc", "--keep-last", "1", "--dry-run")
    assert max(map(len, human.splitlines())) <= 80
    assert "keeps the last 1" in human
    assert {one["state"] for one in json.loads(dtr("ckpt", "ls", "--json"))["checkpoints"]} == {"COMMITTED", "ABANDONED"}
    assert fates(dtr("ckpt", "gc", "--keep-last", "1", "--json")) == {35: "kept", 20: "kept", 25: "deleted", 10: "deleted", 30: "deleted"}
    assert sorted(int(path.parent.name) for path in history.folder.glob("*/runs/*/*/part-00000*")) == [20, 35]


def test_gc_by_metric_interval_and_age(history: History, dtr: Dtr) -> None:
    """Rules are a union; loss falls with the step, so that the highest loss of the lineage is step 10's."""
    keeps = {
        ("--keep-best", "loss:max:1"): {10, 20, 35}, ("--keep-every", "20"): {10, 20, 35}, ("--keep-for", "3600"): {10, 20, 25, 35},
        ("--keep-best", "loss:min:2"): {20, 25, 35}, ("--keep-last", "2", "--keep-best", "none:min:1"): {20, 25, 35},
    }  # fmt: skip
    for rules, kept in keeps.items():
        found = fates(dtr("ckpt", "gc", "--dry-run", "--json", *rules))
        assert {step for step, act in found.items() if act == "kept"} == kept, rules


def test_pin_keeps_and_unpin_lets_go(history: History, dtr: Dtr) -> None:
    """Also an abandoned one; by RUN/STEP, by two words, or latest."""
    dtr("ckpt", "pin", f"{history.a}/30", f"{history.a}/10")
    assert "is pinned: good" in dtr("ckpt", "pin", history.a, "10", "--note", "good")
    assert fates(dtr("ckpt", "gc", "--keep-last", "1", "--json")) == {35: "kept", 20: "kept", 30: "kept", 10: "kept", 25: "deleted"}
    dtr("ckpt", "rm", f"{history.a}/10", code=3)
    assert "pinned" in dtr.err  # type: ignore[attr-defined]
    assert "is not pinned any more" in dtr("ckpt", "unpin", f"{history.a}/10", f"{history.a}/30")
    assert f"{history.a}/30 was not pinned" in dtr("ckpt", "unpin", f"{history.a}/30")
    assert fates(dtr("ckpt", "gc", "--keep-last", "1", "--json"))[10] == "deleted"


def test_rm_is_soft_and_refuses_what_must_stay(history: History, dtr: Dtr) -> None:
    """Objects stay for the grace; the newest and the base are refused with exit 3, an unknown one with exit 1."""
    out = json.loads(dtr("ckpt", "rm", f"{history.b}/25", "--grace", "3600", "--json"))
    assert (out["checkpoints"][0]["act"], out["checkpoints"][0]["left_s"] > 3500) == ("retired", True)
    assert list(history.step_folder(history.b, 25).glob("part-*"))
    assert 25 not in {one["step"] for one in json.loads(dtr("ckpt", "ls", "--json"))["checkpoints"]}
    for name, says, code in (("latest", "newest", 3), (f"{history.a}/20", "continues it", 3), (f"{history.a}/77", "only a commit", 1)):
        assert dtr("ckpt", "rm", name, code=code) == ""
        assert says in dtr.err  # type: ignore[attr-defined]
    assert "deleted" in dtr("ckpt", "rm", f"{history.b}/25")
    for command in (["verify"], ["export"]):
        dtr("ckpt", *command, f"{history.b}/25", *(["out"] if command == ["export"] else []), code=1, store=str(history.folder))
        assert f"{history.b}/25 was retired" in dtr.err  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["gc", "--keep-last", "0"], 2, "--keep-last"),
        (["gc", "--keep-best", "loss"], 2, "METRIC:min:COUNT"),
        (["gc", "--keep-for", "-1"], 2, "--keep-for"),
        (["rm"], 2, "RUN/STEP"),
        (["rm", "../x/5"], 2, "expected RUN STEP"),
        (["pin", "latest", "--note", "a\x1bb"], 3, "note must be"),
        (["pin", "0001-none/3"], 1, "only a commit can be pinned"),
        (["export", "latest", "/dev/null"], 3, "is a file"),
        (["export", "latest", "/proc/nowhere/x"], 3, "cannot be made"),
        (["export", "0001-none/3", "x"], 1, "no decision"),
        (["import", "/nonexistent"], 3, "holds no checkpoint.json"),
        (["diff", "latest", "0001-none/3"], 1, "no decision"),
        (["diff", "latest", "/nonexistent"], 2, "no folder '/nonexistent'"),
        (["diff", "0001-none", "latest"], 2, "RUN/STEP"),
    ],
)
def test_wrong_input(history: History, dtr: Dtr, args: list[str], code: int, says: str) -> None:
    """One line that names what is wrong, and the exit code for it; nothing changes."""
    dtr("ckpt", *args, code=code, store=str(history.folder))
    assert says in dtr.err  # type: ignore[attr-defined]
    assert dtr.err.count("\n") == 1  # type: ignore[attr-defined]
    assert len(list(history.folder.glob("*/runs/*/*/part-00000*"))) == 5


def test_what_changes_something_needs_redis(history: History, dtr: Dtr) -> None:
    """Redis alone knows what is being restored: without it, exit 4 and no change."""
    for args in (["gc"], ["rm", "latest"], ["pin", "latest"]):
        dtr("ckpt", *args, code=4, url=NOBODY, store=str(history.folder))
        assert "needs Redis" in dtr.err  # type: ignore[attr-defined]


# --- orphans ----------------------------------------------------------------------------------------------------------


def test_orphans_go_and_nothing_else(history: History, dtr: Dtr) -> None:
    """A part that no manifest names, one of an aborted and of an undecided checkpoint off the lineage; not what lies beside them."""
    store = open_store(history.folder).child(history.settings.job)
    stray = f"runs/{history.a}/{20:012d}/part-00000-{'0' * 12}-dead.safetensors"
    left = f"runs/{history.a}/{40:012d}/part-00001-{'0' * 12}-beef.safetensors"
    coming = f"runs/{history.b}/{45:012d}/part-00001-{'0' * 12}-cafe.safetensors"
    foreign = f"runs/{history.a}/{20:012d}/notes.txt"
    for key in (stray, left, coming, foreign):
        store.put(key, b"x")
    before = set(store.list())
    shown = json.loads(dtr("ckpt", "gc", "--orphans", "--dry-run", "--json"))
    assert {one["key"]: one["act"] for one in shown["orphans"]} == {stray: "would be", left: "would be"}
    assert set(store.list()) == before
    out = dtr("ckpt", "gc", "--orphans", "--grace", "3600")
    assert max(map(len, out.splitlines())) <= 80
    assert set(store.list()) == before | {f"runs/{history.a}/{40:012d}/manifest.json"}, "in its grace, only the decision is there"
    assert {one["act"] for one in json.loads(dtr("ckpt", "gc", "--orphans", "--grace", "3600", "--json"))["orphans"]} == {"waits"}
    dtr("ckpt", "gc", "--orphans")
    assert before - set(store.list()) == {stray, left}
    with CheckpointManager(history.folder, settings=history.settings) as reader:
        assert [reader.verify(one.run, one.step).parts for one in reader.list() if one.state == "COMMITTED"] == [2, 2, 2, 2]
        aborted = [one for one in reader.list() if one.state == "ABORTED"]
    assert [(one.step, one.reason) for one in aborted] == [(40, "the job went on from an earlier step, and nobody completed it")]
