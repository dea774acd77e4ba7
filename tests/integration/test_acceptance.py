"""The acceptance script ``../shared/acceptance/train.py``, unmodified, as its docstring says: under the launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import RedisServer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT.parent / "shared" / "acceptance" / "train.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason=f"no {SCRIPT}, which is outside of the repository")


def trained(folder: Path, url: str) -> str:
    """Train to the end, in a process group that ends with it; what was said. The script's exit status is its own check."""
    env = {**os.environ, "DTR_REDIS_URL": url, "DTR_STAGING": str(folder / "staging"), "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dtr", "run", "-n", "1", "--", sys.executable, str(SCRIPT)]
    said = folder / "said"
    with said.open("wb") as out:
        child = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        status = child.wait(120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        child.wait(60)
    assert status == 0, said.read_text()[-6000:]
    return said.read_text()


def test_a_trainer_as_a_user_would_write_it(own_valkey: RedisServer, tmp_path: Path) -> None:
    """Given one stack, when the script trains, and again in a new folder of its own, then every step of it held both times."""
    for _ in range(2):
        assert "Training complete!" in trained(tmp_path, own_valkey.url)
    assert len(list(tmp_path.glob("dtr-acceptance-*/checkpoints"))) == 2
