"""The demo's proof of exactly once: from the trainers' own logs alone, and able to fail."""

from __future__ import annotations

import ast
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import worker_agent.demo.proof
from worker_agent.demo.proof import Entry, Position, SampleLog, position_of, prove, read_logs

FIRST, SECOND = "0001-aaaa", "0002-bbbb"
LINEAGE = {FIRST: 1, SECOND: 5}


def entry(run: str, step: int, rank: int, epoch: int, *samples: tuple[int, int]) -> Entry:
    return Entry(run=run, step=step, rank=rank, epoch=epoch, samples=samples)


def good() -> list[Entry]:
    """Two ranks on 20 samples; one dies after step 2, the other goes on from step 1 and gets into epoch 1."""
    return [
        entry(FIRST, 0, 0, 0, (0, 5)),
        entry(FIRST, 0, 1, 0, (10, 13)),
        entry(FIRST, 1, 0, 0, (5, 6)),
        entry(FIRST, 1, 1, 0),
        entry(FIRST, 2, 0, 0, (6, 10)),
        entry(FIRST, 2, 1, 0, (13, 14)),
        entry(SECOND, 2, 0, 0, (13, 20)),
        entry(SECOND, 3, 0, 0, (6, 10)),
        entry(SECOND, 4, 0, 1, (8, 12), (0, 2)),
        entry(SECOND, 5, 0, 1, (2, 4)),
    ]


def test_a_good_lineage_is_exact():
    """What was abandoned is counted apart, the current epoch need not be whole."""
    proof = prove(good(), LINEAGE, samples=20)
    assert proof.exact
    assert (proof.whole_epochs, proof.consumed, proof.lost, proof.twice, proof.strange) == (1, 28, 0, 0, 0)
    assert (proof.abandoned_steps, proof.abandoned_samples) == (1, 5)
    assert proof.position == Position(epoch=1, consumed=((0, 4), (8, 12)))


def test_an_epoch_that_the_last_step_ends_is_whole():
    """It has ended, though nothing of the next one was seen."""
    proof = prove([entry(SECOND, 0, 0, 0, (0, 20))], {SECOND: 0}, samples=20)
    assert (proof.exact, proof.whole_epochs) == (True, 1)


@pytest.mark.parametrize("spoil", range(4))
def test_each_kind_of_fault_is_found(spoil):
    """A sample that nobody saw, one seen twice, one that is none, and an abandoned step that was not."""
    entries, lineage = good(), dict(LINEAGE)
    match spoil:
        case 0:
            entries.remove(entry(FIRST, 1, 0, 0, (5, 6)))
        case 1:
            entries.append(entry(SECOND, 5, 1, 1, (9, 10)))
        case 2:
            entries.append(entry(SECOND, 5, 1, 1, (19, 22)))
        case 3:
            lineage[FIRST] = 2
    proof = prove(entries, lineage, samples=20)
    assert not proof.exact
    assert (proof.lost, proof.twice, proof.strange) == [(1, 0, 0), (0, 1, 0), (0, 0, 2), (0, 5, 0)][spoil]


def test_an_epoch_that_was_left_out_is_lost():
    """Epochs follow each other."""
    assert prove([entry(SECOND, 0, 0, 1, (0, 20))], {SECOND: 0}, samples=20).lost == 20


def test_nothing_proves_nothing():
    """No line of the lineage: not exact, and all that was done was abandoned."""
    proof = prove(good(), {}, samples=20)
    assert (proof.exact, proof.consumed, proof.abandoned_samples) == (False, 0, 33)


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_counting(seed):
    """Random logs, counted one by one."""
    rng = random.Random(seed)
    entries = []
    for step in range(rng.randrange(1, 8)):
        starts = [rng.randrange(20) for _ in range(rng.randrange(4))]
        ranges = tuple((start, rng.randrange(start + 1, 21)) for start in starts)
        entries.append(entry(FIRST, step, 0, step // 3, *ranges))
    counts = Counter((one.epoch, number) for one in entries for start, stop in one.samples for number in range(start, stop))
    proof = prove(entries, {FIRST: 99}, samples=20)
    last = max((epoch for epoch, _ in counts), default=0)
    assert proof.position.epoch == max(one.epoch for one in entries) >= last
    assert proof.consumed == counts.total()
    assert proof.twice == sum(count - 1 for count in counts.values())
    assert proof.lost == sum((epoch, number) not in counts for epoch in range(proof.position.epoch) for number in range(20))


def test_logs_come_back_as_they_were_written(tmp_path):
    """Samples in any order, no sample at all, one file for each process; the torn last line of a killed one is not read."""
    log = SampleLog(tmp_path, "host-0")
    log.write(run=FIRST, step=0, rank=0, epoch=0, numbers=np.array([7, 8, 9, 3, 5, 4]))
    log.write(run=FIRST, step=1, rank=0, epoch=0, numbers=np.array([], dtype=np.int64))
    log.close()
    (tmp_path / "host-1-9.samples.jsonl").write_text(entry(FIRST, 0, 1, 0, (0, 3)).to_line() + '\n{"run": "0001')
    assert list(read_logs(tmp_path)) == [
        entry(FIRST, 0, 0, 0, (7, 10), (3, 4), (5, 6), (4, 5)),
        entry(FIRST, 1, 0, 0),
        entry(FIRST, 0, 1, 0, (0, 3)),
    ]


@pytest.mark.parametrize(
    ("done", "partial", "consumed"),
    [
        ("", {}, ()),
        ("0", {}, ((0, 8),)),
        ("0-1,3", {}, ((0, 16), (24, 30))),
        ("1", {"0": "0-2,7-8", "3": "0-1"}, ((0, 2), (7, 16), (24, 25))),
    ],
)
def test_a_manifests_position_is_read_by_hand(done, partial, consumed):
    """30 samples in shards of 8: whole shards with both ends, ranges within shards half open."""
    record = {"mode": "dynamic", "epoch": 3, "done": done, "partial": partial}
    assert position_of(record, shard_size=8, samples=30) == Position(epoch=3, consumed=consumed)


def test_the_proof_shares_no_code_with_what_it_proves():
    """It imports nothing of dtr, and of the demo nothing either."""
    tree = ast.parse(Path(worker_agent.demo.proof.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.partition(".")[0] in {"dtr", "worker_agent", "tasks"}]
