"""The oracle itself: forged logs in which something is wrong, and what it says about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import judge, sequence

Entries = list[dict[str, Any]]
SAMPLES, EPOCHS = 8, 2


def honest() -> Entries:
    """Two ranks of run a take steps 0 to 2, and a third that comes to nothing; one rank of run b goes on from step 2."""
    entries: Entries = [{"run": "a", "rank": rank, "restored": None} for rank in (0, 1)]

    def took(run: str, size: int, rank: int, step: int, epoch: int, ids: list[int]) -> None:
        entries.append(
            {"run": run, "rank": rank, "world_size": size, "step": step, "seen": step + 1, "epoch": epoch, "batch": step, "ids": ids}
        )

    for step in range(4):
        epoch, at = divmod(4 * step, SAMPLES)
        took("a", 2, 0, step, epoch, [at, at + 1])
        took("a", 2, 1, step, epoch, [at + 2, at + 3])
    entries.append({"run": "b", "rank": 0, "restored": ["a", 2]})
    took("b", 1, 0, 3, 1, [4, 5, 6, 7])
    return entries


def written(folder: Path, entries: Entries, lineage: list[tuple[str, int]] | None = None) -> Path:
    for entry in entries:
        with (folder / f"log-{entry['run']}{entry['rank']}.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")
    (folder / "lineage.json").write_text(json.dumps(lineage or [("a", 2), ("b", 3)]))
    return folder


def step_of(entries: Entries, run: str, rank: int, step: int) -> dict[str, Any]:
    return next(e for e in entries if "ids" in e and (e["run"], e["rank"], e["step"]) == (run, rank, step))


def test_an_honest_job_is_clean(tmp_path: Path) -> None:
    """Given steps that came to nothing and a torn last line, then only what the lineage took counts."""
    folder = written(tmp_path, honest())
    with (folder / "log-a1.jsonl").open("a") as log:
        log.write('{"run": "a", "rank": 1, "step": 0, "ids": [0')
    found = judge(folder, samples=SAMPLES, epochs=EPOCHS)
    assert found.clean, found
    assert found.runs == 2
    assert str(found) == "2 runs: each sample exactly once"


def lose_one(entries: Entries) -> None:
    step_of(entries, "a", 1, 1)["ids"].remove(7)


def give_one_twice(entries: Entries) -> None:
    step_of(entries, "b", 0, 3)["ids"].append(1)


def make_one_up(entries: Entries) -> None:
    step_of(entries, "a", 0, 0)["ids"].append(99)


def leave_a_step_out(entries: Entries) -> None:
    entries.remove(step_of(entries, "a", 1, 2))


def restore_an_older_step(entries: Entries) -> None:
    next(e for e in entries if e["run"] == "b")["restored"] = ["a", 1]


def restore_an_older_model(entries: Entries) -> None:
    step_of(entries, "b", 0, 3)["seen"] = 3


def disagree(entries: Entries) -> None:
    entries[1]["restored"] = ["z", 7]


@pytest.mark.parametrize(
    ("forge", "where", "named"),
    [
        (lose_one, "lost", (0, 7)),
        (give_one_twice, "twice", "epoch 1 sample 1: run a step 2 rank 0, run b step 3 rank 0"),
        (make_one_up, "unknown", (0, 99)),
        (leave_a_step_out, "uneven", "step 2 of run a was taken by ranks [0] of 2"),
        (restore_an_older_step, "wrong", "what its trainers restored says [('a', 1), ('b', 3)]"),
        (restore_an_older_model, "wrong", "step 3 of run b has the state of step 2"),
        (disagree, "wrong", "ranks of run a restored different steps"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, forge: Callable[[Entries], None], where: str, named: Any) -> None:
    """Given logs of a job that lost, repeated or made up a sample, or went on from another step, then the verdict says which."""
    entries = honest()
    forge(entries)
    found = judge(written(tmp_path, entries), samples=SAMPLES, epochs=EPOCHS)
    assert not found.clean
    told = getattr(found, where)
    assert named in told if isinstance(named, tuple) else any(named in text for text in told), found
    assert str(told[0]) in str(found)


def test_a_whole_epoch_that_never_came_is_lost(tmp_path: Path) -> None:
    """Given one epoch more than was trained, then all of its samples are missing."""
    found = judge(written(tmp_path, honest()), samples=SAMPLES, epochs=3)
    assert found.lost == tuple((2, i) for i in range(SAMPLES))


def test_a_sequence_depends_on_the_order_of_samples_and_not_on_the_ranks(tmp_path: Path) -> None:
    """Given the same batches shared by one rank or by two, then their hashes are equal; in another order they are not."""
    hashes = {}
    for name, shares in {"two": [[1, 2], [3, 4]], "one": [[1, 2, 3, 4]], "other": [[2, 1, 3, 4]]}.items():
        (folder := tmp_path / name).mkdir()
        entries = [{"run": "r", "rank": rank, "step": 0, "epoch": 0, "batch": 0, "ids": ids} for rank, ids in enumerate(shares)]
        hashes[name] = sequence(written(folder, entries, [("r", 0)]))
    assert hashes["one"] == hashes["two"] != hashes["other"]
