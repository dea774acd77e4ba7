"""The ends of epochs: short, padded or dropped, in as many batches on every rank, and on record; and passes beside the training."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest

from dtr.config import Settings
from dtr.datasets.consuming import ranges
from dtr.datasets.loading.evaluation import Evaluation
from dtr.errors import InvalidInput, RosterChanged, ShardUnreadable
from tests.loading import LoadingRank, damage, loading, once_each, registered, write_lines
from tests.waiting import eventually

numbers = pytest.fixture(registered)


def noted(state: dict[str, Any], kind: str, epoch: int, size: int = 25) -> list[int]:
    """The ids that are on record as left out, of shards whose samples are numbered through."""
    held = state["numbers"].get("notes", {}).get(kind, {}).get(str(epoch), {})
    return sorted(
        int(shard) * size + at for shard, text in held.items() for start, stop in ranges.parse_ranges(text) for at in range(start, stop)
    )


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 30), (3, 7), (4, 60), (4, 24)])
def test_drop_gives_full_batches_only(settings: Settings, numbers: Path, ranks: int, batch_size: int) -> None:
    """Given tail='drop', then all batches are full, the ranks have equally many, and what was left out is on record, by sample."""
    with loading(settings, ranks) as job:
        steps = job.train(batch_size=batch_size, tail="drop", epochs=2)
        assert len(set(steps)) == 1 and steps[0] > 0
        assert {len(ids) for rank in job.ranks for _, ids in rank.seen} == {batch_size}
        state = job.merged()
        for epoch in (0, 1):
            assert once_each(job.seen(epoch), set(range(400)) - set(noted(state, "dropped", epoch)))
        if ranks == 1:
            assert len(noted(state, "dropped", 0)) == 400 % batch_size


def test_a_dropped_rest_is_not_given_after_a_restart(settings: Settings, numbers: Path) -> None:
    """Given the state at the end of an epoch that dropped samples, when other ranks go on, then they begin with the next epoch."""
    with loading(settings, 3, names="a") as job:
        job.train(batch_size=9, tail="drop")
        cut = job.merged()
        assert noted(cut, "dropped", 0)
    with loading(settings, 2, names="b") as job:
        job.restored(cut).train(batch_size=9, tail="drop", epochs=2)
        assert not job.seen(0)
        state = job.merged()
        assert once_each(job.seen(1), set(range(400)) - set(noted(state, "dropped", 1)))


@pytest.mark.parametrize("steps", [2, 11])
def test_drop_goes_on_in_mid_epoch(settings: Settings, numbers: Path, steps: int) -> None:
    """Given a cut in mid-epoch, when other ranks go on with tail='drop', then what neither consumed is on record."""
    with loading(settings, 3, names="a") as job:
        job.train(steps, batch_size=9, tail="drop")
        cut, seen = job.merged(), job.seen()
    with loading(settings, 2, names="b") as job:
        job.restored(cut).train(batch_size=9, tail="drop")
        assert once_each(seen + job.seen(), set(range(400)) - set(noted(job.merged(), "dropped", 0)))


def test_what_deterministic_mode_drops_is_on_record(settings: Settings, numbers: Path) -> None:
    """Given 400 samples in global batches of 24 and tail='drop', then the 16 that are left are noted, alike by both ranks."""
    with loading(settings, 2) as job:
        job.train(mode="deterministic", global_batch_size=24, tail="drop")
        left = noted(job.merged(), "dropped", 0)
        assert len(left) == 16
        assert once_each(job.seen(), set(range(400)) - set(left))


def test_padding_survives_a_shard_that_cannot_be_read(settings: Settings, numbers: Path) -> None:
    """Given a damaged shard and readers that only meet it when they read, with tail='pad', then batches are full all the same."""
    damage(numbers / "part-2.jsonl")
    with loading(settings, 1) as job:
        rank = job.ranks[0]
        loader = rank.loader(batch_size=16, tail="pad")
        reader = loader.reader()
        for order in loader.orders():
            batch = reader(order)
            assert len(batch) == len(batch["id"]) == 16
            rank.plane.consumed(batch, rank.step + 1)
            rank.step += 1
            rank.seen.append((batch.epoch, sorted(int(i) for i in batch["id"][: sum(e - s for _, s, e in batch.ranges)])))
        assert once_each(job.seen(), [*range(200), *range(225, 400)])
        state = job.merged()
        assert "part-2.jsonl" in state["numbers"]["notes"]["quarantined"]["0"]["8"]
        keys = rank.session.state.keys
        quarantine = keys.quarantine("numbers", loader.plan.dataset.spec.digest)
        eventually(lambda: rank.session.state.redis.hget(quarantine, "8"), what="the ledger to hear of it")


# --- evaluation -------------------------------------------------------------------------------------------------------------


def evaluation(rank: LoadingRank, **options: Any) -> Evaluation:
    asked = {
        "batch_size": 10, "global_batch_size": None, "epochs": 1, "columns": ["id"], "tail": "empty", "prefetch": 2, "prefetch_bytes": None,
        "processes": 0, "start": "spawn", "as_torch": False,
    }  # fmt: skip
    return rank.plane.evaluation(rank.registry, "numbers", **(asked | options))


def ids_of(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch["id"]]


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_evaluation_gives_everything_each_time(settings: Settings, numbers: Path, ranks: int) -> None:
    """Given ranks that train, when they evaluate twice, then each pass has each sample once, alike, and the position is as it was."""
    with loading(settings, ranks) as job:
        job.train(3)
        before = job.merged()
        for _ in range(2):
            passes = job.each(lambda rank: [list(evaluation(rank)), list(evaluation(rank))])
            assert len({len(batches) for both in passes for batches in both}) == 1
            assert sorted(i for both in passes for i in ids_of(both[0])) == list(range(400))
            assert all(ids_of(first) == ids_of(second) for first, second in passes)
        assert job.merged() == before
        job.train()
        assert once_each(job.seen(), range(400))


@pytest.mark.parametrize(("tail", "sizes"), [("empty", [30, 30, 30, 30, 13]), ("pad", [30] * 5), ("drop", [30] * 4)])
def test_the_tail_of_an_evaluation(settings: Settings, numbers: Path, tail: str, sizes: list[int]) -> None:
    """Given 400 samples, three ranks and batches of 30, then every rank has as many, and the last is short, full or left out."""
    with loading(settings, 3) as job:
        found = job.each(
            lambda rank: [
                [len(batch) for batch in evaluation(rank, batch_size=30, tail=tail)],
                len(evaluation(rank, batch_size=30, tail=tail)),
            ]
        )
        assert found[0][0] == sizes and {len(of) for of, _ in found} == {length for _, length in found} == {len(sizes)}


def test_an_evaluation_of_global_batches(settings: Settings, numbers: Path) -> None:
    """Given global_batch_size, when 1 and 4 ranks evaluate, then the global batches are the same."""
    found = []
    for ranks in (1, 4):
        with loading(settings, ranks, names=f"r{ranks}-") as job:
            parts = job.each(lambda rank: [ids_of([b]) for b in evaluation(rank, batch_size=None, global_batch_size=32)])
            found.append([[i for part in parts for i in part[n]] for n in range(len(parts[0]))])
    assert found[0] == found[1]
    assert sorted(i for batch in found[0] for i in batch) == list(range(400))


def test_an_evaluations_batch_is_not_for_step(settings: Settings, numbers: Path) -> None:
    """Given a batch of an evaluation, when it is reported, then that is refused, and the training's position is as it was."""
    with loading(settings, 1) as job:
        job.train(2)
        before = job.merged()
        with pytest.raises(InvalidInput, match=r"evaluation .* leave it out of step\(\)"):
            job.ranks[0].plane.consumed(next(iter(evaluation(job.ranks[0]))), 9)
        assert job.merged() == before


def test_a_loader_at_its_end_says_what_to_take_instead(settings: Settings, numbers: Path) -> None:
    """Given a loader that gave its last batch, when it is asked for again, then that is no silent nothing."""
    with loading(settings, 1) as job:
        job.train()
        with pytest.raises(InvalidInput, match=r"take agent\.evaluation\('numbers'"):
            job.ranks[0].loader()


def test_an_evaluation_that_is_left_half_way_leaves_no_thread(settings: Settings, numbers: Path) -> None:
    """Given a loop that breaks, then the thread that reads ahead ends."""
    with loading(settings, 1) as job:
        for n, _ in enumerate(evaluation(job.ranks[0])):
            if n == 3:
                break
        gc.collect()
        eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("dtr-evaluate")], what="the thread to end")


def test_an_evaluation_does_not_leave_out_what_it_cannot_read(settings: Settings, tmp_path: Path) -> None:
    """Given a file that is damaged, then the figure is not that of less data, silently; and a run that ended ends it."""
    with loading(settings, 1) as job:
        folder = write_lines(tmp_path / "d", 40, 1)
        job.ranks[0].registry.register("numbers", path=folder, format="jsonl", shard_size=20)
        damage(folder / "part-0.jsonl")
        with pytest.raises(ShardUnreadable, match=r"part-0\.jsonl"):
            list(evaluation(job.ranks[0]))
        passed = evaluation(job.ranks[0])
        job.ranks[0].session.form()
        with pytest.raises(RosterChanged):
            list(passed)
