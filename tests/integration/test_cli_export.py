"""`dtr ckpt export, import, diff`: checkpoints as folders that need no dtr, and what differs between two."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from dtr.checkpoint.keeping import export as exporter
from dtr.cli import main
from dtr.config import Settings
from tests.commands import start
from tests.history import WITHIN_S, Dtr, History, made, runner, state
from tests.ranks import running
from tests.uploading import uploading
from tests.waiting import eventually


@pytest.fixture
def history(settings: Settings, tmp_path: Path) -> History:
    return made(settings, tmp_path / "store")


@pytest.fixture
def dtr(history: History, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dtr:
    monkeypatch.setenv("COLUMNS", "80")
    return runner(history, capsys)


def test_an_export_needs_no_dtr(history: History, dtr: Dtr, tmp_path: Path) -> None:
    """The safetensors package reads the tensors by their paths, json the rest; nothing of the work is left beside it."""
    out = json.loads(dtr("ckpt", "export", "latest", str(tmp_path / "out"), "--json"))
    assert (out["checkpoint"], out["files"]) == (f"{history.b}/35", 2)
    about = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert (about["step"], about["world_size"], about["metrics"]) == (35, 2, {"loss": 1 / 35, "rank": 0.0})
    for rank in range(2):
        tensors = safetensors.numpy.load_file(tmp_path / "out" / f"rank-{rank:05d}.safetensors")
        assert np.array_equal(tensors["w"], state(35)["w"])
        tree = json.loads((tmp_path / "out" / f"rank-{rank:05d}.tree.json").read_text())
        assert (tree["dict"]["step"], tree["dict"]["name"]) == (35, f"rank {rank}")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == []
    dtr("ckpt", "export", "latest", str(tmp_path / "out"), code=3)
    assert "new or empty" in dtr.err  # type: ignore[attr-defined]


def test_a_damaged_checkpoint_is_not_exported(history: History, dtr: Dtr, tmp_path: Path) -> None:
    """Exit 5, and no folder."""
    (part,) = history.step_folder(history.b, 35).glob("part-00001*")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.chmod(0o600)
    part.write_bytes(content)
    dtr("ckpt", "export", "latest", str(tmp_path / "out"), code=5)
    assert not list(tmp_path.glob("*out*"))


def test_an_export_without_room_leaves_nothing(history: History, dtr: Dtr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are in the message, exit 4."""
    real = os.statvfs

    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full if "out" in str(path) else real(path))
    dtr("ckpt", "export", "latest", str(tmp_path / "out"), code=4)
    assert "4096 bytes free" in dtr.err  # type: ignore[attr-defined]
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("fault", ["export.mid_part", "export.before_rename"])
def test_an_export_that_fails_half_way_leaves_nothing(
    history: History, dtr: Dtr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Whatever ends it before the last step: no folder, and nothing beside it."""
    monkeypatch.setenv("DTR_TESTING", "1")
    monkeypatch.setenv("DTR_FAILPOINT", f"{fault}=raise")
    dtr("ckpt", "export", "latest", str(tmp_path / "out"), code=1)
    assert not list(tmp_path.glob("*out*"))


def test_what_a_killed_export_left_goes_with_the_next(history: History, dtr: Dtr, tmp_path: Path) -> None:
    """SIGKILL half-way leaves a folder beside the wanted one: the next export there removes it, and not that of one under way."""
    where = ["--url", history.settings.redis_url, "--job", history.settings.job]
    children = []
    for name in ("dead", "alive"):
        env = {**os.environ, "DTR_TESTING": "1", "DTR_FAILPOINT": f"export.mid_part=sleep:30@{tmp_path / name}"}
        children.append(start(["ckpt", "export", "latest", str(tmp_path / "out"), *where], env=env))
        eventually((tmp_path / name).exists, what="an export under way")
    dead, alive = children
    before = set(tmp_path.glob(".out.*.part"))
    dead.kill()
    dead.communicate()
    dtr("ckpt", "export", "latest", str(tmp_path / "out"))
    left = set(tmp_path.glob(".out.*.part"))
    assert (len(before), len(left)) == (2, 1) and left < before
    alive.send_signal(signal.SIGINT)
    alive.communicate(timeout=WITHIN_S)
    assert not list(tmp_path.glob(".out.*.part"))


def test_ctrl_c_in_an_export(history: History, tmp_path: Path) -> None:
    """Exit 130 without a word, and nothing half-written."""
    where = ["--url", history.settings.redis_url, "--job", history.settings.job]
    env = {**os.environ, "DTR_TESTING": "1", "DTR_FAILPOINT": f"export.mid_part=sleep:30@{tmp_path / 'reached'}"}
    child = start(["ckpt", "export", "latest", str(tmp_path / "out"), *where], env=env)
    eventually((tmp_path / "reached").exists, what="an export under way")
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=WITHIN_S)
    assert (child.returncode, out, err.strip()) == (130, "", "")
    assert not list(tmp_path.glob("*out*"))


def test_an_import_that_was_killed_is_made_again(history: History, dtr: Dtr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two of its steps there is no checkpoint; what is left over are orphans, and go as such."""
    dtr("ckpt", "export", "latest", str(tmp_path / "out"))
    other, folder = f"{history.settings.job}-two", str(history.folder)
    monkeypatch.setenv("DTR_TESTING", "1")
    for fault in ("import.after_part", "import.before_manifest"):
        monkeypatch.setenv("DTR_FAILPOINT", f"{fault}=raise")
        dtr("ckpt", "import", str(tmp_path / "out"), code=1, job=other, store=folder)
        assert json.loads(dtr("ckpt", "ls", "--json", job=other, store=folder))["checkpoints"] == []
    monkeypatch.delenv("DTR_FAILPOINT")
    name = json.loads(dtr("ckpt", "import", str(tmp_path / "out"), "--json", job=other, store=folder))["checkpoint"]
    chosen = replace(history.settings, job=other)
    with uploading(chosen), running(chosen, folder, 2) as job:
        assert {f"{found.run}/{found.step}" for found in job.restore()} == {name}
        job.commit(lambda rank: state(36, rank.rank), 36)
        dtr("ckpt", "gc", "--orphans", "--grace", "0", job=other)
        assert {one.state for one in job.ranks[0].manager.list()} == {"COMMITTED", "ABORTED"}
    left = {path.parent for path in Path(folder, other).glob("runs/*/*/part-*")}
    assert len(left) == 2, "the imported one and the one that was saved since"


def test_an_import_is_restored_by_another_job(history: History, dtr: Dtr, tmp_path: Path) -> None:
    """Under a run of its own; a job that has checkpoints is refused; what comes back is bit by bit what was saved."""
    dtr("ckpt", "export", f"{history.b}/35", str(tmp_path / "out"))
    dtr("ckpt", "import", str(tmp_path / "out"), code=3, store=str(history.folder))
    assert "import under another --job" in dtr.err  # type: ignore[attr-defined]
    other = f"{history.settings.job}-two"
    found = json.loads(dtr("ckpt", "import", str(tmp_path / "out"), "--json", job=other, store=str(history.folder)))
    chosen = replace(history.settings, job=other)
    with uploading(chosen), running(chosen, history.folder, 2) as job:
        for rank, restored in enumerate(job.restore()):
            assert f"{restored.run}/{restored.step}" == found["checkpoint"]
            assert np.array_equal(restored.state["w"], state(35)["w"])
            assert restored.state["name"] == f"rank {rank}"
        job.commit(lambda rank: state(36, rank.rank), 36)
    shown = json.loads(dtr("ckpt", "log", "--json", job=other, store=str(history.folder)))
    assert [run["parent"] for run in shown["runs"]] == [found["checkpoint"], ""]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "escape", "json", "other size"])
def test_a_damaged_folder_is_not_imported(history: History, dtr: Dtr, tmp_path: Path, damage: str) -> None:
    """Refused with what is wrong, before anything is in the store."""
    dtr("ckpt", "export", "latest", str(tmp_path / "out"))
    file, about = tmp_path / "out" / "rank-00001.safetensors", tmp_path / "out" / "checkpoint.json"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "escape":
        about.write_text(about.read_text().replace("rank-00001.safetensors", "../rank-00001.safetensors"))
    elif damage == "json":
        about.write_text(about.read_text()[:-30])
    else:
        about.write_text(about.read_text().replace('"world_size": 2', '"world_size": 3'))
    dtr("ckpt", "import", str(tmp_path / "out"), code=5, job="other-job", store=str(tmp_path / "elsewhere"))
    assert not list((tmp_path / "elsewhere").rglob("part-*"))


def test_diff_measures_what_moved(history: History, dtr: Dtr, tmp_path: Path) -> None:
    """Weights moved by 10 in all elements, the table not at all, values by name; a folder is compared with the store alike."""
    found = json.loads(dtr("ckpt", "diff", f"{history.b}/25", "latest", "--json"))
    assert (found["identical"], found["same"]) == (False, 2)
    assert [(one["path"], one["rank"], one["measured"]["changed"], one["measured"]["max_abs"]) for one in found["tensors"]] == [
        ("w", 0, 1000, 10.0), ("w", 1, 1000, 10.0),
    ]  # fmt: skip
    assert found["tensors"][0]["measured"]["max_rel"] == pytest.approx(10 / 35)
    assert [(one["path"], one["rank"], one["a"], one["b"]) for one in found["values"]] == [("step", 0, "25", "35"), ("step", 1, "25", "35")]
    out = dtr("ckpt", "diff", f"{history.b}/25", "latest")
    assert max(map(len, out.splitlines())) <= 80
    assert "100 %" in out
    dtr("ckpt", "export", "latest", str(tmp_path / "out"))
    same = json.loads(dtr("ckpt", "diff", "latest", str(tmp_path / "out"), "--json", "--exit-code"))
    assert (same["identical"], same["same"]) == (True, 4)
    dtr("ckpt", "diff", f"{history.b}/25", str(tmp_path / "out"), "--exit-code", code=1)


def test_diff_follows_what_shares_memory(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tied weights, a transposed view and every other row are stored once; each is compared as what it is, with one that is dense too."""
    chosen = replace(settings, keep_last=0, store=str(tmp_path / "store"))

    def tied(moved: float, *, dense: bool) -> dict[str, Any]:
        w = np.arange(24, dtype=np.float32).reshape(6, 4)
        w[1, 2] += moved
        found = {"w": w, "same": w, "turned": w.T, "rows": w[::2], "back": w[::-1]}
        return {name: array.copy() for name, array in found.items()} if dense else found

    with uploading(chosen), running(chosen, tmp_path / "store", 1) as job:
        for step, moved, dense in ((1, 0.0, False), (2, 0.5, False), (3, 0.5, True)):
            job.commit(lambda _, moved=moved, dense=dense: tied(moved, dense=dense), step)
        run = job.ranks[0].session.run.id
    where = ["--url", settings.redis_url, "--job", settings.job, "--store", str(tmp_path / "store"), "--json"]
    assert main(["ckpt", "diff", f"{run}/1", f"{run}/2", *where]) == 0
    found = json.loads(capsys.readouterr().out)
    changed = {one["path"]: (one["what"], one["measured"]["changed"], one["measured"]["max_abs"]) for one in found["tensors"]}
    assert changed == dict.fromkeys(("w", "same", "turned", "back"), ("differs", 1, 0.5)), "row 1 is none of every other row"
    assert main(["ckpt", "diff", f"{run}/2", f"{run}/3", *where]) == 0
    assert json.loads(capsys.readouterr().out)["identical"], "shared or not, the values are the same"


@pytest.mark.parametrize("delta", ["off", "auto"])
def test_what_ranks_share_is_compared_once_and_comes_back(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], delta: str
) -> None:
    """A common tensor that lies in rows over two parts, in files or in chunks: diff, export, import and restore see it whole."""
    chosen = replace(settings, keep_last=0, delta=delta, store=str(tmp_path / "store"))

    def held(step: int, rank: int) -> dict[str, Any]:
        return {"common": {"m": np.full((100, 30), step, np.float64)}, "own": np.full(50, rank), "step": step}

    def call(*args: str) -> Any:
        assert main(["ckpt", *args, "--url", settings.redis_url, "--store", str(tmp_path / "store"), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    with uploading(chosen), running(chosen, tmp_path / "store", 2) as job:
        for step in (1, 3):
            job.commit(lambda rank, at=step: held(at, rank.rank), step, replicated="common/*")  # type: ignore[arg-type]
        run = job.ranks[0].session.run.id
    here = ["--job", settings.job]
    found = call("diff", f"{run}/1", f"{run}/3", *here)
    assert [(one["path"], one["rank"], one["measured"]["max_abs"], one["measured"]["elements"]) for one in found["tensors"]] == [
        ("common/m", None, 2.0, 3000)
    ]
    assert [(value["path"], value["rank"]) for value in found["values"]] == [("step", 0), ("step", 1)]
    call("export", f"{run}/3", str(tmp_path / "out"), *here)
    assert call("diff", f"{run}/3", str(tmp_path / "out"), *here)["identical"]
    other = f"{settings.job}-two"
    call("import", str(tmp_path / "out"), "--job", other)
    with running(replace(chosen, job=other), tmp_path / "store", 2) as job:
        for rank, restored in enumerate(job.restore()):
            assert np.array_equal(restored.state["common"]["m"], held(3, rank)["common"]["m"])
            assert np.array_equal(restored.state["own"], held(3, rank)["own"])


def test_a_disk_that_fills_up_meanwhile(history: History, dtr: Dtr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was room when it began: exit 4, with the numbers, and nothing is left."""

    def full(descriptor: int, view: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporter, "_write_all", full)
    dtr("ckpt", "export", "latest", str(tmp_path / "out"), code=4)
    assert "has no room for" in dtr.err  # type: ignore[attr-defined]
    assert not list(tmp_path.glob("*out*"))
