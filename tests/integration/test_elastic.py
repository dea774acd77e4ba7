"""The acceptance script ``../shared/acceptance/elastic.py``, unmodified, as its docstring says: with one launcher and with two."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers import RedisServer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT.parent / "shared" / "acceptance" / "elastic.py"
LAUNCHERS = [["-n", "4"]], [["-n", "2", "--nnodes", "2"]] * 2

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason=f"no {SCRIPT}, which is outside of the repository")


@contextmanager
def launched(options: list[str], folder: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """``dtr run`` with the script, in a process group that ends with the block; what it says goes to FOLDER.out."""
    env = {**os.environ, "DTR_REDIS_URL": url, "DTR_STAGING": str(folder.parent / "staging"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dtr", "run", *options, "--max-restarts", "3", "--", sys.executable, str(SCRIPT), str(folder)]
    with folder.with_suffix(".out").open("ab") as out:
        child = subprocess.Popen(
            command, cwd=folder.parent, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        child.wait(60)


def trained(launchers: list[list[str]], folder: Path, url: str) -> None:
    """Train in a new folder to the end, and let the script's own check prove it."""
    with contextlib.ExitStack() as running:
        children = [running.enter_context(launched(options, folder, url)) for options in launchers]
        statuses = [child.wait(240) for child in children]
    said = folder.with_suffix(".out").read_text()
    assert statuses == [0] * len(launchers), said[-6000:]
    checked = subprocess.run([sys.executable, str(SCRIPT), str(folder), "--check"], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, f"{checked.stdout}{checked.stderr}\n{said[-6000:]}"
    assert "every sample exactly once" in checked.stdout


@pytest.mark.parametrize("launchers", LAUNCHERS, ids=["one launcher of 4", "two launchers of 2"])
def test_a_killed_rank_costs_no_sample(own_valkey: RedisServer, tmp_path: Path, launchers: list[list[str]]) -> None:
    """Given the script's own kill of rank 2 at step 12, when the job is over, then every sample counted exactly once."""
    trained(launchers, tmp_path / "first", own_valkey.url)


@pytest.mark.soak
@pytest.mark.parametrize("launchers", LAUNCHERS, ids=["one launcher of 4", "two launchers of 2"])
def test_twenty_times_in_a_row(own_valkey: RedisServer, tmp_path: Path, launchers: list[list[str]]) -> None:
    """Given one stack, when the script trains in one new folder after another, then each time every sample counted exactly once."""
    for n in range(20):
        trained(launchers, tmp_path / f"folder-{n}", own_valkey.url)
