"""What every store must do; a backend's test class inherits ``StoreContract`` and gives the fixture ``store``: a new, empty one.

``ObjectContract`` is the part that a service without put-if-absent can keep as well.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from dtr.errors import AlreadyExists, InvalidInput, NotFound
from dtr.store import Store, open_store
from dtr.store.crc import crc_of
from dtr.store.resume import Resume, Sent

MANIFEST = "runs/0001-abcd/000000000005/manifest.json"
LARGE_BYTES = (40 << 20) + 12_345  # three parts on S3, more than one piece to read everywhere (the fixture `large` has them)

BAD_KEYS = [
    "", "/etc/passwd", "../up", "a/../b", "a/..", "./a", "a//b", "a/", "nul\0", "new\nline", "\x7f", "x" * 201, "/".join("abcde" * 200),
    "a/.dtr-tmp-1", ".dtr-probe-1", "\ud800", None, 7, b"bytes",
]  # fmt: skip


class Cancelled(Exception):
    """What a caller raises to stop a transfer."""


class ObjectContract:
    """Objects, files, ranges, listings and places. ``conditional``: what is stored here as a file is stored if absent."""

    conditional = True

    # --- objects ---

    @pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 5000, bytearray(b"array"), memoryview(b"view")])
    def test_what_was_put_is_what_is_got(self, store: Store, content: bytes) -> None:
        """Any bytes come back, and their size."""
        store.put("a/b", content)
        assert store.get("a/b") == content
        assert store.size("a/b") == len(content)

    @pytest.mark.parametrize("key", ["k", "a/b/c/d/e", "with space", "ünï/ç✓", "a=b&c+d%20?#", "..a", "a..b", "x" * 200])
    def test_plain_names_are_keys(self, store: Store, key: str) -> None:
        """A key is taken literally, whatever a URL or a shell would make of it."""
        store.put(key, b"1")
        assert store.get(key) == b"1"
        assert list(store.list()) == [key]

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys_are_refused_everywhere(self, store: Store, key: str, large: Path) -> None:
        """No verb takes a key that leaves the store or that a backend could not hold."""
        for verb in (
            lambda: store.put(key, b""),
            lambda: store.put_file(key, large, 1, if_absent=self.conditional),
            lambda: store.get(key),
            lambda: store.get_range(key, 0, 1),
            lambda: store.read_into(key, bytearray(1)),
            lambda: store.size(key),
            lambda: store.delete(key),
            lambda: store.child(key),
        ):
            with pytest.raises(InvalidInput):
                verb()
        assert list(store.list()) == []

    def test_put_replaces(self, store: Store) -> None:
        """Without a condition the last put wins."""
        store.put("k", b"a longer first")
        store.put("k", b"second")
        assert store.get("k") == b"second"

    def test_a_tag_tells_contents_of_one_size_apart(self, store: Store) -> None:
        """What was written anew with other bytes has another tag, what was not has the same, also for a client that opens later."""
        store.put("k", b"one")
        size_bytes, tag = store.stat("k")
        assert (size_bytes, tag) == (3, open_store(store.url).stat("k")[1])
        assert tag and tag == store.stat("k")[1]
        store.put("k", b"two")
        assert store.stat("k") == (3, store.stat("k")[1]) != (3, tag)

    def test_absent_objects_are_not_found(self, store: Store) -> None:
        """Reading what is not there is NotFound, in an empty store, beside an object and below one."""
        for _ in range(2):
            for key in ("absent", "folder/absent", "object/below"):
                for read in (
                    store.get,
                    store.size,
                    store.stat,
                    lambda k: store.get_range(k, 0, 1),
                    lambda k: store.read_into(k, bytearray(1)),
                ):
                    with pytest.raises(NotFound):
                        read(key)
            store.put("object", b"")
            store.put("folder/other", b"")

    def test_a_folder_is_no_object(self, store: Store) -> None:
        """The prefix of a key can neither be read nor deleted."""
        store.put("folder/object", b"1")
        with pytest.raises(NotFound):
            store.get("folder")
        with pytest.raises(NotFound):
            store.size("folder")
        store.delete("folder")
        assert store.get("folder/object") == b"1"

    def test_data_must_be_bytes(self, store: Store) -> None:
        """Text or a strided view is refused by name, nothing is stored."""
        for data in ("text", None, memoryview(b"abcdef")[::2]):
            with pytest.raises(InvalidInput, match="data"):
                store.put("k", data)  # type: ignore[arg-type]
        assert list(store.list()) == []

    def test_readers_see_old_or_new(self, store: Store) -> None:
        """While an object is replaced again and again, each read is one whole version."""
        versions = [bytes([n]) * 300_000 for n in range(4)]
        store.put("k", versions[0])
        over = threading.Event()

        def replace() -> None:
            for n in range(12):
                store.put("k", versions[n % 4])
            over.set()

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(replace)
            while not over.is_set() and not writer.done():
                assert store.get("k") in versions
            writer.result()

    # --- files ---

    @pytest.mark.parametrize("size_bytes", [0, 1, 5000, LARGE_BYTES])
    def test_put_file(self, store: Store, large: Path, size_bytes: int) -> None:
        """The named part of a file is stored, and progress ends with its size."""
        seen: list[int] = []
        store.put_file("part", large, size_bytes, if_absent=self.conditional, progress=seen.append)
        assert store.size("part") == size_bytes
        assert store.get("part") == large.read_bytes()[:size_bytes]
        assert seen == sorted(seen)
        assert seen[-1] == size_bytes

    def test_put_file_from_a_descriptor_and_offset(self, store: Store, large: Path) -> None:
        """A descriptor is read from the offset on, its position neither used nor moved, and it stays open."""
        with large.open("rb") as file:
            file.seek(7)
            store.put_file("part", file.fileno(), 20 << 20, if_absent=self.conditional, offset=4097)
            assert file.tell() == 7
            assert os.fstat(file.fileno()).st_size == LARGE_BYTES
        assert store.get("part") == large.read_bytes()[4097 : 4097 + (20 << 20)]

    def test_put_file_needs_the_bytes(self, store: Store, large: Path, tmp_path: Path) -> None:
        """More than the file has, a negative size, or no file: refused before anything is sent."""
        for source, size_bytes, offset in ((large, LARGE_BYTES + 1, 0), (large, LARGE_BYTES, 1), (large, -1, 0), (tmp_path / "no", 1, 0)):
            with pytest.raises(InvalidInput):
                store.put_file("part", source, size_bytes, if_absent=self.conditional, offset=offset)
        assert list(store.list()) == []

    @pytest.mark.parametrize("size_bytes", [3, LARGE_BYTES])
    def test_a_cancelled_transfer_leaves_nothing(self, store: Store, large: Path, size_bytes: int) -> None:
        """What progress raises comes out, and neither object nor upload nor temporary file stays."""

        def cancel(done: int) -> NoReturn:
            raise Cancelled(done)

        with pytest.raises(Cancelled):
            store.put_file("a/part", large, size_bytes, if_absent=self.conditional, progress=cancel)
        assert list(store.list()) == []
        assert store.abort_uploads() == 0
        store.put_file("a/part", large, size_bytes, if_absent=self.conditional)
        assert store.size("a/part") == size_bytes

    def test_an_oserror_of_progress_is_the_callers(self, store: Store, large: Path) -> None:
        """An OSError that the callback raises (its own disk, its own socket) is not taken for the store's."""

        def cancel(done: int) -> NoReturn:
            raise BlockingIOError("mine")

        with pytest.raises(BlockingIOError, match="mine"):
            store.put_file("part", large, LARGE_BYTES, if_absent=self.conditional, progress=cancel)

    # --- ranges ---

    @pytest.mark.parametrize(("start", "end"), [(0, 10), (3, 7), (0, 0), (5, 5), (9, 10), (8, 99), (10, 12), (99, 100), (10, 10)])
    def test_ranges_are_slices(self, store: Store, start: int, end: int) -> None:
        """A range is what slicing the object would give."""
        store.put("k", b"0123456789")
        assert store.get_range("k", start, end) == b"0123456789"[start:end]

    def test_ranges_of_an_empty_object(self, store: Store) -> None:
        """An empty object has only empty ranges."""
        store.put("k", b"")
        assert store.get_range("k", 0, 5) == b""
        assert store.read_into("k", bytearray(3)) == 0

    @pytest.mark.parametrize(("start", "end"), [(-1, 3), (5, 4), (-5, -2)])
    def test_backward_ranges_are_refused(self, store: Store, start: int, end: int) -> None:
        """Negative indices are not ranges here."""
        store.put("k", b"0123456789")
        with pytest.raises(InvalidInput):
            store.get_range("k", start, end)

    def test_read_into_fills_the_buffer(self, store: Store, large: Path) -> None:
        """The object's bytes land in the caller's memory; the count says how many there were."""
        content = large.read_bytes()
        store.put_file("part", large, LARGE_BYTES, if_absent=self.conditional)
        buffer = bytearray(LARGE_BYTES)
        assert store.read_into("part", memoryview(buffer)) == LARGE_BYTES
        assert buffer == content
        tail = bytearray(100)
        assert store.read_into("part", tail, LARGE_BYTES - 60) == 60
        assert tail == content[-60:] + bytes(40)
        assert store.read_into("part", tail, LARGE_BYTES + 5) == 0
        assert store.read_into("part", bytearray()) == 0

    # --- going on with what an interrupted call left ---

    def test_an_interrupted_put_file_is_gone_on_with(self, store: Store, large: Path) -> None:
        """Cancelled after its first piece: nothing is visible; the next call stores the right bytes, and nothing is left over.

        A store that cannot resume puts nothing on record and sends everything; one that can goes on, with every piece's checksum known.
        """
        record = Record()

        def cancel(done: int) -> None:
            if done >= 16 << 20:
                raise Cancelled

        with pytest.raises(Cancelled):
            store.put_file("a/part", large, LARGE_BYTES, if_absent=self.conditional, progress=cancel, resume=record)
        assert list(store.list()) == []
        before, seen = len(record.sent), []
        store.put_file("a/part", large, LARGE_BYTES, if_absent=self.conditional, progress=seen.append, resume=record)
        content = large.read_bytes()
        assert store.get("a/part") == content
        assert seen == sorted(seen)
        assert seen[-1] == LARGE_BYTES
        if record.upload:
            assert seen[0] >= min(before * (16 << 20), LARGE_BYTES) > 0
            cuts = range(0, LARGE_BYTES, 16 << 20)
            assert [record.sent[n].crc for n in sorted(record.sent)] == [crc_of(content[start : start + (16 << 20)]) for start in cuts]
        assert list(store.list()) == ["a/part"]
        assert store.abort_uploads() == 0

    # --- listing and deleting ---

    def test_list_is_recursive_and_sorted(self, store: Store) -> None:
        """Keys come in code point order, not folder by folder."""
        keys = ["A", "a-b", "a.b/c", "a/b-c", "a/b/c", "ab", "b/1/2-3", "b/1/2/3", "z", "ä"]
        for key in reversed(keys):
            store.put(key, b"")
        assert list(store.list()) == keys

    def test_list_takes_folders(self, store: Store) -> None:
        """A prefix is a whole folder: not the beginning of a name, and not an object."""
        for key in ("runs/1/a", "runs/1/b", "runs/10/c", "runs/x", "other/y"):
            store.put(key, b"")
        assert list(store.list("runs/1")) == list(store.list("runs/1/")) == ["runs/1/a", "runs/1/b"]
        assert list(store.list("runs/x")) == []
        assert list(store.list("absent/folder")) == []
        with pytest.raises(InvalidInput):
            list(store.list("../"))

    def test_list_of_many(self, store: Store) -> None:
        """More keys than one page of any service holds."""
        keys = [f"many/{n:05d}" for n in range(1_050)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b""), keys))
        assert list(store.list("many")) == keys

    def test_delete_is_idempotent(self, store: Store) -> None:
        """Deleting what is there or not succeeds; emptied folders are not listed and can be used again."""
        store.delete("never/was")
        store.put("a/b/c", b"1")
        store.delete("a/b/c")
        store.delete("a/b/c")
        assert list(store.list()) == []
        store.put("a/b", b"a name that was a folder")
        assert store.get("a/b") == b"a name that was a folder"

    # --- places ---

    def test_the_url_opens_the_same_store(self, store: Store) -> None:
        """Another process finds the objects by the URL, a child's as well."""
        child = store.child("runs/0001 ä")
        child.put("k", b"1")
        assert open_store(child.url).get("k") == b"1"
        assert open_store(child.url).url == child.url
        assert open_store(store.url).get("runs/0001 ä/k") == b"1"
        assert child.url in repr(child)

    def test_a_child_is_confined(self, store: Store) -> None:
        """A child lists only its own keys, relative to itself."""
        store.put("a/x", b"1")
        store.put("ab/y", b"2")
        child = store.child("a")
        child.put("new", b"3")
        assert list(child.list()) == ["new", "x"]
        assert child.child("b").url == store.child("a/b").url
        with pytest.raises(NotFound):
            child.get("y")
        assert list(store.list()) == ["a/new", "a/x", "ab/y"]

    def test_a_closed_store_opens_again(self, store: Store) -> None:
        """close() only lets idle connections go."""
        store.put("k", b"1")
        store.close()
        store.close()
        assert store.get("k") == b"1"

    def test_a_forked_child_can_use_it(self, store: Store) -> None:
        """A store that was used before a fork works in parent and child at once."""
        store.put("before", b"1")
        pid = os.fork()
        if pid == 0:
            try:
                for n in range(20):
                    store.put(f"child/{n}", store.get("before"))
                os._exit(0)
            finally:
                os._exit(1)
        for n in range(20):
            store.put(f"parent/{n}", store.get("before"))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(list(store.list())) == 41


class Record(Resume):
    """The record of a transfer, in memory."""

    def __init__(self) -> None:
        self.upload: str = ""
        self.sent: dict[int, Sent] = {}

    def begin(self, upload: str, there: Iterable[Sent] = ()) -> None:
        self.upload, self.sent = upload, {sent.number: sent for sent in there}

    def done(self, piece: Sent) -> None:
        self.sent[piece.number] = piece


class StoreContract(ObjectContract):
    """Inherit, give ``store``, and add what only your backend can break."""

    def test_put_if_absent_keeps_the_first(self, store: Store) -> None:
        """The second put-if-absent raises AlreadyExists and changes nothing, equal bytes or not."""
        store.put(MANIFEST, b"commit", if_absent=True)
        for data in (b"abort", b"commit"):
            with pytest.raises(AlreadyExists) as caught:
                store.put(MANIFEST, data, if_absent=True)
            assert (caught.value.key, caught.value.maybe_ours) == (MANIFEST, False)
        assert store.get(MANIFEST) == b"commit"

    def test_put_if_absent_after_delete(self, store: Store) -> None:
        """A deleted key is absent."""
        store.put("k", b"1", if_absent=True)
        store.delete("k")
        store.put("k", b"2", if_absent=True)
        assert store.get("k") == b"2"

    def test_exactly_one_of_many_wins(self, store: Store) -> None:
        """Of concurrent put-if-absents exactly one returns, and its bytes are there."""
        store.probe()
        start = threading.Barrier(8)

        def put(number: int) -> int | None:
            start.wait(30)
            try:
                store.put(MANIFEST, f"writer {number}".encode() * 1000, if_absent=True)
            except AlreadyExists:
                return None
            return number

        with ThreadPoolExecutor(8) as pool:
            winners = [number for number in pool.map(put, range(8)) if number is not None]
        assert len(winners) == 1
        assert store.get(MANIFEST) == f"writer {winners[0]}".encode() * 1000

    def test_probe_finds_it_and_leaves_nothing(self, store: Store) -> None:
        """A good store passes the probe, twice, and is as empty as before."""
        store.probe()
        store.probe()
        assert list(store.list()) == []

    @pytest.mark.parametrize("size_bytes", [3, LARGE_BYTES])
    def test_put_file_if_absent(self, store: Store, large: Path, size_bytes: int) -> None:
        """By default a file never replaces an object; on request it does."""
        store.put("part", b"first")
        with pytest.raises(AlreadyExists):
            store.put_file("part", large, size_bytes)
        assert store.get("part") == b"first"
        store.put_file("part", large, size_bytes, if_absent=False)
        assert store.size("part") == size_bytes
        assert store.abort_uploads() == 0
