"""The store contract on a real S3 server, and what only a network or a service can break."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtr.errors import AlreadyExists, ConditionalPutUnsupported, ConfigError, IntegrityError, InvalidInput, NotFound
from dtr.errors import StoreRefused, StoreUnavailable
from dtr.store import Store, open_store, s3_requests
from dtr.store.s3 import PART_BYTES, part_bytes
from tests.contract.store_contract import LARGE_BYTES, MANIFEST, StoreContract
from tests.proxy import Proxy
from tests.s3_faults import FaultyS3
from tests.servers import SeaweedServer, free_port

pytestmark = pytest.mark.usefixtures("s3_credentials")


@pytest.fixture(scope="module")
def bucket(seaweed: SeaweedServer) -> Iterator[Store]:
    """One store, and so one client, for the folders of all tests: a client takes 0.1 s to make."""
    store = open_store(seaweed.url("jobs"))
    yield store
    store.close()


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, bucket: Store) -> Store:
        return bucket.child(secrets.token_hex(4))


@pytest.fixture
def faulty(seaweed: SeaweedServer) -> Iterator[FaultyS3]:
    with FaultyS3(seaweed) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, so that a test of five attempts does not take half a minute."""
    monkeypatch.setattr(s3_requests, "_LONGEST_PAUSE_S", 0.02)


@pytest.fixture
def prefix() -> str:
    return f"jobs/{secrets.token_hex(4)}"


@pytest.fixture
def direct(bucket: Store, prefix: str) -> Store:
    """The same place as ``store``, past the proxy."""
    return bucket.child(prefix.removeprefix("jobs/"))


@pytest.fixture
def store(seaweed: SeaweedServer, faulty: FaultyS3, prefix: str, impatient: None) -> Iterator[Store]:
    """A store behind the proxy, which has already passed its probe."""
    store = open_store(seaweed.url(prefix, endpoint=faulty.endpoint))
    store.probe()
    yield store
    store.close()


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


# --- services that cannot do it ---


@pytest.mark.parametrize("fault", ["ignore_conditions", "no_conditions"])
def test_a_service_without_conditional_put_is_refused(
    seaweed: SeaweedServer, faulty: FaultyS3, prefix: str, large: Path, fault: str
) -> None:
    """Ignored or not implemented: probe, put and put_file say so instead of overwriting; nothing of the probe stays."""
    store = open_store(seaweed.url(prefix, endpoint=faulty.endpoint))
    faulty.plan(fault, times=99)
    store.put("k", b"first")
    for write in (store.probe, lambda: store.put("k", b"second", if_absent=True), lambda: store.put_file("k", large, LARGE_BYTES)):
        with pytest.raises(ConditionalPutUnsupported):
            write()
    assert store.get("k") == b"first"
    found = seaweed.client().list_objects_v2(Bucket=seaweed.bucket, Prefix=prefix)
    assert [entry["Key"] for entry in found["Contents"]] == [f"{prefix}/k"]


def test_a_probe_under_bad_conditions(seaweed: SeaweedServer, faulty: FaultyS3, prefix: str, impatient: None) -> None:
    """A busy moment or a lost answer does not make a good service look bad, and the answer is asked for once."""
    store = open_store(seaweed.url(prefix, endpoint=faulty.endpoint))
    for fault in ("500", "drop_reply"):
        faulty.plan(fault, method="PUT")
    store.probe()
    faulty.requests.clear()
    store.probe()
    store.child("a").probe()
    store.put("k", b"", if_absent=True)
    assert faulty.requests == [f"PUT /{seaweed.bucket}/{prefix}/k"]


def test_a_service_without_our_checksum(
    seaweed: SeaweedServer, faulty: FaultyS3, prefix: str, large: Path, direct: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """It is found by the probe: payloads are signed instead, small and large, and a warning says so once."""
    store = open_store(seaweed.url(prefix, endpoint=faulty.endpoint))
    faulty.plan("no_checksums", times=99)
    store.put("k", b"1", if_absent=True)
    store.put_file("part", large, LARGE_BYTES)
    assert direct.get("part") == large.read_bytes()
    assert direct.get("k") == b"1"
    assert sum("refuses CRC64NVME" in record.message for record in caplog.records) == 1


def test_checksums_can_be_turned_off(seaweed: SeaweedServer, prefix: str, large: Path, direct: Store) -> None:
    """checksum=none in the URL: no header of ours, also in the store's own URL."""
    store = open_store(seaweed.url(prefix) + "&checksum=none")
    store.put_file("part", large, LARGE_BYTES)
    assert direct.get("part") == large.read_bytes()
    assert "checksum=none" in store.url


def test_the_service_keeps_our_checksum(store: Store, seaweed: SeaweedServer, prefix: str, large: Path) -> None:
    """The CRC64NVME of the whole object is stored with it, combined from its parts, so that others can verify it."""
    import base64

    from awscrt.checksums import crc64nvme

    for size_bytes in (1000, LARGE_BYTES):
        store.put_file(f"part-{size_bytes}", large, size_bytes)
        found = seaweed.client().head_object(Bucket=seaweed.bucket, Key=f"{prefix}/part-{size_bytes}", ChecksumMode="ENABLED")
        expected = crc64nvme(large.read_bytes()[:size_bytes]).to_bytes(8, "big")
        assert found["ChecksumCRC64NVME"] == base64.b64encode(expected).decode()


# --- what somebody has to mend ---


def test_no_such_bucket(seaweed: SeaweedServer) -> None:
    """Each read of a bucket that does not exist says so, and not that an object is missing."""
    for read in (lambda s: s.get("k"), lambda s: s.size("k"), lambda s: list(s.list())):
        with pytest.raises(StoreRefused, match="no such bucket") as caught:
            read(open_store(seaweed.url("x").replace(seaweed.bucket, "absent-bucket")))
        assert not isinstance(caught.value, NotFound)


@pytest.mark.parametrize(
    ("verb", "method", "permission"),
    [
        (lambda s: s.put("k", b""), "PUT", "s3:PutObject"),
        (lambda s: s.get("k"), "GET", "s3:GetObject"),
        (lambda s: list(s.list()), "GET", "s3:ListBucket"),
        (lambda s: s.delete("k"), "DELETE", "s3:DeleteObject"),
        (lambda s: s.abort_uploads(), "GET", "s3:ListBucketMultipartUploads"),
    ],
)
def test_a_missing_permission_is_named(store: Store, faulty: FaultyS3, verb, method: str, permission: str) -> None:
    """Access denied is not retried, and says what to allow."""
    faulty.requests.clear()
    faulty.plan("403", times=99, method=method)
    with pytest.raises(StoreRefused, match=f"{permission} "):
        verb(store)
    assert len(faulty.requests) == 1


def test_wrong_credentials(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong secret, unknown key, none at all: three answers, none of which shows a secret."""
    cases = [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret-value"}, "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "unknown-key-value"}, "AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no usable credentials"),
    ]
    for environment, expected in cases:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.delenv(name) if value is None else patch.setenv(name, value)
            with pytest.raises(StoreRefused, match=expected) as caught:
                open_store(seaweed.url("x")).put("k", b"")
            for secret in (*filter(None, environment.values()), seaweed.secret_key):
                assert secret not in str(caught.value)


@pytest.mark.parametrize(("fault", "text"), [("expired", "have expired"), ("region", "another region")])
def test_expired_credentials_and_wrong_region(store: Store, faulty: FaultyS3, fault: str, text: str) -> None:
    """Both are refused with what to do."""
    faulty.plan(fault, times=99)
    with pytest.raises(StoreRefused, match=text):
        store.get("k")


def test_a_profile_that_does_not_exist(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What boto3 says about its own configuration is a ConfigError."""
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(ConfigError, match="no-such-profile"):
        open_store(seaweed.url("x")).get("k")


# --- sizes ---


@pytest.mark.parametrize("size_bytes", [0, 1, PART_BYTES, 9_000 * PART_BYTES, 9_000 * PART_BYTES + 1, 1 << 40, 5 << 40])
def test_parts_are_few_and_whole_mebibytes(size_bytes: int) -> None:
    """Never more than 9,000 parts of 16 MiB or more."""
    size = part_bytes(size_bytes)
    assert size >= PART_BYTES
    assert size % (1 << 20) == 0
    assert size * 9_000 >= size_bytes


def test_more_than_s3_can_hold(store: Store, large: Path) -> None:
    """An object over 5 TiB is refused before anything is sent."""
    with pytest.raises(InvalidInput, match="5 TiB"):
        store.put_file("k", large, (5 << 40) + 1)


def test_nothing_stays_behind(store: Store, large: Path) -> None:
    """Threads and connections of transfers end with them and with close()."""
    import os
    import threading

    from tests.waiting import eventually

    threads = threading.active_count()
    store.close()
    before = len(os.listdir("/proc/self/fd"))
    store.put_file("part", large, LARGE_BYTES)
    store.read_into("part", bytearray(LARGE_BYTES))
    store.close()
    eventually(lambda: threading.active_count() <= threads + 1, what="the transfer's threads to end")
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 1, what="the connections to close")
