"""The demo's model, data and gradients: right numbers, the same bits everywhere."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from dtr.errors import Unavailable
from worker_agent.demo.corpus import numbered, sources, split, write_corpus
from worker_agent.demo.gradients import SharedGradients, slice_of
from worker_agent.demo.model import Adam, ByteModel, Shape, digest, load, state_of

SMALL = Shape(context=3, embedding=4, hidden=8)


def samples(count: int, shape: Shape = SMALL) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, shape.text_bytes), dtype=np.uint8)


def test_gradient_is_the_slope_of_the_loss():
    """A tiny move of any weight changes the loss as the gradient says."""
    model, batch = ByteModel(SMALL, seed=3), samples(32)
    slope = np.empty_like(model.flat)
    model.gradient(batch, slope)
    scratch = np.empty_like(model.flat)
    for name, part in SMALL.views(slope).items():
        index = np.unravel_index(np.argmax(np.abs(part)), part.shape)
        weight = model.weights[name]
        kept = weight[index]
        losses = []
        for move in (1e-2, -1e-2):
            weight[index] = kept + np.float32(move)
            losses.append(model.gradient(batch, scratch))
        weight[index] = kept
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(part[index]), rel=0.02), name


def test_loss_of_a_fresh_model_is_that_of_a_guess_and_training_lowers_it():
    """256 bytes equally likely are log(256) nats; after some steps on a pattern the model knows it."""
    model, batch = ByteModel(SMALL, seed=3), np.tile(np.arange(4, dtype=np.uint8), (16, 1))
    slope, optimizer = np.empty_like(model.flat), Adam(SMALL.parameters)
    first = model.gradient(batch, slope)
    for _ in range(100):
        last = model.gradient(batch, slope)
        optimizer.update(model.flat, slope)
    assert first == pytest.approx(np.log(256), abs=0.3)
    assert last < first / 4
    assert int(np.argmax(model.next_byte(batch[0, :-1]))) == 3


def test_adam_in_pieces_is_adam():
    """Working piece by piece gives what the formula gives for the whole array."""
    rng = np.random.default_rng(5)
    count = (1 << 15) * 2 + 7
    flat = rng.standard_normal(count).astype(np.float32)
    expected, first, second = flat.astype(np.float64), np.zeros(count), np.zeros(count)
    optimizer = Adam(count, rate=0.01)
    for n in range(1, 4):
        slope = rng.standard_normal(count).astype(np.float32)
        optimizer.update(flat, slope)
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope.astype(np.float64) ** 2
        expected -= 0.01 * (first / (1 - 0.9**n)) / np.sqrt(second / (1 - 0.99**n))
    np.testing.assert_allclose(flat, expected, rtol=0, atol=1e-4)  # of moves of 0.01; Adam adds its epsilon elsewhere than the paper does


def test_a_loaded_state_trains_on_bit_for_bit():
    """A model that took over a state continues exactly as the one it came from."""
    one, its = ByteModel(SMALL, seed=3), Adam(SMALL.parameters)
    slope = np.empty_like(one.flat)
    one.gradient(samples(8), slope)
    its.update(one.flat, slope)
    other, others = ByteModel(SMALL, seed=4), Adam(SMALL.parameters)
    assert digest(state_of(one, its)) != digest(state_of(other, others))
    load(state_of(one, its), other, others)
    for model, optimizer in ((one, its), (other, others)):
        model.gradient(samples(8), slope)
        optimizer.update(model.flat, slope)
    assert digest(state_of(one, its)) == digest(state_of(other, others))


@pytest.mark.parametrize("where", ["model", "first", "updates"])
def test_digest_sees_a_single_bit(where):
    """A change anywhere, of the smallest kind, changes the digest."""
    model, optimizer = ByteModel(SMALL, seed=3), Adam(SMALL.parameters)
    before = digest(state_of(model, optimizer))
    if where == "model":
        model.flat[-1:].view(np.uint32)[...] ^= 1
    elif where == "first":
        optimizer.first.view(np.uint32)[0] ^= 1
    else:
        optimizer.updates += 1
    assert digest(state_of(model, optimizer)) != before


@pytest.mark.parametrize(("world_size", "width"), [(1, 5), (3, 10), (4, 3), (5, 1001)])
def test_slices_cover_all_columns_once(world_size, width):
    """Whatever the sizes, each column is averaged by exactly one rank."""
    columns = [column for rank in range(world_size) for column in range(width)[slice_of(rank, world_size, width)]]
    assert columns == list(range(width))


def test_ranks_average_through_one_file(tmp_path):
    """Threads as ranks, over several steps, with fast and slow ones mixed: each sees the true mean of every step, by weight.

    A row of weight 0 counts nothing, and the sum of weights is everybody's.
    """
    world_size, width, steps = 3, 1000, 20
    barrier = threading.Barrier(world_size)
    seen: dict[int, list[tuple[np.ndarray, int]]] = {}

    def meet(name: str) -> None:
        barrier.wait(30)

    def rank_main(rank: int) -> None:
        with SharedGradients(tmp_path, run="0001-abcd", rank=rank, world_size=world_size, width=width) as shared:
            seen[rank] = []
            for step in range(steps):
                shared.own[...] = np.arange(width) * (rank + 1) + step
                mean, total = shared.average(meet, weight=0 if step == 7 and rank else rank + 1)
                seen[rank].append((mean.copy(), total))

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for step in range(steps):
        total, mean = (1, 1.0) if step == 7 else (6, 14 / 6)  # of 1, 2, 3 by weights 1, 2, 3
        for rank in range(world_size):
            np.testing.assert_allclose(seen[rank][step][0], np.arange(width) * mean + step, rtol=1e-6)
            np.testing.assert_array_equal(seen[rank][step][0], seen[0][step][0])
            assert seen[rank][step][1] == total
    assert list(tmp_path.iterdir()) == []


def library(folder: Path) -> Path:
    for name, text in {"b.py": "b" * 30, "a.py": "a" * 25, "test/t.py": "t" * 99, "site-packages/s.py": "s" * 99, "n.txt": "n"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_corpus_holds_each_whole_sample_of_the_sources_once(tmp_path):
    """Tests and installed packages are left out; what is over at the end is cut to whole samples; each has its number."""
    (tmp_path / "lib").mkdir()
    found = write_corpus(tmp_path / "out", source=library(tmp_path / "lib"), text_bytes=10, file_samples=2, samples=1000)
    files = sorted((tmp_path / "out").iterdir())
    assert [len(file.read_bytes()) for file in files] == [28, 28, 14]
    numbers, texts = split(np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8).reshape(5, 14))
    assert numbers.tolist() == [0, 1, 2, 3, 4]
    assert sorted(map(bytes, texts)) == sorted([b"a" * 10, b"a" * 10, b"a" * 5 + b"b" * 5, b"b" * 10, b"b" * 10])
    assert (found.sources, found.samples, found.files) == (2, 5, 3)


def test_the_same_library_gives_the_same_bytes(tmp_path):
    """Also in their order."""
    (tmp_path / "lib").mkdir()
    for name in ("one", "other"):
        write_corpus(tmp_path / name, source=library(tmp_path / "lib"), text_bytes=3, file_samples=99, samples=1000)
    assert (tmp_path / "one" / "stdlib-000.bin").read_bytes() == (tmp_path / "other" / "stdlib-000.bin").read_bytes()


def test_corpus_stops_at_the_limit(tmp_path):
    """No more is read than is wanted."""
    (tmp_path / "lib").mkdir()
    found = write_corpus(tmp_path / "out", source=library(tmp_path / "lib"), text_bytes=10, file_samples=9, samples=2)
    assert (found.sources, found.samples) == (1, 2)


def test_corpus_without_sources_says_what_to_do(tmp_path):
    """A Python without its sources is named."""
    with pytest.raises(Unavailable, match="no Python sources in"):
        write_corpus(tmp_path / "out", source=tmp_path, text_bytes=10, file_samples=2, samples=1000)
    assert list(sources(tmp_path)) == []


def test_a_sample_knows_its_number_wherever_it_lies():
    """Rows in any order and with gaps, also of numbers above one byte; none is fine too."""
    texts = samples(1000)
    rows = numbered(texts)
    chosen = [999, 0, 256, 3]
    numbers, found = split(rows[chosen])
    assert numbers.tolist() == chosen
    np.testing.assert_array_equal(found, texts[chosen])
    assert [len(part) for part in split(rows[:0])] == [0, 0]
