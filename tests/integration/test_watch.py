"""People see a save move: the handle's progress and callback, and ``dtr ckpt watch`` on a terminal, into a pipe and as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint.saving.progress import SaveProgress
from dtr.cli import main
from dtr.config import Settings
from dtr.errors import CheckpointAborted, UnsupportedLeaf
from tests.proxy import Proxy
from tests.ranks import Job, running
from tests.servers import RedisServer
from tests.uploading import uploading
from tests.waiting import eventually

WITHIN_S = 30


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def watch(settings: Settings, *args: str, columns: int = 80, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dtr", "ckpt", "watch", "--url", settings.redis_url, "--job", settings.job, *args]
    return subprocess.Popen(
        command, env={**os.environ, "COLUMNS": str(columns)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )  # fmt: skip


@contextlib.contextmanager
def begun(settings: Settings, store: Path, step: int = 1) -> Iterator[Job]:
    """Two ranks, of which rank 0 has staged a save that waits for the other and for an uploader."""
    with running(settings, store, 2) as job:
        job.ranks[0].manager.save_async({"w": np.zeros(50_000)}, step)
        state = job.ranks[0].session.state
        eventually(lambda: state.redis.zcard(state.keys.open_ckpts), what="the checkpoint in Redis")
        yield job


class TestHandle:
    def test_shows_every_rank_and_ends_with_the_commit(self, settings: Settings, store: Path) -> None:
        """From the callback and when asked: own part at once, the others' as they come, at the end every byte."""
        told: list[SaveProgress] = []
        threads: set[str] = set()

        def hear(now: SaveProgress) -> None:
            told.append(now)
            threads.add(threading.current_thread().name)

        with running(settings, store, 2) as job:
            first, second = job.ranks
            handle = first.manager.save_async({"w": np.zeros(50_000)}, 1, on_progress=hear)
            (mine,) = handle.progress().parts
            assert (mine.rank, mine.state, mine.done_bytes) == (0, "staged", 0)
            eventually(lambda: [part.state for part in handle.progress().parts] == ["staged", "absent"], what="a look at both ranks")
            other = second.manager.save_async({"w": np.zeros(60_000)}, 1)
            with uploading(settings):
                commit = handle.durable.result(WITHIN_S)
                other.durable.result(WITHIN_S)
            assert told[-1].state == "COMMITTED", "the last call comes before durable is done"
            assert [(part.state, part.done_bytes == part.total_bytes) for part in told[-1].parts] == [("done", True)] * 2
            assert told[-1].done_bytes == told[-1].total_bytes == commit.size_bytes > 110_000 * 8
            assert handle.progress() == told[-1]
            assert other.progress().state == "COMMITTED"
            assert other.progress().total_bytes == commit.size_bytes
            assert threads == {"dtr-publish"}
            assert sorted(told, key=lambda now: now.done_bytes) == told

    def test_a_callback_that_raises_harms_nothing(self, settings: Settings, store: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The save commits, later ones too, and one error is logged for each save."""
        with running(settings, store, 1) as job, uploading(settings):
            for step in (1, 2):
                handle = job.ranks[0].manager.save_async(b"x", step, on_progress=lambda now: sys.exit(3))
                handle.durable.result(WITHIN_S)
        assert len([record for record in caplog.records if "on_progress" in record.message]) == 2

    def test_a_save_that_is_aborted_is_told_with_its_reason(self, settings: Settings, store: Path) -> None:
        """The last call of the function has the state and why."""
        told: list[SaveProgress] = []
        with running(settings, store, 2) as job, uploading(settings):
            handle = job.ranks[0].manager.save_async({"w": 1}, 1, on_progress=told.append)
            with pytest.raises(TypeError):
                job.ranks[1].manager.save_async({"w": object()}, 1) if False else (_ for _ in ()).throw(TypeError)
            with pytest.raises(UnsupportedLeaf):
                job.ranks[1].manager.save_async({"w": object()}, 1)
            with pytest.raises(CheckpointAborted):
                handle.durable.result(WITHIN_S)
        assert told[-1].state == "ABORTED"
        assert "rank 1: UnsupportedLeaf" in told[-1].reason


class TestWatch:
    def test_lines_until_the_commit(self, settings: Settings, store: Path) -> None:
        """Without a name: the one under way. It names who is missing, and ends with the commit, exit 0."""
        with begun(settings, store) as job:
            seen = watch(settings, "--every", "0.1", columns=200)
            assert seen.stdout is not None
            run = job.ranks[0].session.run.id
            first = seen.stdout.readline()
            assert first.startswith(f"{run}/1 writing · 0 of 2 parts in the store · 0 B of ")
            assert "rank 0 waits for an uploader, rank 1 not staged yet" in first
            job.ranks[1].manager.save_async({"w": 1}, 1)
            with uploading(settings):
                out, err = seen.communicate(timeout=WITHIN_S)
            assert (seen.returncode, err) == (0, "")
            assert re.fullmatch(rf"{run}/1 committed: 2 parts, \d+ KiB in .* s \(.* MB/s\)", out.splitlines()[-1])

    def test_the_next_one_is_waited_for_and_an_abort_is_exit_1(self, settings: Settings, store: Path) -> None:
        """Nothing is under way: it says so, and shows the next; each line of --json is a document."""
        with running(settings, store, 2) as job, uploading(settings):
            job.commit(lambda r: {"w": 0}, 1)
            seen = watch(settings, "--json", "--every", "0.1")
            assert seen.stderr is not None
            assert "waiting for the next" in seen.stderr.readline()
            job.ranks[0].manager.save_async({"w": 1}, 2)
            with pytest.raises(UnsupportedLeaf):
                job.ranks[1].manager.save_async({"w": object()}, 2)
            out, err = seen.communicate(timeout=WITHIN_S)
            documents = [json.loads(one) for one in out.splitlines()]
            assert seen.returncode == 1
            assert (documents[-1]["job"], documents[-1]["step"], documents[-1]["state"]) == (settings.job, 2, "ABORTED")
            assert err.startswith("dtr: checkpoint ") and "is aborted: rank 1: UnsupportedLeaf" in err

    def test_bars_on_a_terminal(self, settings: Settings, store: Path) -> None:
        """One for each rank, drawn in place, and the last picture stays."""
        with begun(settings, store) as job:
            ours, theirs = pty.openpty()
            seen = watch(settings, stdout=theirs, stderr=theirs, columns=100, text=False)
            os.close(theirs)
            assert "waits for an uploader" in _until(ours, "not staged yet")
            job.ranks[1].manager.save_async({"w": 1}, 1)
            with uploading(settings):
                shown = _until(ours, "committed: 2 parts", to_the_end=True)
            assert seen.wait(WITHIN_S) == 0
            assert "░" in shown or "█" in shown
            assert shown.count("█" * 16) >= 2, "two full bars at the end"
            assert "\x1b[" in shown, "the lines are replaced in place"
            os.close(ours)

    @pytest.mark.parametrize("name", [["1"], ["{run}/1"], ["{run}", "1"]])
    def test_one_that_is_decided_is_shown_at_once(
        self, settings: Settings, store: Path, name: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """By its step alone, or with its run; also after its parts are long gone."""
        with running(settings, store, 1) as job, uploading(settings):
            (commit,) = job.commit(lambda r: b"x", 1)
            named = [word.format(run=commit.run) for word in name]
            assert main(["ckpt", "watch", *named, "--url", settings.redis_url, "--job", settings.job]) == 0
        assert f"{commit.run}/1 committed: 1 part" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (["77"], 1, "has no checkpoint of step 77 in Redis"),
            (["0001-none/5"], 1, "has no checkpoint 0001-none/5 in Redis"),
            (["x"], 2, "expected RUN STEP, RUN/STEP or STEP, got 'x'"),
            (["a", "b", "c"], 2, "expected RUN STEP"),
            (["../x/5"], 2, "expected RUN STEP"),
            (["--every", "0"], 2, "0.1<=x<=3600"),
            (["1", "--url", "redis://127.0.0.1:1/0"], 4, "cannot be reached"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, settings: Settings, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One line on stderr, and the exit code of its kind."""
        assert main(["ckpt", "watch", "--url", settings.redis_url, "--job", settings.job, *words]) == code
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1

    def test_an_outage_of_redis_is_survived(self, valkey: RedisServer, settings: Settings, store: Path) -> None:
        """It says so when that begins and when it is over, and shows the commit."""
        with Proxy(valkey.port) as proxy, begun(settings, store) as job:
            seen = watch(replace(settings, redis_url=f"redis://127.0.0.1:{proxy.port}/0"), "--every", "0.1", columns=200)
            assert seen.stdout is not None
            assert seen.stderr is not None
            assert "writing" in seen.stdout.readline()
            proxy.set_mode("refuse")
            assert seen.stderr.readline().startswith("dtr: Redis at ")
            proxy.set_mode("pass")
            assert seen.stderr.readline() == "dtr: Redis answers again\n"
            job.ranks[1].manager.save_async({"w": 1}, 1)
            with uploading(settings):
                out, _ = seen.communicate(timeout=WITHIN_S)
            assert seen.returncode == 0
            assert "committed: 2 parts" in out

    def test_follow_goes_on_until_it_is_interrupted(self, settings: Settings, store: Path) -> None:
        """One checkpoint after the other, each once; Ctrl-C is exit 130."""
        with running(settings, store, 1) as job, uploading(settings):
            seen = watch(settings, "--follow", "--json")
            assert seen.stdout is not None
            assert seen.stderr is not None
            assert "waiting for the next" in seen.stderr.readline()
            ends: list[int] = []
            for step in (1, 2):
                job.commit(lambda r: b"x", step)
                while len(ends) < step:
                    now = json.loads(seen.stdout.readline())
                    ends += [now["step"]] * (now["state"] == "COMMITTED")
            seen.send_signal(signal.SIGINT)
            out, err = seen.communicate(timeout=WITHIN_S)
            assert (seen.returncode, ends, out, err.strip()) == (130, [1, 2], "", "")


def _until(terminal: int, text: str, *, to_the_end: bool = False) -> str:
    """What a terminal shows until ``text`` came, or until nobody writes any more."""
    seen = b""
    while to_the_end or text.encode() not in seen:
        ready, _, _ = select.select([terminal], [], [], WITHIN_S)
        assert ready, f"no {text!r} in {seen.decode(errors='replace')}"
        try:
            chunk = os.read(terminal, 65_536)
        except OSError:
            break
        seen += chunk
    assert text.encode() in seen
    return seen.decode(errors="replace")
