"""A job whose history has a branch: run a saved 10, 20 and 30; run b went on from 20 and saved 25 and 35. And `dtr` run on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr.cli import main
from dtr.config import Settings
from tests.ranks import running
from tests.uploading import uploading

WITHIN_S = 30


@dataclass
class History:
    """Where it lies, and the names of its runs."""

    settings: Settings
    folder: Path
    a: str
    b: str

    def step_folder(self, run: str, step: int) -> Path:
        return self.folder / self.settings.job / "runs" / run / f"{step:012d}"


def state(step: int, rank: int = 0) -> dict[str, Any]:
    """What a rank saves: weights that move, a table that does not, and values beside them."""
    return {"w": np.arange(1000, dtype=np.float32) + step, "frozen": np.ones((4, 5)), "step": step, "name": f"rank {rank}", "lr": 0.1}


def made(settings: Settings, folder: Path) -> History:
    """Train it, with nothing retired; readers get no grace."""
    chosen = replace(settings, keep_last=0, reader_grace_s=0.0, store=str(folder))
    with uploading(chosen):
        runs = []
        for steps, base in (((10, 20, 30), None), ((25, 35), 20)):
            with running(chosen, folder, 2, names=f"w{base or 0}-") as job:
                if base is not None:
                    job.restore(step=base)
                for step in steps:
                    handles = job.each(
                        lambda rank, at=step: rank.manager.save_async(state(at, rank.rank), at, metrics={"loss": 1 / at, "rank": rank.rank})
                    )
                    for handle in handles:
                        handle.durable.result(WITHIN_S)
                runs.append(job.ranks[0].session.run.id)
    return History(chosen, folder, *runs)


Dtr = Callable[..., str]


def runner(history: History, capsys: pytest.CaptureFixture[str]) -> Dtr:
    """Runs a command on that job; ``code`` is what it must end with, ``call.err`` what it said on stderr."""

    def call(*args: str, code: int = 0, url: str = history.settings.redis_url, job: str = history.settings.job, store: str = "") -> str:
        got = main([*args, "--url", url, "--job", job, *(["--store", store] if store else [])])
        out, err = capsys.readouterr()
        assert got == code, (out, err)
        call.err = err  # type: ignore[attr-defined]
        return out

    return call
