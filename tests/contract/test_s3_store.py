"""The store contract on a real S3 server, and what only a network or a service can break."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from dtr.errors import (
    AlreadyExists,
    IntegrityError,
    InvalidInput,
    StoreRefused,
    StoreUnavailable,
)
from dtr.store import Store, open_store, s3_requests
from dtr.store.pieces import piece_bytes
from tests.contract.store_contract import LARGE_BYTES, MANIFEST, Cancelled, StoreContract
from tests.proxy import Proxy
from tests.s3_faults import FaultyS3
from tests.servers import SeaweedServer, free_port

pytestmark = pytest.mark.usefixtures("s3_credentials")

MIB = 1 << 20


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, bucket: Store) -> Store:
        return bucket.child(secrets.token_hex(4))


def open_uploads(seaweed: SeaweedServer, prefix: str) -> list[str]:
    return [upload["Key"] for upload in seaweed.client().list_multipart_uploads(Bucket=seaweed.bucket, Prefix=prefix).get("Uploads", ())]


# --- what passes by itself ---


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "drop_reply"])
def test_plain_requests_are_sent_again(store: Store, faulty: FaultyS3, fault: str) -> None:
    """Two failures in a row of each idempotent request: it succeeds, and the failures were met."""
    store.put("k", b"old")
    steps: list[tuple[str, Callable[[], object], object]] = [
        ("PUT", lambda: store.put("k", b"content"), None),
        ("GET", lambda: store.get("k"), b"content"),
        ("HEAD", lambda: store.size("k"), 7),
        ("GET", lambda: list(store.list()), ["k"]),
        ("DELETE", lambda: store.delete("k"), None),
    ]
    for method, call, expected in steps:
        faulty.met.clear()
        faulty.plan(fault, times=2, method=method)
        assert call() == expected
        assert faulty.met == [fault, fault]


@pytest.mark.parametrize(("fault", "method"), [("503", "PUT"), ("500", "PUT"), ("reset", "PUT"), ("drop_reply", "PUT"), ("503", "POST")])
def test_a_large_upload_survives_bursts(store: Store, direct: Store, faulty: FaultyS3, large: Path, fault: str, method: str) -> None:
    """Failing parts are sent again, only they, and the object is whole."""
    faulty.requests.clear()
    faulty.plan(fault, times=3, method=method)
    store.put_file("part", large, LARGE_BYTES)
    assert direct.get("part") == large.read_bytes()
    assert faulty.met[-3:] == [fault] * 3
    assert faulty.count("partNumber=") <= 3 + 3
    assert direct.abort_uploads() == 0


def test_a_lost_upload_id_leaves_no_upload(
    store: Store, direct: Store, faulty: FaultyS3, seaweed: SeaweedServer, prefix: str, large: Path
) -> None:
    """The answer that named a new upload was lost, so there are two: the one that nobody knows does not stay open."""
    faulty.plan("drop_reply", method="POST", path="uploads")
    store.put_file("part", large, LARGE_BYTES)
    assert faulty.met == ["drop_reply"]
    assert open_uploads(seaweed, prefix) == []
    assert direct.size("part") == LARGE_BYTES


def test_a_cancel_is_heeded_between_attempts(store: Store, direct: Store, faulty: FaultyS3, large: Path) -> None:
    """While a service fails, a small and a large transfer ask the caller before each new attempt."""
    for size_bytes in (1000, LARGE_BYTES):
        faulty.plan("503", times=3, method="PUT")
        asked: list[int] = []

        def cancel(done: int, asked: list[int] = asked) -> None:
            asked.append(done)
            if faulty.met:
                raise Cancelled

        with pytest.raises(Cancelled):
            store.put_file("part", large, size_bytes, progress=cancel)
        assert asked
        faulty.forget()
    assert list(direct.list()) == []
    assert direct.abort_uploads() == 0


def test_a_hang_ends(store: Store, direct: Store, faulty: FaultyS3, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is never answered is given up after the timeout and sent again."""
    monkeypatch.setattr(s3_requests, "_READ_TIMEOUT_S", 2)
    store.close()  # the next client has that timeout
    faulty.plan("hang", method="PUT", path="partNumber=2")
    store.put_file("part", large, LARGE_BYTES)
    faulty.plan("hang", method="GET")
    assert store.get("part") == direct.get("part") == large.read_bytes()
    assert faulty.met == ["hang", "hang"]


def test_bytes_damaged_on_the_way_are_sent_again(store: Store, direct: Store, faulty: FaultyS3, large: Path) -> None:
    """The service compares our checksum with what arrived and refuses; the next send is right."""
    faulty.plan("damage", method="PUT", path="part?")
    store.put_file("part", large, LARGE_BYTES)
    faulty.plan("damage", method="PUT", path="small")
    store.put("small", b"content")
    assert faulty.met == ["damage", "damage"]
    assert direct.get("part") == large.read_bytes()
    assert direct.get("small") == b"content"


def test_bytes_always_damaged(store: Store, direct: Store, faulty: FaultyS3) -> None:
    """A path that damages every send: an integrity error, and nothing is stored."""
    faulty.plan("damage", times=99, method="PUT")
    with pytest.raises(IntegrityError, match="damaged on the way"):
        store.put("k", b"content")
    assert list(direct.list()) == []


def test_a_truncated_answer_is_read_again(store: Store, faulty: FaultyS3, large: Path) -> None:
    """An answer that ends early never passes for the object."""
    store.put_file("part", large, LARGE_BYTES)
    faulty.plan("truncate", times=2, method="GET")
    buffer = bytearray(LARGE_BYTES)
    assert store.read_into("part", buffer) == LARGE_BYTES
    assert buffer == large.read_bytes()
    faulty.plan("truncate", times=2, method="GET")
    assert store.get("part") == large.read_bytes()
    assert faulty.met == ["truncate"] * 4


def test_it_gives_up(store: Store, faulty: FaultyS3, caplog: pytest.LogCaptureFixture) -> None:
    """A service that stays busy: StoreUnavailable with the reason, each attempt logged before."""
    faulty.plan("503", times=99)
    with pytest.raises(StoreUnavailable, match="SlowDown") as caught:
        store.get("k")
    assert caught.value.status == 503
    assert sum("failed, again in" in record.message for record in caplog.records) == 4


def test_nobody_listens(seaweed: SeaweedServer, impatient: None) -> None:
    """A dead endpoint: StoreUnavailable, sure that nothing was done."""
    with pytest.raises(StoreUnavailable) as caught:
        open_store(seaweed.url("x", endpoint=f"http://127.0.0.1:{free_port()}")).put("k", b"")
    assert caught.value.unknown is False


def test_a_path_that_swallows_everything(seaweed: SeaweedServer, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is accepted and never answered ends by timeout, not never."""
    monkeypatch.setattr(s3_requests, "_READ_TIMEOUT_S", 0.2)
    with Proxy(seaweed.port) as proxy:
        proxy.set_mode("blackhole")
        with pytest.raises(StoreUnavailable, match="[Tt]imed out|[Tt]imeout"):
            open_store(seaweed.url("x", endpoint=f"http://127.0.0.1:{proxy.port}")).get("k")


# --- decisions ---


@pytest.mark.parametrize("fault", ["drop_reply", "500", "reset"])
def test_an_unknown_decision_is_not_sent_again(store: Store, direct: Store, faulty: FaultyS3, fault: str) -> None:
    """A conditional put whose answer was lost: StoreUnavailable with unknown=True after one send; the caller reads and compares."""
    faulty.requests.clear()
    faulty.plan(fault, method="PUT")
    with pytest.raises(StoreUnavailable) as caught:
        store.put(MANIFEST, b"commit", if_absent=True)
    assert caught.value.unknown is True
    assert faulty.count("PUT") == 1
    done = fault == "drop_reply"
    assert list(direct.list()) == ([MANIFEST] if done else [])
    if done:
        assert direct.get(MANIFEST) == b"commit"
        with pytest.raises(AlreadyExists):
            store.put(MANIFEST, b"commit", if_absent=True)
    else:
        store.put(MANIFEST, b"commit", if_absent=True)
    assert direct.get(MANIFEST) == b"commit"


@pytest.mark.parametrize("fault", ["503", "429"])
def test_a_throttled_decision_is_sent_again(store: Store, direct: Store, faulty: FaultyS3, fault: str) -> None:
    """A service that asked to slow down has done nothing."""
    faulty.plan(fault, times=3, method="PUT")
    store.put(MANIFEST, b"commit", if_absent=True)
    assert direct.get(MANIFEST) == b"commit"


def test_a_completion_whose_answer_was_lost(store: Store, direct: Store, faulty: FaultyS3, large: Path) -> None:
    """The object may be there: unknown, not aborted; the next attempt meets it and sends nothing."""
    faulty.plan("drop_reply", method="POST", path="uploadId")
    with pytest.raises(StoreUnavailable) as caught:
        store.put_file("part", large, LARGE_BYTES)
    assert caught.value.unknown is True
    assert direct.get("part") == large.read_bytes()
    faulty.requests.clear()
    with pytest.raises(AlreadyExists):
        store.put_file("part", large, LARGE_BYTES)
    assert faulty.count("partNumber=") == 0
    assert direct.abort_uploads() == 0


def test_a_completion_that_loses_is_aborted(store: Store, direct: Store, faulty: FaultyS3, large: Path) -> None:
    """Another writer was quicker while our parts went up: AlreadyExists, its bytes stay, no upload stays open."""
    seen: list[int] = []

    def be_quicker(done: int) -> None:
        if not seen:
            direct.put("part", b"quicker")
        seen.append(done)

    with pytest.raises(AlreadyExists):
        store.put_file("part", large, LARGE_BYTES, progress=be_quicker)
    assert direct.get("part") == b"quicker"
    assert direct.abort_uploads() == 0


@pytest.mark.parametrize(("method", "path"), [("PUT", "partNumber=2"), ("POST", "uploadId")])
def test_a_failed_upload_leaves_nothing(
    store: Store, seaweed: SeaweedServer, prefix: str, faulty: FaultyS3, large: Path, method: str, path: str
) -> None:
    """A part or the completion is refused: the error names the permission, and the upload is aborted."""
    faulty.plan("403", times=99, method=method, path=path)
    with pytest.raises(StoreRefused, match="s3:PutObject"):
        store.put_file("part", large, LARGE_BYTES)
    assert open_uploads(seaweed, prefix) == []


def test_orphans_are_found_and_aborted(store: Store, seaweed: SeaweedServer, prefix: str) -> None:
    """abort_uploads counts and ends the uploads under a key or folder, and only there, and only old ones if asked."""
    for key in ("a/1/part", "a/1/part-2", "a/10/part", "b"):
        seaweed.client().create_multipart_upload(Bucket=seaweed.bucket, Key=f"{prefix}/{key}")
    assert store.abort_uploads(older_than_s=3600) == 0
    assert store.abort_uploads("a/1/part") == 1
    assert store.abort_uploads("a/1") == 1
    assert store.child("a").abort_uploads() == 1
    assert open_uploads(seaweed, prefix) == [f"{prefix}/b"]
    assert store.abort_uploads() == 1
    assert store.abort_uploads() == 0


# --- sizes ---


@pytest.mark.parametrize("size_bytes", [0, 1, 16 * MIB, 9_000 * 16 * MIB, 9_000 * 16 * MIB + 1, 1 << 40, 5 << 40])
def test_parts_are_few_and_whole_mebibytes(size_bytes: int) -> None:
    """Never more than 9,000 pieces of 16 MiB or more."""
    size = piece_bytes(size_bytes)
    assert size >= 16 * MIB
    assert size % (1 << 20) == 0
    assert size * 9_000 >= size_bytes


def test_more_than_s3_can_hold(store: Store, large: Path) -> None:
    """An object over 5 TiB is refused before anything is sent."""
    with pytest.raises(InvalidInput, match="5 TiB"):
        store.put_file("k", large, (5 << 40) + 1)


def test_nothing_stays_behind(store: Store, large: Path) -> None:
    """Threads and connections of transfers end with them and with close()."""
    import contextlib
    import os
    import threading

    from tests.waiting import eventually

    def sockets() -> set[str]:
        found = set()
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/self/fd/{fd}"))
        return {name for name in found if name.startswith("socket:")}

    store.close()
    before = sockets()
    store.put_file("part", large, LARGE_BYTES)
    store.read_into("part", bytearray(LARGE_BYTES))
    store.close()
    # By name: the fixtures' own servers have threads too, which come and go with their connections.
    eventually(lambda: not [t.name for t in threading.enumerate() if t.name.startswith("dtr-")], what="the transfer's threads to end")
    # By themselves, not by their number: those of other tests' servers may end meanwhile, and other files be opened once for all.
    eventually(lambda: not sockets() - before, what="the connections to close")
