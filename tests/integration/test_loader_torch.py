"""The loader under torch: DataLoader with workers, tensors of the arrays' memory, and DCP. Skipped where torch is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr.config import Settings
from dtr.datasets.loading.tensors import as_tensors
from dtr.errors import DatasetMismatch
from tests.loading import LoadingRank, loading, once_each, registered

torch: Any = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0 to try the loader under it")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning", "ignore::DeprecationWarning:torch")


numbers = pytest.fixture(registered)


def data_loader(rank: LoadingRank, workers: int, start: str | None = None, **options: Any) -> Any:
    """As the documentation says."""
    loader = rank.loader(as_torch=True, columns=["id", "x"], **options)
    return torch.utils.data.DataLoader(
        loader.reader(), sampler=loader.orders(workers=workers), batch_size=None, num_workers=workers, multiprocessing_context=start
    )


@pytest.mark.parametrize(("workers", "start"), [(0, None), (1, "fork"), (2, "fork"), (2, "spawn")])
@pytest.mark.parametrize("mode", ["dynamic", "deterministic"])
def test_a_data_loader_gives_each_sample_once(settings: Settings, numbers: Path, workers: int, start: str | None, mode: str) -> None:
    """Given workers of torch started after the agent, when two epochs are trained, then each sample came once, and the ledger is whole."""
    size = {"batch_size": 7} if mode == "dynamic" else {"global_batch_size": 7, "mode": mode}
    with loading(settings, 1) as job:
        rank = job.ranks[0]
        for batch in data_loader(rank, workers, start, epochs=2, **size):
            assert torch.is_tensor(batch["id"])
            assert batch["x"].tolist() == (batch["id"] / 2).tolist()
            rank.consume(batch)
        for epoch in (0, 1):
            assert once_each(job.seen(epoch), range(400))


def test_two_ranks_with_workers_have_equal_steps(settings: Settings, numbers: Path) -> None:
    """Given two ranks, each with a DataLoader, when they train, then they have equally many batches, and each sample came once."""
    with loading(settings, 2) as job:

        def train(rank: LoadingRank) -> int:
            count = 0
            for batch in data_loader(rank, 0, batch_size=9, tail="empty"):
                rank.consume(batch)
                count += 1
            return count

        assert len(set(job.each(train))) == 1
        assert once_each(job.seen(), range(400))


def test_a_data_loader_that_was_left_goes_on(settings: Settings, numbers: Path) -> None:
    """Given a DataLoader whose workers are ahead, when the loop is left and entered again, then nothing is lost and nothing twice."""
    with loading(settings, 1) as job:
        rank = job.ranks[0]
        batches = data_loader(rank, 2, "fork")
        for n, batch in enumerate(batches):
            rank.consume(batch)
            if n == 9:
                break
        for batch in batches:
            rank.consume(batch)
        assert once_each(job.seen(), range(400))


def test_a_workers_error_is_the_loaders(settings: Settings, numbers: Path) -> None:
    """Given a file that changed, when a worker meets it, then the trainer has that error, with the name of the file."""
    with (numbers / "part-1.jsonl").open("a") as file:
        file.write("{}\n")
    with loading(settings, 1) as job, pytest.raises(DatasetMismatch, match=r"part-1\.jsonl changed since"):
        list(data_loader(job.ranks[0], 1, "fork"))


def test_tensors_share_the_memory_of_arrays() -> None:
    """Given columns, then tensors are of the same memory where torch can, copies where it cannot, and other things stay as they are."""
    shared, fixed = np.arange(6.0), np.arange(3)
    fixed.flags.writeable = False
    foreign, words = np.arange(3, dtype=">i4"), np.array(["a", "b"], dtype=object)
    found = as_tensors({"shared": shared[2:], "fixed": fixed, "back": shared[::-1], "foreign": foreign, "words": words})
    assert found["shared"].data_ptr() == shared[2:].ctypes.data
    assert found["fixed"].tolist() == [0, 1, 2] and found["fixed"].data_ptr() != fixed.ctypes.data
    assert found["back"].tolist() == [5, 4, 3, 2, 1, 0]
    assert found["foreign"].tolist() == [0, 1, 2]
    assert found["words"] is words


@pytest.mark.parametrize("after", [1, 3])
def test_dcp_resumes_a_loader(settings: Settings, numbers: Path, tmp_path: Path, after: int) -> None:
    """Given a loader saved by DCP beside a model, when other ranks load it, then each sample was consumed once, and the model is back."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.stateful import Stateful

    with loading(settings, 2, names="a") as job:
        job.train(6, batch_size=9)
        states = job.each(lambda rank: rank.loader(batch_size=9).state_dict())
        assert states[0] == states[1]
        loader = job.ranks[0].loader(batch_size=9)
        assert isinstance(loader, Stateful)
        saved = {"model": {"w": torch.ones(3)}, "loader": loader}
        dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
        seen = job.seen()
    with loading(settings, after, names="b") as job:
        for rank in job.ranks:
            model = {"w": torch.zeros(3)}
            dcp.load({"model": model, "loader": rank.loader(batch_size=9)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
            assert model["w"].tolist() == [1, 1, 1]
        job.train(batch_size=9)
        assert once_each(seen + job.seen(), range(400))


def test_batches_of_tensors(settings: Settings, numbers: Path) -> None:
    """Given as_torch=True, then batches are tensors, empty ones too, of one dtype."""
    with loading(settings, 2) as job:
        batches = job.each(lambda rank: list(rank.loader(as_torch=True, batch_size=150, columns=["x"])))
        assert [tuple(batch["x"].shape) for of in batches for batch in of if len(batch) == 150]
        assert {batch["x"].dtype for of in batches for batch in of} == {torch.float64}
