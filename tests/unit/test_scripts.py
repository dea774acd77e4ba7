"""The loader of the scripts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.state import scripts


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the scripts that this process has not read yet."""
    folder = tmp_path / "lua"
    shutil.copytree(str(scripts._folder()), folder)
    monkeypatch.setattr(scripts, "_folder", lambda: folder)
    for cached in (scripts.load, scripts.preload):
        cached.cache_clear()
    yield folder
    for cached in (scripts.load, scripts.preload):
        cached.cache_clear()


class Client:
    """Answers with the id of the script that it was asked for."""

    def evalsha(self, sha: str, *_: object) -> str:
        return sha


def test_a_running_process_goes_on_with_the_scripts_it_began_with(installed: Path) -> None:
    """Another version is installed over it after its first call: scripts that it calls later are not of that one."""
    caller = scripts.Scripts(Client())  # type: ignore[arg-type]
    expected = scripts.load("part_done").sha
    scripts.load.cache_clear()
    caller.call("part_claim", [], [])
    for path in installed.glob("*.lua"):
        path.write_text("-- another version\n")
    assert caller.call("part_done", [], []) == expected
