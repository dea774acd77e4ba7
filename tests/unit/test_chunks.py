"""Chunks are cut along tensors, and recipes are parsed without trust."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint import checksum
from dtr.checkpoint.delta.carrying import hashed
from dtr.checkpoint.delta.chunks import Chunk, Recipe, cut, digest_of
from dtr.checkpoint.delta.damage import note_damage
from dtr.checkpoint.delta.source import ChunkSource
from dtr.checkpoint.format import tensors
from dtr.checkpoint.format.paths import Patterns
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.restoring.fetch import read_state
from dtr.errors import ChecksumMismatch, IntegrityError, InvalidInput, ManifestInvalid, StoreRefused
from dtr.store import open_store
from dtr.store.local import LocalStore
from tests import chunked

CHUNK = 1 << 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cut.__kwdefaults__, "chunk_bytes", CHUNK)


def file_of(state: Any) -> bytearray:
    return chunked.file_of(state, {"step": "1"})[0]


def spans(content: bytearray) -> list[tuple[tuple[int, int], ...]]:
    return cut(tensors.read_header(content, len(content)), chunk_bytes=CHUNK)


def hashes(state: Any) -> set[str]:
    content = file_of(state)
    return {digest_of([memoryview(content)[start : start + length] for start, length in ranges]) for ranges in spans(content)}


def state_of(seed: int = 0) -> dict[str, Any]:
    chooser = np.random.default_rng(seed)
    sizes = [CHUNK * 3 + 100, CHUNK, CHUNK // 2, 10, 0, 1000, CHUNK * 2 - 1, 7]
    return {f"t{n}": chooser.integers(0, 255, size, dtype=np.uint8) for n, size in enumerate(sizes)}


class TestCut:
    def test_every_byte_is_in_one_chunk(self) -> None:
        """The ranges fill the file behind its header, and no chunk is much larger than asked."""
        content = file_of(state_of())
        found = sorted(span for ranges in spans(content) for span in ranges)
        at = tensors.read_header(content, len(content)).data_start
        for start, length in found:
            assert start == at
            at += length
        assert at == len(content)
        assert all(sum(length for _, length in ranges) < CHUNK + CHUNK // 8 for ranges in spans(content))

    @pytest.mark.parametrize("name", ["t0", "t1", "t6"])
    def test_a_tensor_that_changes_changes_its_own_chunks(self, name: str) -> None:
        """One byte in the middle of a large tensor costs one chunk, wherever the others lie."""
        state = state_of()
        before = hashes(state)
        state[name] = state[name].copy()
        state[name][len(state[name]) // 2] ^= 1
        assert len(before - hashes(state)) == 1

    def test_a_tensor_that_grows_moves_no_other(self) -> None:
        """The other large tensors keep their chunks, though every offset behind it has changed."""
        state = state_of()
        before = hashes(state)
        state["t1"] = np.concatenate([state["t1"], state["t1"]])
        assert len(before - hashes(state)) <= 1

    def test_small_tensors_share_chunks(self) -> None:
        """Thousands of arrays of a few bytes make a few chunks, with few ranges where they are neighbours."""
        content = file_of({f"t{n}": np.full(50, n, np.float32) for n in range(2000)})
        found = spans(content)
        assert len(found) == -(-2000 * 200 // CHUNK)
        assert all(len(ranges) == 1 for ranges in found)

    def test_nothing_but_a_header(self) -> None:
        """A state without arrays has no chunks."""
        assert spans(file_of({"a": 1})) == []


def recipe_of(state: Any) -> tuple[Recipe, bytearray]:
    content = file_of(state)
    header = tensors.read_header(content, len(content))
    chunks = tuple(
        Chunk(hash=one.hash, nonce="0123456789abcdef", crc=one.crc, ranges=one.ranges) for one in hashed(memoryview(content), header)
    )
    recipe = Recipe(
        job="team/lm", run="0001-aaaa", step=7, rank=0, save="ab12", state_bytes=len(content), state_checksum=checksum.of(content),
        header=bytes(content[: header.data_start]), chunks=chunks,
    )  # fmt: skip
    return recipe, content


def put(store: LocalStore, recipe: Recipe, content: bytearray) -> PartFacts:
    """What an upload leaves in the store."""
    for chunk in recipe.chunks:
        store.put(chunk.key, b"".join(content[start : start + length] for start, length in chunk.ranges))
    encoded = recipe.encode()
    store.put("runs/r/1/part-x.chunks.json", encoded)
    return PartFacts(
        rank=0, worker="w", incarnation="0" * 12, object="runs/r/1/part-x.chunks.json", size_bytes=len(encoded),
        checksum=checksum.of(encoded), kind="chunks", state_bytes=len(content), state_checksum=recipe.state_checksum,
    )  # fmt: skip


class TestRecipe:
    def test_comes_back(self) -> None:
        """What was encoded is what is parsed."""
        recipe, _ = recipe_of(state_of())
        assert Recipe.parse(recipe.encode()) == recipe

    def test_a_person_puts_it_together(self, tmp_path: Path) -> None:
        """With nothing but JSON, base64 and the chunks, as README says."""
        import base64

        store = open_store(str(tmp_path))
        recipe, content = recipe_of(state_of())
        facts = put(store, recipe, content)
        record = json.loads((tmp_path / facts.object).read_bytes())
        whole = bytearray(record["state_bytes"])
        header = base64.b64decode(record["header"])
        whole[: len(header)] = header
        for chunk in record["chunks"]:
            data = (tmp_path / "chunks" / chunk["hash"][:2] / f"{chunk['hash']}-{chunk['nonce']}").read_bytes()
            for start, length in chunk["ranges"]:
                whole[start : start + length], data = data[:length], data[length:]
        assert whole == content

    def test_every_change_is_found(self) -> None:
        """A recipe that was cut or changed anywhere is refused."""
        content = recipe_of({"a": np.arange(100)})[0].encode()
        for at in range(0, len(content) - 1, 7):
            with pytest.raises(ManifestInvalid):
                Recipe.parse(content[:at])
            damaged = bytearray(content)
            damaged[at] ^= 4
            with pytest.raises(ManifestInvalid):
                Recipe.parse(bytes(damaged))

    @pytest.mark.parametrize(
        "change",
        [
            lambda r: r.update(version=2),
            lambda r: r.update(hash="md5"),
            lambda r: r.update(job="../x"),
            lambda r: r.update(step=-1),
            lambda r: r.update(state_bytes=10**15),
            lambda r: r.update(state_bytes=True),
            lambda r: r.update(header="!"),
            lambda r: r.update(chunks={}),
            lambda r: r.update(chunks=[]),
            lambda r: r.pop("save"),
            lambda r: r.update(more=1),
            lambda r: r.update(state_checksum="x"),
            lambda r: r["chunks"][0].update(hash="../../etc/passwd"),
            lambda r: r["chunks"][0].update(nonce="../x"),
            lambda r: r["chunks"][0].update(hash="A" * 64),
            lambda r: r["chunks"][0].update(nonce=""),
            lambda r: r["chunks"][0].update(crc=7),
            lambda r: r["chunks"][0].update(ranges=[]),
            lambda r: r["chunks"][0].update(ranges=[[0]]),
            lambda r: r["chunks"][0].update(ranges=[[0, -5]]),
            lambda r: r["chunks"][0].update(ranges=[[True, 5]]),
            lambda r: r["chunks"][0].update(ranges=7),
            lambda r: r["chunks"].append(r["chunks"][0]),
            lambda r: r["chunks"].pop(),
            lambda r: r["chunks"][0].pop("crc"),
            lambda r: r["chunks"].append(7),
        ],
    )
    def test_wrong_members_are_refused(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """A recipe that somebody forged with a right checksum: each wrong member is a ManifestInvalid, nothing else."""
        recipe, _ = recipe_of(state_of())
        record = json.loads(recipe.encode())
        del record["checksum"]
        change(record)
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        forged = json.dumps({**record, "checksum": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}).encode()
        with pytest.raises(ManifestInvalid):
            Recipe.parse(forged)

    def test_what_could_not_be_read_is_not_written(self) -> None:
        """A recipe with a gap cannot be made."""
        recipe, _ = recipe_of(state_of())
        with pytest.raises(InvalidInput, match="ranges"):
            replace(recipe, chunks=recipe.chunks[1:])


class TestReading:
    def test_any_range_is_the_files(self, tmp_path: Path) -> None:
        """Whole, by pieces, and across chunks that several small tensors share."""
        store = open_store(str(tmp_path))
        recipe, content = recipe_of(state_of())
        source = ChunkSource(store, put(store, recipe, content))
        source.check()
        whole = bytearray(source.state_bytes)
        source.read_into(whole)
        assert whole == content
        chooser = np.random.default_rng(3)
        for _ in range(100):
            low, high = sorted(chooser.integers(0, len(content) + 1, 2).tolist())
            piece = bytearray(high - low)
            source.read_into(piece, low)
            assert piece == content[low:high]
        with pytest.raises(InvalidInput, match="there is no range"):
            source.read_into(bytearray(10), len(content) - 9)
        source.close()

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    def test_damage_is_found_and_named(self, tmp_path: Path, damage: str) -> None:
        """A chunk that is flipped, cut or gone is an IntegrityError with its key; reading another range still works."""
        store = open_store(str(tmp_path))
        recipe, content = recipe_of(state_of())
        facts = put(store, recipe, content)
        victim = recipe.chunks[1]
        path = tmp_path / victim.key
        data = bytearray(path.read_bytes())
        if damage == "remove":
            path.unlink()
        else:
            data[5] ^= 1
            path.write_bytes(data if damage == "flip" else data[:-1])
        source = ChunkSource(store, facts)
        with pytest.raises(IntegrityError, match=victim.hash):
            source.verify()
        with pytest.raises(IntegrityError, match=victim.hash):
            source.read_into(bytearray(source.state_bytes))
        if damage != "flip":
            with pytest.raises(IntegrityError, match=victim.hash):
                source.check()
        ((start, length),) = recipe.chunks[0].ranges
        piece = bytearray(length)
        source.read_into(piece, start)
        assert piece == content[start : start + length]

    def test_the_header_costs_no_chunk(self, tmp_path: Path) -> None:
        """What only= selects is read though a chunk of something else is damaged, also one at the file's beginning."""
        store = open_store(str(tmp_path))
        recipe, content = recipe_of(state_of())
        facts = put(store, recipe, content)
        path = tmp_path / recipe.chunks[0].key
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        source = ChunkSource(store, facts)
        assert source.head() == content[: len(recipe.header)]
        found = read_state({0: source}, rank=0, world_size=1, only=Patterns.of("t7", "only"))
        assert np.array_equal(found["t7"], state_of()["t7"])
        with pytest.raises(IntegrityError, match=recipe.chunks[0].hash):
            read_state({0: source}, rank=0, world_size=1, only=Patterns.of("t0", "only"))

    def test_a_damaged_recipe(self, tmp_path: Path) -> None:
        """Of other bytes, of another length, of another part, or gone: each is an IntegrityError that names the object."""
        store = open_store(str(tmp_path))
        recipe, content = recipe_of(state_of())
        facts = put(store, recipe, content)
        for wrong in (
            replace(facts, size_bytes=facts.size_bytes + 1), replace(facts, checksum="crc64nvme:" + "0" * 16), replace(facts, rank=1),
            replace(facts, state_bytes=facts.state_bytes + 1), replace(facts, object="runs/r/1/part-y.chunks.json"),
        ):  # fmt: skip
            with pytest.raises(IntegrityError, match=wrong.object):
                ChunkSource(store, wrong).check()
        with pytest.raises(ChecksumMismatch):
            ChunkSource(store, replace(facts, checksum="crc64nvme:" + "0" * 16)).read_into(bytearray(1))


def test_a_reader_that_may_not_write(caplog: pytest.LogCaptureFixture) -> None:
    """It cannot put on record that a chunk is damaged, says so, and goes on to tell its caller what it found."""

    def put(key: str, data: bytes) -> None:
        raise StoreRefused(f"cannot write {key}")

    readonly: Any = SimpleNamespace(put=put)
    note_damage(readonly, f"chunks/ab/{'ab' * 32}-00000000")
    assert f"cannot write chunks/damaged/{'ab' * 32}-00000000" in caplog.text
